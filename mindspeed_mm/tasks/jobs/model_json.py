"""The model JSON of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, create_model

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.registry import DataConfig
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.flow.config import ScheduleConfig
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.config import parse_transforms
from mindspeed_mm.tasks.jobs.extract import AeConfig, TextEncoderConfig
from mindspeed_mm.training.hooks.config import parse_hooks

_ENCODED = "features are already encoded; only feature extraction and training on raw clips read it"
_FEATURES = "dataset_type of the data JSON decides whether training reads features or raw clips"


class ModelConfig(Config):
    """The whole model JSON. Its model_id determines the schema of `predictor`."""

    task: Literal["vace"] = "vace"
    diffusion: ScheduleConfig = ScheduleConfig()
    predictor: SerializeAsAny[Config]
    transforms: tuple[SerializeAsAny[Config], ...] = Field(
        default=(),
        description=(
            'changes to the model before its weights are loaded, such as {"type": "lora", "rank": 32}'
        ),
    )
    hooks: tuple[SerializeAsAny[Config], ...] = Field(
        default=(),
        description='more training behaviours, such as {"type": "early_stop", "patience": 5}',
    )
    caption_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of samples that train with the embedding of the empty caption",
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "patch": "nothing is patched",
        "load_video_features": _FEATURES,
        "load_text_features": _FEATURES,
        "ae": _ENCODED,
        "text_encoder": _ENCODED,
        "allow_tf32": "the device's default is used",
    }


class RawModelConfig(ModelConfig):
    """A model JSON for training on raw clips, which also names the VAE and the text encoder."""

    ae: AeConfig
    text_encoder: TextEncoderConfig


def parse_model(
    values: Any, where: str, notes: list[str] | None, base: type[ModelConfig] = ModelConfig
) -> ModelConfig:
    """Parse the values of the model JSON `where`. Raises ConfigError with the location of a bad value."""
    predictor = values.get("predictor") if isinstance(values, Mapping) else None
    model_id = predictor.get("model_id", "vace") if isinstance(predictor, Mapping) else "vace"
    try:
        spec = MODELS.get(str(model_id))
    except ConfigError as error:
        raise error.at(f"{where}:predictor.model_id") from None
    for key, read in (("transforms", parse_transforms), ("hooks", parse_hooks)):
        if key in values:
            values = {**values, key: read(values[key], f"{where}:{key}", notes)}
    schema = create_model("ModelConfig", __base__=base, predictor=(spec.predictor, ...))
    return parse(schema, values, where, notes)


def model_schema(data: DataConfig, model: Any, *, mm_data: str, mm_model: str) -> type[ModelConfig]:
    """Return the schema of the model JSON for this dataset.

    Raises ConfigError for raw clips without a VAE or a text encoder.
    """
    if data.dataset_type != "vace":
        return ModelConfig
    missing = [key for key in ("ae", "text_encoder") if not isinstance(model, Mapping) or key not in model]
    if missing:
        raise ConfigError(
            "'vace' are raw clips",
            where=f"{mm_data}:dataset_param.dataset_type",
            fix="extract their features first (examples/vace/feature_extract/feature_extraction.sh) and "
            f"set dataset_type to 'feature', or add {' and '.join(missing)} to {mm_model} to encode "
            "them while training",
        )
    return RawModelConfig
