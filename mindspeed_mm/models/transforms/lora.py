"""LoRA: frozen linear layers, each with a trained low-rank update."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.log import get_logger, once
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.dialects import truncate_list
from mindspeed_mm.models.lora.saved import DOWN, UP
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.transforms.base import ModuleTransform, base_linears
from mindspeed_mm.models.transforms.config import LoraConfig
from mindspeed_mm.models.transforms.match import is_saved, lora_targets
from mindspeed_mm.models.weights import open_adapter
from mindspeed_mm.ops.quantized import QuantizableLinear, linear

logger = get_logger(__name__)

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec


class LoraLinear(QuantizableLinear):
    """y = W x + b + scale · B A dropout(x). Each product uses its own weight's dtype.

    `weight` and `bias` keep the names that they have in the replaced layer.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        device = base.weight.device
        super().__init__(base)
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)  # a module, because recomputation looks for it
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=device)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in the dtype of W x."""
        y = linear(self, x)
        if not self.scale:
            return y
        down, up = self.lora_A.weight, self.lora_B.weight
        update = F.linear(F.linear(self.dropout(x).to(down.dtype), down).to(up.dtype), up)
        return torch.add(y, update.to(y.dtype), alpha=self.scale)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to `weight` in fp32, rounding once, and disable it.

        Does nothing for 8-bit weights, where rounding would lose the update.
        """
        if not self.weight.dtype.is_floating_point:
            return
        delta = self.lora_B.weight.float() @ self.lora_A.weight.float()
        self.weight.copy_(self.weight.float() + self.scale * delta)
        self.scale = 0.0


def build_lora(config: LoraConfig, spec: ModelSpec, trainable: str) -> Lora:
    """Build the transform of a `lora` entry. `trainable` is the predictor's."""
    return Lora(config, spec, trainable)


@dataclass(frozen=True)
class Lora(ModuleTransform):
    """Adds a LoRA to the matching layers of the branch, the trunk or both.

    `Freeze` freezes all other weights.
    """

    config: LoraConfig
    spec: ModelSpec
    trainable: str
    starts: dict[str, tuple[TensorFile, float]] = field(default_factory=dict)  # from `init_from`
    whole: dict[str, TensorFile] = field(default_factory=dict)  # its weights for modules_to_save
    is_adapter: ClassVar[bool] = True

    def apply(self, model: nn.Module) -> None:
        """Replace the matching layers.

        Raises ConfigError as `lora_targets` does, and for a layer that already has a LoRA.
        """
        where = "transforms: lora"
        modules = [name for name, _ in model.named_modules() if name]
        linears = {name: tuple(layer.weight.shape) for name, layer in base_linears(model).items()}
        targets = lora_targets(self.config, self.spec, self.trainable, modules, linears, where)
        if self.config.init_from is not None:
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not self.adds(name)}
            self._read_start(shapes, targets)
        for name in targets:
            parent, _, child = name.rpartition(".")
            layer = model.get_submodule(name)
            if isinstance(layer, LoraLinear):
                raise ConfigError(f"{name} gets a LoRA twice; narrow match or on", where=where)
            assert isinstance(layer, nn.Linear)
            setattr(model.get_submodule(parent), child, LoraLinear(layer, self.config))

    def _read_start(self, shapes: dict[str, tuple[int, ...]], targets: list[str]) -> None:
        """Start from the LoRA in `init_from`. Raises WeightsError if it has another rank or wider targets."""
        adapter = open_adapter(str(self.config.init_from), shapes, expert=self.config.expert)
        where = f"transforms: lora.init_from: {adapter.path}"
        places = {f"{layer}.weight" for layer in targets}
        outside = [name for name in adapter.pairs if name not in places]
        outside += [*adapter.diffs, *(name for name in adapter.whole if not self.is_trainable(name))]
        if outside:
            raise WeightsError(
                f"changes {len(outside)} weights that do not train here: {truncate_list(sorted(outside))}",
                where=where,
                fix="widen match, on or modules_to_save, or fuse it: a transform of type fuse_lora",
            )
        ranks = sorted({pair.rank for pair in adapter.pairs.values()})
        if ranks and ranks != [self.config.rank]:
            fix = f"set rank to {ranks[0]}" if len(ranks) == 1 else "fuse it: a transform of type fuse_lora"
            raise WeightsError(
                f"has rank {' and '.join(map(str, ranks))}, this LoRA has rank {self.config.rank}",
                where=where,
                fix=fix,
            )
        for weight, pair in adapter.pairs.items():
            layer = weight.removesuffix(".weight")
            self.starts[layer + DOWN] = (pair.down, 1.0)
            self.starts[layer + UP] = (pair.up, pair.scale / self.config.scale)
        self.whole.update(adapter.whole)
        rest = len(targets) - len(adapter.pairs)
        more = f"; the other {rest} of {len(targets)} layers start from zero" if rest else ""
        logger.info(f"continues from {adapter.description}{more}", extra=once())

    def change_source(self, source: WeightsSource) -> WeightsSource:
        """Return `source` with the whole weights from `init_from`."""
        return replace(source, tensors={**source.tensors, **self.whole}) if self.whole else source

    def is_trainable(self, name: str) -> bool:
        """Return whether `name` is a LoRA matrix, or in `modules_to_save`."""
        return self.adds(name) or is_saved(name, self.config.modules_to_save)

    def adds(self, name: str) -> bool:
        """Return whether `name` is a LoRA matrix."""
        return name.endswith((DOWN, UP))

    def initial_weight(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Return the value from `init_from`, if it has one.

        Otherwise, A is uniform in ±1/√in as in peft, seeded by name. B is zero, so training starts from the
        base.
        """
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
        """Merge every LoRA into its layer's weight."""
        for module in model.modules():
            if isinstance(module, LoraLinear):
                module.merge()


def lora_scales(model: nn.Module) -> dict[str, float]:
    """Map the name of each LoRA layer in a model to its scale."""
    return {name: module.scale for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def lora_sizes(model: nn.Module) -> dict[str, int]:
    """Map the name of each LoRA layer in a model to the number of parameters in its A and B."""
    return {
        name: module.lora_A.out_features * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }
