"""What an HTTP API costs, and what it loses when its processes are killed.

    PYTHONPATH=. python benchmarks/serve.py --jobs 200 --kills 20 --seed 0

1. requests a second without a model: an empty list, and a queued video;
2. the time of a video in the queue against that of the generate command, both with the models loaded;
3. `--jobs` queued videos while the server or a worker is killed `--kills` times at random moments: videos
that are missing, failed or
   made twice (0 is right).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from mindspeed_mm.log import get_logger, setup_logging
from mindspeed_mm.serve.jobs import JobStore

LOGGER = get_logger("benchmarks.serve")
ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples/vace/tiny/inference.json"


class Server:
    """Start `vace serve` on its own port."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir, self.starts = data_dir, 0

    def start(self, *, ready: bool = True) -> None:
        """Start it; with `ready`, wait for the models."""
        command = [
            sys.executable,
            "-m",
            "mindspeed_mm.cli",
            "serve",
            str(CONFIG),
            "--port",
            "0",
            "--max-queue",
            "1000000",
        ]
        log = self.data_dir.parent / f"serve{self.starts}.log"
        self.starts += 1
        with log.open("w") as written:
            self.process = subprocess.Popen(
                [*command, "--data-dir", str(self.data_dir)],
                cwd=ROOT,
                stdout=written,
                stderr=subprocess.STDOUT,
            )
        while " at http" not in log.read_text():
            time.sleep(0.05)
        self.url = log.read_text().split(" at ")[1].split()[0]
        while ready and self.ask("/ready")[0] != 200:
            time.sleep(0.1)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, None

    def workers(self) -> list[int]:
        """Process ids."""
        found = subprocess.run(
            ["pgrep", "-f", f"serve.start_worker {self.data_dir}"],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(word) for word in found.stdout.split()]


def rate(call: Callable[[], object], count: int) -> float:
    """Calls a second, from eight threads."""
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: call(), range(count)))
    return count / (time.perf_counter() - start)


def measure_requests(server: Server, count: int) -> dict[str, float]:
    """Requests a second while the worker does nothing."""
    for pid in server.workers():
        os.kill(pid, signal.SIGSTOP)
    found = {
        "list": rate(lambda: server.ask("/v1/videos"), count),
        "create": rate(lambda: server.ask("/v1/videos", {"prompt": "a ball", "steps": 1}), count),
    }
    for video in server.ask(f"/v1/videos?limit={100}")[1]["data"]:
        delete(server, video["id"])
    while data := server.ask("/v1/videos?limit=100")[1]["data"]:
        for video in data:
            delete(server, video["id"])
    for pid in server.workers():
        os.kill(pid, signal.SIGCONT)
    return found


def delete(server: Server, video_id: str) -> None:
    """Delete a video."""
    request = urllib.request.Request(f"{server.url}/v1/videos/{video_id}", method="DELETE")
    with suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60):
        pass


def measure_overhead(server: Server, folder: Path, videos: int, steps: int) -> dict[str, float]:
    """Median seconds of a video, in the queue and in the generate command."""
    for seed in range(videos + 1):
        server.ask("/v1/videos", {"prompt": "a ball", "steps": steps, "seed": seed})
    while any(video["status"] != "completed" for video in server.ask("/v1/videos?limit=100")[1]["data"]):
        time.sleep(0.2)
    store = JobStore(server.data_dir)
    ends = sorted(job.completed_at or 0.0 for job in store.page(after=None, limit=100, newest_first=True)[0])
    values = {
        **json.loads(CONFIG.read_text()),
        "prompt": "a ball",
        "steps": steps,
        "output_path": str(folder / "command"),
    }
    values["tasks"] = [{"seed": seed} for seed in range(videos + 1)]
    values["model"] = json.loads((server.data_dir / "template.json").read_text())["model"]
    path = folder / "command.json"
    path.write_text(json.dumps(values))
    subprocess.run(
        [sys.executable, "-m", "mindspeed_mm.cli", "generate", str(path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    made = sorted(file.stat().st_mtime for file in (folder / "command").glob("video*.json"))
    return {"queue": gap(ends[-videos - 1 :]), "command": gap(made)}


def gap(moments: list[float]) -> float:
    """The median time between two of them."""
    return statistics.median(late - early for early, late in pairwise(moments))


def measure_kills(server: Server, jobs: int, kills: int, rng: random.Random) -> dict[str, int]:
    """Queue `jobs`, kill the server or a worker now and then, and count what became of them."""
    ids = [
        server.ask("/v1/videos", {"prompt": "a ball", "steps": 4, "seed": seed})[1]["id"]
        for seed in range(jobs)
    ]
    made: dict[str, float] = {}
    store, twice, done = JobStore(server.data_dir), 0, 0
    moments = sorted(rng.sample(range(jobs), kills))
    while True:
        waiting = 0
        for video_id in ids:
            job = store.get(video_id)
            if job is None or job.status in ("queued", "in_progress"):
                waiting += job is not None
                continue
            end = job.completed_at or 0.0
            twice += made.setdefault(video_id, end) != end
        done = len(made)
        if not waiting:
            break
        if moments and done >= moments[0]:
            moments.pop(0)
            time.sleep(rng.random())
            victims = server.workers()
            if victims and rng.random() < 0.5:
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(victims), signal.SIGKILL)
            else:
                server.process.kill()
                server.process.wait()
                server.start(ready=False)
        time.sleep(0.1)
    whole = sum(server.ask(f"/v1/videos/{video_id}")[1]["status"] == "completed" for video_id in ids)
    return {
        "queued": jobs,
        "kills": kills,
        "completed": whole,
        "failed or lost": jobs - whole,
        "twice": twice,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    setup_logging()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        server = Server(folder / "data")
        server.start()
        try:
            for what, calls in measure_requests(server, given.requests).items():
                LOGGER.info("%-10s %7.0f requests/s", what, calls)
            seconds = measure_overhead(server, folder, given.videos, given.steps)
            ratio = 100 * (seconds["queue"] / seconds["command"] - 1)
            LOGGER.info(
                "a video    %.3f s in the queue, %.3f s in the command: %+.1f %%",
                seconds["queue"],
                seconds["command"],
                ratio,
            )
            LOGGER.info(
                "kills      %s", measure_kills(server, given.jobs, given.kills, random.Random(given.seed))
            )
        finally:
            server.process.kill()


if __name__ == "__main__":
    main()
