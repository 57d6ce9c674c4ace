"""Draws docs/images/tasks/NAME.png for every VACE task.

The rows are the source, src_video and src_mask; references stand at the right.

    python scripts/draw_tasks.py docs/images/tasks [TASK …]

The clip is drawn here: a figure that walks over hills. Tasks that need a network get what the scene knows:
its depth, skeleton and face. So the pictures need no download, and show what a good network's answer becomes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mindspeed_mm.conditioning.annotate import detect
from mindspeed_mm.conditioning.annotate.networks import ANNOTATORS, Annotator, Networks
from mindspeed_mm.conditioning.tasks.catalog import all_tasks
from mindspeed_mm.conditioning.tasks.spec import Clip, Sources, Task, count_bounds
from mindspeed_mm.data.forms import ArrayReader
from mindspeed_mm.data.video_writer import write_video

Pixels = NDArray[np.uint8]
COUNT, HEIGHT, WIDTH = 17, 144, 208
BETWEEN = (188, 194, 204)  # colour between the tiles
TILE = (104, 72)  # width, height
GAP, COLOURS = 3, 48
ONE_IMAGE = ("image_reference", "expand_anything", "swap_anything", "animate_anything")


def joints(number: int) -> dict[str, tuple[float, float]]:
    """Where the figure's joints are in a frame."""
    phase, x = number / COUNT * 4 * np.pi, 48 + 6.5 * number
    swing = 13 * np.sin(phase)
    bob = 2 * abs(np.cos(phase))
    return {
        "nose": (x + 3, 33 - bob),
        "neck": (x, 47 - bob),
        "hip": (x, 84 - bob),
        "left_hand": (x + swing, 78),
        "right_hand": (x - swing, 78),
        "left_elbow": (x + swing / 2 - 3, 64),
        "right_elbow": (x - swing / 2 - 3, 64),
        "left_knee": (x - swing / 2 + 3, 103),
        "right_knee": (x + swing / 2 + 3, 103),
        "left_foot": (x - swing, 123),
        "right_foot": (x + swing, 123),
    }


def scene(number: int) -> tuple[Pixels, NDArray[np.float32], Pixels]:
    """A frame, its disparity, and the figure's mask."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    frame = np.stack([120 + y * 0.4, 160 + y * 0.3, 225 - y * 0.3], axis=-1)
    disparity = np.full((HEIGHT, WIDTH), 0.05, np.float32)
    noise = cv2.GaussianBlur(
        np.random.default_rng(4).normal(size=(HEIGHT, WIDTH)).astype(np.float32), (0, 0), 1.5
    )
    for depth, base, colour in (
        (0.2, 62, (96, 128, 150)),
        (0.4, 86, (88, 140, 92)),
        (0.7, 112, (150, 128, 84)),
    ):
        ridge = base + 10 * np.sin(x / (60 * depth + 20) + 5 * depth) + 4 * np.sin(x / 11 + depth * 9)
        inside = y > ridge
        frame[inside] = (np.array(colour) + 26 * noise[..., None] + (ridge - y)[..., None] * 0.25)[inside]
        disparity[inside] = (depth + 0.3 * (y - ridge) / HEIGHT)[inside]
    place, figure = joints(number), np.zeros((HEIGHT, WIDTH), np.uint8)
    clean = np.ascontiguousarray(frame.clip(0, 255).astype(np.uint8))
    parts = (
        ("neck", "left_elbow", 7, (150, 40, 40)),
        ("left_elbow", "left_hand", 6, (224, 172, 138)),
        ("hip", "left_knee", 9, (40, 50, 90)),
        ("left_knee", "left_foot", 8, (40, 50, 90)),
        ("hip", "right_knee", 9, (52, 64, 116)),
        ("right_knee", "right_foot", 8, (52, 64, 116)),
        ("neck", "hip", 19, (196, 52, 48)),
        ("neck", "right_elbow", 7, (214, 70, 60)),
        ("right_elbow", "right_hand", 6, (236, 188, 152)),
    )
    for start, end, width, colour in parts:
        ends = [tuple(round(v) for v in place[name]) for name in (start, end)]
        for canvas, value in ((clean, colour), (figure, 255)):
            cv2.line(canvas, ends[0], ends[1], value, width, cv2.LINE_AA)
    nose = place["nose"]
    head = (round(nose[0] - 2), round(nose[1]))
    for canvas, value in ((clean, (240, 192, 156)), (figure, 255)):
        cv2.ellipse(canvas, head, (10, 13), 0, 0, 360, value, -1, cv2.LINE_AA)
    cv2.ellipse(clean, (head[0] - 1, head[1] - 7), (11, 8), 0, 180, 360, (70, 44, 30), -1, cv2.LINE_AA)
    for eye in (1, 6):
        cv2.circle(clean, (head[0] + eye, head[1] - 1), 1, (30, 30, 30), -1)
    cv2.line(clean, (head[0] + 1, head[1] + 6), (head[0] + 6, head[1] + 5), (150, 60, 60), 1, cv2.LINE_AA)
    disparity = np.where(figure > 127, 0.95, disparity).astype(np.float32)
    return clean, disparity, np.where(figure > 127, 255, 0).astype(np.uint8)


def skeleton(number: int, part: str) -> Pixels:
    """What a whole-body network's points are drawn as."""
    place = joints(number)
    x, y = place["nose"]
    points = np.zeros((133, 3), np.float32)
    body = [(x, y), (x + 2, y - 2), (x - 3, y - 2), (x + 5, y), (x - 8, y)]
    neck = place["neck"]
    body += [(neck[0] + 7, neck[1] + 3), (neck[0] - 7, neck[1] + 3)]
    body += [place[name] for name in ("left_elbow", "right_elbow", "left_hand", "right_hand")]
    hip = place["hip"]
    body += [(hip[0] + 5, hip[1]), (hip[0] - 5, hip[1])]
    body += [place[name] for name in ("left_knee", "right_knee", "left_foot", "right_foot")]
    points[:17] = [(*point, 1) for point in body]
    turn = np.linspace(0, 2 * np.pi, 68)
    points[23:91] = np.stack([x - 2 + 10 * np.cos(turn), y + 13 * np.sin(turn), np.ones(68)], axis=1)
    canvas = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    detect._draw_body(canvas, points)
    if part == "body_face":
        detect._draw_face(canvas, points[detect._FACE])
    return canvas


