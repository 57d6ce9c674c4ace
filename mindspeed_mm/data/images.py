"""Reads image files as RGB.

All image files are opened here, within a pixel limit, and converted by their mode, never by their values.
Does not import torch.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mindspeed_mm.data.png import check_rows
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import display_path, regular_file

Frames = NDArray[np.uint8]  # [T, H, W, 3]
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".heic", ".heif"}
)
WHITE, BLACK = 255, 0
_BLANK = {
    "nowhere": "all pixels of src_video are kept and nothing is generated; white = generate",
    "everywhere": "no pixel of src_video is kept; black = keep",
}
UNTIMED_FPS = 16.0  # frame rate of image folders, which have no timestamps
PIXELS_VARIABLE = "MINDSPEED_MM_MAX_PIXELS"
_DEFAULT_PIXELS = 1 << 26  # 8192 x 8192
_HIGHEST_PIXELS = 178_956_970  # Pillow refuses to open larger images
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_WITH_PREVIEWS = ("MPO", "HEIF", "HEIC")  # phones append previews and depth maps to the image
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def max_pixels() -> int:
    """Return the maximum number of pixels of an image or a frame.

    Raises ConfigError if the environment variable has an invalid value.
    """
    text = os.environ.get(PIXELS_VARIABLE, "")
    if not text:
        return _DEFAULT_PIXELS
    if not re.fullmatch(r"[0-9]{1,18}", text) or not 0 < int(text) <= _HIGHEST_PIXELS:
        raise ConfigError(
            f"got {text!r}", where=PIXELS_VARIABLE, expected=f"a whole number from 1 to {_HIGHEST_PIXELS}"
        )
    return int(text)


def check_pixels(path: Path, width: int, height: int) -> None:
    """Raise DataError for an image with more pixels than the limit."""
    if width * height > max_pixels():
        raise DataError(
            f"has {width}x{height} pixels, more than the limit of {max_pixels()}",
            where=display_path(path),
            fix=f"shrink it, or raise {PIXELS_VARIABLE}",
        )


def read_image(path: str | Path, background: int = WHITE) -> NDArray[np.uint8]:
    """Read an image file as 8-bit RGB [H, W, 3].

    Applies the EXIF rotation and fills transparent pixels with `background`. A JPEG above the pixel limit is
    reduced while it is decoded. Raises DataError for a file that is not an image, is damaged or is too large.
    """
    with open_image(path) as image:
        return flatten(ImageOps.exif_transpose(image), background)


def read_mask(path: str | Path, *, by_alpha: bool = False) -> NDArray[np.uint8]:
    """Read a mask image as gray RGB [H, W, 3], 255 = generate.

    If the palette has colours, its indices are labels: every index except 0 is white. With `by_alpha`, opaque
    pixels are white. Otherwise the value is the brightness, and transparent pixels are black.
    """
    with open_image(path) as image:
        rotated = ImageOps.exif_transpose(image)
        if is_labels(rotated):
            return as_gray(np.asarray(rotated) > 0)
        if by_alpha:
            return as_gray(np.asarray(rotated.convert("RGBA"))[..., 3])
        return flatten(rotated, BLACK)


def as_gray(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert bytes or booleans [H, W] to gray RGB [H, W, 3]."""
    gray = np.where(values, 255, 0).astype(np.uint8) if values.dtype == bool else values
    return np.repeat(gray[..., None], 3, axis=-1)


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file within the pixel limit. Decoding errors also become DataError."""
    path = regular_file(path, DataError)
    _enable_heic(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_pixels applies our limit
            file = Image.open(path)
            if file.format == "PNG":  # Pillow ignores wrong checksums while decoding
                file.verify()
                file = Image.open(path)
        with file:
            _reduce(file)
            check_pixels(path, *file.size)
            yield file
            if file.format == "PNG" and _may_lack_rows(file):
                check_rows(path)
    except (ConfigError, MemoryError):
        raise
    except DataError as error:
        raise (error if error.where == display_path(path) else error.at(display_path(path))) from None
    except Image.DecompressionBombError:
        raise DataError(
            f"has more than {_HIGHEST_PIXELS} pixels (limit: {max_pixels()})",
            where=display_path(path),
            fix="shrink it",
        ) from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
        raise DataError(f"cannot be read as an image: {short(error)}", where=display_path(path)) from None


def _may_lack_rows(image: Image.Image) -> bool:
    """Return whether a decoded PNG ends in black. Pillow fills missing rows with black."""
    if getattr(image, "tile", None):  # not decoded yet
        return False
    last = image.crop((0, image.height - 1, image.width, image.height))
    return bool(image.info.get("interlace")) or not np.asarray(last).any()


def _reduce(image: Image.Image) -> None:
    """Let a JPEG above the pixel limit decode at 1/2, 1/4 or 1/8 of its size, which saves memory."""
    if image.format not in ("JPEG", "MPO"):
        return
    width, height = image.size
    for scale in (2, 4, 8):
        if image.width * image.height <= max_pixels():
            break
        image.draft(None, (width // scale, height // scale))
        image.info["reduced"] = True


def _enable_heic(path: Path) -> None:
    """Load the HEIC plugin for a HEIC file. Raises DataError if it is not installed."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIC_BRANDS:
        return
    try:
        import pillow_heif
    except ImportError:
        raise DataError(
            "is a HEIC image", where=display_path(path), fix="pip install pillow-heif, or convert it to JPEG"
        ) from None
    pillow_heif.register_heif_opener()


