"""A LoRA in memory: its updates by official weight name, and how to merge them into a base."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.source import WeightsSource


@dataclass(frozen=True)
class Pair:
    """One low-rank update: W + scale · up · down."""

    down: TensorFile  # [rank, in]; for a convolution [rank, in, ...]
    up: TensorFile  # [out, rank] or [out, rank, 1, ...]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The alpha that most dialects store: scale · rank."""
        return self.scale * self.rank

    def product(self) -> Tensor:
        """Return scale · up · down in fp32, flattened to [out, rest]."""
        product = self.up.read().float().flatten(1) @ self.down.read().float().flatten(1)
        return product.mul_(self.scale)


@dataclass(frozen=True)
class Adapter:
    """A LoRA file. All names are official weight names, such as `blocks.0.self_attn.q.weight`."""

    path: Path
    dialect: str
    pairs: Mapping[str, Pair] = field(repr=False)
    diffs: Mapping[str, TensorFile] = field(default_factory=dict, repr=False)  # added to a weight as stored
    whole: Mapping[str, TensorFile] = field(default_factory=dict, repr=False)  # replace a weight
    base: str | None = None  # path of the base, if the checkpoint records one

    @property
    def names(self) -> list[str]:
        """Sorted names of the weights that the LoRA changes."""
        return sorted({*self.pairs, *self.diffs, *self.whole})

    def misfits(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Return the updates that match no weight in `shapes` or have the wrong shape."""
        found = [f"{name} is not a weight of the model" for name in self.names if name not in shapes]
        for name, pair in self.pairs.items():
            size = [pair.up.shape[0], math.prod(pair.down.shape[1:])]
            if name in shapes and size != [shapes[name][0], math.prod(shapes[name][1:])]:
                found.append(f"{name} {size} for {list(shapes[name])}")
        for name, tensor in {**self.diffs, **self.whole}.items():
            if name in shapes and tensor.shape.numel() != math.prod(shapes[name]):
                found.append(f"{name} {list(tensor.shape)} for {list(shapes[name])}")
        return found

    def fingerprint(self) -> str:
        """Hash names, shapes, dtypes, scales and the first 64 KiB of each tensor, but not the path."""
        digest = hashlib.sha256()
        for name in self.names:
            pair = self.pairs.get(name)
            digest.update(f"{name} {pair.scale if pair else 1:.9g}\n".encode())
            found = {"down": pair.down, "up": pair.up} if pair else {}
            found |= {
                kind: of[name] for kind, of in (("diff", self.diffs), ("whole", self.whole)) if name in of
            }
            for kind, tensor in found.items():
                digest.update(f"{kind} {list(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.head_bytes())
        return digest.hexdigest()

    @property
    def count(self) -> int:
        """The number of tensors, not counting alphas."""
        return 2 * len(self.pairs) + len(self.diffs) + len(self.whole)

    @property
    def description(self) -> str:
        """One-line summary: dialect, ranks, scales and the number of weights in each part."""
        ranks = _span([pair.rank for pair in self.pairs.values()])
        scales = _span([pair.scale for pair in self.pairs.values()])
        branch = sum(name.startswith("vace_") for name in self.names)
        parts = f"{len(self.names) - branch} weights of the trunk and {branch} of the branch"
        more = "".join(
            f", {len(found)} {what}"
            for found, what in ((self.diffs, "differences"), (self.whole, "whole weights"))
            if found
        )
        return f"{self.path}: LoRA, {self.dialect} names, rank {ranks}, scale {scales}, {parts}{more}"


def merged(source: WeightsSource, loras: Sequence[tuple[Adapter, float]]) -> WeightsSource:
    """Return `source` plus every LoRA times its strength. Each weight is merged when it is read.

    Sums in fp32 and rounds once to the base's dtype. Raises WeightsError if a LoRA changes a weight that
    `source` lacks. Reading a weight raises WeightsError if its update is not finite.
    """
    parts: dict[str, list[tuple[Adapter, float]]] = {}
    for adapter, strength in loras:
        for name in adapter.names if strength else ():
            parts.setdefault(name, []).append((adapter, strength))
    tensors = dict(source.tensors)
    for name, found in parts.items():
        if name not in tensors:
            raise WeightsError(
                f"changes {name}, which is not in {source.path}",
                where=found[0][0].path,
                fix="set the base: --cfg.base_path (mm-convert), predictor.from_pretrained (training)",
            )
        base = tensors[name]
        tensors[name] = TensorFile(base.shape, base.dtype, partial(_sum, name, base, found))
    said = ", ".join(f"{adapter.path.name} × {strength:g}" for adapter, strength in loras)
    return replace(source, what=f"{source.what}, merged with {said}", tensors=tensors)


def _sum(name: str, base: TensorFile, loras: Sequence[tuple[Adapter, float]]) -> Tensor:
    weight = base.read().float()
    total = torch.zeros_like(weight)
    for adapter, strength in loras:
        if name in adapter.whole:
            total += strength * (adapter.whole[name].read().float() - weight)
        if name in adapter.diffs:
            total += strength * adapter.diffs[name].read().float().view(weight.shape)
        if name in adapter.pairs:
            # In place, because the product is large.
            total += adapter.pairs[name].product().mul_(strength).view(weight.shape)
        if not bool(torch.isfinite(total).all()):
            raise WeightsError(
                f"its update of {name} is NaN or infinite", where=adapter.path, fix="use another file or save"
            )
    return total.add_(weight).to(base.dtype)


def _span(values: Sequence[float]) -> str:
    found = sorted(set(values))
    return "none" if not found else f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"
