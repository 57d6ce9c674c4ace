"""Whether memory and descriptors grow with work.

Many clips, many videos, many iterations, each in one process.

    PYTHONPATH=. python benchmarks/growth.py --clips 300 --videos 100 --iterations 2000 --plot growth.png

Tiny sizes, one rank, on the CPU. The process is sampled from outside; a table compares the second tenth of
the work with the last, and the plot has every sample.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from mindspeed_mm.log import get_logger, setup_logging
from tests.fuzz.world import EXTRACT, INFERENCE, TRAIN
from tests.support.clips import write_clip

LOGGER = get_logger("benchmarks.growth")
ROOT = Path(__file__).resolve().parents[1]
PANEL = (640, 240)  # width, height of one curve
MARGIN = 48


@dataclass
class Job:
    """One command and how much of its work is done."""

    name: str
    command: Sequence[str]
    units: int
    done: Callable[[], int]
    samples: list[tuple[int, float, int]] = field(default_factory=list)  # units done, MB, descriptors

    def mean(self, first: float, last: float) -> tuple[float, float]:
        """Mean MB and descriptors between two parts of the work."""
        chosen = [s for s in self.samples if first * self.units <= s[0] <= last * self.units] or self.samples[
            -1:
        ]
        return statistics.mean(s[1] for s in chosen), statistics.mean(s[2] for s in chosen)


def make_jobs(world: Path, clips: int, videos: int, iterations: int) -> list[Job]:
    """The three commands in a folder that tests.fuzz.world made."""
    rows = []
    for number in range(clips):
        write_clip(world / f"clips/g{number}.mp4", 5 + number % 7, height=32, width=32 + 16 * (number % 3))
        rows.append({"video": f"g{number}.mp4", "cap": f"the red ball number {number}"})
    (world / "clips/many.json").write_text(json.dumps(rows))
    (world / "many.txt").write_text("clips,clips/many.json\n")
    data = json.loads((world / "data.json").read_text())
    data["dataset_param"]["basic_parameters"]["data_path"] = "many.txt"
    (world / "many.json").write_text(json.dumps(data))
    tasks = [{**INFERENCE["tasks"][0], "name": f"v{number}", "seed": number} for number in range(videos)]
    (world / "many_videos.json").write_text(
        json.dumps({**INFERENCE, "tasks": tasks, "output_path": "many_videos"})
    )
    python = sys.executable
    extract = [*(word for word in EXTRACT if not word.startswith(("--mm-data", "--num-workers")))]
    flags = ["--mm-data=many.json", "--save-path=many", "--num-workers=1", "--no-check-clips"]
    train = [word for word in TRAIN if not word.startswith(("--save=", "--log-interval"))]
    saving = [
        "--save=trained",
        f"--train-iters={iterations}",
        f"--save-interval={max(1, iterations // 20)}",
        "--log-interval=20",
    ]
    return [
        Job(
            "extraction, clips", [python, str(ROOT / (
                "mindspeed_mm/tools/feature_extraction/get_vace_feature.py"
            )), *extract, *flags],
            clips, lambda: len(list((world / "many/features").glob("*.safetensors"))),
        ),
        Job(
            "generation, videos", [python, str(ROOT / (
                "examples/vace/inference/Wan-VACE-Inference.py"
            )), "many_videos.json"],
            videos, lambda: len(list((world / "many_videos").glob("*.mp4"))),
        ),
        Job(
            "training, iterations",
            [python, str(ROOT / "pretrain_vace.py"), *train, *saving, "--save-retain-interval=100000"],
            iterations, lambda: _iteration(world / "trained/metrics.jsonl"),
        ),
    ]  # fmt: skip


def _iteration(metrics: Path) -> int:
    with suppress(OSError, ValueError, IndexError), open(metrics, "rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - 4000))
        return int(json.loads(stream.read().decode().splitlines()[-1])["iteration"])
    return 0


def measure(job: Job, world: Path, every: float = 0.5) -> None:
    """Run it to its end, sampling its process. Raises RuntimeError when it fails."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MINDSPEED_MM_DEVICE": "cpu"}
    log = world / "growth.log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(job.command, cwd=world, env=env, stdout=stream, stderr=stream)
    while process.poll() is None:
        with suppress(OSError, IndexError):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
            if 0 < (done := job.done()) < job.units:  # not while it starts, not while it ends
                job.samples.append((done, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, descriptors))
        time.sleep(every)
    if process.returncode:
        raise RuntimeError(f"{job.name}: {log.read_text(errors='replace')[-2000:]}")


def draw(jobs: Sequence[Job], path: Path) -> None:
    """Megabytes (blue, left axis) and descriptors (orange) over the work done, one panel per job."""
    width, height = PANEL
    image = Image.new("RGB", (width + 2 * MARGIN, len(jobs) * (height + MARGIN) + MARGIN), "white")
    pen = ImageDraw.Draw(image)
    for number, job in enumerate(jobs):
        top = MARGIN + number * (height + MARGIN)
        pen.rectangle((MARGIN, top, MARGIN + width, top + height), outline="black")
        for place, colour, side in ((1, "#1f5fbf", 4), (2, "#d9730d", MARGIN + width + 4)):
            most = max(sample[place] for sample in job.samples)
            points = [
                (MARGIN + width * sample[0] / job.units, top + height - 0.9 * height * sample[place] / most)
                for sample in job.samples
            ]
            pen.line(points, fill=colour, width=2)
            pen.text((side, top + 0.1 * height - 6), f"{most:.0f}", fill=colour)
            pen.text((side, top + height - 12), "0", fill=colour)
        pen.text(
            (MARGIN, top - 14), f"{job.name}: MB (blue), descriptors (orange); 0 to {job.units}", fill="black"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def main() -> None:
    """Measure, print the table, draw."""
    setup_logging()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--videos", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--plot", type=Path, default=Path("growth.png"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        make = (
            "from pathlib import Path; from tests.fuzz.world import make_world; "
            f"make_world(Path({str(world)!r}))"
        )
        subprocess.run([sys.executable, "-c", make], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        jobs = make_jobs(world, arguments.clips, arguments.videos, arguments.iterations)
        for job in jobs:
            measure(job, world)
        draw(jobs, arguments.plot)
    LOGGER.info(
        "| job | units | MB in the second tenth | MB in the last | descriptors | in the last |\n|-|-|-|-|-|-|"
    )
    for job in jobs:
        (before, opened), (after, open_now) = job.mean(0.1, 0.2), job.mean(0.9, 1.0)
        LOGGER.info(
            "| %s | %d | %.1f | %.1f | %.1f | %.1f |", job.name, job.units, before, after, opened, open_now
        )


if __name__ == "__main__":
    main()
