"""A small deterministic world of moving shapes, written as real mp4 clips in the guide's dataset layout.

A scene is one coloured shape that moves in a straight line over a gray gradient. It depends on (split, index)
only, so two machines write the same dataset. Each VACE condition that needs no neural annotator is a "kind":

    plain        no condition                              silhouette   white shape on black, moving
    inpaint      a moving box is masked and grayed         edge         white outline on black
    outpaint     all but the middle is masked              extension    all frames but the first are masked
    reference    one image of the shape on white

    python examples/vace/tiny/world.py OUT --split train --count 600 --kinds inpaint silhouette edge
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mindspeed_mm.data.video_writer import write_video

Pixels = NDArray[np.uint8]  # [T, H, W, 3]
Coverage = NDArray[np.float32]  # [T, H, W], how much of a pixel the shape covers

FRAMES, SIDE, FPS = 17, 64, 16
KINDS = ("plain", "inpaint", "silhouette", "edge", "extension", "outpaint", "reference")
COLOURS = {
    "red": (214, 42, 42),
    "green": (46, 168, 62),
    "blue": (48, 84, 226),
    "yellow": (244, 208, 44),
    "purple": (186, 44, 200),
}
NEW_COLOURS = {"orange": (244, 124, 24)}  # in no scene by default: for a LoRA to learn
PAINTS = {**COLOURS, **NEW_COLOURS}
SHAPES = ("circle", "bar", "triangle", "cross")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
TONES = {"dark": (34, 96), "light": (150, 222)}  # the two ends of the gray gradient
GRAY = 128  # value of a masked pixel of src_video: it reveals nothing of the target


@dataclass(frozen=True)
class Scene:
    """One clip, before it is drawn. Lengths are fractions of the shorter side of the frame."""

    colour: str
    shape: str
    direction: str
    tone: str
    vertical: bool  # the gradient runs from top to bottom, else from left to right
    radius: float
    across: float  # position of the path perpendicular to the motion, -1 … 1
    start: float  # where on the path the shape starts, 0 … 1
    travel: float  # how far it goes

    @property
    def caption(self) -> str:
        """Describe everything visible, in one fixed form."""
        return f"a {self.colour} {self.shape} moves {self.direction} over a {self.tone} background"

    @property
    def caption_without_look(self) -> str:
        """The caption without colour and shape: those come from a reference image."""
        return f"the object moves {self.direction} over a {self.tone} background"

    def recoloured(self) -> Scene:
        """The same scene in the next colour of the list: for a caption changed on purpose."""
        names = list(PAINTS if self.colour in NEW_COLOURS else COLOURS)
        return replace(self, colour=names[(names.index(self.colour) + 2) % len(names)])


def make_scene(split: str, index: int, colour: str | None = None) -> Scene:
    """Scene `index` of a split ("train", "heldout", …), in its own colour or in the given one."""
    rng = np.random.default_rng([index, *split.encode()])
    scene = Scene(
        colour=str(rng.choice(list(COLOURS))),
        shape=str(rng.choice(SHAPES)),
        direction=str(rng.choice(list(DIRECTIONS))),
        tone=str(rng.choice(list(TONES))),
        vertical=bool(rng.integers(2)),
        radius=float(rng.uniform(0.24, 0.3)),
        across=float(rng.uniform(-1, 1)),
        start=float(rng.uniform(0.0, 0.25)),
        travel=float(rng.uniform(0.55, 0.75)),
    )
    return replace(scene, colour=colour or scene.colour)


def centres(scene: Scene, frames: int, height: int, width: int) -> NDArray[np.float32]:
    """[T, 2] centre of the shape as (x, y) in pixels; the shape never leaves the frame."""
    radius = scene.radius * min(height, width)
    room = np.array([width - 2 * radius, height - 2 * radius])
    along = scene.start + scene.travel * np.linspace(0, 1, frames)
    x, y = DIRECTIONS[scene.direction]
    if x < 0 or y < 0:
        along = 1 - along
    across = np.full(frames, (scene.across + 1) / 2)
    path = np.stack([along, across] if x else [across, along], axis=1)
    return (radius + path * room).astype(np.float32)


def coverage(scene: Scene, frames: int = FRAMES, height: int = SIDE, width: int = SIDE) -> Coverage:
    """[T, H, W] anti-aliased coverage of the scene's shape, 0 … 1."""
    return drawn(
        scene.shape, centres(scene, frames, height, width), scene.radius * min(height, width), height, width
    )


