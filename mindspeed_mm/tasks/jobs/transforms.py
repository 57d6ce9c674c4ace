"""The `transforms` of a training job: their short flags, and checks that do not need torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from mindspeed_mm.config.schema import Config
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.files import stat_path
from mindspeed_mm.models.spec import ModelSpec
from mindspeed_mm.models.transforms.config import (
    Expert,
    FuseLoraConfig,
    LoraConfig,
    Part,
    QuantFormat,
    QuantizeConfig,
)
from mindspeed_mm.models.transforms.match import is_saved, is_trainable, lora_targets, quantize_targets
from mindspeed_mm.models.wan.config import PredictorConfig


class LoraFlags(Config):
    """Short flags for one LoRA and 8-bit weights. They replace or add keys in the model JSON's transforms."""

    lora_rank: int | None = Field(default=None, gt=0, le=4096, description="train only a LoRA of this rank")
    lora_alpha: float | None = Field(
        default=None, gt=0, description="the scale of the LoRA is alpha / rank (default: the rank)"
    )
    lora_on: Part | None = Field(
        default=None,
        description=(
            "part of the model that gets the LoRA (default: the part that predictor.trainable names)"
        ),
    )
    lora_init_from: str | None = Field(
        default=None, description="LoRA to continue from: a file of any dialect, or a LoRA checkpoint"
    )
    fuse_lora: str | None = Field(
        default=None, description="LoRA of any dialect to fuse into the weights before training"
    )
    quantize: QuantFormat | None = Field(
        default=None, description="keep the frozen linear layers of the blocks in 8 bits"
    )

    def apply(self, values: Any, prog: str) -> Any:
        """Return the values of a model JSON with these flags applied to its transforms.

        Raises ConfigError if the flags need a LoRA and the JSON has none, or has several.
        """
        if not isinstance(values, Mapping):
            return values
        given = {
            name.removeprefix("lora_"): value
            for name, value in self.model_dump(exclude={"fuse_lora", "quantize"}).items()
            if value is not None
        }
        if not given and self.fuse_lora is None and self.quantize is None:
            return values
        found = values.get("transforms", [])
        found = list(found) if isinstance(found, list | tuple) else [found]
        if given:
            found = _with_lora(found, given, prog)
        if self.fuse_lora is not None:
            found = [{"type": "fuse_lora", "path": self.fuse_lora}, *found]
        if self.quantize is not None:
            kept = [item for item in found if not _is_type(item, "quantize")]
            changed = [{**item, "format": self.quantize} for item in found if _is_type(item, "quantize")]
            found = [*kept, *(changed or [{"type": "quantize", "format": self.quantize}])]
        return {**values, "transforms": found}


def _with_lora(found: list[Any], given: Mapping[str, Any], prog: str) -> list[Any]:
    where = f"{prog}: --lora-{min(given).replace('_', '-')}"
    positions = [i for i, item in enumerate(found) if _is_type(item, "lora")]
    if len(positions) > 1:
        raise ConfigError(f"the model JSON has {len(positions)} LoRAs", where=where, fix="edit the JSON")
    if not positions and "rank" not in given:
        raise ConfigError("there is no LoRA", where=where, fix="also pass --lora-rank")
    if not positions:
        return [*found, {"type": "lora", **given}]
    return [{**item, **given} if i in positions else item for i, item in enumerate(found)]


def _is_type(item: object, name: str) -> bool:
    return isinstance(item, Mapping) and item.get("type") == name


def for_expert(transforms: Sequence[Config], role: Expert | None) -> tuple[Config, ...]:
    """Fill in the `expert` of the transforms.

    If a file contains the LoRAs of both experts, the run then reads that of the expert in training.
    """
    return tuple(
        config.model_copy(update={"expert": role})
        if isinstance(config, LoraConfig | FuseLoraConfig) and config.expert is None
        else config
        for config in transforms
    )


def check_transforms(
    transforms: Sequence[Config], predictor: PredictorConfig, spec: ModelSpec, model_json: str
) -> None:
    """Check that no two LoRAs share a layer, and that there are weights to change.

    Does not import torch. Raises ConfigError.
    """
    if not transforms:
        return
    adapts = any(not isinstance(config, QuantizeConfig) for config in transforms)
    if adapts and getattr(getattr(predictor, "vace_dit", None), "init_from_trunk", False):
        raise ConfigError(
            "transforms cannot change a branch that starts from the trunk, because it has no effect yet",
            where=f"{model_json}:predictor.vace_dit.init_from_trunk",
            fix="train the whole branch first, or remove transforms",
        )
    owner: dict[str, int] = {}
    for number, config in enumerate(transforms):
        where = f"{model_json}:transforms[{number}]"
        if isinstance(config, FuseLoraConfig) and not predictor.weight_paths:
            raise ConfigError(
                "fuse_lora has no weights to change", where=where, fix="set predictor.from_pretrained"
            )
        if isinstance(config, QuantizeConfig):
            _check_quantize(config, transforms, predictor, spec, model_json, where)
        if isinstance(config, LoraConfig) and spec.modules and spec.linears:
            modules, linears = spec.module_names(predictor.model), spec.linear_shapes(predictor.model)
            for name in lora_targets(config, spec, predictor.trainable, modules, linears, where):
                if name in owner:
                    raise ConfigError(
                        f"{name} gets a LoRA here and in transforms[{owner[name]}]",
                        where=where,
                        fix="narrow match or on",
                    )
                owner[name] = number


def _check_quantize(
    config: QuantizeConfig,
    transforms: Sequence[Config],
    predictor: PredictorConfig,
    spec: ModelSpec,
    model_json: str,
    where: str,
) -> None:
    """Check that a single source has all weights that are kept in 8 bits.

    Checkpoints never include 8-bit weights, but refer to that source. Raises ConfigError.
    """

    if predictor.from_pretrained is None:
        raise ConfigError(
            "quantize has no weights to round", where=where, fix="set predictor.from_pretrained"
        )
    loras = [other for other in transforms if isinstance(other, LoraConfig)]
    adapts = any(not isinstance(other, QuantizeConfig) for other in transforms)
    branch = getattr(getattr(predictor, "vace_dit", None), "vace_pretrained", None)
    if branch is not None and (adapts or predictor.trainable != "branch"):
        raise ConfigError(
            "no single source has all 8-bit weights, and checkpoints need one to refer to",
            where=f"{model_json}:predictor.vace_dit.vace_pretrained",
            fix=(
                "write trunk and branch into one folder with mm-convert, and set predictor.from_pretrained "
                "to it"
            ),
        )

    def is_trained(name: str) -> bool:
        if loras:
            return any(is_saved(name, lora.modules_to_save) for lora in loras)
        return is_trainable(name, predictor.trainable, spec.branch)

    if spec.linears:
        quantize_targets(config, spec, spec.linear_shapes(predictor.model), is_trained, where)


def check_lora_files(transforms: Sequence[Config], model_json: str) -> None:
    """Raise WeightsError if a LoRA file that the transforms name does not exist."""
    for number, config in enumerate(transforms):
        for key in ("init_from", "path"):
            path = getattr(config, key, None) if isinstance(config, LoraConfig | FuseLoraConfig) else None
            if path is None:
                continue
            try:
                stat_path(path, WeightsError)
            except WeightsError as error:
                raise error.at(f"{model_json}:transforms[{number}].{key}") from None
