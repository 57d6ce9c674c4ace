"""`vace data split`: cuts long files into one clip per scene. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from pydantic import Field

from mindspeed_mm.conditioning.annotate.opencv import Frame, opencv
from mindspeed_mm.conditioning.tasks.spec import Clip
from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import (
    display_path,
    format_json,
    open_append,
    parse_json,
    read_text,
    write_json_lines,
    write_text,
)
from mindspeed_mm.locks import lock_folder
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.outputs import check_folder, check_not_read
from mindspeed_mm.progress import Progress
from mindspeed_mm.text_encoding import split_lines

logger = get_logger(__name__)
PROG = "vace data split"
LISTING = "scenes.jsonl"
_WIDTH = 256  # width in pixels of the frames that are compared


class SplitConfig(Config):
    """Where to cut files, and where to write the clips."""

    out: str = Field(default="scenes", description="folder for the clips (default: scenes)")
    threshold: float = Field(
        default=3.0, gt=0, le=255, description="how much a cut must differ from the frames around it"
    )
    min_seconds: float = Field(default=1.0, ge=0, le=86400, description="shorter scenes are left out")
    max_seconds: float | None = Field(
        default=None, gt=0, le=86400, description="longer scenes are cut into equal pieces (default: never)"
    )
    dry_run: bool = Field(default=False, description="find the scenes, print them, and stop")
    print_config: bool = Field(default=False, description="print the settings as JSON and stop")


@dataclass(frozen=True)
class Piece:
    """The frames [start, stop) of a file."""

    start: int
    stop: int


@one_line_errors
def main(argv: Sequence[str], prog: str = PROG) -> None:
    """Cut the files, writing each piece atomically. On bad input, print one line and exit with 1."""
    arguments = split_parser(prog).parse_strict(argv)
    config = parse(SplitConfig, given(arguments, SplitConfig), prog)
    if config.print_config:
        logger.info(format_json({"sources": arguments.sources, **config.model_dump(mode="json")}, indent=2))
        return
    make_detector(config.threshold)  # if the package is missing, fail before opening any clip
    clips = [Clip.open(source) for source in arguments.sources]
    stems = [clip.path.stem for clip in clips]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), ""):
        raise DataError(f"two files are named {twice}", where=prog, fix="split them into two folders")
    check_folder(config.out, "--out")
    out = Path(config.out)
    for clip in clips:  # fail before hours of decoding, although the number of pieces is not known yet
        check_pieces(clip, 1, out, clips)
    for clip in clips:  # report now: the pieces no longer have these traits
        for remark in remarks_on(clip.reader.traits):
            logger.info(f"{clip.path}: {remark}")
    found = {clip.path: pieces_of(clip, config) for clip in clips}
    for clip in clips:
        check_pieces(clip, len(found[clip.path]), out, clips)
    if config.dry_run:
        for path, pieces in found.items():
            ends = ", ".join(f"{piece.start}-{piece.stop - 1}" for piece in pieces)
            logger.info(f"{path}: {len(pieces)} scenes, frames {ends or 'none'}")
        return
    with lock_folder(out, choose="--out"):
        rows: list[dict[str, Any]] = []
        # List each piece when it is written, so that the next run can replace the pieces of a killed run.
        with open_append(out / LISTING, buffering=0) as listing:
            for row in (row for clip in clips for row in write_pieces(clip, found[clip.path], out)):
                rows.append(row)
                listing.write(f"{format_json(row)}\n".encode())
        write_json_lines(out / LISTING, rows)
    logger.info(f"{len(rows)} scenes of {len(clips)} files -> {out}")


def make_detector(threshold: float) -> Callable[[int, Frame], list[int]]:
    """Return PySceneDetect's adaptive detector, a function from (number, RGB frame) to new scene starts.

    Raises ConfigError if the package is missing.
    """
    try:
        detectors = import_module("scenedetect.detectors")
    except ImportError:
        raise ConfigError(
            "needs the package scenedetect",
            where=PROG,
            fix="install it: pip install --no-deps 'scenedetect<0.7' platformdirs",
        ) from None
    detector: Any = detectors.AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1)

    def detect(number: int, frame: Frame) -> list[int]:
        cuts: list[int] = detector.process_frame(number, frame[..., ::-1])
        return cuts

    return detect


def pieces_of(clip: Clip, config: SplitConfig) -> list[Piece]:
    """Find the scenes of a clip, drop short ones, and cut long ones into equal parts. Raises DataError."""
    scenes = list(pairwise([0, *find_cuts(clip, config.threshold), clip.num_frames]))
    min_frames = max(1, round(config.min_seconds * clip.fps))
    max_frames = None if config.max_seconds is None else max(1, int(config.max_seconds * clip.fps))
    kept = [scene for scene in scenes if scene[1] - scene[0] >= min_frames]
    if len(kept) < len(scenes):
        logger.info(
            f"{clip.path}: {len(scenes) - len(kept)} of {len(scenes)} scenes are shorter than --min-seconds "
            f"{config.min_seconds:g} and skipped"
        )
    return [piece for start, stop in kept for piece in _parts(start, stop, max_frames)]


def find_cuts(clip: Clip, threshold: float) -> list[int]:
    """Return the frames at which a new scene begins, in ascending order and without frame 0."""
    detect, cv2 = make_detector(threshold), opencv()
    height, width = clip.size
    size = (min(width, _WIDTH), max(1, round(height * min(width, _WIDTH) / width)))
    cuts: list[int] = []
    with Progress(f"scenes of {clip.path.name}", clip.num_frames, "frame") as progress:
        for number, frame in enumerate(clip.frames()):
            cuts += detect(number, cv2.resize(frame, size, interpolation=cv2.INTER_AREA))
            progress.step()
    return sorted({cut for cut in cuts if 0 < cut < clip.num_frames})


def _parts(start: int, stop: int, max_frames: int | None) -> Iterator[Piece]:
    count = 1 if max_frames is None else -(-(stop - start) // max_frames)
    ends = [start + (stop - start) * part // count for part in range(count + 1)]
    yield from (Piece(a, b) for a, b in pairwise(ends))


def check_pieces(clip: Clip, count: int, out: Path, sources: Sequence[Clip]) -> None:
    """Check that the pieces of a clip replace only pieces of an earlier run. Raises ConfigError."""
    pieces = [piece_path(clip, number, out) for number in range(count)]
    check_not_read(pieces, (source.path for source in sources), "--out")
    has_caption = clip.path.with_suffix(".txt").is_file()
    captions = [piece.with_suffix(".txt") for piece in pieces if has_caption]
    existing = [path for path in (*pieces, *captions) if os.path.lexists(path)]
    ours = listed_pieces(out / LISTING) if existing else set()
    if others := [path for path in existing if path.stem not in ours]:
        raise ConfigError(
            f"would overwrite {display_path(others[0])}, which {LISTING} does not list"
            + (f", and {len(others) - 1} more" if len(others) > 1 else ""),
            where=f"--out: {out}",
            fix="choose another folder, or move the file",
        )


def piece_path(clip: Clip, number: int, out: Path) -> Path:
    """Return the path of a piece, such as name-000.mp4."""
    return out / f"{clip.path.stem}-{number:03d}.mp4"


def listed_pieces(path: Path) -> set[str]:
    """Return the stems of the pieces that an earlier run listed. Skips truncated lines. Raises DataError."""
    if not path.is_file():
        return set()
    found = set()
    for line in split_lines(read_text(path, DataError)):
        with suppress(DataError):
            row = parse_json(line, str(path), DataError)
            name = row.get("file") if isinstance(row, dict) else None
            found |= {Path(name).stem} if isinstance(name, str) else set()
    return found


def write_pieces(clip: Clip, pieces: Sequence[Piece], out: Path) -> Iterator[dict[str, Any]]:
    """Write the pieces (name-000.mp4, …), each with a copy of the source's caption file, name.txt.

    Yields the rows of the list.
    """
    caption = clip.path.with_suffix(".txt")
    text = read_text(caption, DataError) if caption.is_file() else None
    frames, place = clip.frames(), 0
    for number, piece in enumerate(pieces):
        path = piece_path(clip, number, out)
        for _ in islice(frames, piece.start - place):
            pass
        write_video(path, islice(frames, piece.stop - piece.start), clip.fps)
        place = piece.stop
        if text is not None:
            write_text(path.with_suffix(".txt"), text)
        yield {"file": path.name, "source": str(clip.path), "frames": [piece.start, piece.stop - 1]}


def split_parser(prog: str = PROG) -> FlagParser:
    """Build the command's parser."""
    parser = FlagParser(prog, "Cut long files into one clip for each scene.")
    parser.add_argument("action", choices=["split"], metavar="split")
    parser.add_argument("sources", nargs="+", metavar="CLIP", help="video files")
    add_flags(parser, SplitConfig, "job")
    return parser
