"""Score generated clips of the tiny world from their mp4 files: did the model follow the request?

    python examples/vace/tiny/score.py RESULTS [RESULTS ...]     one table column for each folder of mp4 files

masked PSNR   PSNR inside the inpaint box, against the true clip
kept PSNR     PSNR outside that box
first frame   PSNR of the frame that extension keeps
IoU           coloured pixels against the true silhouette
colour        the nearest of the five colours is the requested one
shape         the nearest of the four shapes is the requested one, at any position
reference     colour and shape match the reference image
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import world
from numpy.typing import NDArray

from mindspeed_mm.data.psnr import psnr_of
from mindspeed_mm.data.video import open_video

SHAPE_IOU = 0.8  # lowest IoU that counts as a shape; shapeless blobs stay below 0.7
NAME = re.compile(r"heldout_(?P<index>\d+)_(?P<kind>[a-z]+)(?:_(?P<colour>[a-z]+))?")


@dataclass(frozen=True)
class Score:
    """The scores of one clip; None where a measure does not apply to its kind."""

    name: str
    kind: str
    changed: bool  # requested in another colour than the source's
    colour_obeyed: bool
    shape_obeyed: bool
    iou: float
    masked_psnr: float | None = None
    kept_psnr: float | None = None
    first_frame_psnr: float | None = None


def score_clip(path: Path, colour: str | None = None) -> Score | None:
    """The score of one mp4, or None when its name is not that of a held-out request.

    `colour`: what heldout.py painted every scene in.
    """
    match = NAME.fullmatch(path.stem)
    if match is None:
        return None
    index, kind = int(match["index"]), match["kind"]
    scene = world.make_scene("heldout", index, colour)
    output = _read(path)
    truth = world.render(scene, *output.shape[:3])
    inside = world.coverage(scene, *output.shape[:3]) > 0.5
    _, mask = world.condition(scene, kind, truth, index)
    changed = match["colour"] is not None
    masked = kept = first = None
    if kind == "inpaint" and mask is not None:
        box = mask[..., 0] > 127
        masked = None if changed else psnr(output[box], truth[box])
        kept = psnr(output[~box], truth[~box])
    if kind == "extension":
        first = psnr(output[0], truth[0])
    requested = match["colour"] or scene.colour
    coloured = is_coloured(output, requested)
    return Score(
        name=path.stem,
        kind=kind,
        changed=changed,
        colour_obeyed=nearest_colour(output, coloured, world.PAINTS if colour else world.COLOURS)
        == requested,
        shape_obeyed=nearest_shape(coloured) == scene.shape,
        iou=float((coloured & inside).sum() / max(1, (coloured | inside).sum())),
        masked_psnr=masked,
        kept_psnr=kept,
        first_frame_psnr=first,
    )


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """PSNR of two arrays of pixels in dB, at most 99."""
    return psnr_of(float(np.square(found.astype(np.float32) - expected).mean(dtype=np.float64)))


def is_coloured(frames: world.Pixels, colour: str) -> NDArray[np.bool_]:
    """[T, H, W] mask of the pixels with more than half the chroma of `colour`.

    Grays have no chroma; the pixels of an outline have part of it.
    """
    return _chroma(frames) > _chroma(np.array(world.PAINTS[colour])) / 2


def nearest_colour(
    frames: world.Pixels, where: NDArray[np.bool_], among: Mapping[str, tuple[int, ...]] = world.COLOURS
) -> str | None:
    """The colour nearest to the median of the pixels in `where`; None when nothing is coloured."""
    if where.sum() < 20:
        return None
    middle = np.median(frames[where].astype(np.float64), axis=0)
    return min(among, key=lambda name: float(np.square(middle - np.array(among[name])).sum()))


def nearest_shape(where: NDArray[np.bool_]) -> str | None:
    """The world's shape closest to the mask `where` [T, H, W]; None when it is empty or matches no shape."""
    frames = [frame for frame in where if frame.sum() >= 20]
    overlaps = {
        shape: sum(_shape_iou(frame, shape) for frame in frames) / len(where) for shape in world.SHAPES
    }
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= SHAPE_IOU else None


