"""Writes the output of a task as files that generation and extraction read. Does not import torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mindspeed_mm.conditioning.annotate.opencv import Frame, as_rgb
from mindspeed_mm.conditioning.annotate.spool import Spool
from mindspeed_mm.conditioning.tasks.spec import Prepared
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import write_json
from mindspeed_mm.leftovers import temporary_name

RECORD = "prepare.json"


def describe(prepared: Prepared) -> str:
    """Return a one-line summary, such as `81 frames of 832x480 at 16 fps, 2 reference(s)`."""
    parts = []
    if prepared.steps is not None:
        height, width = prepared.size
        parts.append(f"{prepared.num_frames} frames of {width}x{height} at {prepared.fps:g} fps")
    if prepared.references:
        parts.append(f"{len(prepared.references)} reference(s)")
    return ", ".join(parts)


def file_names(prepared: Prepared, *, lossless: bool = False) -> list[str]:
    """Return the names of the files that `write_files` may create."""
    references = [f"reference_{number}.png" for number in range(len(prepared.references))]
    return [*_clip_names(prepared, lossless=lossless).values(), *references, RECORD]


def write_prepared(prepared: Prepared, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write src_video, src_mask, reference_N.png and prepare.json to `folder` and return their paths.

    The files are moved to `folder` only after all of them are written. src_video is an .mp4, and src_mask is
    lossless (FFV1). A single frame and its mask are PNGs. A clip with an odd side, which H.264 cannot store,
    is a lossless .mkv. Raises DataError.
    """
    draft = folder / temporary_name("prepared")
    try:
        draft.mkdir(parents=True)
        write_files(prepared, draft, settings)
        written = []
        for path in sorted(draft.iterdir()):
            os.replace(path, folder / path.name)
            written.append(folder / path.name)
        return written
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_files(
    prepared: Prepared, folder: Path, settings: Mapping[str, Any], *, lossless: bool = False
) -> dict[str, Any]:
    """Write the files directly to `folder`, and return the content of prepare.json.

    prepare.json contains `settings` and the file names by key. Raises OSError.
    """
    names = _write_clip(prepared, folder, lossless=lossless)
    references = [f"reference_{number}.png" for number in range(len(prepared.references))]
    for name, reference in zip(references, prepared.references, strict=True):
        Image.fromarray(reference).save(folder / name)
    record = {**settings, **names, "src_ref_images": references}
    write_json(folder / RECORD, record)
    return record


def cannot_write(folder: Path, error: OSError) -> DataError:
    """Return the error for a folder that cannot be written."""
    return DataError(
        f"cannot be written: {error.strerror or error}",
        where=folder,
        fix="free disk space or choose another --out",
    )


def _write_clip(prepared: Prepared, folder: Path, *, lossless: bool) -> dict[str, str]:
    """Write the clip and its mask, and return the file names by key.

    Masks are spooled to disk while the clip is encoded, so that the source is read only once.
    """
    if prepared.steps is None:
        return {}
    names = _clip_names(prepared, lossless=lossless)
    video, mask_path = folder / names["src_video"], folder / names["src_mask"]
    with Spool() as masks:

        def frames() -> Iterator[Frame]:
            for frame, mask in prepared.read():
                if mask is not None:
                    masks.add(mask)
                yield frame

        if prepared.num_frames == 1:
            Image.fromarray(next(frames())).save(video)
        else:
            write_video(video, frames(), prepared.fps, lossless=video.suffix == ".mkv")
        if not masks.count:
            return {"src_video": video.name}
        if prepared.num_frames == 1:
            Image.fromarray(next(iter(masks))).save(mask_path)
        else:
            write_video(mask_path, (as_rgb(mask) for mask in masks), prepared.fps, lossless=True)
        return names


def _clip_names(prepared: Prepared, *, lossless: bool) -> dict[str, str]:
    if prepared.steps is None:
        return {}
    if prepared.num_frames == 1:
        return {"src_video": "src_video.png", "src_mask": "src_mask.png"}
    odd = any(side % 2 for side in prepared.size)
    return {"src_video": "src_video.mkv" if lossless or odd else "src_video.mp4", "src_mask": "src_mask.mkv"}
