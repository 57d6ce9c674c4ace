"""A request far from what the published weights know is one line a kind."""

from __future__ import annotations

import pytest

from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.usual import unusual_requests
from mindspeed_mm.models.wan.config import PRESETS, VaceConfig
from tests.support.tiny import TINY

SMALL, LARGE = PRESETS["Wan2.1-VACE-1.3B"], PRESETS["Wan2.1-VACE-14B"]


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (SMALL, {}, []),
        (SMALL, {"height": 720, "width": 1280}, ["720x1280"]),
        (LARGE, {"height": 720, "width": 1280}, []),
        (LARGE, {"height": 1088, "width": 1920}, ["1088x1920"]),
        (LARGE, {"height": 256, "width": 256}, ["256x256"]),
        (SMALL, {"height": 832, "width": 480}, []),
        (SMALL, {"height": 640, "width": 640}, []),
        (SMALL, {"height": 96, "width": 4096}, ["96x4096"]),
        (LARGE, {"height": 2048, "width": 256}, ["2048x256"]),
        (SMALL, {"num_frames": 241}, ["241 frames"]),
        (SMALL, {"num_frames": 9, "height": 64, "width": 64}, ["64x64", "9 frames"]),
        (TINY, {"height": 64, "width": 64}, []),
    ],
)
def test_unusual_request_is_named(config: VaceConfig, size: dict[str, int], words: list[str]) -> None:
    lines = unusual_requests(config, {"video1": SamplingConfig(**size)})
    assert len(lines) == len(words)
    assert all(word in line and "video1" in line for word, line in zip(words, lines, strict=True))


def test_unusual_requests_of_one_kind_are_counted() -> None:
    wide = SamplingConfig(height=720, width=1280)
    (line,) = unusual_requests(SMALL, {"a": wide, "b": SamplingConfig(), "c": wide})
    assert line.startswith("2 of 3 videos (a, c)")