def _shape_iou(frame: NDArray[np.bool_], shape: str) -> float:
    """IoU of the mask of a frame with a shape of the same area and centre of mass."""
    unit, offset = _unit(shape)
    radius = math.sqrt(frame.sum() / unit)
    there = world.drawn(shape, (_centre(frame) - offset * radius)[None], radius, *frame.shape)[0] > 0.5
    return float((frame & there).sum() / (frame | there).sum())


@cache
def _unit(shape: str) -> tuple[float, NDArray[np.float32]]:
    """Area and centre of mass of a shape of radius 1; a triangle's centre of mass is off its centre."""
    model = world.drawn(shape, np.full((1, 2), 64, np.float32), 32, 128, 128)[0] > 0.5
    return model.sum() / 32**2, (_centre(model) - 64) / 32


def _centre(frame: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(x, y) centre of mass of the pixels that are set."""
    y, x = np.nonzero(frame)
    return np.array([x.mean() + 0.5, y.mean() + 0.5], np.float32)


def table(columns: dict[str, Sequence[Score]]) -> str:
    """A Markdown table with one row per measure and one column per folder."""
    rows: list[tuple[str, str, list[float | None]]] = []

    def add(title: str, unit: str, values: Iterable[Sequence[float]]) -> None:
        rows.append((title, unit, [float(np.mean(v)) if len(v) else None for v in values]))

    scores = list(columns.values())
    for title, field in (
        ("inpaint: masked PSNR", "masked_psnr"),
        ("inpaint: kept PSNR", "kept_psnr"),
        ("extension: first frame PSNR", "first_frame_psnr"),
    ):
        add(
            title,
            "dB",
            ([getattr(s, field) for s in found if getattr(s, field) is not None] for found in scores),
        )
    for kind in ("silhouette", "edge"):
        add(f"{kind}: IoU", "", ([s.iou for s in found if s.kind == kind] for found in scores))
    captioned = ("inpaint", "silhouette", "edge")
    add(
        "colour obeyed",
        "%",
        (
            [100.0 * s.colour_obeyed for s in found if s.kind in captioned and not s.changed]
            for found in scores
        ),
    )
    add(
        "changed colour obeyed",
        "%",
        ([100.0 * s.colour_obeyed for s in found if s.kind in captioned and s.changed] for found in scores),
    )
    add(
        "shape obeyed",
        "%",
        ([100.0 * s.shape_obeyed for s in found if s.kind in (*captioned, "extension")] for found in scores),
    )
    for look in ("colour", "shape"):
        add(
            f"reference: {look}",
            "%",
            (
                [100.0 * getattr(s, f"{look}_obeyed") for s in found if s.kind == "reference"]
                for found in scores
            ),
        )
    lines = ["| | " + " | ".join(columns) + " |", "|-|" + "-|" * len(columns)]
    for title, unit, values in rows:
        cells = ["–" if v is None else f"{v:.2f}" if not unit else f"{v:.1f} {unit}" for v in values]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def score_folder(folder: Path, colour: str | None = None) -> list[Score]:
    """Scores of all held-out requests in a folder of results, by name."""
    return [s for path in sorted(folder.rglob("*.mp4")) if (s := score_clip(path, colour)) is not None]


def _read(path: Path) -> world.Pixels:
    reader = open_video(path)
    return reader.read(range(reader.num_frames))


def _chroma(frames: NDArray[Any]) -> NDArray[np.int16]:
    """max − min of the channels of every pixel."""
    wide = frames.astype(np.int16)
    return wide.max(-1) - wide.min(-1)


def main() -> None:
    """Print a table with one column for each folder."""
    parser = argparse.ArgumentParser(
        description="Score generated clips of the tiny world from their mp4 files."
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", help="folders of results; their names head the columns"
    )
    parser.add_argument("--colour", choices=world.PAINTS, help="what heldout.py painted every shape in")
    given = parser.parse_args()
    found = {folder.name: score_folder(folder, given.colour) for folder in given.folders}
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
