"""What a clip's header says: length, size, rate. No torch.

One frame is decoded, of a folder of images each; nothing else is read where the format allows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mindspeed_mm.data.content import Signature, append_lines, read_lines, signature_of
from mindspeed_mm.data.video import (
    IMAGE_SUFFIXES,
    ImageReader,
    clock,
    index_frames,
    read_image,
    refuse_text,
    short,
    upright,
)
from mindspeed_mm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """A clip, unopened. `times` are even: exact ones need the whole file."""

    path: Path
    num_frames: int
    height: int  # as shown: after rotation
    width: int
    fps: float
    duration: float
    timed: bool = True
    variable: bool = False  # the frame rate changes
    squeezed: bool = False  # its pixels are not square

    @property
    def times(self) -> list[float]:
        """When each frame comes on, were they even."""
        return [i * self.duration / self.num_frames for i in range(self.num_frames)]


def probe_picture(path: str | Path) -> ClipInfo:
    """Look at a reference: one image. Raises DataError for what is none."""
    height, width = read_image(path).shape[:2]
    return ClipInfo(path=Path(path), num_frames=1, height=height, width=width, fps=0.0, duration=0.0, timed=False)


def probe(path: str | Path) -> ClipInfo:
    """Look at a video file, an image or a folder of images. Raises DataError for what is no video, cut off, or damaged at its start."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        images = ImageReader(path)
        # a torn one, or one of another size, is known before anything is encoded
        for index in range(1, images.num_frames):
            images.read([index])
        return ClipInfo(
            path=path,
            num_frames=images.num_frames,
            height=images.height,
            width=images.width,
            fps=images.fps,
            duration=images.duration,
            timed=False,
        )
    if not path.exists():
        raise DataError(f"{path}: no such file")
    refuse_text(path)
    import av

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            return _look(path, container)
    except DataError:
        raise
    except Exception as error:  # av.error.FFmpegError, and whatever a damaged header leads to
        raise DataError(f"{path}: cannot be opened as a video: {short(error)}") from None


def _look(path: Path, container: Any) -> ClipInfo:
    if not container.streams.video:
        raise DataError(f"{path}: there is no video in it")
    stream = container.streams.video[0]
    _check_length(path, stream)
    base = float(stream.time_base)
    count, duration = stream.frames, (stream.duration or 0) * base
    rates = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    variable = bool(rates) and max(rates) > 1.05 * min(rates)
    if (
        not count or not duration or variable
    ):  # Matroska, WebM, MPEG-TS keep no count; of phones' clips the header may be wrong
        stamps, _, last = index_frames(container, stream)
        count = len(stamps)
        duration = clock([(stamp - stamps[0]) * base for stamp in stamps], last * base)[0]
        container.seek(0)
    first = next(container.decode(stream), None)
    if first is None:
        raise DataError(f"{path}: the first frame cannot be decoded")
    height, width = upright(first).shape[:2]
    aspect = stream.sample_aspect_ratio
    return ClipInfo(
        path=path,
        num_frames=count,
        height=height,
        width=width,
        fps=round(float(stream.average_rate or count / duration), 3),
        duration=duration,
        variable=variable,
        squeezed=bool(aspect) and aspect != 1,
    )


def _check_length(path: Path, stream: Any) -> None:
    """MP4's index says where each frame lies: behind the end of the file when a download or a copy broke off."""
    entries = getattr(stream, "index_entries", None)
    if entries is None or not stream.frames or len(entries) == 0:
        return
    last = max((entries[i] for i in range(len(entries))), key=lambda entry: entry.pos)
    size = os.path.getsize(path)
    if last.pos + last.size > size:
        raise DataError(
            f"{path}: cut off: its index ends at byte {last.pos + last.size}, the file at {size}; copy it again"
        )


Kind = Literal["clip", "picture"]  # what a file was looked at as
Seen = dict[tuple[Kind, Path], tuple[Signature, ClipInfo]]


class ClipIndex:
    """What files were found to be, remembered by size and time stamp: a second check of a dataset opens nothing that was good.

    Lines of JSON in a folder; a torn line is ignored, a folder that cannot be written costs the memory alone.
    """

    _FILE = "clips.1.jsonl"  # the number changes when `probe` learns to see more

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / self._FILE
        self._known: dict[tuple[str, str], tuple[Signature, dict[str, Any]]] = {}
        for line in read_lines(self._path) if self._path is not None and self._path.is_file() else ():
            if len(line) == 4 and isinstance(line[3], dict):
                self._known[str(line[0]), str(line[1])] = (str(line[2]), line[3])

    def get(self, kind: Kind, path: Path) -> ClipInfo | None:
        """What the file is, if it was looked at and has not changed since."""
        known = self._known.get((kind, os.path.abspath(path)))
        try:
            return ClipInfo(path=path, **known[1]) if known and known[0] == signature_of(path) else None
        except (OSError, TypeError):
            return None

    def add(self, seen: Seen) -> None:
        """Remember files, each with the signature that was taken before it was opened."""
        lines: list[list[Any]] = []
        for (kind, path), (signature, info) in seen.items():
            facts = {name: value for name, value in asdict(info).items() if name != "path"}
            lines.append([kind, os.path.abspath(path), signature, facts])
        if self._path is None or not lines:
            return
        try:
            append_lines(self._path, lines)
        except OSError:
            self._path = None


def look(kind: Kind, path: Path, known: Mapping[tuple[Kind, Path], ClipInfo], seen: Seen) -> ClipInfo:
    """What a file is, from `known` or from the file itself; what was opened goes to `seen`. Raises DataError."""
    info = known.get((kind, path))
    if info is None:
        try:
            signature = signature_of(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        info = probe_picture(path) if kind == "picture" else probe(path)
        seen[kind, path] = (signature, info)
    return info
