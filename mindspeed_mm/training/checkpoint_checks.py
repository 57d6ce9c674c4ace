"""Checks that a checkpoint matches the job: base weights, settings, LoRA, quantization and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mindspeed_mm.config.schema import Config
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import display_path, parse_json
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.containers.tensors import kind_of
from mindspeed_mm.models.lora.fused import same_fused
from mindspeed_mm.models.lora.saved import DOWN, UP, read_scales
from mindspeed_mm.models.transforms.lora import lora_scales
from mindspeed_mm.models.transforms.quantize import describe_quantized
from mindspeed_mm.models.wan.config_json import read_hints, setting_conflicts
from mindspeed_mm.training.checkpoint_values import Values, brief

logger = get_logger(__name__)
QUANTIZED = "quantized"  # entry that describes how the frozen weights, which are not saved, were quantized


@dataclass(frozen=True)
class BaseReference:
    """A reference to the frozen weights that a trainable-only checkpoint leaves out.

    The checkpoint stores it as a plain dict.
    """

    path: str
    fingerprint: str
    dialect: str
    loras: str = ""  # LoRAs that were fused into these weights before training, as `write_fused` writes them

    def entry(self) -> dict[str, str]:
        """Return the dict that a checkpoint stores, without empty fields."""
        return {key: value for key, value in asdict(self).items() if value}


def check_base(folder: Path, found: Any, base: BaseReference | None, finetune: bool) -> None:
    """Check that a trainable-only checkpoint was trained on the weights of `base`.

    Raises WeightsError if there is no base. A different base or different fused LoRAs also raise
    WeightsError, but only log a warning with `finetune`.
    """
    if not isinstance(found, Mapping):
        return
    path = display_path(str(found.get("path")))
    if base is None:
        raise WeightsError(
            "contains only the trained weights",
            where=folder,
            fix=f"set predictor.from_pretrained to its base: {path}",
        )
    if found.get("fingerprint") != base.fingerprint:
        problem = (
            f"was trained on {path} (fingerprint {str(found.get('fingerprint'))[:12]}), but "
            f"predictor.from_pretrained {base.path} has other weights ({base.fingerprint[:12]})"
        )
        if not finetune:
            raise WeightsError(
                problem, where=folder, fix="use the same weights, or start over with --finetune"
            )
        logger.warning(f"{folder}: {problem}")
    if not same_fused(found.get("loras"), base.loras):
        problem = "the LoRAs fused into its base differ from those in the transforms of the model JSON"
        if not finetune:
            raise WeightsError(
                problem, where=folder, fix="fuse the same LoRAs, or start over with --finetune"
            )
        logger.warning(f"{folder}: {problem}")


def check_config(folder: Path, saved: Any, model: nn.Module) -> None:
    """Check that the model settings in the checkpoint match those of the job.

    Shapes alone do not determine settings such as the number of heads or eps. Raises WeightsError.
    """
    config = getattr(model, "config", None)
    if saved is None or not isinstance(config, Config):
        return
    if not isinstance(saved, str):
        raise WeightsError(
            f"got {kind_of(saved)}",
            where=f"{folder}: config",
            expected="JSON",
            fix="copy the checkpoint again",
        )
    hints = read_hints(parse_json(saved, f"{folder}: config", WeightsError))
    if conflicts := setting_conflicts(read_hints(config.model_dump(mode="json")), hints):
        raise WeightsError(
            f"was trained with settings that differ from the model JSON: {'; '.join(conflicts)}",
            where=folder,
            fix="make them equal",
        )


def check_lora(folder: Path, saved: object, model: nn.Module) -> None:
    """Check that the LoRA in the checkpoint matches the job's: the same layers and, on each, the same scale.

    Raises WeightsError.
    """
    scales = lora_scales(model)
    before = read_scales(saved, folder) if saved is not None else {}
    restart = f"set predictor.from_pretrained to {folder} and remove --load"
    if before and not scales:
        raise WeightsError(
            f"contains a LoRA of {len(before)} layers, but the job trains none",
            where=folder,
            fix=f"restore --lora-rank and the other LoRA settings, or, to train something else, {restart}",
        )
    if scales and not before:
        raise WeightsError(
            "contains no LoRA, but the job trains one", where=folder, fix=f"to train a LoRA on it, {restart}"
        )
    if odd := sorted(scales.keys() ^ before.keys()):
        raise WeightsError(
            f"its LoRA is on {len(before)} layers, the job's is on {len(scales)}; only one has {odd[0]}",
            where=folder,
            fix="restore match and on",
        )
    for name in sorted(scales):
        if not math.isclose(scales[name], before[name]):
            raise WeightsError(
                f"its LoRA has scale {before[name]:g} in {name}, but the job has {scales[name]:g}",
                where=folder,
                fix="restore rank, alpha and rslora",
            )


def check_quantized(folder: Path, saved: object, model: nn.Module, finetune: bool) -> None:
    """Check that the job quantizes the frozen weights as the checkpoint's run did.

    The frozen weights are read from the base and quantized again, with bitwise identical results. A mismatch
    raises WeightsError, or logs a warning with `finetune`.
    """
    before, now = saved or "", describe_quantized(model)
    if before == now:
        return
    problem = f"was trained with {_describe(before)}, but the job has {_describe(now)}"
    if not finetune:
        fix = "restore quantize, or start over with --finetune"
        raise WeightsError(problem, where=folder, fix=fix)
    logger.warning(f"{folder}: {problem}")


def _describe(text: object) -> str:
    if not text:
        return "no 8-bit weights"
    found = parse_json(text, QUANTIZED, WeightsError) if isinstance(text, str) else None
    if not isinstance(found, dict):
        return f"{brief(text)}"
    return " and ".join(f"{count} layers in {form}" for form, count in found.items())


def check_weights(
    values: Values, names: Mapping[nn.Parameter, str], every: set[str], *, partial: bool
) -> None:
    saved = {key.removeprefix("model.") for key in values.entries if key.startswith("model.")}
    trained = {name for parameter, name in names.items() if parameter.requires_grad}
    missing, foreign = sorted(trained - saved), sorted(saved - every)
    if missing or foreign:
        text = "; ".join(
            f"{title}: {', '.join(found[:4])}{' …' if len(found) > 4 else ''}"
            for title, found in (
                ("lacks weights that are trainable here", missing),
                ("contains weights of another model", foreign),
            )
            if found
        )
        advice = "check the model JSON's sizes and predictor.trainable"
        if partial and not foreign:
            advice = (
                "it contains only trained weights: set predictor.trainable as before, or to train more of "
                f"the model, set predictor.from_pretrained to {values.folder} and remove --load"
            )
        raise WeightsError(text, where=values.folder, fix=advice)
    for parameter, name in names.items():
        entry = values.tensor(f"model.{name}")
        if entry is not None and not parameter.is_floating_point():
            raise WeightsError(
                f"contains {name}, which is 8-bit in the job",
                where=values.folder,
                fix=f"set predictor.from_pretrained to {values.folder}, and remove --load",
            )
        if entry is not None and (
            entry.size != parameter.shape or not entry.properties.dtype.is_floating_point
        ):
            raise WeightsError(
                f"got {entry.properties.dtype} {list(entry.size)}",
                where=f"{values.folder}: model.{name}",
                expected=f"a floating-point weight of {list(parameter.shape)}",
                fix="restore rank" if name.endswith((DOWN, UP)) else "check the model JSON's sizes",
            )
