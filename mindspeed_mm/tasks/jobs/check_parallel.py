"""Checks that a model, its FSDP2 YAML and the number of ranks fit together."""

from __future__ import annotations

from mindspeed_mm.distributed.config import (
    Fsdp2Config,
    check_reshard,
)
from mindspeed_mm.distributed.patterns import check_patterns
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.wan.config import PredictorConfig


def check_sharding(fsdp2: Fsdp2Config, ranks: int) -> None:
    """Raise ConfigError if the sharding size does not divide the number of ranks."""
    if isinstance(fsdp2.sharding_size, int) and ranks % fsdp2.sharding_size:
        raise ConfigError(
            f"{fsdp2.sharding_size} does not divide the {ranks} rank(s)",
            where="fsdp2_config.yaml:sharding_size",
            fix="use auto, or a divisor",
        )
    check_reshard(fsdp2, fsdp2.sharding_size if isinstance(fsdp2.sharding_size, int) else ranks)


def check_modules(predictor: PredictorConfig, fsdp2: Fsdp2Config) -> None:
    """Raise ConfigError if a pattern in the YAML matches no module of the model."""
    spec = MODELS.get(predictor.model_id)
    if spec.modules:
        check_patterns(fsdp2, spec.units, spec.module_names(predictor.model))


def check_dtype(predictor: PredictorConfig, fsdp2: Fsdp2Config, *, bf16: bool) -> None:
    """Raise ConfigError if the model JSON, the FSDP2 YAML and --bf16 set different dtypes."""
    if predictor.dtype != fsdp2.param_dtype:
        raise ConfigError(
            f"predictor.dtype is {predictor.dtype} but fsdp2 param_dtype is {fsdp2.param_dtype}",
            fix="set both to the same dtype",
        )
    if bf16 and predictor.dtype != "bf16":
        raise ConfigError(
            f"contradicts predictor.dtype {predictor.dtype}",
            where="--bf16",
            fix="remove the flag, or set bf16",
        )
