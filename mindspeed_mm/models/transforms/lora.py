"""LoRA: frozen linear layers with a trained update of low rank beside them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.log import get_logger, once
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.lora.read import open_lora
from mindspeed_mm.models.lora.saved import DOWN, UP
from mindspeed_mm.models.transforms.base import ModuleTransform
from mindspeed_mm.models.transforms.config import LoraConfig
from mindspeed_mm.models.transforms.freeze import trains
from mindspeed_mm.models.transforms.match import ends_in, matching

logger = get_logger(__name__)

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec


class LoraLinear(nn.Linear):
    """y = W x + b + scale · B A dropout(x). Each product is in the dtype of its own weight.

    `weight` and `bias` keep the names that they have in the layer it replaces.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        device = base.weight.device
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device=device)
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = config.scale, config.dropout
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=device)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out] in the dtype of `weight`."""
        y = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        if not self.scale:
            return y
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        down, up = self.lora_A.weight, self.lora_B.weight
        update = F.linear(F.linear(dropped.to(down.dtype), down).to(up.dtype), up)
        return torch.add(y, update.to(y.dtype), alpha=self.scale)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to `weight`, in fp32 and rounded once; the update itself does nothing from then on."""
        delta = self.lora_B.weight.float() @ self.lora_A.weight.float()
        self.weight.copy_(self.weight.float() + self.scale * delta)
        self.scale = 0.0


def build_lora(config: LoraConfig, spec: ModelSpec, trainable: str) -> Lora:
    """For a model of `spec`; `trainable` is that of its predictor. Raises ConfigError."""
    if not (config.match or spec.adapted):
        raise ConfigError("missing; the model names no usual layers", where="transforms: lora.match")
    part = config.on or ("both" if trainable == "all" or not spec.branch else trainable)
    return Lora(config, spec.branch, spec.adapted, part)


@dataclass(frozen=True)
class Lora(ModuleTransform):
    """Gives the matching layers of the branch, the trunk or both a LoRA; all other weights are left to be frozen."""

    config: LoraConfig
    branch: tuple[str, ...] = ()  # first parts of the names of the branch's weights
    usual: tuple[str, ...] = ()  # what `match` is by default
    part: str = "both"
    starts: dict[str, tuple[TensorFile, float]] = field(default_factory=dict)  # from `init_from`

    def apply(self, model: nn.Module) -> None:
        """Replace the matching layers. Raises ConfigError when a pattern matches none, or no linear layer."""
        where = "transforms: lora"
        names = [name for name, _ in model.named_modules() if name]
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = matching(self.config.match or self.usual, linear, f"{where}.match")
        targets = [name for name in targets if self.part == "both" or trains(name, self.part, self.branch)]
        if not targets:
            raise ConfigError(f"the model has no matching layer in the {self.part}", where=f"{where}.on")
        matching(self.config.modules_to_save, names, f"{where}.modules_to_save")
        if self.config.init_from is not None:
            self._read_start({name: tuple(p.shape) for name, p in model.named_parameters()}, targets)
        for name in targets:
            parent, _, child = name.rpartition(".")
            layer = model.get_submodule(name)
            if isinstance(layer, LoraLinear):
                raise ConfigError(f"{name} gets a LoRA twice; narrow match or on", where=where)
            assert isinstance(layer, nn.Linear)
            setattr(model.get_submodule(parent), child, LoraLinear(layer, self.config))

    def _read_start(self, shapes: dict[str, tuple[int, ...]], targets: list[str]) -> None:
        """Take over the LoRA of `init_from`. Raises ConfigError for what this one has no place for."""
        adapter = open_lora(str(self.config.init_from), shapes)
        where = f"transforms: lora.init_from: {adapter.path}"
        outside = [name for name in adapter.names if name.removesuffix(".weight") not in targets]
        if outside or adapter.diffs or adapter.whole:
            extra = ", ".join(outside[:4] or [*adapter.diffs, *adapter.whole][:4])
            raise ConfigError(
                f"changes weights that this LoRA does not: {extra}",
                where=where,
                fix="widen match and on, or merge it",
            )
        ranks = {pair.rank for pair in adapter.pairs.values()}
        if ranks != {self.config.rank}:
            text = ", ".join(map(str, sorted(ranks)))
            raise ConfigError(
                f"has rank {text}, this LoRA has rank {self.config.rank}", where=where, fix="set the same"
            )
        for weight, pair in adapter.pairs.items():
            layer = weight.removesuffix(".weight")
            self.starts[layer + DOWN] = (pair.down, 1.0)
            self.starts[layer + UP] = (pair.up, pair.scale / self.config.scale)
        logger.info(f"continues from {adapter.description}", extra=once())

    def trains(self, name: str) -> bool:
        """Its own matrices, and `modules_to_save`."""
        module = name.rpartition(".")[0]
        parents = [module[:end] for end, mark in enumerate(module) if mark == "."] + [module]
        saved = self.config.modules_to_save
        return self.adds(name) or any(ends_in(parent, one) for parent in parents for one in saved)

    def adds(self, name: str) -> bool:
        """Its own matrices."""
        return name.endswith((DOWN, UP))

    def initial_weight(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """`init_from`'s; else A uniform in ±1/√in as in peft, drawn by name, and B zero: training starts from the base."""
        if name in self.starts:
            tensor, factor = self.starts[name]
            return tensor.read().float().view(shape) * factor
        if name.endswith(UP):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def merge(self, model: nn.Module) -> None:
        """Add every update to its layer's weight."""
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.merge()


def lora_scales(model: nn.Module) -> dict[str, float]:
    """Every LoRA layer of a model by its name, with its scale."""
    return {name: module.scale for name, module in model.named_modules() if isinstance(module, LoraLinear)}
