"""Sizes and lengths that published weights were trained on, and warnings about requests far from them."""

from __future__ import annotations

from collections.abc import Mapping

from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.wan.sizes import preset_name

_SMALL = 480 * 832  # pixels per frame
_LARGEST = {"Wan2.1-VACE-1.3B": ("480x832", _SMALL), "Wan2.1-VACE-14B": ("480x832 and 720x1280", 720 * 1280)}
_WIDEST = 2.4  # aspect ratio of CinemaScope; the weights were trained on 16:9
_FRAMES = 81


def unusual_requests(config: VaceConfig, videos: Mapping[str, SamplingConfig]) -> list[str]:
    """Return one line for each size or length that is far from what these weights were trained on.

    Returns [] for unpublished weights.
    """
    kinds: dict[str, list[str]] = {}
    for name, sampling in videos.items():
        for line in unusual(config, sampling):
            kinds.setdefault(line, []).append(name)
    return [
        f"{len(names)} of {len(videos)} videos ({', '.join(names[:3])}{', …' if names[3:] else ''}): {line}"
        for line, names in kinds.items()
    ]


def unusual(config: VaceConfig, sampling: SamplingConfig) -> list[str]:
    """Describe how a request is far from what these weights were trained on; [] for unpublished weights."""
    known = _LARGEST.get(preset_name(config) or "")
    if known is None:
        return []
    found = []
    area = sampling.height * sampling.width
    aspect = max(sampling.height, sampling.width) / min(sampling.height, sampling.width)
    if not 0.5 * _SMALL <= area <= 1.25 * known[1] or aspect > _WIDEST:
        found.append(f"{sampling.height}x{sampling.width} is far from {known[0]}")
    frames = sampling.frames_at_once
    if not _FRAMES // 3 <= frames <= 1.5 * _FRAMES and frames > 1:
        longer = f"; set window to {_FRAMES}" if frames > _FRAMES else ""
        found.append(f"{frames} frames are far from {_FRAMES}{longer}")
    return [
        f"{kind}, which these weights were trained on; expect repeated or distorted content" for kind in found
    ]