def drawn(shape: str, centre: NDArray[np.float32], radius: float, height: int, width: int) -> Coverage:
    """[T, H, W] anti-aliased coverage of a shape around each centre, [T, 2] as (x, y) in pixels."""
    x = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - centre[:, 0, None, None]
    y = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - centre[:, 1, None, None]
    return np.clip(0.5 - _distance(shape, x, y, radius), 0, 1).astype(np.float32)


def _distance(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], radius: float
) -> NDArray[np.float32]:
    """Signed distance to the outline in pixels, negative inside; accurate enough for anti-aliasing."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "bar":  # horizontal
        return np.maximum(ax - radius, ay - 0.45 * radius)
    if shape == "triangle":  # pointing up
        return np.maximum(y - 0.8 * radius, (ax * 2 - y) / np.sqrt(5) - radius * 0.4)
    arm = 0.4 * radius  # cross
    return np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ax - arm, ay - radius))


def background(scene: Scene, height: int = SIDE, width: int = SIDE) -> NDArray[np.float32]:
    """[H, W, 3] gray gradient, 0 … 255."""
    low, high = TONES[scene.tone]
    ramp = np.linspace(low, high, height if scene.vertical else width, dtype=np.float32)
    plane = np.broadcast_to(ramp[:, None] if scene.vertical else ramp[None, :], (height, width))
    return np.repeat(plane[..., None], 3, axis=2)


def render(scene: Scene, frames: int = FRAMES, height: int = SIDE, width: int = SIDE) -> Pixels:
    """The clip, uint8 [T, H, W, 3]."""
    alpha = coverage(scene, frames, height, width)[..., None]
    colour = np.array(PAINTS[scene.colour], dtype=np.float32)
    return np.rint(background(scene, height, width) * (1 - alpha) + colour * alpha).astype(np.uint8)


def reference_image(scene: Scene, side: int = SIDE) -> Pixels:
    """[side, side, 3] the shape alone, large, on white."""
    still = replace(scene, radius=0.36, across=0.0, start=0.5, travel=0.0, direction="right")
    alpha = coverage(still, 1, side, side)[0][..., None]
    return np.rint(255 * (1 - alpha) + np.array(PAINTS[scene.colour]) * alpha).astype(np.uint8)


def condition(scene: Scene, kind: str, video: Pixels, index: int) -> tuple[Pixels | None, Pixels | None]:
    """(src_video, src_mask) of a kind, each uint8 [T, H, W, 3] or None; `index` varies the masks."""
    frames, height, width, _ = video.shape
    if kind in ("plain", "reference"):
        return None, None
    if kind == "silhouette":
        return _gray_image(coverage(scene, frames, height, width)), None
    if kind == "edge":
        alpha = coverage(scene, frames, height, width)
        return _gray_image(np.clip(4 * alpha * (1 - _shrunk(alpha)), 0, 1)), None
    mask = np.zeros((frames, height, width), dtype=bool)
    if kind == "extension":
        mask[1:] = True
    elif kind == "outpaint":
        mask[:] = True
        mask[:, height // 5 : height - height // 5, width // 5 : width - width // 5] = False
    elif kind == "inpaint":
        margin = (0.08 + 0.02 * (index % 3)) * min(height, width)
        half = scene.radius * min(height, width) + margin
        for frame, (x, y) in enumerate(centres(scene, frames, height, width)):
            top, left = max(0, int(y - half)), max(0, int(x - half))
            mask[frame, top : int(y + half) + 1, left : int(x + half) + 1] = True
    else:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    return np.where(mask[..., None], GRAY, video).astype(np.uint8), _gray_image(mask.astype(np.float32))


def _shrunk(alpha: Coverage) -> Coverage:
    """Coverage eroded by two pixels; the outline is the difference from the shape."""
    for axis in (1, 2):
        for step in (-2, -1, 1, 2):
            alpha = np.minimum(alpha, np.roll(alpha, step, axis))
    return alpha


def _gray_image(plane: NDArray[np.float32]) -> Pixels:
    return np.repeat(np.rint(plane * 255).astype(np.uint8)[..., None], 3, axis=-1)


@dataclass(frozen=True)
class Clip:
    """One row to write: its scene, kind, size and number of reference images."""

    index: int
    kind: str = "plain"
    height: int = SIDE
    width: int = SIDE
    frames: int = FRAMES
    references: int = 0
    split: str = "train"
    colour: str | None = None  # None: the scene's own

    @property
    def name(self) -> str:
        """The stem of this clip's files."""
        return f"{self.split}_{self.index:05d}_{self.kind}"


