"""Draw the pictures of docs/guide/generate.md: one small sheet per kind of task, with the tiny weights.

    python examples/vace/tiny/draw_kinds.py docs/images

A sheet shows the keys of the request, the model's inputs and its output. To use other weights or settings,
pass any inference JSON as `--config`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import world
from PIL import Image

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.sheet import Strip, draw_sheet, spread
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.files import read_json
from mindspeed_mm.generation.outputs import condition_strips
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.log import setup_logging
from mindspeed_mm.tasks.generate_videos import check_weights, open_models
from mindspeed_mm.tasks.jobs.generate import GenerateJob

SCENE = world.make_scene("heldout", 0)  # a red circle moves down
OTHER = world.make_scene("heldout", 1)  # a yellow one
SHOWN = 8  # frames of a clip on a sheet


@dataclass(frozen=True)
class Kind:
    """One kind of task: the keys of its request, as the guide has them."""

    title: str
    prompt: str
    keys: dict[str, object] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """The request as a JSON object."""
        return json.dumps({"prompt": self.prompt, **self.keys})


KINDS = {
    "text": Kind("Text to video", SCENE.caption),
    "reference": Kind("Reference image", SCENE.caption_without_look, {"image_path": "yellow_circle.png"}),
    "control": Kind("Control video", SCENE.caption, {"video_path": "silhouette.mp4"}),
    "control_reference": Kind(
        "Control video and reference image",
        SCENE.caption_without_look,
        {"video_path": "silhouette.mp4", "image_path": "yellow_circle.png"},
    ),
    "inpaint": Kind(
        "Inpaint", SCENE.recoloured().caption, {"video_path": "clip.mp4", "mask_path": "mask.mp4"}
    ),
    "inpaint_reference": Kind(
        "Inpaint with a reference image",
        SCENE.caption_without_look,
        {"video_path": "clip.mp4", "mask_path": "mask.mp4", "image_path": "yellow_circle.png"},
    ),
    "outpaint": Kind(
        "Outpaint", SCENE.caption, {"video_path": "middle.mp4", "outpaint": [0.3, 0.3, 0.3, 0.3]}
    ),
    "first_frame": Kind("First frame", SCENE.caption, {"first_frame_path": "first.png"}),
    "first_last": Kind(
        "First and last frame",
        SCENE.caption,
        {"first_frame_path": "first.png", "last_frame_path": "last.png"},
    ),
    "extension": Kind("Extend a clip", SCENE.caption, {"first_frame_path": "beginning.mp4"}),
    "first_frame_reference": Kind(
        "First frame and reference image",
        SCENE.caption,
        {"first_frame_path": "first.png", "image_path": "red_circle.png"},
    ),
}


def write_sources(folder: Path) -> None:
    """Write every file that the requests name."""
    clip = world.render(SCENE)
    silhouette, _ = world.condition(SCENE, "silhouette", clip, 0)
    _, mask = world.condition(SCENE, "inpaint", clip, 0)
    assert silhouette is not None
    assert mask is not None
    edge = world.SIDE // 5
    clips = {"clip": clip, "silhouette": silhouette, "mask": mask, "beginning": clip[:5]}
    clips["middle"] = np.ascontiguousarray(clip[:, edge:-edge, edge:-edge])
    for name, frames in clips.items():
        write_video(folder / f"{name}.mp4", frames, world.FPS, lossless=True)
    pictures = {"first": clip[0], "last": clip[-1]}
    pictures |= {"red_circle": world.reference_image(SCENE), "yellow_circle": world.reference_image(OTHER)}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")


def write_request(folder: Path, base: Path) -> Path:
    """Write the base JSON with one task per kind."""
    tasks = [{"name": name, "prompt": kind.prompt, **kind.keys} for name, kind in KINDS.items()]
    path = folder / "kinds.json"
    settings = read_json(base)
    path.write_text(json.dumps({**settings, "tasks": tasks}), encoding="utf-8")
    return path


def sheets(job: GenerateJob) -> dict[str, Image.Image]:
    """One sheet for each video of the job."""
    pipe = VacePipeline(open_models(job, Accelerator.detect(), check_weights(job).trunk.text_len))

    def make(video: GenerationRequest) -> Image.Image:
        kind = KINDS[video.name]
        result = pipe.generate(video)
        shown = spread(len(result.frames), SHOWN)
        strips = [
            *condition_strips(result.conditions, shown),
            Strip(name="output", pictures=list(result.frames[shown])),
        ]
        return draw_sheet(kind.title, strips, caption=kind.recipe, width=1000, columns=SHOWN)

    return {video.name: make(video) for video in job.videos}


def main() -> None:
    """Write the sources, generate every kind, draw the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where generate_KIND.png go")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("inference.json"))
    given = parser.parse_args()
    setup_logging()
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        write_sources(Path(name))
        for kind, sheet in sheets(GenerateJob.from_file(write_request(Path(name), given.config))).items():
            sheet.save(given.folder / f"generate_{kind}.png", optimize=True)


if __name__ == "__main__":
    main()
