"""Command lines with a value, a name or a flag that nobody wrote on purpose."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from random import Random

Words = list[str]
_VALUES = [
    *(
        "",
        " ",
        "-1",
        "0",
        "0.5",
        "1e308",
        "1e999",
        "nan",
        "inf",
        "true",
        "null",
        "[1,2]",
        "{}",
        "1,2",
        "a",
        "0x10",
        "08",
    ),
    *(
        "2147483648",
        "9223372036854775808",
        "9" * 30,
        "9" * 5000,
        "a" * 5000,
        "[" * 5000,
        "\udcff",
        "雪",
        "a\u2028b",
        "%s",
    ),
    *("../..", "zero", "clips", "clips/ref.png", "nowhere/at/all", "-", "--", "=", "$(true)"),
]
_ENVIRONMENT = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MINDSPEED_MM_DEVICE"]


def flag_value(rng: Random, words: Words, known: Sequence[str]) -> Words:
    """Another value of a flag that is given, or of one that is not."""
    place = rng.randrange(len(words))
    name, equals, _ = words[place].partition("=")
    if equals and rng.random() < 0.4:
        return [*words[:place], f"{name}={rng.choice(_VALUES)}", *words[place + 1 :]]
    return [*words, f"{rng.choice(known)}={rng.choice(_VALUES)}"]


def flag_bare(rng: Random, words: Words, known: Sequence[str]) -> Words:
    """A flag at the end, without a value."""
    return [*words, rng.choice(known)]


def flag_unknown(rng: Random, words: Words, known: Sequence[str]) -> Words:
    name = rng.choice(known)
    return [
        *words,
        rng.choice([name + "x", name[:-1] + "_", "--", "-", "--=3", "-q", "--\udcff", "word", name.upper()]),
    ]


def flag_gone(rng: Random, words: Words, known: Sequence[str]) -> Words:
    place = rng.randrange(len(words))
    return words[:place] + words[place + 1 :]


def environment(rng: Random, words: Words, known: Sequence[str]) -> Words:
    """A variable of torchrun's that holds no number."""
    os.environ[rng.choice(_ENVIRONMENT)] = rng.choice(["", "a", "-1", "1.5", "9" * 30, "0x1", "１"])
    return words


FlagMutator = Callable[[Random, Words, Sequence[str]], Words]
FLAGS: tuple[FlagMutator, ...] = (flag_value, flag_bare, flag_unknown, flag_gone, environment)
