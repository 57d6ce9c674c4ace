"""Damage to bytes, as disks, networks and editors do it."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.fuzz.places import replace


def flip_bit(rng: Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    replace(path, bytes(data))


def flip_bits(rng: Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(2, 64)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    replace(path, bytes(data))


def flip_head(rng: Random, path: Path) -> None:
    """Flip a bit in the first bytes, where formats store their header."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(min(len(data), 64))] ^= 1 << rng.randrange(8)
    replace(path, bytes(data))


def cut(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    replace(path, data[: rng.randrange(1, len(data))])


def cut_little(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    replace(path, data[: -rng.randrange(1, min(16, len(data)))])


def cut_front(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    replace(path, data[rng.randrange(1, len(data)) :])


def insert_junk(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    place = rng.randrange(len(data) + 1)
    replace(path, data[:place] + rng.randbytes(rng.randrange(1, 64)) + data[place:])


def append_junk(rng: Random, path: Path) -> None:
    replace(path, path.read_bytes() + rng.randbytes(rng.randrange(1, 64)))


def zeros(rng: Random, path: Path) -> None:
    """A block that was never written."""
    data = path.read_bytes()
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice([1, 16, 512, 4096]))
    replace(path, data[:start] + bytes(length) + data[start + length :])


def swap_blocks(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    size = max(1, len(data) // 8)
    first, second = sorted(rng.sample(range(8), 2))
    blocks = [data[i * size : (i + 1) * size] for i in range(8)] + [data[8 * size :]]
    blocks[first], blocks[second] = blocks[second], blocks[first]
    replace(path, b"".join(blocks))


def all_junk(rng: Random, path: Path) -> None:
    replace(path, rng.randbytes(len(path.read_bytes())))


DAMAGE = (
    flip_bit,
    flip_bits,
    flip_head,
    cut,
    cut_little,
    cut_front,
    insert_junk,
    append_junk,
    zeros,
    swap_blocks,
    all_junk,
)


def byte_order_mark(rng: Random, path: Path) -> None:
    replace(path, b"\xef\xbb\xbf" + path.read_bytes())


def carriage_returns(rng: Random, path: Path) -> None:
    replace(path, path.read_bytes().replace(b"\n", b"\r\n"))


def utf_16(rng: Random, path: Path) -> None:
    replace(path, path.read_text(encoding="utf-8").encode("utf-16"))


def not_utf_8(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    place = rng.randrange(len(data))
    replace(path, data[:place] + b"\xff\xfe\x80" + data[place:])


def nul(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    place = rng.randrange(len(data))
    replace(path, data[:place] + b"\0" + data[place:])


TEXT_SAME = (byte_order_mark, carriage_returns)
TEXT = (utf_16, not_utf_8, nul)
