"""JSON, JSON lines and YAML with one value replaced, one key renamed, doubled or gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.fuzz.places import replace

_HOLE = "\x00hole\x00"
# Values that no key can mean: refused, or without effect.
NONSENSE = {
    "an object": '{"a": 1}',
    "5000 digits": "1" * 5000,
    "deep nest": "[" * 100_000 + "]" * 100_000,
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "1e308": "1e308",
    "1e999": "1e999",
    "10^30": "1" + "0" * 30,
    "2^63": str(1 << 63),
    "NUL": '"a\\u0000b"',
    "lone surrogate": '"\\ud800"',
    "5000 letters": '"' + "a" * 5000 + '"',
    "a boolean": "true",
    "a list of lists": "[[1], [[2]]]",
}
# Values that some keys can mean: any result, but no traceback.
ODD = {
    "null": "null",
    "-1": "-1",
    "0": "0",
    "0.5": "0.5",
    "1e-300": "1e-300",
    "empty text": '""',
    "blanks": '"   "',
    "an empty list": "[]",
    "an empty object": "{}",
    "a list": "[1, 2]",
    "texts": '["a", "b"]',
    "a number as text": '"5"',
    "2^31": str(1 << 31),
    "up and away": '"../../../etc/passwd"',
    "a device": '"zero"',
    "line separators": '"a\\u2028b\\u0085c\\nd"',
    "other words": '"雪 \\ud83d\\ude00 %s {} $(true)"',
    "a folder": '"clips"',
    "another file": '"clips/ref.png"',
}


# Keys whose value is a text of the user's: any text is meant.
_TEXTS = ("prompt", "negative_prompt", "cap", "name")


def replace_with_nonsense(rng: Random, path: Path) -> bool:
    """Whether the file may mean it all the same."""
    raw = rng.choice(list(NONSENSE.values()))
    key, before = _replace_one(rng, path, raw)
    return (key in _TEXTS and raw[0] == '"') or (isinstance(before, bool) and raw == "true")


def replace_with_odd(rng: Random, path: Path) -> None:
    _replace_one(rng, path, rng.choice(list(ODD.values())))


def rename_key(rng: Random, path: Path) -> None:
    """A key with one letter more, less or changed."""

    def edit(owner: dict[str, Any], key: str) -> None:
        place = rng.randrange(max(1, len(key)))
        other = rng.choice(
            [key + "s", key[:place] + key[place + 1 :], key[:place] + "x" + key[place + 1 :], key.upper()]
        )
        items = [(other if name == key else name, value) for name, value in owner.items()]
        owner.clear()
        owner.update(items)

    _edit_key(rng, path, edit)


def drop_key(rng: Random, path: Path) -> None:
    _edit_key(rng, path, lambda owner, key: owner.pop(key))


def add_key(rng: Random, path: Path) -> None:
    _edit_key(
        rng, path, lambda owner, key: owner.update({rng.choice(["", "zz", "a.b", "\u2028", key + "2"]): 1})
    )


def double_key(rng: Random, path: Path) -> None:
    """The same key twice in one object, with another value the second time."""
    values, dump = _load(path)
    owners = [(owner, key) for owner, key, _ in _places(values) if isinstance(owner, dict)]
    owner, key = rng.choice(owners)
    raw = json.dumps(owner[key])
    owner[key] = _HOLE
    text = dump(values).replace(
        json.dumps(_HOLE), f"{raw}, {json.dumps(key)}: {rng.choice(['1', 'null', raw])}"
    )
    replace(path, text.encode("utf-8", "surrogatepass"))


def deep_document(rng: Random, path: Path) -> None:
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    replace(path, (opening * 100_000 + "1" + closing * 100_000).encode())


def wide_document(rng: Random, path: Path) -> None:
    replace(path, ("[" + "1," * 300_000 + "1]").encode())


def scalar_document(rng: Random, path: Path) -> None:
    replace(path, rng.choice([b"null", b"3", b'"text"', b"true", b"[]", b"{}", b"[null]", b"[[]]", b"\n\n"]))


def _replace_one(rng: Random, path: Path, raw: str) -> tuple[Any, Any]:
    """Replace one value by other JSON. Return its key (or the key of its list) and the old value."""
    values, dump = _load(path)
    owner, key, name = rng.choice(list(_places(values)))
    before, owner[key] = owner[key], _HOLE
    replace(path, dump(values).replace(json.dumps(_HOLE), raw).encode("utf-8"))
    return name, before


def _edit_key(rng: Random, path: Path, edit: Any) -> None:
    values, dump = _load(path)
    owner, key = rng.choice([(owner, key) for owner, key, _ in _places(values) if isinstance(owner, dict)])
    edit(owner, key)
    replace(path, dump(values).encode("utf-8"))


def _load(path: Path) -> tuple[Any, Any]:
    """The values of a file, and how they are written back.

    JSON is YAML, so that a YAML file is written as JSON.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [
            json.loads(line) for line in text.splitlines()
        ], lambda rows: "\n".join(map(json.dumps, rows)) + "\n"
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text), json.dumps


def _places(values: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every (container, key, nearest name) in it."""
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in list(items):
        called = key if isinstance(key, str) else name
        yield values, key, called
        yield from _places(value, called)


# Refused or equal; any result.
STRUCTURE_SAME = (replace_with_nonsense, rename_key, double_key, deep_document, wide_document)
STRUCTURE = (replace_with_odd, drop_key, add_key, scalar_document)
