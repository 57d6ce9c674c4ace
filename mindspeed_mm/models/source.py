"""Lazily read weights of a model under the official names, and initialization of a branch from a trunk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.dialects import truncate_list
from mindspeed_mm.models.wan.config import BRANCH, VaceConfig
from mindspeed_mm.models.wan.config_json import setting_conflicts
from mindspeed_mm.models.wan.shapes import Shape, layout
from mindspeed_mm.models.wan.sizes import infer_config, infer_layers


@dataclass(frozen=True)
class WeightsSource:
    """Weights of a model that have not been read yet. Names are the official ones, not those in the files."""

    path: Path
    dialect: str  # official | diffusers | mm
    what: str  # "a folder of 7 safetensors shards"
    tensors: Mapping[str, TensorFile] = field(repr=False)
    hints: Mapping[str, Any] = field(default_factory=dict, repr=False)  # settings in their config.json
    hints_from: Path | None = None  # that config.json, or the file that the hints come from
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)  # that file's own keys
    base: WeightsSource | None = None  # source of the frozen weights, for a trainable-only checkpoint
    stage_layers: tuple[
        int, ...
    ] = ()  # number of trunk blocks per pipeline stage; () if the files are not split into stages

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each weight, by official name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each weight in its file, by official name."""
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    @property
    def has_branch(self) -> bool:
        """Whether the weights include a VACE branch. A plain T2V checkpoint does not."""
        return any(name.startswith("vace_") for name in self.tensors)

    @cached_property
    def config(self) -> VaceConfig:
        """Sizes of the model, from the shapes and config.json.

        Raises WeightsError if the number of heads or vace_layers is unknown.
        """
        try:
            return infer_config(self.shapes, self.hints)
        except WeightsError as error:
            raise error.at(self.path) from None

    @property
    def layers(self) -> tuple[int, tuple[int, ...]]:
        """num_layers and vace_layers. Raises WeightsError if vace_layers is unknown."""
        try:
            return infer_layers(self.shapes, self.hints)
        except WeightsError as error:
            raise error.at(self.path) from None

    def refuse_other_settings(self, settings: Mapping[str, Any], where: str) -> None:
        """Check `settings` (sizes by field name) against the config file of the weights.

        Raises ConfigError.
        """
        if self.hints_from is None:
            return
        if conflicts := setting_conflicts(settings, self.hints):
            raise ConfigError(
                f"contradicts {self.hints_from}, which belongs to the weights: {'; '.join(conflicts)}",
                where=where,
                fix="make them agree, or set the weights of the intended model",
            )

    @property
    def description(self) -> str:
        """One line with the path, the kind of files, the dialect, the number of tensors and the dtypes."""
        dtypes = "/".join(sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes.values()}))
        parts = "trunk and branch" if self.has_branch else "trunk only"
        found = (
            f"{self.path}: {self.what}, {self.dialect} names, {len(self.tensors)} tensors, {dtypes}, {parts}"
        )
        return f"{found}, completed from {self.base.path}" if self.base else found

    def read(self, name: str) -> Tensor:
        """Read one weight on the CPU in its file's dtype, memory-mapped if the format allows it.

        Raises WeightsError if there is no such weight.
        """
        if name not in self.tensors:
            raise WeightsError(f"has no weight {name!r}", where=self.path)
        return self.tensors[name].read()

    def fingerprint(self) -> str:
        """Return a hash of names, shapes, dtypes and the first 64 KiB of each tensor in the files.

        The hash does not depend on the dialect.
        """
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            if tensor.derived:
                continue
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.head_bytes())
        return digest.hexdigest()


class OpenedModel(NamedTuple):
    """Result of `ModelSpec.open`."""

    weights: WeightsSource
    sizes: VaceConfig  # or a class derived from it; `ModelSpec.build` takes it


def differences(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str:
    """List the missing, unexpected and misshaped weights: ten names of each and a count; "" for none."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshaped = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
    return "; ".join(f"{kind}: {truncate_list(names)}" for kind, names in kinds if names)


def init_branch_from_trunk(source: WeightsSource, config: VaceConfig) -> WeightsSource:
    """Add a VACE branch, which initially has no effect, to a T2V trunk.

    Branch block n is a copy of trunk block vace_layers[n]. vace_patch_embedding is [W, W, 0 …] over its input
    channels, with the trunk's bias. before_proj and after_proj are zero. Raises WeightsError if the sizes of
    the trunk differ from `config`.
    """
    if source.has_branch:
        raise WeightsError("already has a VACE branch", where=source.path, fix="remove init_from_trunk")
    wanted = layout(config)
    problems = differences(
        source.shapes, {name: shape for name, shape in wanted.items() if not _in_branch(name)}
    )
    if problems:
        raise WeightsError(f"is not the trunk of the configured model: {problems}", where=source.path)
    if config.vace_in_dim < 2 * config.trunk.in_dim:
        raise WeightsError(
            f"got {config.vace_in_dim}",
            where="vace_in_dim",
            expected=(
                f"at least {2 * config.trunk.in_dim}, to start from a trunk with in_dim {config.trunk.in_dim}"
            ),
        )
    branch = {
        name: _starting_weight(source.tensors, name, shape, config.vace_layers)
        for name, shape in wanted.items()
        if _in_branch(name)
    }
    hints = {**source.hints, "vace_layers": config.vace_layers, "num_heads": config.trunk.num_heads}
    return replace(
        source,
        what=f"{source.what}, branch started from the trunk",
        tensors={**source.tensors, **branch},
        hints=hints,
        hints_from=None,  # the hints now describe the configured model
    )


def _in_branch(name: str) -> bool:
    return name.split(".")[0] in BRANCH


def _starting_weight(
    trunk: Mapping[str, TensorFile], name: str, shape: Shape, vace_layers: tuple[int, ...]
) -> TensorFile:
    size = torch.Size(shape)
    if name == "vace_patch_embedding.weight":
        patch = trunk["patch_embedding.weight"]
        return TensorFile(size, patch.dtype, partial(_widen, patch, size), derived=True)
    if name == "vace_patch_embedding.bias":
        return replace(trunk["patch_embedding.bias"], derived=True)
    _, index, rest = name.split(".", 2)
    if rest.startswith(("before_proj.", "after_proj.")):
        dtype = trunk["patch_embedding.weight"].dtype
        return TensorFile(size, dtype, partial(torch.zeros, size, dtype=dtype), derived=True)
    return replace(trunk[f"blocks.{vace_layers[int(index)]}.{rest}"], derived=True)


def _widen(patch: TensorFile, size: torch.Size) -> Tensor:
    """Widen a patch embedding W [D, C, …] to [W, W, 0 …] of `size` [D, vace_in_dim, …].

    The inactive and reactive channels are read like latents, and the mask channels are ignored.
    """
    weight, channels = patch.read(), patch.shape[1]
    wide = torch.zeros(size, dtype=patch.dtype)
    wide[:, :channels] = weight
    wide[:, channels : 2 * channels] = weight
    return wide
