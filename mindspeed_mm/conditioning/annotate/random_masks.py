"""Random masks for a clip: boxes, strokes, blobs, frames and noise.

Masked pixels are white, and the model generates them. A mask depends only on the state of its generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mindspeed_mm.conditioning.annotate.opencv import Mask, opencv, whole_mask

Generator = np.random.Generator
Shape = Callable[[int, int, int, Generator], Iterator[Mask]]  # frames, height, width → one mask per frame
_KEPT = 4  # maximum number of frames kept at each end
_ROWS = 480  # shorter frame side for which widths and speeds are given; they scale with the frame


def everywhere(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask every pixel."""
    return iter([whole_mask(height, width, generate=True)] * count)


def after_first(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask all but the first 1 to 4 frames."""
    return _frames(count, height, width, set(range(_ends(count, generator))))


def middle(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Keep 1 to 4 frames at each end."""
    kept = _ends((count + 1) // 2, generator)
    ends = {*range(kept), *range(count - kept, count)} if count > 2 else set(range(count - 1))
    return _frames(count, height, width, ends)


def some_frames(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask random whole frames, each drawn independently. At least one frame is masked."""
    drawn = generator.random(count) < generator.uniform(0.2, 0.8)
    drawn[int(generator.integers(count))] = True
    return _frames(count, height, width, {int(place) for place in np.flatnonzero(~drawn)})


def box(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask a box. In half of the draws the box is static; otherwise it moves and resizes linearly."""
    start, end = (_box(height, width, generator) for _ in range(2))
    end = start if generator.random() < 0.5 else end
    return _moving(count, height, width, start, end)


def box_in_time(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask a box during part of the clip."""
    first = int(generator.integers(count))
    last = int(generator.integers(first, count))
    nothing = whole_mask(height, width, generate=False)
    masks = box(count, height, width, generator)
    return (mask if first <= index <= last else nothing for index, mask in enumerate(masks))


def small_boxes(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask up to ten small static boxes."""
    mask = whole_mask(height, width, generate=False)
    for _ in range(int(generator.integers(2, 11))):
        left, top, right, bottom = _box(height, width, generator, 0.03, 0.15)
        mask[top:bottom, left:right] = 255
    return iter([mask] * count)


def salt(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask random pixels, drawn independently for each frame (salt noise)."""
    share = generator.uniform(0.1, 0.7)
    for _ in range(count):
        mask = np.where(generator.random((height, width)) < share, 255, 0).astype(np.uint8)
        mask[int(generator.integers(height)), int(generator.integers(width))] = 255
        yield mask


def ellipse(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask the same ellipse in every frame."""
    return iter([_ellipse(height, width, generator, circle=False)] * count)


def circle(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask the same circle in every frame."""
    return iter([_ellipse(height, width, generator, circle=True)] * count)


def strokes(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask 3 to 5 freehand strokes of 5 to 30 points, 5 to 50 pixels wide, moving up to 15 pixels per frame.

    Widths and speeds are for a shorter frame side of 480 pixels, and scale with the frame.
    """
    cv2, scale = opencv(), min(height, width) / _ROWS
    lines, widths, steps = [], [], []
    for _ in range(int(generator.integers(3, 6))):
        points = int(generator.integers(5, 31))
        start = generator.uniform((0, 0), (width, height))
        turns = generator.normal(0, 40 * scale, (points, 2)).cumsum(axis=0)
        lines.append(start + turns)
        widths.append(max(1, round(generator.uniform(5, 50) * scale)))
        steps.append(generator.uniform(-15 * scale, 15 * scale, 2))
    for index in range(count):
        mask = whole_mask(height, width, generate=False)
        for line, thickness, step in zip(lines, widths, steps, strict=True):
            moved = line + step * index
            inside = np.stack([moved[:, 0] % width, moved[:, 1] % height], axis=1).round().astype(np.int32)
            jumps = np.abs(np.diff(inside, axis=0)).max(axis=1) > min(height, width) // 2
            for part in np.split(inside, np.flatnonzero(jumps) + 1):
                cv2.polylines(mask, [part.reshape(-1, 1, 2)], False, 255, thickness)
        yield mask


def blobs(count: int, height: int, width: int, generator: Generator) -> Iterator[Mask]:
    """Mask drifting, object-like shapes: smooth noise above a threshold."""
    cv2 = opencv()
    sigma = max(2.0, min(height, width) / 12)
    noise = generator.normal(size=(height, width)).astype(np.float32)
    # The frame wraps around, so that the shapes have no seam when they drift across a border.
    edge = min(round(4 * sigma), height, width)
    wrapped = cv2.copyMakeBorder(noise, edge, edge, edge, edge, cv2.BORDER_WRAP)
    noise = cv2.GaussianBlur(wrapped, (0, 0), sigma)[edge : edge + height, edge : edge + width]
    level = float(np.quantile(noise, generator.uniform(0.6, 0.9)))
    shape = np.where(noise > level, 255, 0).astype(np.uint8)
    step = generator.uniform(-4, 4, 2) * min(height, width) / _ROWS
    return (np.roll(shape, tuple(int(value * index) for value in step), (0, 1)) for index in range(count))


SHAPES: Mapping[str, Shape] = {
    "box": box,
    "all": everywhere,
    "after_first": after_first,
    "middle": middle,
    "box_in_time": box_in_time,
    "salt": salt,
    "small_boxes": small_boxes,
    "ellipse": ellipse,
    "circle": circle,
    "frames": some_frames,
    "strokes": strokes,
    "blobs": blobs,
}


def _ends(count: int, generator: Generator) -> int:
    """Draw the number of frames to keep: 1 to 4, and less than `count`."""
    return min(int(generator.integers(1, _KEPT + 1)), max(count - 1, 0))


def _frames(count: int, height: int, width: int, kept: set[int]) -> Iterator[Mask]:
    keep, make = whole_mask(height, width, generate=False), whole_mask(height, width, generate=True)
    return (keep if index in kept else make for index in range(count))


def _box(
    height: int, width: int, generator: Generator, low: float = 0.2, high: float = 0.7
) -> tuple[int, int, int, int]:
    across = max(1, round(width * generator.uniform(low, high)))
    down = max(1, round(height * generator.uniform(low, high)))
    left, top = int(generator.integers(width - across + 1)), int(generator.integers(height - down + 1))
    return left, top, left + across, top + down


def _moving(
    count: int, height: int, width: int, start: tuple[int, ...], end: tuple[int, ...]
) -> Iterator[Mask]:
    for index in range(count):
        part = index / max(count - 1, 1)
        left, top, right, bottom = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
        mask = whole_mask(height, width, generate=False)
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = 255
        yield mask


def _ellipse(height: int, width: int, generator: Generator, *, circle: bool) -> Mask:
    mask = whole_mask(height, width, generate=False)
    side = min(height, width)
    axes = generator.uniform(0.1, 0.4, 2) * (side if circle else np.array([width, height]))
    axes = np.repeat(axes[:1], 2) if circle else axes
    centre = generator.uniform(0.25, 0.75, 2) * (width, height)
    angle = 0.0 if circle else float(generator.uniform(0, 180))
    sizes = tuple(max(1, round(float(axis))) for axis in axes)
    opencv().ellipse(mask, tuple(int(value) for value in centre), sizes, angle, 0, 360, 255, -1)
    return mask
