"""Synthetic scenes for annotators and tasks.

A textured disc that moves over a textured background, with its true masks.
"""

from __future__ import annotations

import numpy as np

from mindspeed_mm.data.video_writer import write_video


def texture(height: int, width: int, seed: int, low: int, high: int) -> np.ndarray:
    """Smooth noise, uint8 [H, W, 3]."""
    import cv2

    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), 2)
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return (low + noise * (high - low)).astype(np.uint8)


def moving_disc(
    count: int = 9, height: int = 96, width: int = 128, radius: int = 16, step: float = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Frames [T, H, W, 3], and the disc's masks [T, H, W] of 0 and 255.

    It moves `step` pixels right each frame.
    """
    background = texture(height, width, 0, 20, 90)
    subject = texture(height, width, 1, 60, 255)
    subject[..., 1:] //= 3  # reddish
    frames, masks = [], []
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        centre = width / 4 + step * i
        inside = (x - centre) ** 2 + (y - height / 2) ** 2 <= radius**2
        moved = np.roll(subject, round(step * i), axis=1)
        frames.append(np.where(inside[..., None], moved, background))
        masks.append(np.where(inside, 255, 0).astype(np.uint8))
    return np.stack(frames), np.stack(masks)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two masks."""
    a, b = first > 127, second > 127
    return float((a & b).sum() / max(1, (a | b).sum()))


def write_scene(path, count: int = 9, fps: float = 16, height: int = 96, width: int = 128):
    """The moving disc as a clip, without loss for .mkv."""
    frames, _ = moving_disc(count, height, width)
    return write_video(path, frames, fps, lossless=path.suffix == ".mkv", quality=4)
