"""A training run as the planner sees it, and its FSDP units with their sizes. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from mindspeed_mm.models.wan.config import ADAPTED, BRANCH, FP32_MODULES, VaceConfig
from mindspeed_mm.models.wan.shapes import Shape, layout

ROUNDED = tuple(f".{layer}.weight" for layer in ADAPTED)  # layers that are quantized to 8 bits by default


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The parameters that determine the memory of one device."""

    model: VaceConfig
    grid: tuple[int, int, int]  # latent (R+F, h, w)
    trainable: str = "branch"
    lora: Mapping[str, int] = field(default_factory=dict)  # layer → rank; all else is frozen then
    quantized: frozenset[str] | None = (
        None  # linear layers in 8 bits; None: none, empty: all frozen ones of the blocks
    )
    text: int | None = None  # rows of a prompt; None: the maximum
    batch: int = 1  # samples of a micro-batch
    micro_batches: int = 1
    ranks: int = 1
    stages: tuple[int, ...] = ()  # trunk blocks of each pipeline stage; (): no pipeline
    pipeline: int = 1  # ranks of a pipeline; stage v * pipeline + p is on rank p
    gpipe: bool = False  # all forwards first, instead of 1F1B
    shards: int = 1  # ranks that share one copy of the weights of a rank's stages
    context_parallel: int = 1
    ulysses: int | None = None  # of these, ranks that divide the heads, with rings between them; None: all
    product: int = 2  # bytes of a product's dtype
    residual: int = 4
    reduce: int = 4  # bytes of the dtype in which gradients are summed
    recompute: Mapping[str, str] = field(default_factory=dict)  # module → full or selective
    optimizer: str = "adam"
    fused: bool = True
    reshard: bool = True
    prefetch: int = 0  # units gathered ahead in backward
    offload: bool = False
    offload_inputs: bool = False
    on_cpu: bool = False  # a CPU computes equal caption rows once and needs no slack

    @property
    def replicas(self) -> int:
        """Ranks with the same stages: data times context parallel size."""
        return self.ranks // self.pipeline


@dataclass(frozen=True)
class Unit:
    """An FSDP unit: a block, or another child of the root."""

    name: str
    whole: float  # elements on all ranks together
    local: float  # elements on one rank
    trained: float  # elements of `whole` that train
    trained_local: float
    width: int  # bytes of a product's dtype
    rounded: float = 0.0  # elements of `whole` in 8 bits
    rounded_local: float = 0.0
    scales: float = 0.0  # bytes that are not sharded
    expanded: float = 0.0  # bytes of the largest 8-bit weight in the dtype of its product

    @property
    def bytes(self) -> float:
        """Bytes of all its weights after a gather."""
        return (self.whole - self.rounded) * self.width + self.rounded

    @property
    def frozen_local(self) -> float:
        """Bytes of frozen weights on one rank."""
        return (
            (self.local - self.trained_local - self.rounded_local) * self.width
            + self.rounded_local
            + self.scales
        )

    @property
    def is_trainable(self) -> bool:
        """Whether any of its weights is trainable."""
        return self.trained > 0


def all_shapes(run: TrainingRun) -> Mapping[str, Shape]:
    """Map all weights of the model and its LoRA to their shapes."""
    return _all_shapes(run.model, tuple(run.lora.items()))


@lru_cache(maxsize=8)
def _all_shapes(model: VaceConfig, lora: tuple[tuple[str, int], ...]) -> Mapping[str, Shape]:
    shapes = layout(model)
    for name, rank in lora:
        rows, columns = shapes[f"{name}.weight"]
        shapes |= {f"{name}.lora_A.weight": (rank, columns), f"{name}.lora_B.weight": (rows, rank)}
    return shapes


def unit_of(name: str) -> str:
    """Return the unit that a weight belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("blocks", "vace_blocks") else parts[0]


def is_trainable(run: TrainingRun, name: str) -> bool:
    """Return whether a weight is trainable."""
    return _is_trainable(name, run.trainable, bool(run.lora))


def _is_trainable(name: str, trainable: str, has_lora: bool) -> bool:
    if has_lora:
        return ".lora_" in name
    return trainable == "all" or name.startswith(BRANCH) == (trainable == "branch")


def local_size(shape: Shape, shards: int) -> int:
    """Return the number of elements on one rank. FSDP2 splits the first axis, with padding."""
    return -(-shape[0] // shards) * math.prod(shape[1:])


def units(run: TrainingRun) -> Sequence[Unit]:
    """Return all units of the model."""
    lora = tuple(run.lora.items())
    return _units(run.model, lora, run.trainable, run.shards, run.product, quantized_weights(run))


def quantized_weights(run: TrainingRun) -> frozenset[str]:
    """Return the names of the 8-bit weights."""
    if run.quantized is None:
        return frozenset()
    named = {f"{layer}.weight" for layer in run.quantized}
    return frozenset(
        name
        for name in layout(run.model)
        if not is_trainable(run, name) and (name in named if named else name.endswith(ROUNDED))
    )


@lru_cache(maxsize=32)
def _units(
    model: VaceConfig,
    lora: tuple[tuple[str, int], ...],
    trainable: str,
    shards: int,
    product: int,
    quantized: frozenset[str],
) -> Sequence[Unit]:
    sizes: dict[str, list[int]] = {}
    for name, shape in _all_shapes(model, lora).items():
        key = unit_of(name)
        whole, local, has = (
            math.prod(shape),
            local_size(shape, shards),
            _is_trainable(name, trainable, bool(lora)),
        )
        found = sizes.setdefault(key, [0] * 8)
        is_rounded = name in quantized
        counts = (whole, local, whole * has, local * has, whole * is_rounded, local * is_rounded)
        for index, size in enumerate((*counts, 4 * shape[0] * is_rounded)):
            found[index] += size
        found[7] = max(found[7], whole * is_rounded * product)
    return [
        Unit(
            name=key,
            whole=whole,
            local=local,
            trained=trained,
            trained_local=trained_local,
            width=4 if key in FP32_MODULES else product,
            rounded=rounded,
            rounded_local=rounded_local,
            scales=scales,
            expanded=expanded,
        )
        for key, (
            whole,
            local,
            trained,
            trained_local,
            rounded,
            rounded_local,
            scales,
            expanded,
        ) in sizes.items()
    ]
