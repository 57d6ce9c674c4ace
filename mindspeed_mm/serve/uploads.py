"""Stores and checks the files that clients upload.

The server chooses the file names, and identifies the format of a file by its first bytes. Does not import
torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from mindspeed_mm.data.images import (
    IMAGE_SUFFIXES,
    blank_remark,
    brightness,
    image_traits,
    open_image,
    read_mask,
)
from mindspeed_mm.data.probe import probe
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.errors import DataError
from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.problem import ApiError

Kind = Literal["image", "clip"]
KNOWN = "PNG, JPEG, WebP, BMP, GIF, MP4, MOV, MKV, WebM or AVI"
_HEAD = 64  # number of bytes that identify the format of a file


@dataclass(frozen=True)
class Slot:
    """A form field in which a client sends files."""

    key: str  # key of the inference JSON
    what: str
    kinds: frozenset[Kind] = frozenset({"image", "clip"})
    several: bool = False


SLOTS: Mapping[str, Slot] = {
    "src_video": Slot("video_path", "the clip to edit, or the control clip", frozenset({"clip"})),
    "src_mask": Slot("mask_path", "mask of src_video: white = generate, black = keep"),
    "src_ref_images": Slot("image_paths", "reference images, in order", frozenset({"image"}), several=True),
    "first_frame": Slot("first_frame_path", "image or clip that the video begins with"),
    "last_frame": Slot("last_frame_path", "image or clip that the video ends with"),
    "input_reference": Slot(
        "", "alias of other servers: an image is used as first_frame, a clip as src_video"
    ),
}


def identify(head: bytes) -> tuple[Kind, str] | None:
    """Identify a file by its first bytes. Returns its kind and suffix, or None for an unknown format.

    Only formats that contain the pixels are known. A playlist or script could make FFmpeg open other files.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image", ".png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image", ".jpg"
    if head.startswith(b"BM"):
        return "image", ".bmp"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image", ".webp"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "clip", ".gif"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "clip", ".avi"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "clip", ".mkv"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "clip", ".mp4"
    return None


def keep_uploads(
    uploads: Mapping[str, Sequence[BinaryIO]], folder: Path, settings: ServeConfig
) -> dict[str, list[str]]:
    """Write each slot's files to `folder`. Returns slot → file names, with `input_reference` resolved.

    Raises ApiError with the name of the slot if there are too many files, or if a file is of an unknown
    format, too long, too large or damaged.
    """
    kept: dict[str, list[str]] = {}
    if sum(map(len, uploads.values())) > settings.max_files:
        raise ApiError(
            413,
            "too_many_files",
            f"got {sum(map(len, uploads.values()))}",
            expected=f"at most {settings.max_files} files",
        )
    for name, files in uploads.items():
        slot = SLOTS[name]
        if len(files) > 1 and not slot.several:
            raise ApiError(400, "invalid_request", f"got {len(files)} files", where=name, expected="one file")
        for file in files:
            kind, suffix = _kind_of(file, name, slot)
            target = name
            if name == "input_reference":
                target = "first_frame" if kind == "image" else "src_video"
                if target in uploads:
                    raise ApiError(
                        400, "invalid_request", f"is {target}, which is given too", where=name, fix="send one"
                    )
            place = folder / f"{target}_{len(kept.get(target, ()))}{suffix}"
            with place.open("xb") as written:
                shutil.copyfileobj(file, written, 1 << 20)
            check_upload(place, name, kind, settings)
            kept.setdefault(target, []).append(place.name)
    return kept


def _kind_of(file: BinaryIO, name: str, slot: Slot) -> tuple[Kind, str]:
    head = file.read(_HEAD)
    file.seek(0)
    if not head:
        raise ApiError(400, "invalid_input", "is an empty file", where=name)
    found = identify(head)
    if found is None or found[0] not in slot.kinds:
        wanted = KNOWN if len(slot.kinds) > 1 else "an image" if "image" in slot.kinds else "a video file"
        got = (
            f"got {'an image' if found[0] == 'image' else 'a video file'}"
            if found
            else "got a file in an unsupported format"
        )
        raise ApiError(415, "unsupported_format", got, where=name, expected=wanted)
    return found


def check_upload(path: Path, name: str, kind: Kind, settings: ServeConfig) -> None:
    """Check that a file can be read and is within the limits.

    Raises ApiError with the name of the slot, but never with the server's path.
    """
    seconds = 0.0
    try:
        if kind == "image":
            with open_image(path) as image:
                _check_pixels(*image.size, name, settings)
                image.load()  # detects truncated pixels, which the header does not show
        else:
            info = probe(path, mask=name == "src_mask")
            _check_pixels(info.width, info.height, name, settings)
            seconds = info.duration
    except DataError as error:
        problem = error.problem.replace(f"{path}: ", "").replace(str(path), "the file")
        raise ApiError(
            400, "invalid_input", problem, where=name, expected=error.expected, fix=error.fix
        ) from None
    if seconds > settings.max_clip_seconds:
        raise ApiError(
            413,
            "too_long",
            f"lasts {seconds:.1f} s",
            where=name,
            expected=f"at most {settings.max_clip_seconds:g} s",
        )


def remarks_of(folder: Path, files: Mapping[str, Sequence[str]], *, soft_mask: bool | None) -> list[str]:
    """Return remarks on stored files, from their headers and from the pixels of images.

    `soft_mask`: how a mask is read; None for the mask of a task, whose meaning is different. The worker adds
    the remarks that need a clip's frames when it reads the frames.
    """
    remarks = []
    for slot, names in files.items():
        is_mask = slot == "src_mask"
        for path in (folder / name for name in names):
            is_image = path.suffix in IMAGE_SUFFIXES
            found = image_traits(path, mask=is_mask) if is_image else probe(path, mask=is_mask).traits
            remarks += [f"{slot}: {remark}" for remark in remarks_on(found)]
            if is_mask and is_image and soft_mask is not None:
                values = brightness(read_mask(path)[None])
                levels = (int(values.min()), int(values.max()))
                remarks += [
                    f"{slot}: {remark}" for remark in (blank_remark(levels, soft=soft_mask),) if remark
                ]
    return remarks


def _check_pixels(width: int, height: int, name: str, settings: ServeConfig) -> None:
    """Raise ApiError if a frame has more pixels than the server accepts."""
    if width * height > settings.max_clip_pixels:
        raise ApiError(
            413,
            "too_many_pixels",
            f"has {width}x{height} pixels",
            where=name,
            expected=f"at most {settings.max_clip_pixels}",
        )