def flatten(image: Image.Image, background: int = WHITE) -> NDArray[np.uint8]:
    """Convert a Pillow image of any mode to RGB [H, W, 3] on `background`.

    Integers of more than 8 bits are read as 16-bit values, and floats as values from 0 to 1. Raises DataError
    for floats outside that range.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray(
            (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        )
    elif image.mode == "F":
        image = Image.fromarray(_float_bytes(np.asarray(image)))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _float_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # negated, so that NaN raises too
        raise DataError(
            f"a float image has values from {low:g} to {high:g}", expected="0 to 1", fix="rescale it"
        )
    return np.asarray((values.astype(np.float64) * 255).round().clip(0, 255).astype(np.uint8))


def brightness(frames: Frames) -> NDArray[np.uint8]:
    """Convert mask frames [T, H, W, 3] to their values [T, H, W]."""
    return np.asarray(np.round(frames.astype(np.float32) @ _LUMA).astype(np.uint8))


def reject_zero_one(path: Path | str, highest: int) -> None:
    """Raise DataError for a mask with values 0 and 1, not 0 and 255, or 8-bit values in a 16-bit file."""
    if highest <= 1 and (deepest := _highest_deep_value(Path(path))):
        raise DataError(
            f"brightest value is {deepest} of 65535 (a 16-bit file), so the mask is black everywhere",
            where=path,
            fix="write 0 and 65535, or save it with 8 bits",
        )
    if highest == 1:
        raise DataError(
            "brightest value is 1 of 255, as if written as 0 and 1", where=path, fix="write 0 and 255"
        )


def blank_mask(levels: tuple[int, int], *, soft: bool) -> str:
    """Return `nowhere` or `everywhere` if a mask with this range of values is uniform, else ''."""
    low, high = levels
    if high == 0 or (high <= 127 and not soft):
        return "nowhere"
    return "everywhere" if low == 255 or (low > 127 and not soft) else ""


def blank_remark(levels: tuple[int, int], *, soft: bool) -> str:
    """Return a remark on the effect of a uniform mask with this range of values, else ''."""
    where = blank_mask(levels, soft=soft)
    return f"white {where}: {_BLANK[where]}" if where else ""


def _highest_deep_value(path: Path) -> int:
    """Return the largest value in an image or a folder of images of more than 8 bits; 0 for other files."""
    highest = 0
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "." and file.is_file():
            with open_image(file) as image:
                highest = max(highest, int(np.asarray(image).max()) if image.mode.startswith("I") else 0)
    return highest


def is_labels(image: Image.Image) -> bool:
    """Return whether a palette image contains labels: its palette has colours other than grays."""
    if image.mode != "P":
        return False
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    return bool((palette != palette[:, :1]).any())


def are_only_alpha(files: Sequence[Path]) -> bool:
    """Return whether all images have an alpha channel and are black, and at least one pixel is not opaque."""
    see_through = False
    for file in files:
        with open_image(file) as image:
            if not is_black(image):
                return False
            see_through |= has_transparency(image)
    return see_through


def is_black(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel and is entirely black."""
    return image.mode in _ALPHA_MODES and not np.asarray(image.convert("RGBA"))[..., :3].any()


def has_transparency(image: Image.Image) -> bool:
    """Return whether any pixel of an image is not opaque."""
    return bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)


def image_traits(path: Path, *, mask: bool = False) -> tuple[str, ...]:
    """Return the traits of an image file; see `traits.py`. Raises DataError."""
    found = []
    with open_image(path) as image:
        if image.info.get("reduced"):
            found.append("reduced")
        if image.format not in _WITH_PREVIEWS and getattr(image, "n_frames", 1) > 1:
            found.append("pages" if image.format == "TIFF" else "pictures")
        if image.format in ("HEIF", "HEIC"):
            found.append("heic")
        if image.mode == "F":
            found.append("float")
        elif image.mode.startswith("I") and 0 < np.asarray(image).max() <= 255:
            found.append("deep")
        if mask and is_labels(image):
            found.append("labels")
    return tuple(found)


def short(error: Exception) -> str:
    """Return the first line of a library's error, shortened, without error number and file name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return re.sub(r"^\[Errno \d+\] |: '.*'$|^\[[\d:]+\] \S+: ", "", text)[:160]
