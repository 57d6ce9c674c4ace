"""Draw the strip of pictures in the README: five tasks side by side, inputs above the tiny model's outputs.

python examples/vace/tiny/draw_strip.py docs/images/tasks.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from draw_kinds import KINDS, write_request, write_sources
from PIL import Image, ImageDraw

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.fonts import TextRenderer
from mindspeed_mm.data.sheet import spread
from mindspeed_mm.generation.outputs import condition_strips
from mindspeed_mm.generation.pipeline import GenerationResult, VacePipeline
from mindspeed_mm.log import setup_logging
from mindspeed_mm.tasks.generate_videos import check_weights, open_models
from mindspeed_mm.tasks.jobs.generate import GenerateJob

PANELS = {
    "inpaint": "Repaint what is masked",
    "control_reference": "Move a picture along a clip",
    "outpaint": "Widen the frame",
    "first_last": "Fill between two frames",
    "extension": "Continue a clip",
}
SHOWN, CELL, GAP, MARGIN, HEAD, FOOT = 3, 100, 6, 24, 36, 30
PAPER, INK, FAINT, GRAY = "#fcfbf9", "#202020", "#707070", 128


def given_frames(result: GenerationResult, indices: list[int]) -> list[np.ndarray]:
    """The model's inputs at these frames: masked regions in gray, a reference in place of the first frame."""
    rows = {strip.name: list(strip.pictures) for strip in condition_strips(result.conditions, indices)}
    frames = rows["src_video"]
    masks = rows.get("src_mask", [np.zeros_like(frame) for frame in frames])
    shown = [np.where(mask > 127, np.uint8(GRAY), frame) for frame, mask in zip(frames, masks, strict=True)]
    return [rows["references"][0], *shown[1:]] if "references" in rows else shown


def draw_strip(results: dict[str, GenerationResult]) -> Image.Image:
    """One panel per result, in order: a title, a row of inputs, a row of outputs."""
    panel = SHOWN * CELL + (SHOWN - 1) * GAP
    width = 2 * MARGIN + len(results) * panel + (len(results) - 1) * MARGIN
    image = Image.new("RGB", (width, 2 * MARGIN + HEAD + 2 * CELL + GAP + FOOT), PAPER)
    draw, title, small = ImageDraw.Draw(image), TextRenderer(20), TextRenderer(14)
    for number, (name, result) in enumerate(results.items()):
        left, top = MARGIN + number * (panel + MARGIN), MARGIN
        title.draw(draw, (left, top), PANELS[name], panel, INK)
        indices = spread(len(result.frames), SHOWN)
        for row, frames in enumerate((given_frames(result, indices), list(result.frames[indices]))):
            y = top + HEAD + row * (CELL + GAP)
            for column, frame in enumerate(frames):
                cell = Image.fromarray(frame).resize((CELL, CELL), Image.Resampling.BICUBIC)
                image.paste(cell, (left + column * (CELL + GAP), y))
        prompt = KINDS[name].prompt
        small.draw(draw, (left, top + HEAD + 2 * CELL + GAP + 8), prompt, panel + MARGIN, FAINT)
    return image


def main() -> None:
    """Make the five videos and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path, help="the .png to write")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("inference.json"))
    given = parser.parse_args()
    setup_logging()
    with tempfile.TemporaryDirectory() as name:
        write_sources(Path(name))
        job = GenerateJob.from_file(write_request(Path(name), given.config))
        pipe = VacePipeline(open_models(job, Accelerator.detect(), check_weights(job).trunk.text_len))
        requests = {video.name: video for video in job.videos}
        draw_strip({kind: pipe.generate(requests[kind]) for kind in PANELS}).save(
            given.picture, optimize=True
        )


if __name__ == "__main__":
    main()
