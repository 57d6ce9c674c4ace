"""Reads images as clips: a still image, a folder of images, or an animated PNG or WebP.

Does not import torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mindspeed_mm.data.frames import check_range
from mindspeed_mm.data.images import (
    IMAGE_SUFFIXES,
    UNTIMED_FPS,
    WHITE,
    Frames,
    are_only_alpha,
    as_gray,
    flatten,
    has_transparency,
    image_traits,
    is_black,
    is_labels,
    open_image,
    read_image,
    read_mask,
)
from mindspeed_mm.errors import DataError


def is_animation(path: Path) -> bool:
    """Return whether an image file is an animated PNG or WebP."""
    if path.suffix.lower() not in (".png", ".webp"):
        return False
    with open_image(path) as image:
        return image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1


class ImageReader:
    """Reads a still image, or a folder of images sorted by the numbers in their names."""

    timed = False

    def __init__(self, path: Path, background: int = WHITE, *, mask: bool = False) -> None:
        self.path = path
        self._background, self._mask = background, mask
        self.files = [path]
        self._ignored = ""
        if path.is_dir():
            files = [
                file
                for file in path.iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."
            ]
            self.files = sorted(files, key=_natural)
            self._ignored = _ignored_pictures(path)
        if not self.files:
            raise DataError("folder contains no images", where=path)
        self.num_frames = len(self.files)
        # Decided once for the whole folder, because a single frame may be fully opaque.
        self.by_alpha = mask and are_only_alpha(self.files)
        self.height, self.width = self._load(self.files[0]).shape[:2]
        self.fps = UNTIMED_FPS
        self.times = [i / self.fps for i in range(self.num_frames)]
        self.duration = self.num_frames / self.fps

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits of all images; see `traits.py`. Opens every file."""
        found = {trait for file in self.files for trait in image_traits(file, mask=self._mask)}
        found |= {"by alpha"} if self.by_alpha else set()
        return tuple(sorted(found | ({self._ignored} if self._ignored else set())))

    def read(self, indices: Sequence[int]) -> Frames:
        """Return the frames at `indices`, uint8 [T, H, W, 3]."""
        check_range(self.path, self.num_frames, indices)
        frames = [self._load(self.files[index]) for index in indices]
        for index, frame in zip(indices, frames, strict=True):
            if frame.shape != (self.height, self.width, 3):
                raise DataError(
                    f"has {frame.shape[1]}x{frame.shape[0]} pixels, but the first image of the folder has "
                    f"{self.width}x{self.height}",
                    where=f"{self.files[index]}",
                    fix="give all images the same size",
                )
        return np.stack(frames)

    def _load(self, file: Path) -> NDArray[np.uint8]:
        return read_mask(file, by_alpha=self.by_alpha) if self._mask else read_image(file, self._background)


def _ignored_pictures(folder: Path) -> str:
    """Return the trait `ignored: …` if a folder has images in other formats than those read, else ''."""
    others = Counter(
        file.suffix.lower()
        for file in folder.iterdir()
        if file.suffix.lower() not in IMAGE_SUFFIXES and file.name[0] != "." and file.is_file()
    )
    known = Image.registered_extensions() if others else {}
    ignored = {suffix: count for suffix, count in sorted(others.items()) if suffix in known}
    return f"ignored: {sum(ignored.values())} ({', '.join(ignored)})" if ignored else ""


class AnimationReader:
    """Reads an animated PNG or WebP with its timestamps."""

    timed = True

    def __init__(self, path: Path, background: int = WHITE, *, mask: bool = False) -> None:
        self.path = path
        self._background = background
        durations = []
        only_alpha, see_through = mask, False
        with open_image(path) as image:
            self.width, self.height = image.size
            self._background_label = (image.getpalette("RGB") or [])[:3] if mask and is_labels(image) else []
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                image.load()
                # Like browsers, never use a duration of 0.
                durations.append(max(float(image.info.get("duration", 0)), 10) / 1000)
                only_alpha = only_alpha and is_black(image)
                see_through = see_through or (only_alpha and has_transparency(image))
        self.by_alpha = only_alpha and see_through
        self.traits = ("animation", *["labels"] * bool(self._background_label), *["by alpha"] * self.by_alpha)
        ends = np.cumsum(durations)
        self.num_frames = len(durations)
        self.times = [0.0, *(round(float(end), 6) for end in ends[:-1])]
        self.duration = round(float(ends[-1]), 6)
        self.fps = round(self.num_frames / self.duration, 3)

    def read(self, indices: Sequence[int]) -> Frames:
        """Return the frames at `indices`, uint8 [T, H, W, 3]."""
        check_range(self.path, self.num_frames, indices)
        frames = {}
        with open_image(self.path) as image:
            for index in sorted(set(indices)):
                image.seek(index)
                frames[index] = self._picture(image.copy())
        return np.stack([frames[index] for index in indices])

    def _picture(self, image: Image.Image) -> NDArray[np.uint8]:
        if not self._background_label and not self.by_alpha:
            return flatten(image, self._background)
        if self.by_alpha:
            values = np.asarray(image.convert("RGBA"))[..., 3]
        elif image.mode == "P":
            values = np.asarray(image) > 0
        else:  # Pillow blended the frame with the previous one, so compare with the colour of index 0
            colours = np.asarray(image.convert("RGB"))
            values = np.any(colours != np.array(self._background_label, np.uint8), axis=-1)
        return as_gray(values)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Return a sort key that puts frame_2 before frame_10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name)]
