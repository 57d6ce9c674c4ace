"""Load transformers: build on the meta device, then assign weights from files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.log import get_logger, once
from mindspeed_mm.models.finite import FiniteWeights
from mindspeed_mm.models.source import OpenedModel, WeightsSource, differences
from mindspeed_mm.models.spec import VACE, ModelSpec
from mindspeed_mm.models.transforms.quantize import quantize_blocks
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.wan.vace import VaceTransformer
from mindspeed_mm.models.weights import PathLike, open_weights
from mindspeed_mm.ops.quantized import SCALE, QuantFormat, format_of, quantize_rows, quantized_layers

logger = get_logger(__name__)
M = TypeVar("M", bound=nn.Module)


def open_model(path: PathLike | Sequence[PathLike], spec: ModelSpec = VACE) -> OpenedModel:
    """Open the weights of a model in a folder, a file or a list of parts, and determine its sizes.

    Weights are not read yet. The model of `spec` must be able to generate. Raises WeightsError.
    """
    return spec.open_model(path)


def open_vace(path: PathLike | Sequence[PathLike]) -> OpenedModel:
    """Open VACE of any size in any known dialect. Raises WeightsError."""
    source = open_weights(path)
    return OpenedModel(source, source.config)


def build_on_meta(config: VaceConfig, spec: ModelSpec = VACE) -> VaceTransformer:
    """Build the model on the meta device, without memory for its weights."""
    with torch.device("meta"):
        model: VaceTransformer = spec.build_module(config)
    return model


def load_weights(
    model: M,
    source: WeightsSource,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    fp32_modules: Sequence[str] = VACE.fp32_modules,
) -> M:
    """Load weights into a model on the meta device. Names and shapes must match exactly.

    `dtype` None keeps the dtypes of the files; `fp32_modules` become fp32 otherwise. On a CPU, weights whose
    dtype does not change stay memory-mapped. Raises WeightsError that names missing, unexpected and misshaped
    weights, and those that contain NaN or Inf.
    """
    in_8_bits = quantized_layers(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    problems = differences(source.shapes, wanted)
    if problems:
        raise WeightsError(
            f"does not fit the model ({source.dialect} names): {problems}",
            where=source.path,
            fix=""
            if source.has_branch
            else "set predictor.vace_dit.init_from_trunk to initialize a VACE branch",
        )
    state = {}
    finite = FiniteWeights(source.path)
    for name in wanted:
        if (layer := in_8_bits.get(name)) is not None:
            stored, scale = quantize_rows(source.read(name), format_of(layer))
            state[name] = stored.to(device)
            state[name.removesuffix("weight") + SCALE] = scale.to(device)
            finite.check(name, scale)
            continue
        target = torch.float32 if dtype is not None and name.split(".")[0] in fp32_modules else dtype
        tensor = source.tensors[name]
        if torch.device(device).type == "cpu":
            state[name] = finite.read(name, tensor, target or tensor.dtype)
            continue
        state[name] = tensor.read().to(device=device, dtype=target)
        finite.check(name, state[name])
    finite.raise_if_nonfinite()
    model.load_state_dict(state, assign=True)
    return model


def load_transformer(
    path: PathLike | Sequence[PathLike],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    quantize: QuantFormat | None = None,
    spec: ModelSpec = VACE,
) -> VaceTransformer:
    """Load a whole model in evaluation mode, with the sizes of its checkpoint.

    `quantize` is the 8-bit format of the linear layers of its blocks. Raises WeightsError.
    """
    source, sizes = open_model(path, spec)
    logger.info(source.description, extra=once())
    model = build_on_meta(sizes, spec)
    if quantize is not None:
        model = model.to(source.dtypes["blocks.0.modulation"] if dtype is None else dtype)
        quantize_blocks(model.requires_grad_(False), quantize, spec)
    load_weights(model, source, dtype=dtype, device=device, fp32_modules=spec.fp32_modules)
    return model.eval()
