"""The sample inputs of the inference JSONs: small, readable, and those that their script renders."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from examples.vace.inference import make_samples as samples

FOLDER = samples.FOLDER


def frame(name: str, place: int) -> NDArray[np.uint8]:
    with av.open(str(FOLDER / f"{name}.mp4")) as clip:
        stream = clip.streams.video[0]
        assert (stream.frames, float(stream.average_rate or 0)) == (81, 16)
        return next(
            shot.to_ndarray(format="rgb24") for i, shot in enumerate(clip.decode(video=0)) if i == place
        )


def close(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> bool:
    return found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 3


def test_sample_inputs_are_what_the_script_renders() -> None:
    directions, centre = samples.rays(), samples.ball(0.5)
    hits = samples.trace(directions, centre)
    assert close(frame("depth", 40), samples.depth_picture(hits))
    assert close(frame("room", 40), samples.picture(hits, centre))
    assert close(frame("mask", 40), samples.mask_picture(directions, centre))
    assert close(np.asarray(Image.open(FOLDER / "ball.jpg").convert("RGB")), np.asarray(samples.reference()))


def test_sample_inputs_stay_below_a_megabyte() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000


@pytest.mark.parametrize("path", sorted(FOLDER.parent.glob("*.json")), ids=lambda path: path.stem)
def test_inference_json_names_samples_that_exist(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    named = [values[key] for key in ("video_path", "mask_path", "image_path") if key in values]
    assert named
    assert all((path.parent / name).is_file() for name in named)
