"""Writing videos: equal frames make equal files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindspeed_mm.data.video_writer import write_video


def test_equal_frames_make_equal_files(tmp_path: Path) -> None:
    """Whatever memory held before: the encoder must not read what nobody wrote."""
    random = np.random.default_rng(0)
    places = np.mgrid[:64, :64]
    frames = np.stack(
        [
            np.where(((places - [[[32]], [[5 + 3 * t]]]) ** 2).sum(0)[..., None] < 250, (220, 40, 40), 60)
            for t in range(17)
        ]
    )
    frames = (frames + random.integers(-2, 3, frames.shape)).astype(np.uint8)
    written = set()
    for number in range(12):
        junk = [random.integers(0, 255, size, dtype=np.uint8) for size in random.integers(1000, 300_000, 60)]
        del junk
        written.add(write_video(tmp_path / f"{number}.mp4", frames, 16).read_bytes())
    assert len(written) == 1
