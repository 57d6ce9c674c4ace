"""The train_pipeline of published data JSONs, and the steps that this library accepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from mindspeed_mm.config.schema import Config


class Transform(Config):
    """One entry of a published `train_pipeline`."""

    trans_type: str
    param: dict[str, Any] = Field(default_factory=dict)


# The preprocessing that VACE was trained with. load_sample performs exactly these steps.
_STEPS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "video": {
        "ResizeCropVideo": {"size": "auto", "interpolation_mode": "bicubic", "antialias": True},
        "ToTensorVideo": {},
        "norm_fun": {"mean": 0.5, "std": 0.5},
    },
    "image": {
        "ToTensorVideo": {},
        "norm_fun": {"mean": 0.5, "std": 0.5},
        "ResizeToFill": {"size": "auto", "interpolation_mode": "bilinear", "align_corners": False},
    },
}


class TrainPipeline(Config):
    """`train_pipeline` of published files.

    Accepted if it contains only the steps that are always performed. Other steps raise an error, because
    VACE's weights were not trained with them.
    """

    video: tuple[Transform, ...] = ()
    image: tuple[Transform, ...] = ()

    @field_validator("video", "image")
    @classmethod
    def _check_steps(cls, steps: tuple[Transform, ...], info: Any) -> tuple[Transform, ...]:
        for step in steps:
            _check_step(info.field_name, step)
        return steps


def _check_step(stream: str, step: Transform) -> None:
    known = _STEPS[stream]
    if step.trans_type not in known:
        raise ValueError(
            f"{step.trans_type} would change {stream} pixels but not src_video, mask and references, "
            f"which must stay aligned; remove it (supported: {', '.join(known)})"
        )
    for name, value in step.param.items():
        wanted = known[step.trans_type].get(name)
        if value != wanted:
            raise ValueError(
                f"{step.trans_type}.{name} is {value!r}, but VACE was trained with {wanted!r}; "
                "use that value or remove the key"
            )