def write_clip(folder: Path, clip: Clip, scene: Scene | None = None) -> dict[str, object]:
    """Write the files of one clip under `folder`; return its row of data.json."""
    scene = scene or make_scene(clip.split, clip.index, clip.colour)
    video = render(scene, clip.frames, clip.height, clip.width)
    src_video, src_mask = condition(scene, clip.kind, video, clip.index)
    row: dict[str, object] = {"video": f"videos/{clip.name}.mp4", "cap": scene.caption}
    write_video(folder / f"videos/{clip.name}.mp4", video, FPS)
    if src_video is not None:
        row["src_video"] = f"conditions/{clip.name}_src.mp4"
        write_video(folder / f"conditions/{clip.name}_src.mp4", src_video, FPS)
    if src_mask is not None:
        row["src_video_mask"] = f"conditions/{clip.name}_mask.mp4"
        write_video(folder / f"conditions/{clip.name}_mask.mp4", src_mask, FPS)
    references = max(clip.references, int(clip.kind == "reference"))
    if references:
        row["src_ref_images"] = [f"references/{clip.name}_{number}.png" for number in range(references)]
        (folder / "references").mkdir(parents=True, exist_ok=True)
        for number in range(references):  # a second image shows the same shape, smaller
            Image.fromarray(reference_image(scene, SIDE * (number + 1))).save(
                folder / f"references/{clip.name}_{number}.png"
            )
    if clip.kind == "reference":
        row["cap"] = scene.caption_without_look
    return row


def write_dataset(folder: Path, clips: Sequence[Clip]) -> Path:
    """Write every clip, then `data.json`, so that a half-written folder has none; return its path."""
    rows = [write_clip(folder, clip) for clip in clips]
    temporary = folder / "data.json.tmp"
    temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return temporary.replace(folder / "data.json")


def quickstart_clips() -> list[Clip]:
    """A few clips that vary like a real dataset: frame shape, length, condition, repeated captions."""
    return [
        Clip(index=0, kind="inpaint", height=64, width=96),
        Clip(index=1, kind="plain", height=96, width=64),
        Clip(index=2, kind="plain"),
        Clip(index=3, kind="reference", references=2),
        Clip(index=4, kind="silhouette"),
        Clip(index=4, kind="edge"),  # the same scene again: the same caption
        Clip(index=5, kind="extension"),
        Clip(index=6, kind="outpaint", height=64, width=96),
    ]


def mixed_clips(counts: dict[str, str], split: str) -> list[Clip]:
    """`counts[kind]` scenes of each kind, and no scene twice."""
    kinds = [kind for kind, count in counts.items() for _ in range(int(count))]
    return [Clip(index=100 + index, kind=kind, split=split) for index, kind in enumerate(kinds)]


def main() -> None:
    """Write one split of the world."""
    parser = argparse.ArgumentParser(
        description="Write clips of the tiny world in the guide's dataset layout."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="train", help="train, heldout, …: another name, other scenes")
    parser.add_argument("--count", type=int, default=8, help="scenes")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["plain"], help="conditions written for every scene"
    )
    parser.add_argument(
        "--mix", nargs="+", metavar="KIND=COUNT", help="scenes of each kind instead, every scene once"
    )
    parser.add_argument(
        "--quickstart",
        action="store_true",
        help="also eight clips that differ in every way a real dataset does",
    )
    parser.add_argument("--colour", choices=PAINTS, help="of every shape (default: each scene's own)")
    given = parser.parse_args()
    clips = [
        Clip(index=index, kind=kind, split=given.split)
        for index in range(given.count)
        for kind in given.kinds
    ]
    if given.mix or given.quickstart:
        mixed = mixed_clips(dict(item.split("=") for item in given.mix or []), given.split)
        clips = [*quickstart_clips(), *mixed] if given.quickstart else mixed
    write_dataset(given.folder, [replace(clip, colour=given.colour) for clip in clips])


if __name__ == "__main__":
    main()
