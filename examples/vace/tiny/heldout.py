"""Write held-out scenes, their data.json, and the requests to generate from them.

    python examples/vace/tiny/heldout.py OUT --base examples/vace/tiny/inference.json --count 4
    python examples/vace/inference/Wan-VACE-Inference.py OUT/inference.json --output_path OUT/results

inference.json requests the scenes' own colours, changed.json other colours, all.json both. The name of a
result says what was requested, for example heldout_00003_inpaint or heldout_00003_inpaint_blue; score.py
needs nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import world

from mindspeed_mm.files import read_json

KINDS = ("inpaint", "silhouette", "edge", "extension", "outpaint", "reference")


def heldout_indices(count: int) -> list[int]:
    """Indices of `count` held-out scenes that cycle through the world's shapes."""
    numbers = itertools.count()
    shapes = itertools.islice(itertools.cycle(world.SHAPES), count)
    return [next(n for n in numbers if world.make_scene("heldout", n).shape == shape) for shape in shapes]


def write_requests(folder: Path, base: Path, count: int, kinds: list[str], colour: str | None = None) -> None:
    """Write clips under `folder`, their data.json, and three inference JSONs with one task per request."""
    rows: list[dict[str, Any]] = []
    tasks: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    indices = heldout_indices(count + len(kinds) - 1)
    for number, kind in enumerate(
        kinds
    ):  # each kind starts one scene later, so that a few scenes cover many shapes
        for index in indices[number : number + count]:
            scene = world.make_scene("heldout", index, colour)
            clip = world.Clip(index=index, kind=kind, split="heldout")
            row = world.write_clip(folder, clip, scene)
            rows.append(row)
            tasks.append(_task(folder, clip.name, str(row["cap"]), row))
            other = scene.recoloured()
            name = f"{clip.name}_{other.colour}"
            if kind == "reference":  # another picture: the caption names no colour
                row = world.write_clip(folder, world.Clip(index=index, kind=kind, split="recoloured"), other)
                changed.append(_task(folder, name, str(row["cap"]), row))
            elif kind in ("inpaint", "silhouette", "edge"):  # another caption for the same clip
                changed.append(_task(folder, name, other.caption, row))
    (folder / "data.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    settings = read_json(base)
    files = {"inference.json": tasks, "changed.json": changed, "all.json": [*changed, *tasks]}
    for name, requests in files.items():
        (folder / name).write_text(json.dumps({**settings, "tasks": requests}, indent=1), encoding="utf-8")


def _task(folder: Path, name: str, prompt: str, row: dict[str, Any]) -> dict[str, Any]:
    task: dict[str, Any] = {"name": name, "prompt": prompt}
    for key, source in (("video_path", "src_video"), ("mask_path", "src_video_mask")):
        if source in row:
            task[key] = str((folder / row[source]).resolve())
    if "src_ref_images" in row:
        task["image_paths"] = [str((folder / name).resolve()) for name in row["src_ref_images"]]
    return task


def main() -> None:
    """Write held-out requests."""
    parser = argparse.ArgumentParser(
        description="Write held-out scenes and the inference JSONs that ask for them."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--base", type=Path, required=True, help="inference JSON with model paths and settings"
    )
    parser.add_argument("--count", type=int, default=4, help="scenes of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--colour", choices=world.PAINTS, help="of every shape (default: each scene's own)")
    given = parser.parse_args()
    write_requests(given.folder, given.base, given.count, given.kinds, given.colour)


if __name__ == "__main__":
    main()