class Scenes:
    """The clip with all that is known of it, in place of networks."""

    def __init__(self) -> None:
        made = [scene(number) for number in range(COUNT)]
        self.frames = np.stack([frame for frame, _, _ in made])
        self.disparities = [disparity for _, disparity, _ in made]
        self.masks = np.stack([mask for _, _, mask in made])

    def open(self, networks: Networks, kind: str) -> Any:
        """What stands for `Networks.open`."""
        return {
            "depth": lambda frame: self.disparities[self.number(frame)],
            "pose": lambda frame, part: skeleton(self.number(frame), part),
            "face": lambda frame: self.face(self.number(frame)),
            "ground": lambda frame, text: self.box(self.number(frame)),
        }[kind]

    def number(self, frame: Pixels) -> int:
        """Which frame of the clip this is."""
        return int(np.argmin([np.abs(frame.astype(int) - own).sum() for own in self.frames.astype(int)]))

    def face(self, number: int) -> tuple[float, float, float, float]:
        """The box of the figure's head."""
        x, y = joints(number)["nose"]
        return x - 14, y - 16, x + 10, y + 14

    def box(self, number: int) -> tuple[float, float, float, float]:
        """The box of the figure."""
        rows, columns = np.nonzero(self.masks[number])
        return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def options_of(task: Task, scenes: Scenes, folder: Path) -> dict[str, Any]:
    """Options with which the task shows itself."""
    fields, box = task.options.model_fields, list(scenes.box(0))
    found: dict[str, Any] = {}
    if "mode" in fields and "mode" not in task.fixed:
        found["mode"] = {
            "frameref": "firstlastframe",
            "clipref": "firstlastclip",
            "framerefext": "firstlast",
            "expand_anything": "salient",
            "swap_anything": "masktrack,bboxtrack",
            "image_inpainting": "mask",
        }.get(
            task.name, "bboxtrack" if task.family == "reference" or "anything" in task.name else "masktrack"
        )
    mode = str(task.fixed.get("mode", found.get("mode", "")))
    if "mask" in fields and "mask" in mode:
        found["mask"] = str(
            folder / ("masks.mkv" if mode == "mask" and task.needs == ("clip",) else "mask.png")
        )
    if "bbox" in fields and "bbox" in mode:
        found["bbox"] = [box, list(scenes.box(COUNT - 1))] if task.name == "reference_anything" else [box]
    if "image_bbox" in fields:
        found["image_bbox"] = [box]
    if mode in ("label", "caption"):
        found[mode] = "walker"
    if task.name in ("layout_bbox", "move_anything"):
        found |= {"bbox": [[20, 40, 80, 120], [120, 30, 190, 110]], "label": "walker"}
    sizes = {"num_frames": 17, "height": HEIGHT, "width": WIDTH} if task.name == "layout_bbox" else {}
    found |= sizes
    if "expand_num" in fields:
        found["expand_num"] = 12
    if "references" in fields:
        found["references"] = 2
    if task.name == "inpainting_random":
        found["shapes"] = {"strokes": 1}
    if task.name == "composition":
        found |= {"process_type_1": "repaint", "process_type_2": "control"}
        found |= {"video_1": str(folder / "hole.mkv"), "mask_1": str(folder / "masks.mkv")}
        found |= {"video_2": str(folder / "edges.mkv"), "mask_2": str(folder / "white.png")}
    return {key: value for key, value in found.items() if key in fields}


