"""Draws the sheets that docs/guide/data.md shows, from clips of the tiny world.

`python scripts/guide_pictures.py docs/images`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.vace.tiny.world import COLOURS, FPS, Scene, condition, coverage, render
from mindspeed_mm.data.manifest import read_manifest
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.tools.inspect_samples import main as inspect


def _scene(look: str, *, radius: float, start: float, travel: float) -> Scene:
    colour, shape, direction, tone = look.split()
    return Scene(
        colour=colour,
        shape=shape,
        direction=direction,
        tone=tone,
        vertical=direction in ("left", "right"),
        radius=radius,
        across=0.1,
        start=start,
        travel=travel,
    )


SCENES = {
    "inpaint": _scene("purple circle right dark", radius=0.24, start=0.0, travel=1.0),
    "extension": _scene("yellow cross down light", radius=0.22, start=0.05, travel=0.8),
}
SIZES = {"inpaint": (480, 832), "extension": (832, 480)}


def write_dataset(folder: Path) -> Path:
    """Two clips with everything a row can name; the second one stands upright, at 24 frames a second."""
    rows = []
    for place, (kind, scene) in enumerate(SCENES.items()):
        height, width = SIZES[kind]
        fps = FPS if kind == "inpaint" else 24
        video = render(scene, 33 if kind == "inpaint" else 40, height, width)
        source, mask = condition(scene, kind, video, 0)
        assert source is not None
        assert mask is not None
        write_video(folder / f"videos/{place}.mp4", video, fps)
        write_video(folder / f"src_videos/{place}.mp4", source, fps)
        write_video(folder / f"masks/{place}.mkv", mask, fps, lossless=True)
        row = {"video": f"videos/{place}.mp4", "cap": scene.caption}
        row |= {"src_video": f"src_videos/{place}.mp4", "src_video_mask": f"masks/{place}.mkv"}
        rows.append(row)
    rows[0]["src_ref_images"] = [str(path.relative_to(folder)) for path in write_references(folder / "refs")]
    rows[1] = {
        key: value for key, value in rows[1].items() if key != "src_video"
    }  # the mask then masks the video itself
    (folder / "data.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return folder / "data.json"


def write_references(folder: Path) -> list[Path]:
    """The shape on white, and on nothing (with alpha), tall."""
    folder.mkdir(parents=True)
    still = _scene("purple circle right dark", radius=0.4, start=0.5, travel=0.0)
    alpha = coverage(still, 1, 512, 384)[0][..., None]
    colour = np.array(COLOURS["purple"], np.float32)
    on_white = np.rint(255 * (1 - alpha) + colour * alpha).astype(np.uint8)
    cut_out = np.concatenate([np.broadcast_to(colour, (512, 384, 3)), 255 * alpha], axis=-1).astype(np.uint8)
    Image.fromarray(on_white).save(folder / "front.png")
    Image.fromarray(cut_out).save(folder / "cut_out.png")
    return [folder / "front.png", folder / "cut_out.png"]


def main(target: Path) -> None:
    """Write the pictures."""
    target = target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # so that paths on the sheets are short
        data = write_dataset(Path("my_clips"))
        for row in range(len(read_manifest(data))):
            inspect([str(data), "--index", str(row), "--out", str(target / f"sheet_{row}.png")])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
