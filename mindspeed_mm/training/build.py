"""Builds a sharded model with weights from a model JSON. No rank needs a whole copy.

The steps are: build on the meta device; apply transforms, which freeze layers and choose dtypes; apply
context parallelism, recompute and compile; shard; fill the local shards from memory-mapped files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mindspeed_mm.accelerator import DTYPES, Accelerator
from mindspeed_mm.config.schema import Config
from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
from mindspeed_mm.distributed.fsdp import shard_model
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.distributed.mesh import Mesh
from mindspeed_mm.distributed.patterns import absent_units, match, recompute_plan
from mindspeed_mm.distributed.pipeline import Pipeline, WholeModel, whole_shapes
from mindspeed_mm.distributed.recompute import apply_recompute, compile_blocks
from mindspeed_mm.distributed.sequence import apply_context_parallel
from mindspeed_mm.distributed.shards import copy_local
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.finite import FiniteWeights
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.base import ModuleTransform
from mindspeed_mm.models.transforms.plan import plan_transforms
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.ops.quantized import SCALE, fill_scale, quantized_layers

logger = get_logger(__name__)
# official name → the whole tensor, which is lazy, so that slicing reads only the slice
Reader = Callable[[str], Tensor]


class Source(Protocol):
    """The interface of what `models.weights.open_weights` returns."""

    @property
    def shapes(self) -> dict[str, torch.Size]: ...

    def read(self, name: str) -> Tensor: ...


def build_model(
    predictor: PredictorConfig,
    parallel: ParallelConfig,
    fsdp: Fsdp2Config,
    mesh: Mesh,
    accelerator: Accelerator,
    *,
    source: Source | None,
    seed: int = 0,
    transforms: Sequence[Config] = (),
    layers: Sequence[int] = (),
) -> nn.Module:
    """Build the model, shard it, and fill it from `source`.

    Without a source, the weights are random and depend only on `seed`. `transforms` are the entries of that
    list in the model JSON. Trainable weights are fp32 (the master weights). Frozen weights have the dtype
    `predictor.dtype` and no gradient. `layers` are the sizes of all pipeline stages; with pipeline
    parallelism, the result is this rank's Pipeline.

    Raises ConfigError, or WeightsError that lists every missing and unexpected key.
    """
    check_dtypes(predictor, fsdp)
    spec = MODELS.get(predictor.model_id)
    with torch.device("meta"):
        model: nn.Module = spec.build_module(predictor.model)
    model.residual_dtype = DTYPES[predictor.residual_dtype]  # type: ignore[assignment]
    plan = plan_transforms(spec, predictor.trainable, DTYPES[predictor.dtype], transforms)
    for transform in plan:
        transform.apply(model)
        if isinstance(source, WeightsSource):
            source = transform.change_source(source)
    whole = WholeModel.copy_of(model) if mesh.pp_size > 1 else None
    apply_context_parallel(model, mesh.cp_group, ulysses=mesh.ulysses_group, ring=mesh.ring_group)
    names = [name for name, _ in model.named_modules() if name]
    recomputed = recompute_plan(names, spec.units, fsdp, parallel)
    to_host = fsdp.offload_block_inputs and accelerator.kind != "cpu"  # CPU tensors are already on the host
    apply_recompute(model, recomputed, inputs_to_host=to_host, pin=fsdp.pin_memory)
    if fsdp.compile:
        absent = absent_units(spec.units, names)
        compile_blocks(
            model, [name for unit in spec.units for name in match(unit, names, "units", absent=absent)]
        )
    if whole is not None:
        mine = range(mesh.pp_rank, len(layers), mesh.pp_size)
        split = spec.split_stages(model, layers, mine)
        pipeline = Pipeline(split, whole, mesh, parallel.pipeline_schedule, accelerator.device)
        pipeline.config = model.config
        for part in pipeline.parts():
            shard_model(part, spec.units, fsdp, mesh, fp32_modules=spec.fp32_modules, every=names)
        model = pipeline
    else:
        shard_model(model, spec.units, fsdp, mesh, fp32_modules=spec.fp32_modules)
    model.to_empty(device=torch.device("cpu") if fsdp.offload_to_cpu else accelerator.device)
    for layer in quantized_layers(model).values():  # scales are small, and buffers are not offloaded
        layer.register_buffer(SCALE, layer.get_buffer(SCALE).to(accelerator.device))
    fill_parameters(model, source, seed, plan)
    return model.train()


def check_dtypes(predictor: PredictorConfig, fsdp: Fsdp2Config) -> None:
    """Check that the two files agree on the dtype of matrix products. Raises ConfigError."""
    if predictor.dtype != fsdp.param_dtype:
        raise ConfigError(
            f"predictor.dtype is {predictor.dtype} but fsdp2_config.yaml:param_dtype is {fsdp.param_dtype}",
            fix="set both to the same value",
        )


@torch.no_grad()
def fill_parameters(
    model: nn.Module, source: Source | None, seed: int, transforms: Sequence[ModuleTransform] = ()
) -> None:
    """Copy this rank's slice of each weight from `source`, or draw random weights without one.

    Raises WeightsError if names or shapes differ, or if a slice contains NaN or Inf.
    """
    if source is None:
        logger.warning("no predictor.from_pretrained: training starts from random weights")
    else:
        _check_keys(model, source, transforms)
    finite = FiniteWeights(getattr(source, "path", "weights"))
    in_8_bits = quantized_layers(model)
    for name, parameter in model.named_parameters():
        added = next((transform for transform in transforms if transform.adds(name)), None)
        if added is not None:
            whole = added.initial_weight(name, parameter.shape, seed)
        else:
            whole = source.read(name) if source is not None else initial_weight(name, parameter.shape, seed)
        if (layer := in_8_bits.get(name)) is not None:
            whole = fill_scale(layer, whole)
            finite.check(name, layer.get_buffer(SCALE))
        finite.check(name, copy_local(parameter, whole))
    raise_on_all_ranks(finite.raise_if_nonfinite)


def initial_weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return the initial fp32 value of a weight, as in the official code.

    Random values depend on `seed` and the name only, so they are the same for any number of ranks.
    """
    last = name.rsplit(".", 1)[-1]
    if last == "bias" or "after_proj" in name or "before_proj" in name or name == "head.head.weight":
        return torch.zeros(shape)
    if last == "weight" and len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if last == "modulation":
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    fan_in, fan_out = shape[1:].numel(), shape[0]
    bound = math.sqrt(6 / (fan_in + fan_out))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _check_keys(model: nn.Module, source: Source, transforms: Sequence[ModuleTransform]) -> None:
    wanted = {
        name: shape
        for name, shape in whole_shapes(model).items()
        if not any(transform.adds(name) for transform in transforms)
    }
    missing = [name for name in wanted if name not in source.shapes]
    left_over = [name for name in source.shapes if name not in wanted]
    different = [
        f"{name} {list(source.shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in source.shapes and source.shapes[name] != shape
    ]
    problems = [
        f"{title} {len(found)}: {', '.join(found[:8])}{' …' if len(found) > 8 else ''}"
        for title, found in (("missing", missing), ("unexpected", left_over), ("of another shape", different))
        if found
    ]
    if problems:
        where = getattr(source, "path", "weights")
        raise WeightsError(f"does not fit predictor's sizes: {'; '.join(problems)}", where=where)
