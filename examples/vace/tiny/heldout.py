"""Write held-out scenes and the inference JSON that asks for each of them, with the true caption and with a changed one.

    python examples/vace/tiny/heldout.py OUT --base examples/vace/tiny/inference.json --count 4 --recoloured
    python examples/vace/inference/Wan-VACE-Inference.py OUT/inference.json --output_path OUT/results

Names of the results say what was asked, so that score.py needs nothing else: heldout_00003_inpaint, heldout_00003_inpaint_blue.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import world

KINDS = ("inpaint", "silhouette", "edge", "extension", "outpaint", "reference")


def write_requests(folder: Path, base: Path, count: int, kinds: list[str], *, recoloured: bool) -> Path:
    """Clips under `folder` and `folder/inference.json`: the base JSON with one task a request. Returns the JSON's path."""
    tasks: list[dict[str, Any]] = []
    for index in range(count):
        scene = world.make_scene("heldout", index)
        for kind in kinds:
            clip = world.Clip(index=index, kind=kind, split="heldout")
            row = world.write_clip(folder, clip, scene)
            tasks.append(_task(folder, clip.name, str(row["cap"]), row))
            if recoloured and kind == "reference":  # the picture is changed instead: the caption names no colour
                other = world.Clip(index=index, kind=kind, split="recoloured")
                changed = world.write_clip(folder, other, scene.recoloured())
                tasks.append(_task(folder, f"{clip.name}_{scene.recoloured().colour}", str(changed["cap"]), changed))
            elif recoloured and kind in ("inpaint", "silhouette", "edge"):
                other_scene = scene.recoloured()
                tasks.append(_task(folder, f"{clip.name}_{other_scene.colour}", other_scene.caption, row))
    settings = json.loads(base.read_text(encoding="utf-8"))
    path = folder / "inference.json"
    path.write_text(json.dumps({**settings, "tasks": tasks}, indent=1), encoding="utf-8")
    return path


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
    parser = argparse.ArgumentParser(description="Write held-out scenes and the inference JSON that asks for them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="inference JSON with model paths and settings")
    parser.add_argument("--count", type=int, default=4, help="scenes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--recoloured", action="store_true", help="also ask for each in another colour")
    given = parser.parse_args()
    write_requests(given.folder, given.base, given.count, given.kinds, recoloured=given.recoloured)


if __name__ == "__main__":
    main()
