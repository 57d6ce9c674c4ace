"""Render the sample inputs of the inference JSONs into samples/.

A depth clip, the clip itself, a mask and a reference image.

A ball bounces through a room past a box; every pixel is computed here, so the files belong to nobody else.
    python examples/vace/inference/make_samples.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mindspeed_mm.data.video_writer import write_video

FOLDER = Path(__file__).resolve().parent / "samples"
HEIGHT, WIDTH, FRAMES, FPS = 480, 832, 81, 16
Floats = NDArray[np.float64]
CAMERA = np.array([0.0, 1.7, -4.0])
LIGHT = np.array([-2.0, 6.0, -2.0])
RADIUS = 0.6
BOX = (np.array([1.5, 0.0, 3.0]), np.array([2.7, 1.2, 4.2]))  # opposite corners
WALL = 7.0  # distance of the back wall
MASK_MARGIN = 1.25  # the mask is this much larger than the ball, which leaves room for another shape


@dataclass(frozen=True)
class Hits:
    """What the ray of every pixel meets first."""

    distance: Floats  # [H, W]
    normal: Floats  # [H, W, 3]
    colour: Floats  # [H, W, 3] in 0…1, without light
    point: Floats  # [H, W, 3]
    gloss: Floats  # [H, W], how strongly it shines


def ball(time: float) -> Floats:
    """Centre of the ball at `time` in 0…1: four bounces from left to right, each lower."""
    bounce = abs(np.sin(4 * np.pi * time)) * (1.5 - time)
    return np.array([-3.2 + 5.6 * time, RADIUS + bounce, 1.6])


def rays(height: int = HEIGHT, width: int = WIDTH) -> Floats:
    """Unit directions [H, W, 3] of a camera that looks ahead and a little down."""
    y, x = np.mgrid[0:height, 0:width]
    directions = np.stack(
        [(x + 0.5 - width / 2) / height, (height / 2 - y - 0.5) / height - 0.12, np.ones_like(x)], -1
    )
    return np.asarray(directions / np.linalg.norm(directions, axis=-1, keepdims=True))


def sphere_distance(origin: Floats, directions: Floats, centre: Floats, radius: float) -> Floats:
    """Distance along each ray to a sphere, inf where it is missed."""
    offset = origin - centre
    half = (offset * directions).sum(-1)
    inside = half**2 - (offset**2).sum(-1) + radius**2
    distance = -half - np.sqrt(np.maximum(inside, 0))
    return np.where((inside > 0) & (distance > 1e-4), distance, np.inf)


def box_distance(origin: Floats, directions: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Distance along each ray to the box, inf where it is missed, and the axis of the side that is met."""
    with np.errstate(divide="ignore"):
        low, high = (BOX[0] - origin) / directions, (BOX[1] - origin) / directions
    near, far = np.minimum(low, high), np.maximum(low, high)
    entry = near.max(-1)
    return np.where((entry < far.min(-1)) & (entry > 1e-4), entry, np.inf), near.argmax(-1)


def trace(directions: Floats, centre: Floats) -> Hits:
    """What the camera sees with the ball at `centre`."""
    with np.errstate(divide="ignore"):
        floor = np.where(directions[..., 1] < 0, -CAMERA[1] / directions[..., 1], np.inf)
        wall = (WALL - CAMERA[2]) / directions[..., 2]
    box, axis = box_distance(CAMERA, directions)
    sphere = sphere_distance(CAMERA, directions, centre, RADIUS)
    every = np.stack([floor, wall, box, sphere])
    which, distance = every.argmin(0), every.min(0)
    point = CAMERA + distance[..., None] * directions
    side = np.eye(3)[axis] * -np.sign(directions)
    normal = np.select(
        [(which == n)[..., None] for n in range(4)],
        [np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, -1.0]), side, (point - centre) / RADIUS],
    )
    planks = np.where(np.floor(point[..., :1] * 1.4) % 2 == 0, 1.0, 0.9) * np.array([0.72, 0.5, 0.3])
    colour = np.select(
        [(which == n)[..., None] for n in range(4)],
        [planks, np.array([0.86, 0.84, 0.78]), np.array([0.2, 0.4, 0.75]), np.array([0.85, 0.12, 0.1])],
    )
    return Hits(distance, normal, colour, point, np.array([0.0, 0.0, 0.05, 0.4])[which])


def picture(hits: Hits, centre: Floats) -> NDArray[np.uint8]:
    """The lit scene, uint8 [H, W, 3], with shadows of ball and box."""
    to_light = LIGHT - hits.point
    reach = np.linalg.norm(to_light, axis=-1)
    to_light = to_light / reach[..., None]
    start = hits.point + 1e-3 * hits.normal
    blocked = (
        np.minimum(sphere_distance(start, to_light, centre, RADIUS), box_distance(start, to_light)[0]) < reach
    )
    light = np.clip((hits.normal * to_light).sum(-1), 0, 1) * np.where(blocked, 0.25, 1.0)
    toward = CAMERA - hits.point
    half = to_light + toward / np.linalg.norm(toward, axis=-1, keepdims=True)
    half /= np.linalg.norm(half, axis=-1, keepdims=True)
    shine = np.clip((hits.normal * half).sum(-1), 0, 1) ** 60 * np.where(blocked, 0.0, hits.gloss)
    lit = hits.colour * (0.35 + 0.65 * light)[..., None] + shine[..., None]
    return np.asarray(np.clip(lit, 0, 1) ** (1 / 1.3) * 255, dtype=np.uint8)


def depth_picture(hits: Hits) -> NDArray[np.uint8]:
    """Inverse depth as estimators write it, near = white, uint8 [H, W, 3]."""
    inverse = 1 / (hits.point[..., 2] - CAMERA[2])
    far, near = 1 / (WALL + 1 - CAMERA[2]), 1 / 3.2
    gray = np.clip((inverse - far) / (near - far), 0, 1)
    return np.repeat((gray * 255).astype(np.uint8)[..., None], 3, axis=-1)


def mask_picture(directions: Floats, centre: Floats) -> NDArray[np.uint8]:
    """White where something else is to be generated: the ball and a margin around it."""
    hit = np.isfinite(sphere_distance(CAMERA, directions, centre, RADIUS * MASK_MARGIN))
    return np.repeat((hit * 255).astype(np.uint8)[..., None], 3, axis=-1)


def reference() -> Image.Image:
    """The ball alone on white, 512x512: what a reference image of a subject looks like."""
    directions = rays(512, 512)
    centre = CAMERA + 1.8 * directions[256, 256]
    hits = trace(directions, centre)
    on_ball = np.isfinite(sphere_distance(CAMERA, directions, centre, RADIUS))[..., None]
    return Image.fromarray(np.where(on_ball, picture(hits, centre), 255).astype(np.uint8))


def main() -> None:
    """Write all four files."""
    FOLDER.mkdir(exist_ok=True)
    directions = rays()
    depth, room, mask = [], [], []
    for frame in range(FRAMES):
        centre = ball(frame / (FRAMES - 1))
        hits = trace(directions, centre)
        depth.append(depth_picture(hits))
        room.append(picture(hits, centre))
        mask.append(mask_picture(directions, centre))
    for name, frames in (("depth", depth), ("room", room), ("mask", mask)):
        write_video(FOLDER / f"{name}.mp4", np.stack(frames), FPS)
    reference().save(FOLDER / "ball.jpg", quality=90)


if __name__ == "__main__":
    main()
