"""Pipeline stages of an MM checkpoint: which stage holds which weight under which name, and the inverse.

Stages take trunk layers in order and number them from 0. Branch block j is on the stage of the trunk layer
`vace_layers[j]` that it feeds, also numbered from 0. Weights before the blocks are on the first stage, the
head is on the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from mindspeed_mm.errors import ConfigError, WeightsError

T = TypeVar("T")
Layers = Sequence[int] | Sequence[Sequence[int]]  # one size per stage; or one such list per virtual chunk
_BLOCK = re.compile(r"(blocks|vace_blocks)\.(\d+)\.(.+)")


def flat_layers(pp_layers: Layers) -> tuple[list[int], int]:
    """Return the sizes of the flat stages, and the number of virtual chunks per rank.

    Raises ConfigError if the lists differ in length.
    """
    chunks = [list(chunk) for chunk in pp_layers if not isinstance(chunk, int)]
    if not chunks:
        return [size for size in pp_layers if isinstance(size, int)], 1
    if len({len(chunk) for chunk in chunks}) != 1 or len(chunks) != len(pp_layers):
        raise ConfigError(
            f"got {[list(c) for c in chunks]}",
            where="pp_layers",
            expected="one size for each stage in every virtual chunk",
        )
    return [size for chunk in chunks for size in chunk], len(chunks)


def even_layers(num_layers: int, count: int) -> list[int]:
    """Divide `num_layers` over `count` stages, longer stages first."""
    short, longer = divmod(num_layers, count)
    return [short + (number < longer) for number in range(count)]


def stage_layers(sizes: object, num_layers: int, count: int, where: str) -> list[int]:
    """Convert `pipeline_num_layers` of a model JSON to sizes of `count` flat stages. Raises ConfigError."""
    lists: Any = sizes if isinstance(sizes, list | tuple) else [None]
    parts = [item for part in lists for item in (part if isinstance(part, list | tuple) else [part])]
    if not parts or not all(type(item) is int for item in parts):
        raise ConfigError(
            f"got {sizes!r:.60}", where=where, expected="a list of numbers, such as [10, 10, 10, 10]"
        )
    try:
        layers, _ = flat_layers(lists)
        check_layers(layers, num_layers)
    except ConfigError as error:
        raise error.at(where) from None
    if len(layers) != count:
        raise ConfigError(
            f"{layers} are {len(layers)} stages, the flags give {count}",
            where=where,
            fix="make them agree, or remove the key for even stages",
        )
    return layers


def count_layers(names: Iterable[str]) -> int:
    """Return the number of trunk blocks in one stage with the weights `names`."""
    return len({match[2] for name in names if (match := _BLOCK.fullmatch(name)) and match[1] == "blocks"})


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raise ConfigError unless every stage has at least one layer and the sizes sum to `num_layers`."""
    if not layers or any(size < 1 for size in layers):
        raise ConfigError(
            f"got {list(layers)}", where="pp_layers", expected="at least one layer in each stage"
        )
    if sum(layers) != num_layers:
        raise ConfigError(
            f"{list(layers)} sum to {sum(layers)}, but the model has {num_layers} layers",
            where="pp_layers",
            fix="make them agree",
        )


def place(name: str, layers: Sequence[int], vace_layers: Sequence[int]) -> tuple[int, str]:
    """Return the flat stage of an official name, and its name there, with blocks numbered from 0."""
    if match := _BLOCK.fullmatch(name):
        stem, index, rest = match[1], int(match[2]), match[3]
        trunk_layer = index if stem == "blocks" else vace_layers[index]
        stage = _stage_of(trunk_layer, layers)
        first = sum(layers[:stage])
        before = first if stem == "blocks" else sum(layer < first for layer in vace_layers)
        return stage, f"{stem}.{index - before}.{rest}"
    return (len(layers) - 1 if name.startswith("head.") else 0), name


def split(weights: Mapping[str, T], layers: Sequence[int], vace_layers: Sequence[int]) -> list[dict[str, T]]:
    """Split one model into its flat stages. Each weight goes to exactly one stage.

    Raises WeightsError if two weights get the same name.
    """
    stages: list[dict[str, T]] = [{} for _ in layers]
    for name, weight in weights.items():
        stage, local = place(name, layers, vace_layers)
        if local in stages[stage]:
            raise WeightsError(f"{name} and another weight are both called {local}", where=f"stage {stage}")
        stages[stage][local] = weight
    return stages


def merge(stages: Sequence[Mapping[str, T]]) -> dict[str, T]:
    """Merge flat stages, in order, into one model: the inverse of `split`.

    Raises WeightsError if a weight is on two stages.
    """
    weights: dict[str, T] = {}
    offset = {"blocks": 0, "vace_blocks": 0}
    for number, stage in enumerate(stages):
        for local, weight in stage.items():
            match = _BLOCK.fullmatch(local)
            name = f"{match[1]}.{int(match[2]) + offset[match[1]]}.{match[3]}" if match else local
            if name in weights:
                raise WeightsError(
                    f"{name} is on an earlier stage, too",
                    where=f"stage {number}",
                    fix="convert the checkpoint again",
                )
            weights[name] = weight
        for stem in offset:
            offset[stem] += len({m[2] for name in stage if (m := _BLOCK.fullmatch(name)) and m[1] == stem})
    return weights


def _stage_of(layer: int, layers: Sequence[int]) -> int:
    for stage, size in enumerate(layers):
        if layer < size:
            return stage
        layer -= size
    raise WeightsError(f"no stage of {list(layers)} holds layer {layer + sum(layers)}", where="pp_layers")
