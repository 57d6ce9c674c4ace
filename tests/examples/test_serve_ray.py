"""`vace serve --engine ray` on a local Ray cluster: two replicas make videos, and one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from mindspeed_mm.data.video import open_video

pytest.importorskip("ray.serve", reason="pip install -e '.[ray]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    folder = tmp_path_factory.mktemp("ray")
    command = [sys.executable, "-m", "mindspeed_mm.cli", "serve", "examples/vace/tiny/inference.json"]
    command += ["--engine", "ray", "--devices", "2", "--port", "0", "--data-dir", str(folder)]
    environment = {**os.environ, "MINDSPEED_MM_DEVICE": "cpu", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if " at http" in line)
        url = line.split(" at ")[1].split()[0]
        wait(lambda: requests.get(f"{url}/ready", timeout=10).status_code == 200)
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def wait(is_done: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not is_done():
        assert time.monotonic() < until
        time.sleep(0.5)


def statuses(url: str) -> list[str]:
    return [video["status"] for video in requests.get(f"{url}/v1/videos", timeout=30).json()["data"]]


def test_replicas_make_videos_and_survive_a_kill(served: tuple[str, psutil.Process], tmp_path: Path) -> None:
    url, server = served
    fields = {"prompt": "a red circle moves down over a dark background", "steps": "40"}
    ids = [
        requests.post(f"{url}/v1/videos", data={**fields, "seed": str(seed)}, timeout=60).json()["id"]
        for seed in range(4)
    ]
    wait(lambda: statuses(url).count("in_progress") == 2)
    replicas = [
        child for child in server.children(recursive=True) if "ServeReplica" in " ".join(child.cmdline())
    ]
    assert len(replicas) == 2
    replicas[0].kill()
    wait(lambda: statuses(url) == ["completed"] * 4)
    content = requests.get(f"{url}/v1/videos/{ids[0]}/content", timeout=60).content
    (tmp_path / "video.mp4").write_bytes(content)
    assert open_video(tmp_path / "video.mp4").num_frames == 17


def test_bad_input_fails_the_video_alone(served: tuple[str, psutil.Process]) -> None:
    url, _ = served
    refused = requests.post(f"{url}/v1/videos", data={"prompt": "x", "context_scale": "1,1,1"}, timeout=60)
    found = refused.json()
    if refused.status_code == 200:
        wait(lambda: requests.get(f"{url}/v1/videos/{found['id']}", timeout=30).json()["status"] == "failed")
