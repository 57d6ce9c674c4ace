"""Draw what the model is shown for each kind of task, from one clip: the picture of docs/guide/generate.md.

python examples/vace/inference/draw_kinds.py CLIP.mp4 SILHOUETTE.mp4 REFERENCE.png OUT.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mindspeed_mm.data.sheet import Strip, draw_sheet, spread
from mindspeed_mm.data.video import open_video
from mindspeed_mm.generation.config import SamplingConfig
from mindspeed_mm.generation.inputs import Conditions, Inputs, load_conditions
from mindspeed_mm.generation.writer import mask_frames, picture_frames


def kinds(clip: Path, control: Path, image: Path, size: SamplingConfig) -> dict[str, Inputs]:
    """One request of each kind."""
    frames = open_video(clip).read(range(size.num_frames))
    box = np.zeros((size.num_frames, size.height, size.width), np.uint8)
    box[:, size.height // 4 : -size.height // 4, size.width // 4 : -size.width // 4] = 255
    return {
        "reference": Inputs(src_ref_images=[image]),
        "control video": Inputs(src_video=control),
        "control + reference": Inputs(src_video=control, src_ref_images=[image]),
        "inpaint": Inputs(src_video=clip, src_mask=box),
        "inpaint + reference": Inputs(src_video=clip, src_mask=box, src_ref_images=[image]),
        "outpaint": Inputs(src_video=clip, outpaint=(0.5, 0.25, 0.5, 0.25)),
        "first frame": Inputs(first_frame=frames[0]),
        "first and last": Inputs(first_frame=frames[0], last_frame=frames[-1]),
        "clip goes on": Inputs(first_frame=frames[:5]),
    }


def strips(name: str, shown: Conditions, columns: list[int]) -> list[Strip]:
    """References, src_video and mask of one kind."""
    rows = []
    if shown.src_ref_images:
        rows.append(
            Strip(name=name, note="src_ref_images", pictures=[picture_frames(r)[0] for r in shown.src_ref_images])
        )
    if shown.src_video is not None:
        rows.append(Strip(name=name, note="src_video", pictures=list(picture_frames(shown.src_video[:, columns]))))
    if shown.src_mask is not None:
        pictures = list(mask_frames(shown.src_mask[:, columns]))
        rows.append(Strip(name=name, note="src_mask", pictures=pictures, crisp=True))
    return rows


def main() -> None:
    """Read the sources, draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("clip", "control", "image", "out"):
        parser.add_argument(name, type=Path)
    paths = parser.parse_args()
    reader = open_video(paths.clip)
    size = SamplingConfig(height=reader.height, width=reader.width, num_frames=reader.num_frames, fps=reader.fps)
    columns = spread(size.num_frames, 8)
    rows = [
        strip
        for name, inputs in kinds(paths.clip, paths.control, paths.image, size).items()
        for strip in strips(name, load_conditions(inputs, size), columns)
    ]
    facts = ["mask: white = generate, black = keep; grey in src_video = nothing given"]
    draw_sheet("What the model is shown", rows, facts=facts, width=1240).save(paths.out, optimize=True)


if __name__ == "__main__":
    main()
