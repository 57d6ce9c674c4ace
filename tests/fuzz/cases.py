"""Which damage fits which file, and a seeded choice among all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import damage, places, structure, tensors
from tests.fuzz.entries import ENTRIES, expand
from tests.fuzz.flags import FLAGS

Mutator = Callable[[Random, Path], bool | None]
ARGV = "argv"
REGRESSIONS = Path(__file__).with_name("regressions.json")
# Flags are tried where nothing is computed: a long run that a flag means is no fault.
_FLAG_ENTRIES = (
    "check training",
    "check clips",
    "check generation",
    "hf_to_mm",
    "inspect rows",
    "plan",
    "import",
)


@dataclass(frozen=True)
class Case:
    """One damaged input.

    A command, the file (or the command line) that is damaged, how, and the seed of the damage.
    """

    entry: str
    target: str
    mutator: str
    seed: int

    def __str__(self) -> str:
        return json.dumps([self.entry, self.target, self.mutator, self.seed])


def all_triples(root: Path) -> list[tuple[str, str, str]]:
    """Every (entry, target, mutator) that fits."""
    found = [
        (name, path, mutator)
        for name, entry in ENTRIES.items()
        for path in expand(entry, root)
        for mutator in fitting(path)
    ]
    return found + [
        (name, ARGV, mutator.__name__) for name in _FLAG_ENTRIES for mutator in FLAGS for _ in range(6)
    ]


def draw(root: Path, count: int, seed: int, *, only: Sequence[str] = ()) -> Iterator[Case]:
    """`count` cases: files and commands take turns, so that a few hundred touch every kind.

    `only`: names of entries; none means all.
    """
    rng = Random(seed)
    by_target: dict[tuple[str, str], list[str]] = {}
    for entry, target, mutator in all_triples(root):
        if not only or entry in only:
            by_target.setdefault((entry, target), []).append(mutator)
    for mutators in by_target.values():
        rng.shuffle(mutators)
    left: list[tuple[str, str]] = []
    for number in range(count):
        if not left:
            left = list(by_target)
            rng.shuffle(left)
        entry, target = left.pop()
        mutators = by_target[entry, target]
        mutators.append(mutators.pop(0))
        yield Case(entry, target, mutators[-1], rng.randrange(1 << 31) if number else 0)


def regressions() -> list[Case]:
    """Cases that failed once, of the commands that can be run here."""
    return [Case(*values) for values in json.loads(REGRESSIONS.read_text()) if values[0] in ENTRIES]


def _names(mutators: Any) -> list[str]:
    return [mutator.__name__ for mutator in mutators]


_CRC = (".pth", ".pt", ".distcp")
_JSON = (".json", ".jsonl", ".yaml")
_TEXT = (*_JSON, ".txt", ".csv")


def fitting(path: str) -> list[str]:
    """Names of the mutators for a file."""
    suffix = Path(path).suffix
    found = _names(places.PLACES + damage.DAMAGE)
    if suffix in _TEXT:
        found += _names(damage.TEXT_SAME + damage.TEXT)
    if suffix in _JSON:
        found += _names(structure.STRUCTURE_SAME + structure.STRUCTURE) * 3  # these are what people get wrong
        found += _names([structure.replace_with_nonsense, structure.replace_with_odd]) * 4
    if suffix == ".safetensors":
        found += _names(
            tensors.SAFETENSORS + tensors.VALUES + (tensors.header_value, tensors.header_metadata)
        )
    if suffix in (".pth", ".pt"):
        found += _names(tensors.TORCH_FILE + tensors.VALUES + (tensors.pickle_ops,) * 3)
    if path.endswith(".metadata"):
        found += _names(tensors.PICKLE + (tensors.pickle_ops,) * 8)
    return found


def mutator_of(name: str) -> Mutator:
    """The function of that name."""
    for module in (places, damage, structure, tensors):
        if hasattr(module, name):
            found: Mutator = getattr(module, name)
            return found
    raise KeyError(name)


def may_differ(case: Case) -> bool:
    """Whether a result other than the sound file's can be what the damaged file says.

    Else: refused, or the same result.
    """
    if case.target == ARGV:
        return case.mutator != "flag_unknown"
    suffix, mutator = Path(case.target).suffix, case.mutator
    foreign = "weights/config.json" in case.target or "/umt5-xxl/" in case.target or "/mp_rank" in case.target
    foreign |= case.target.startswith(("rounded/", "loras/", "videos/"))
    others = ("weights/", "shards/", "loras/", "rounded/")  # files that carry no checksums of ours
    if "/kohya" in case.target and mutator == "tensor_gone":
        return True  # an alpha: without one, the scale is 1
    if mutator in _names(damage.DAMAGE):
        if mutator in ("cut", "cut_little", "cut_front"):
            return suffix in _TEXT or suffix == ".mp4"
        return suffix in (*_TEXT, ".mp4") or (
            suffix in (".safetensors", ".gguf") and case.target.startswith(others)
        )
    if mutator in _names(structure.STRUCTURE_SAME):
        return foreign
    return mutator in (*_names(structure.STRUCTURE), "legacy") or (foreign and mutator == "web_page")
