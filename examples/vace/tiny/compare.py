"""Draw held-out requests in one picture: inputs, each model's output, and the output in another colour.

python examples/vace/tiny/compare.py HELDOUT OUT.png before=RESULTS after=RESULTS shipped=RESULTS
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from score import NAME

from mindspeed_mm.data.sheet import Picture, Strip, draw_sheet
from mindspeed_mm.data.video import open_video
from mindspeed_mm.files import read_json

TITLES = {
    "inpaint": "Inpaint: fill the gray box",
    "silhouette": "Silhouette: paint the shape",
    "edge": "Edges: paint what they outline",
    "extension": "Extension: continue from the first frame",
    "outpaint": "Outpaint: complete the border",
    "reference": "Reference: move the pictured object",
}


def draw(heldout: Path, columns: dict[str, Path]) -> Image.Image:
    """One row per kind, each showing its first scene; two frames of every clip."""
    tasks: list[dict[str, Any]] = []
    for name in ("inference.json", "changed.json"):
        tasks += read_json(heldout / name)["tasks"]
    strips = []
    has_changed = False
    for kind in TITLES:
        matched = [
            (match, task)
            for task in tasks
            if (match := NAME.fullmatch(task["name"])) and match["kind"] == kind
        ]
        plain = [task for match, task in matched if not match["colour"]]
        if not plain:
            continue
        task = plain[0]
        changed = [
            other
            for match, other in matched
            if match["colour"]
            and other["name"].startswith(task["name"] + "_")
            and (list(columns.values())[-1] / f"{other['name']}.mp4").is_file()
        ]
        has_changed = has_changed or bool(changed)
        strips.append(_strip(TITLES[kind], task, changed[0] if changed else None, columns))
    return draw_sheet(
        "The tiny world: what was given, and what came out",
        strips,
        facts=[
            "Held-out scenes. Two frames of each clip: the first and a late one."
            + (" Right: the same request in another colour." if has_changed else "")
        ],
        columns=2 * (len(columns) + 1 + has_changed),
    )


def _strip(
    title: str, task: dict[str, Any], changed: dict[str, Any] | None, columns: dict[str, Path]
) -> Strip:
    pictures, labels = _given(task), ["given", ""]
    for name, folder in columns.items():
        pictures += _two_frames(folder / f"{task['name']}.mp4")
        labels += [name, ""]
    if changed is not None:
        folder = list(columns.values())[-1]
        pictures += _two_frames(folder / f"{changed['name']}.mp4")
        labels += [_changes(task, changed), ""]
    return Strip(name=title, pictures=pictures, labels=labels, note=task["prompt"], crisp=True)


def _changes(task: dict[str, Any], changed: dict[str, Any]) -> str:
    new = [word for word in changed["prompt"].split() if word not in task["prompt"].split()]
    return f"requested: {' '.join(new)}" if new else "another picture"


def _given(task: dict[str, Any]) -> list[Picture]:
    if "video_path" in task:
        return _two_frames(Path(task["video_path"]))
    picture = np.asarray(Image.open(task["image_paths"][0]).convert("RGB"))
    return [picture, np.full_like(picture, 255)]


def _two_frames(path: Path) -> list[Picture]:
    reader = open_video(path)
    return list(reader.read([0, reader.num_frames - 4]))


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description="Draw held-out requests and what each model made of them.")
    parser.add_argument("heldout", type=Path, help="folder that heldout.py wrote")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument(
        "columns",
        nargs="+",
        metavar="NAME=FOLDER",
        help="results; the last one also shows the changed requests",
    )
    given = parser.parse_args()
    columns = {name: Path(folder) for name, _, folder in (item.partition("=") for item in given.columns)}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw(given.heldout, columns).save(given.out)


if __name__ == "__main__":
    main()
