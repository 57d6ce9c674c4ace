"""Makes masks from a region painted on one frame: tracks it through the clip, and grows or shrinks it.

Does not import torch or gradio.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mindspeed_mm.conditioning.annotate.opencv import Frame, Mask, as_rgb, opencv
from mindspeed_mm.conditioning.annotate.shapes import mask_box
from mindspeed_mm.conditioning.annotate.spool import Spool
from mindspeed_mm.conditioning.annotate.subject import track_mask
from mindspeed_mm.conditioning.tasks.spec import Clip
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import atomic_path

_SIDE = (512, 768)  # range of the canvas's longer side; larger is slow in a browser, smaller is imprecise
_ALPHA = 100  # alpha, out of 255, above which a pixel is painted; fainter ones are a stroke's soft edge
_LONGEST = 8_000_000  # maximum characters of a painting's data URL


@dataclass(frozen=True, kw_only=True)
class Painting:
    """A painted region, and how it is tracked through the clip."""

    mask: Mask  # at the size of the painting
    frame: int = 0
    follow: bool = True
    refine: bool = True
    grow: float = 0.0  # in percent of the frame's shorter side; negative values shrink the mask


def paintable(frame: Frame) -> Frame:
    """Resize a frame to the size of the canvas."""
    longest = max(frame.shape[:2])
    scale = min(_SIDE[1], max(_SIDE[0], longest)) / longest
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(frame).resize(size, method))


def painted_mask(text: str | None) -> Mask | None:
    """Decode a painting from painter.js, a data URL of a PNG with alpha, to a mask that is 255 where painted.

    Returns None if nothing is painted. Raises DataError.
    """
    if not text:
        return None
    head, _, data = text.partition(",")
    if head != "data:image/png;base64" or len(data) > _LONGEST:
        raise DataError("is not a painting", where="mask", expected="a PNG data URL from the page")
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG"]) as image:
            if max(image.size) > 2 * _SIDE[1]:
                raise ValueError(image.size)
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
    except (ValueError, OSError, SyntaxError, binascii.Error) as error:
        raise DataError(
            f"is not a painting: {error}", where="mask", expected="a PNG data URL from the page"
        ) from None
    return np.where(alpha > _ALPHA, 255, 0).astype(np.uint8) if (alpha > _ALPHA).any() else None


def frame_url(frame: Frame) -> str:
    """Encode a frame as a data URL."""
    written = io.BytesIO()
    Image.fromarray(frame).save(written, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def fitted(mask: Mask, size: tuple[int, int]) -> Mask:
    """Resize a mask to the size (height, width) of a clip."""
    image = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.BOX)
    return np.where(np.asarray(image) > 127, 255, 0).astype(np.uint8)


def resized_edge(mask: Mask, percent: float) -> Mask:
    """Grow the mask by a percentage of the frame's shorter side, or shrink it if `percent` is negative.

    A mask that would vanish is returned unchanged.
    """
    reach = round(abs(percent) / 100 * min(mask.shape))
    if not reach:
        return mask
    cv2 = opencv()
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    changed = np.asarray(cv2.dilate(mask, kernel) if percent > 0 else cv2.erode(mask, kernel))
    return changed if changed.any() else mask


def clip_masks(clip: Clip, painting: Painting) -> Iterator[Mask]:
    """Yield one mask [H, W] per frame. Raises DataError if the painting does not fit the clip."""
    mask, at = fitted(painting.mask, clip.size), painting.frame
    if not 0 <= at < clip.num_frames:
        raise DataError(f"got {at}", where="frame", expected=f"0 to {clip.num_frames - 1}")
    if not mask.any():
        raise DataError("is too small", where="mask", fix="paint a larger region")
    if not painting.follow:
        still = resized_edge(mask, painting.grow)
        yield from (still for _ in range(clip.num_frames))
        return
    before = (clip.reader.read([index])[0] for index in range(at, -1, -1))
    after = (clip.reader.read([index])[0] for index in range(at, clip.num_frames))
    with Spool() as earlier:
        for _, found in track_mask(before, mask, refine=painting.refine):
            earlier.add(found)
        known = list(earlier)[:0:-1]  # without the painted frame, which the later masks start with
    for found in known:
        yield resized_edge(found, painting.grow)
    for _, found in track_mask(after, mask, refine=painting.refine):
        yield resized_edge(found, painting.grow)


def write_clip_masks(video: Path, painting: Painting, folder: Path) -> Path:
    """Write the masks of a clip as a lossless clip in `folder`, unless the same painting is already there.

    Raises DataError.
    """
    key_text = (
        f"{video}:{painting.frame}:{painting.follow}:{painting.refine}:{painting.grow}:{painting.mask.shape}"
    )
    digest = hashlib.sha256(key_text.encode() + painting.mask.tobytes()).hexdigest()[:24]
    path = folder / f"mask_{digest}.mkv"
    if not path.exists():
        clip = Clip.open(video)
        write_video(path, (as_rgb(mask) for mask in clip_masks(clip, painting)), clip.fps, lossless=True)
    return path


def write_image_mask(size: tuple[int, int], painting: Painting, folder: Path) -> Path:
    """Write the mask of an image of the given size (height, width)."""
    mask = resized_edge(fitted(painting.mask, size), painting.grow)
    path = folder / f"mask_{hashlib.sha256(mask.tobytes()).hexdigest()[:24]}.png"
    with atomic_path(path) as draft:
        Image.fromarray(mask).save(draft, format="PNG")
    return path


def painted_box(mask: Mask, size: tuple[int, int]) -> str:
    """Return the box of the painted region as `left,top,right,bottom` in pixels of the clip.

    Raises DataError if the region is too small.
    """
    box = mask_box(fitted(mask, size))
    if box is None:
        raise DataError("is too small", where="mask", fix="paint a larger region")
    return ",".join(str(int(value)) for value in box)
