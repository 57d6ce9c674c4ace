"""Quantize frozen linear layers to 8 bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mindspeed_mm.files import format_json
from mindspeed_mm.models.spec import VACE, ModelSpec
from mindspeed_mm.models.transforms.base import ModuleTransform, base_linears
from mindspeed_mm.models.transforms.config import QuantFormat, QuantizeConfig
from mindspeed_mm.models.transforms.match import quantize_targets
from mindspeed_mm.ops.quantized import QuantizableLinear, format_of, prepare_8bit_weight, quantized_layers


def build_quantize(config: QuantizeConfig, spec: ModelSpec, trainable: str) -> Quantize:
    """Build the transform of a `quantize` entry."""
    return Quantize(config, spec)


@dataclass(frozen=True)
class Quantize(ModuleTransform):
    """Prepares the matching frozen layers for 8-bit weights. The loader rounds the weights."""

    config: QuantizeConfig
    spec: ModelSpec
    comes_last: ClassVar[bool] = True

    def apply(self, model: nn.Module) -> None:
        """Change the layers in place. Raises ConfigError as `quantize_targets` does."""
        linears = base_linears(model)
        trained = {f"{name}.weight" for name, layer in linears.items() if layer.weight.requires_grad}
        names = quantize_targets(
            self.config, self.spec, linears, lambda name: name in trained, "transforms: quantize"
        )
        held = quantized_layers(model)
        for name in names:
            layer = linears[name]
            if f"{name}.weight" in held:
                continue
            if not isinstance(layer, QuantizableLinear):
                parent, _, child = name.rpartition(".")
                layer = QuantizableLinear(layer)
                setattr(model.get_submodule(parent), child, layer)
            prepare_8bit_weight(layer, self.config.format)


def quantize_blocks(model: nn.Module, form: QuantFormat, spec: ModelSpec = VACE) -> None:
    """Prepare all linear layers in the blocks of a frozen model for 8-bit weights; `spec` names them."""
    Quantize(QuantizeConfig(format=form), spec).apply(model)


def describe_quantized(model: nn.Module) -> str:
    """Return JSON for a checkpoint: the number of layers in each 8-bit format; "" if there are none."""
    counts = Counter(format_of(layer) for layer in quantized_layers(model).values())
    return format_json(dict(sorted(counts.items()))) if counts else ""