def tile(picture: Pixels) -> Pixels:
    """One small picture, letterboxed."""
    scale = min(TILE[0] / picture.shape[1], TILE[1] / picture.shape[0])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    small = np.atleast_3d(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
    canvas = np.full((TILE[1], TILE[0], 3), BETWEEN, np.uint8)
    top, left = (TILE[1] - size[1]) // 2, (TILE[0] - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = small
    return canvas


def picture_of(task: Task, scenes: Scenes, folder: Path) -> Image.Image:
    """Source, src_video and src_mask in rows of three; references at the right."""
    clip = Clip(ArrayReader(scenes.frames))
    half = Clip(ArrayReader(scenes.frames[:4])), Clip(ArrayReader(scenes.frames[-4:]))
    clips = {0: (), 1: (half[0] if "clip" in task.name else clip,), 2: half}[
        min(2, count_bounds(task.needs, "clip")[1])
    ]
    most = count_bounds(task.needs, "image")[1]
    images = tuple(scenes.frames[[0, -1]][: min(most, 1 if task.name in ONE_IMAGE else 2)])
    options = task.parse(options_of(task, scenes, folder), task.name)
    sources = Sources(clips=clips, images=images, names=tuple("ab"[: len(images)]))
    prepared = task.prepare(sources, options)
    steps = list(prepared.read())
    rows = [list(images) if images and not clips else [frame for each in clips for frame in each.frames()]]
    rows += [[frame for frame, _ in steps], [mask for _, mask in steps if mask is not None]]
    shown = [[row[0], row[len(row) // 2], row[-1]] if len(row) > 2 else row for row in rows if row]
    references = list(prepared.references)
    across = max(map(len, shown), default=0)
    down = max(len(shown), len(references))
    canvas = np.full(
        (down * (TILE[1] + GAP) - GAP, (across + bool(references)) * (TILE[0] + GAP) - GAP, 3),
        BETWEEN,
        np.uint8,
    )
    placed = [(r, c, picture) for r, row in enumerate(shown) for c, picture in enumerate(row)]
    for row, column, picture in [*placed, *((r, across, picture) for r, picture in enumerate(references))]:
        top, left = row * (TILE[1] + GAP), column * (TILE[0] + GAP)
        canvas[top : top + TILE[1], left : left + TILE[0]] = tile(picture)
    return Image.fromarray(canvas).quantize(COLOURS, dither=Image.Dither.NONE)


def write_sources(scenes: Scenes, folder: Path) -> None:
    """The masks and clips that options name."""
    folder.mkdir(parents=True, exist_ok=True)
    masks = np.repeat(scenes.masks[..., None], 3, axis=-1)
    Image.fromarray(masks[0]).save(folder / "mask.png")
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 255, np.uint8)).save(folder / "white.png")
    edges = np.stack([np.repeat(cv2.Canny(frame, 80, 200)[..., None], 3, axis=-1) for frame in scenes.frames])
    hole = np.where(masks > 127, 128, scenes.frames)
    for name, frames in (("masks", masks), ("hole", hole), ("edges", edges)):
        write_video(folder / f"{name}.mkv", frames.astype(np.uint8), 16, lossless=True)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description="Draw a picture of every VACE task.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("tasks", nargs="*", help="names of tasks (default: all)")
    parser.add_argument("--scratch", type=Path, default=Path("outputs/draw_tasks"), help="folder for sources")
    given = parser.parse_args()
    scenes = Scenes()
    write_sources(scenes, given.scratch)
    Networks.open = lambda networks, kind: scenes.open(networks, kind)  # type: ignore[method-assign]
    ANNOTATORS.add("ground", Annotator((), "", ""))
    given.folder.mkdir(parents=True, exist_ok=True)
    for task in all_tasks():
        if not given.tasks or task.name in given.tasks:
            picture_of(task, scenes, given.scratch).save(given.folder / f"{task.name}.png", optimize=True)


if __name__ == "__main__":
    main()
