"""Build the transforms of a model from the settings of a job."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from mindspeed_mm.config.schema import Config
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.transforms.base import ModuleTransform
from mindspeed_mm.models.transforms.config import TRANSFORMS
from mindspeed_mm.models.transforms.freeze import Freeze
from mindspeed_mm.models.transforms.match import is_trainable
from mindspeed_mm.registry import resolve


def plan_transforms(
    spec: ModelSpec, trainable: str, dtype: torch.dtype, configs: Sequence[Config] = ()
) -> tuple[ModuleTransform, ...]:
    """Return the transforms of `configs` in order, then `Freeze`, then those with `comes_last`.

    With an adapter, only the weights that it names train. Without one, `trainable: branch | trunk | all`
    decides.
    """
    chosen: list[ModuleTransform] = [
        resolve(TRANSFORMS.get(str(getattr(config, "type", ""))).build)(config, spec, trainable)
        for config in configs
    ]
    adapters = [transform for transform in chosen if transform.is_adapter]
    if adapters:
        freeze = Freeze(
            lambda name: any(adapter.is_trainable(name) for adapter in adapters),
            dtype,
            spec.fp32_modules,
            "transforms",
        )
    else:
        is_trained = partial(is_trainable, trainable=trainable, branch=spec.branch)
        freeze = Freeze(is_trained, dtype, spec.fp32_modules, f"predictor.trainable: {trainable}")
    last = [transform for transform in chosen if transform.comes_last]
    return (*(transform for transform in chosen if not transform.comes_last), freeze, *last)
