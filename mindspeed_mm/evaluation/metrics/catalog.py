"""Registers the metrics of this package on import. Other packages register theirs through an entry point."""

from __future__ import annotations

from mindspeed_mm.evaluation.metrics import (  # noqa: F401 (each registers its metrics)
    colour,
    control,
    given,
    movement,
    reference,
    temporal,
    truth,
)
from mindspeed_mm.evaluation.spec import METRICS, Metric

__all__ = ["METRICS", "all_metrics"]
_ORDER = (
    "truth_psnr", "truth_ssim", "kept_psnr", "kept_ssim", (
        "given_frame_psnr"
    ), "seam", "gray_error", "line_f1", "depth_error",
    "pose_f1", "flow_error", "layout_iou", (
        "reference_colour"
    ), "reference_shape", "flicker", "warp_error", "latent_jump",
    "colour_drift", "motion",
)  # fmt: skip


def all_metrics(names: tuple[str, ...] = ()) -> list[Metric]:
    """Return the metrics of `names`, or all, in table order. Raises ConfigError for an unknown name."""
    known = [name for name in _ORDER if name in METRICS] + [name for name in METRICS if name not in _ORDER]
    chosen = set(names or known)
    return [
        METRICS.get(name)
        for name in [*known, *(name for name in names if name not in known)]
        if name in chosen
    ]
