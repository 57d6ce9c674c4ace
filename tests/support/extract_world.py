"""A feature extraction without decoders and models.

Rows are small files of bytes, encoders are closed formulas.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mindspeed_mm.conditioning.extraction import Extraction
from mindspeed_mm.conditioning.reading import FeatureKeys
from mindspeed_mm.conditioning.text import PromptCache
from mindspeed_mm.conditioning.vace import StreamEncoder
from mindspeed_mm.data.conditions import PixelSample
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.errors import DataError

T, H, W = 5, 16, 32


class CellVae:
    """The mean of each cell plus one; `at` names the call at which it sends this process a signal."""

    device = torch.device("cpu")

    def __init__(self, at: int = 0, number: signal.Signals = signal.SIGTERM) -> None:
        self.calls = 0
        self.at, self.number = at, number

    def encode(self, video):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
        frames = (video.shape[2] + 3) // 4
        cells = torch.nn.functional.adaptive_avg_pool3d(
            video, (frames, video.shape[3] // 8, video.shape[4] // 8)
        )
        return cells.repeat(1, 6, 1, 1, 1)[:, :16] + 1


class WordEncoder:
    """One row for each word, and one for the end."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def encode(self, prompts):
        self.prompts += prompts
        return tuple(torch.full((len(prompt.split()) + 1, 8), len(prompt) / 7) for prompt in prompts)


def load(record: SampleRecord, num_frames: int = T) -> PixelSample:
    """Pixels drawn from the bytes of the row's files."""
    if record.video.read_bytes() == b"corrupt":
        raise DataError(f"{record.video}: no frames in it")
    return PixelSample(
        video=_pixels(record.video, num_frames),
        src_video=None if record.src_video is None else _pixels(record.src_video, num_frames),
        src_mask=None if record.src_mask is None else np.full((num_frames, H, W), 255, np.uint8),
        src_ref_images=tuple(
            np.full((3, 1, H, W), path.read_bytes()[0] / 255, np.float32) for path in record.src_ref_images
        ),
        captions=record.captions,
        fps=16.0,
        frame_indices=tuple(range(num_frames)),
        frame_policy="exact",
    )


def _pixels(path: Path, num_frames: int):
    return np.random.default_rng(list(path.read_bytes())).integers(
        0, 256, (num_frames, H, W, 3), dtype=np.uint8
    )


def write_rows(folder: Path, count: int, captions=("a red ball",)) -> list[SampleRecord]:
    """Return `count` rows with one caption, each with different bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in range(count):
        video = folder / f"{row}.clip"
        if not video.exists():
            video.write_bytes(b"clip %d" % row)
        rows.append(SampleRecord(video=video, captions=tuple(captions), address=f"data.json[{row}]", row=row))
    return rows


def make_extraction(
    save_path: Path, vae=None, *, num_frames=T, text="t5", weights="vae", workers=0, timeout=60.0
):
    """An Extraction over `write_rows`."""
    return Extraction(
        vae=StreamEncoder(vae or CellVae()),
        text=PromptCache(WordEncoder()),
        keys=FeatureKeys(
            pixels={"num_frames": num_frames, "soft_mask": False},
            vae={"fingerprint": weights},
            text={"fingerprint": text},
        ),
        load=partial(load, num_frames=num_frames),
        save_path=save_path,
        num_workers=workers,
        timeout=timeout,
    )
