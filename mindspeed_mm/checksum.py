"""CRC-32, the checksum of everything that is written here.

ISA-L's where it is installed, which is faster than zlib's.
"""

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this processor
    from zlib import crc32

__all__ = ["crc32"]
