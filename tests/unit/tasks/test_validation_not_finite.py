"""A validation video that is not finite is no video, and no end of the training."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.tasks.validation_videos import ValidationVideos
from tests.support.tiny import tiny_transformer, write_official

pytestmark = pytest.mark.medium


def test_nan_validation_video_is_a_warning_and_no_file(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mindspeed_mm"), "propagate", True)
    write_official(tmp_path / "tiny")
    sizes = {"height": 32, "width": 48, "num_frames": 5, "steps": 2, "dtype": "fp32"}
    config = {
        "model": {"transformer": "unused while training", "vae": "tiny", "text_encoder": "tiny"},
        "output_path": str(tmp_path / "unused"),
        "tasks": [{"prompt": "a red ball"}, {"prompt": "a cat", "name": "bad"}],
        **sizes,
    }
    # no config takes such a shift; it stands for any number that a step turns into NaN
    monkeypatch.setattr(
        "mindspeed_mm.generation.request.resolve_sampling",
        lambda request, **others: resolve_sampling(request, **others).model_copy(
            update={"shift": 1e-300} if request.name == "bad" else {}
        ),
    )
    (tmp_path / "inference.json").write_text(json.dumps(config))
    model = tiny_transformer().train()
    mesh = SimpleNamespace(world_size=1, cp_size=1)
    videos = ValidationVideos(
        tmp_path / "inference.json", model, mesh, Accelerator.detect("cpu"), tmp_path / "videos"
    )
    videos(10)
    made = sorted(path.name for path in (tmp_path / "videos/iter_0000010").iterdir())
    assert made == ["video1", "video1.json", "video1.mp4", "video1.png"]
    assert re.search(r"\biteration 10\b.*\bbad: .*\blatents\b.*\bfinite\b", caplog.text)
    assert model.training

    with torch.no_grad():
        model.head.head.bias[0] = float("nan")  # as when a training diverges
    videos(20)
    assert not (tmp_path / "videos/iter_0000020").exists()
    assert "head.head.bias" in caplog.text
