"""Draw long videos of the tiny world, six windows in each mode, on one sheet with their drift and seams.

    python examples/vace/tiny/draw_long.py docs/images/long_video.png

A silhouette moves the shape down and up again. Both window modes follow it; a third row leaves the colours of
each window uncorrected.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import world
from PIL import Image

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.sheet import Strip, draw_sheet, spread
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.files import read_json
from mindspeed_mm.generation.pipeline import GenerationResult, VacePipeline
from mindspeed_mm.log import setup_logging
from mindspeed_mm.tasks.generate_videos import check_weights, open_models
from mindspeed_mm.tasks.jobs.generate import GenerateJob

WINDOW, OVERLAP, COUNT = 17, 5, 6
FRAMES = (COUNT - 1) * (WINDOW - OVERLAP) + WINDOW
SCENE = world.make_scene("heldout", 0)  # a red circle
SHOWN = 12
WAYS: dict[str, dict[str, object]] = {
    "extend": {},
    "extend, colours left": {"window_colors": "none"},
    "context windows": {"window_mode": "context_windows"},
}


def silhouette() -> world.Pixels:
    """[FRAMES, H, W, 3]: white on black, down and up again."""
    half = FRAMES // 2 + 1
    down = world.coverage(SCENE, half)
    up = down[::-1][1:]
    plane = np.rint(255 * np.concatenate([down, up])).astype(np.uint8)
    return np.repeat(plane[..., None], 3, axis=-1)


def write_request(folder: Path, base: Path) -> Path:
    """Write the clip, and the base JSON with one task per mode."""
    write_video(folder / "silhouette.mp4", silhouette(), world.FPS, lossless=True)
    shared = {
        "prompt": SCENE.caption,
        "video_path": "silhouette.mp4",
        "num_frames": FRAMES,
        "window": WINDOW,
        "window_overlap": OVERLAP,
    }
    tasks = [{"name": name, **shared, **keys} for name, keys in WAYS.items()]
    path = folder / "long.json"
    path.write_text(json.dumps({**read_json(base), "tasks": tasks}), encoding="utf-8")
    return path


def make_all(job: GenerateJob) -> dict[str, GenerationResult]:
    """Generate one video per mode."""
    pipe = VacePipeline(open_models(job, Accelerator.detect(), check_weights(job).trunk.text_len))
    return {video.name: pipe.generate(video) for video in job.videos}


def facts(name: str, result: GenerationResult) -> str:
    """Drift and seams in one line."""
    found = result.settings["windows"]
    psnr = found["min_seam_psnr"]
    shared = "" if psnr is None else f", shared frames at least {psnr:.1f} dB alike"
    return (
        f"{name}: largest drift {found['max_lab_drift']:.2f} in Lab, "
        f"largest change at a seam {found['max_seam_jump']:.2f} of the usual{shared}"
    )


def draw(results: dict[str, GenerationResult]) -> Image.Image:
    """The control video, and the result of each mode."""
    shown = spread(FRAMES, SHOWN)
    windows = next(iter(results.values())).settings["windows"]["windows"]
    owner = [max(w["window"] for w in windows if w["frames"][0] <= index) + 1 for index in shown]
    labels = [f"{index} · window {number}" for index, number in zip(shown, owner, strict=True)]
    strips = [Strip(name="src_video", pictures=list(silhouette()[shown]), note="control clip")]
    for place, (name, result) in enumerate(results.items()):
        row = Strip(name=name, pictures=list(result.frames[shown]))
        strips.append(replace(row, labels=labels) if place + 1 == len(results) else row)
    lines = [facts(name, result) for name, result in results.items()]
    title = f"{FRAMES} frames in {COUNT} windows of {WINDOW}"
    return draw_sheet(title, strips, facts=lines, caption=SCENE.caption, width=1640, columns=SHOWN)


def main() -> None:
    """Make the videos and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("inference.json"))
    given = parser.parse_args()
    setup_logging()
    with tempfile.TemporaryDirectory() as name:
        job = GenerateJob.from_file(write_request(Path(name), given.config))
        results = make_all(job)
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(results).save(given.picture, optimize=True)


if __name__ == "__main__":
    main()
