"""Count the files that one clip passes through: from data.json to its feature, and from a video to an mp4.

    python scripts/clip_trip.py

Runs extraction and generation of a tiny clip in this process, with the weights of examples/vace/tiny. Notes
each function of the library when it first gets the clip as an argument: a row, a request, a path, pixels or
latents.
A file is entered again when another file calls such a function in a file that the clip had left before. A
function that goes on with the next step of its own file enters nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples/vace/tiny"
ROOMS = tuple(f"{ROOT / room}/" for room in ("mindspeed_mm", "checkpoint", "megatron"))
LOADERS = "/mindspeed_mm/models/"
CARRIERS = {
    *(
        "SampleRecord",
        "VideoSample",
        "Conditions",
        "ReadConditions",
        "Inputs",
        "FeatureRecord",
        "FeatureInfo",
    ),
    *("GenerationRequest", "Encoded", "ReadTask", "ReadResult", "VideoReader", "Frames", "Step"),
    "GeneratedVideo",
}


class Trip:
    """The functions that got the clip, in the order of their first call."""

    def __init__(self, clip: Path) -> None:
        self.clip = str(clip)
        self.functions: dict[tuple[str, str], str] = {}  # (file, function) → file of its caller, in order

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOMS) or code.co_name.startswith("<"):
            return
        key = (code.co_filename, code.co_qualname)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if key in self.functions:
            return
        reads_weights = LOADERS in code.co_filename and "/models/wan/" not in code.co_filename
        if any(self.carries(frame.f_locals.get(name), reads_weights) for name in names):
            self.functions[key] = caller_of(frame)

    def carries(self, value: object, reads_weights: bool, depth: int = 0) -> bool:
        """Whether an argument is the clip in one of its forms."""
        if isinstance(value, (str, Path)):
            return str(value).endswith(self.clip)
        if isinstance(value, (list, tuple)) and depth < 2:
            return any(self.carries(item, reads_weights, depth + 1) for item in value[:4])
        if type(value).__name__ in CARRIERS:
            return True
        return not reads_weights and getattr(value, "ndim", 0) >= 4  # pixels, latents and vace_context

    def report(self, name: str) -> set[str]:
        """Print the figures; the files."""
        files = [Path(file).relative_to(ROOT).as_posix() for file, _ in self.functions]
        seen, again, last = set(), 0, ""
        for file, ((path, _), caller) in zip(files, self.functions.items(), strict=True):
            again += file in seen and file != last and caller != path
            seen.add(file)
            last = file
        sys.stdout.write(f"{name}: {len(seen)} files, {len(files)} functions, entered again {again} times\n")
        for file in dict.fromkeys(files):
            sys.stdout.write(f"    {file}\n")
        return seen


def caller_of(frame: FrameType) -> str:
    """The nearest file of the library, or "", that the call comes from."""
    above = frame.f_back
    while above is not None and not above.f_code.co_filename.startswith(ROOMS):
        above = above.f_back
    return "" if above is None else above.f_code.co_filename


def follow(clip: Path, run: Callable[[], None]) -> Trip:
    trip = Trip(clip)
    threading.setprofile(trip)
    sys.setprofile(trip)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return trip


def main() -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.update(MINDSPEED_MM_DEVICE="cpu")
    import numpy as np

    from mindspeed_mm.data.video_writer import write_video
    from mindspeed_mm.tasks import extract, generate

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = folder / "clip.mp4"
        frames = np.zeros((17, 64, 64, 3), np.uint8)
        frames[:, 20:40, 20:40] = 200
        write_video(clip, iter(frames), fps=16)
        row = {"video": "clip.mp4", "cap": "a ball", "src_video": "clip.mp4"}
        (folder / "rows.json").write_text(json.dumps([row]))
        data = json.loads((TINY / "data.json").read_text())
        data["dataset_param"]["basic_parameters"]["data_path"] = str(folder / "rows.json")
        (folder / "data.json").write_text(json.dumps(data))
        argv = [
            "--mm-data",
            str(folder / "data.json"),
            "--mm-model",
            str(TINY / "model.json"),
            "--num-workers",
            "0",
        ]
        tools = {"sorafeature": {"save_path": str(folder / "features")}}
        (folder / "tools.json").write_text(json.dumps(tools))
        argv += ["--mm-tool", str(folder / "tools.json")]
        first = follow(clip, lambda: extract.main(argv))
        request = [
            str(TINY / "inference.json"),
            "--prompt",
            "a ball",
            "--video-path",
            str(clip),
            "--steps",
            "1",
        ]
        second = follow(clip, lambda: generate.main([*request, "--output-path", str(folder / "out")]))
    both = first.report("data.json to feature") | second.report("video to mp4")
    sys.stdout.write(f"both: {len(both)} files\n")


if __name__ == "__main__":
    main()
