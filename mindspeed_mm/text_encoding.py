"""Decodes the bytes of a file as UTF-8. The error for other bytes names their likely encoding."""

from __future__ import annotations

import codecs

from mindspeed_mm.errors import ConfigError, MindSpeedMMError

_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),  # before UTF-16, whose mark is a prefix of it
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# First byte: lowest and highest; second byte: lowest.
_COMMON_PAIRS = {
    "GBK": (0xB0, 0xD7, 0xA1),
    "Big5": (0xA4, 0xC6, 0x40),
}


def decode_text(data: bytes, where: str, error: type[MindSpeedMMError] = ConfigError) -> str:
    """Decode UTF-8 with or without a byte order mark.

    Raises `error` with the likely encoding and the offset of the first invalid byte.
    """
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    if encoding is None and b"\0" in data[:4096]:
        zeros = data[:4096].count(0)
        encoding = "UTF-16" if zeros >= len(data[:4096]) // 4 and data[:2].count(0) == 1 else ""
    if encoding:
        raise error(f"looks like {encoding}", where=where, expected="UTF-8", fix="save it as UTF-8")
    if encoding == "":
        raise error("got a binary file", where=where, expected="text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise error(
            f"got byte 0x{data[problem.start]:02x}, as in {_guess_encoding(data)}",
            where=f"{where}:{line}",
            expected="UTF-8",
            fix="save it as UTF-8",
        ) from None


def _guess_encoding(data: bytes) -> str:
    """Guess GBK, Big5 or a Western encoding.

    GBK and Big5 use two bytes per character, and the first byte shows whether the character is a common one.
    """
    shares = {name: _common_share(data[: 1 << 16], name, *bounds) for name, bounds in _COMMON_PAIRS.items()}
    best = max(shares, key=lambda name: shares[name])  # on a tie, the first one
    return best if shares[best] >= 0.7 else "Windows-1252 or Latin-1"


def _common_share(data: bytes, encoding: str, low: int, high: int, second: int) -> float:
    """Return the fraction of common characters among the non-ASCII ones; 0 for bytes in other encodings."""

    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data)  # the last character may be incomplete
    except UnicodeDecodeError:
        return 0.0
    pairs = [character.encode(encoding) for character in text if ord(character) > 127]
    common = [
        pair for pair in pairs if (low <= pair[0] <= high and pair[-1] >= second) or 0xA1 <= pair[0] <= 0xA3
    ]
    return len(common) / max(len(pairs), 1)


def split_lines(text: str) -> list[str]:
    r"""Split at `\n` and `\r\n` only, because U+2028, U+0085 and form feeds are part of a caption."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]
