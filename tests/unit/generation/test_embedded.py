"""The settings within a video file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mindspeed_mm.data.video import open_video
from mindspeed_mm.data.video_writer import read_comment, write_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.embedded import embedded, read_embedded
from mindspeed_mm.generation.sampling_config import SamplingConfig
from tests.support.errors import raises

FRAMES = np.arange(5 * 16 * 16 * 3, dtype=np.uint8).reshape(5, 16, 16, 3)
SETTINGS = {
    "prompt": "一个红球 bounces",
    "negative_prompt": "",
    "sampling": SamplingConfig(seed=7, steps=4).model_dump(mode="json"),
    "task": {
        "type": "inpainting",
        "mode": "mask",
        "mask": "/home/me/mask.png",
        "videos": ["/home/me/a.mp4"],
        "images": [],
    },
    "inputs": {"video": "/home/me/a.mp4", "mask": None, "images": [], "outpaint": [0.5, 0, 0, 0]},
    "model": {"vae": "/home/me/vae"},
    "command": ["/home/me/run.py"],
}


def test_settings_come_back_from_the_file(tmp_path: Path):
    path = write_video(tmp_path / "a.mp4", FRAMES, 16, comment=embedded(SETTINGS))
    found = read_embedded(path)
    assert found["prompt"] == SETTINGS["prompt"]
    assert (found["seed"], found["steps"]) == (7, 4)
    assert found["task"] == {"type": "inpainting", "mode": "mask"}
    assert found["outpaint"] == [0.5, 0, 0, 0]
    assert found["inputs"] == ["video"]


def test_no_path_of_the_machine_is_in_the_file(tmp_path: Path):
    path = write_video(tmp_path / "a.mp4", FRAMES, 16, comment=embedded(SETTINGS))
    assert "/home" not in read_comment(path)
    assert b"/home" not in path.read_bytes()


def test_comment_changes_no_pixel(tmp_path: Path):
    plain = write_video(tmp_path / "a.mp4", FRAMES, 16)
    said = write_video(tmp_path / "b.mp4", FRAMES, 16, comment="x")
    assert (open_video(plain).read(range(5)) == open_video(said).read(range(5))).all()
    assert read_comment(plain) == ""


@pytest.mark.parametrize(
    "comment",
    ["", "a holiday", "{", "[]", '{"vace": 99, "prompt": "x"}', json.dumps({"vace": 1, "steps": -3})],
)
def test_video_without_settings_is_rejected(comment: str, tmp_path: Path):
    path = write_video(tmp_path / "a.mp4", FRAMES, 16, comment=comment)
    with raises(DataError, where="a.mp4"):
        read_embedded(path)


def test_paths_and_loras_of_a_comment_are_left_out(tmp_path: Path):
    said = {"vace": 1, "prompt": "x", "video_path": "/etc/passwd", "loras": [{"path": "/x"}], "name": "y"}
    path = write_video(tmp_path / "a.mp4", FRAMES, 16, comment=json.dumps(said))
    assert not {"video_path", "loras"} & read_embedded(path).keys()
