"""What tasks and synthesis cost on one core, in CPU time, so that a busy machine tells the same.

python benchmarks/tasks.py                          # every task that needs no network, 832 x 480, 17 frames
python benchmarks/tasks.py --clips 50 --workers 2   # vace prepare on a dataset of so many clips, too
python benchmarks/tasks.py --samples 8              # training samples, too
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_mm.conditioning.recipe import parse_recipe, training_draw
from mindspeed_mm.conditioning.synthesis import load_synthesized, to_synthesis
from mindspeed_mm.conditioning.tasks.catalog import all_tasks
from mindspeed_mm.conditioning.tasks.spec import Clip, Sources, Task
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.forms import ArrayReader
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.data.transforms import load_pixels
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.tasks.prepare import main as prepare
from tests.support.scenes import moving_disc

RECIPE = {
    "tasks": {
        "inpainting_random": {"weight": 5, "options": {"references": {"integers": [0, 2]}}},
        "framerefext": {"weight": 2, "options": {"mode": {"choice": ["first", "last", "firstlast"]}}},
        "outpainting_inner": {},
        "reference_random": {},
        "gray": {"weight": 0.5},
        "canny": {"weight": 0.5},
    }
}
MODES = {"inpainting": "bboxtrack", "framerefext": "firstlast", "layout_track": "bboxtrack"}


def cpu(work: Callable[[], object]) -> float:
    """Seconds of CPU time of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def options_of(task: Task, box: list[float]) -> dict[str, Any] | None:
    """Options for a plain clip; None for a task that needs more than a clip, or a network."""
    if (
        task.needs != ("clip",)
        or task.network
        or task.name.endswith(("mask", "masktrack", "label", "caption"))
    ):
        return None
    fields = task.options.model_fields
    found: dict[str, Any] = {"bbox": [box], "mode": MODES.get(task.name), "expand_num": 12, "references": 2}
    return {
        key: value
        for key, value in found.items()
        if key in fields and key not in task.fixed and value is not None
    }


def measure_tasks(frames: int, height: int, width: int) -> list[str]:
    """A row for each task: frames of its result a second."""
    clip, masks = moving_disc(frames, height, width, height // 5, 8)
    rows, columns = np.nonzero(masks[0])
    box = [float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)]
    lines = ["| task | frames/s of CPU time |", "|-|-|"]
    for task in all_tasks():
        values = options_of(task, box)
        if values is None:
            continue
        options, sources = task.parse(values, task.name), Sources(clips=(Clip(ArrayReader(clip)),))
        spent = statistics.median(cpu(lambda: list(task.prepare(sources, options).read())) for _ in range(2))  # noqa: B023
        count = max(task.prepare(sources, options).num_frames, frames)
        lines.append(f"| `{task.name}` | {count / max(spent, 1e-9):.0f} |")
    return lines


def measure_batch(folder: Path, clips: int, workers: int, frames: int, height: int, width: int) -> list[str]:
    """`vace prepare` on a dataset."""
    rows = []
    for number in range(clips):
        name = f"{number}.mp4"
        write_video(folder / name, moving_disc(frames, height, width, height // 5, 2 + number % 7)[0], 16)
        rows.append({"video": name, "cap": "a disc"})
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time()
    argv = ["--data", str(folder / "data.json"), "--recipe", str(folder / "recipe.yaml")]
    prepare([*argv, "--out", str(folder / "out"), "--num-workers", str(workers)])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime + time.process_time() - own
    return [
        f"vace prepare, {clips} clips of {frames} frames, {workers} processes: {spent:.0f} s of CPU time "
        f"({clips / spent:.2f} clips/s of one core), {time.perf_counter() - began:.0f} s in all"
    ]


def measure_samples(folder: Path, samples: int, height: int, width: int) -> list[str]:
    """Reading and drawing of training samples, 81 frames each."""
    clip = write_video(folder / "long.mp4", moving_disc(81, height, width, height // 5, 4)[0], 16)
    record, config = SampleRecord(video=clip, captions=("a disc",)), VideoConfig(max_hxw=height * width)
    recipe = parse_recipe(RECIPE, "recipe")
    read = statistics.median(cpu(lambda: load_pixels(record, config)) for _ in range(3))
    spent: dict[str, list[float]] = {}
    for index in range(samples):
        draw = training_draw(recipe, "a", seed=1, sample_index=index, first_index=index, iteration=1)
        if draw is not None:
            drawn = to_synthesis(draw)
            made = SampleRecord(video=clip, captions=("a disc",), synthesis=drawn)
            spent.setdefault(draw.task_name, []).append(cpu(lambda: load_synthesized(made, config)))  # noqa: B023
    lines = [f"| a sample of 81 frames | s of CPU time |\n|-|-|\n| decode and resize | {read:.2f} |"]
    return lines + [
        f"| the same and `{name}` ({len(values)}) | {statistics.mean(values):.2f} |"
        for name, values in sorted(spent.items())
    ]


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description="CPU time of tasks and synthesis.")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--clips", type=int, default=0, help="clips of a dataset (default: none)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=0, help="training samples (default: none)")
    parser.add_argument("--no-tasks", action="store_true")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    size = given.height, given.width
    with tempfile.TemporaryDirectory() as scratch:
        lines = [] if given.no_tasks else measure_tasks(given.frames, *size)
        if given.samples:
            lines += measure_samples(Path(scratch), given.samples, *size)
        if given.clips:
            lines += measure_batch(Path(scratch), given.clips, given.workers, given.frames, *size)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
