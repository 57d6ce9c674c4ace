"""`vace serve` with the tiny weights, called by a third-party client, while its processes get killed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspeed_mm.cli.main import main as vace
from mindspeed_mm.data.video import open_video

pytest.importorskip("fastapi", reason="pip install -e '.[serve]'")
openai = pytest.importorskip("openai", reason="pip install openai")

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API")]


class Running:
    """A server process on a free port."""

    def __init__(self, data_dir: Path, *flags: str) -> None:
        self.data_dir, self.flags = data_dir, flags
        self.start()

    def start(self) -> None:
        """Start, and wait until it listens and the models are loaded."""
        environment = {
            **os.environ,
            "VACE_TOKEN": TOKEN,
            "MINDSPEED_MM_DEVICE": "cpu",
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "mindspeed_mm.cli", "serve", "examples/vace/tiny/inference.json"]
        command += ["--port", "0", "--data-dir", str(self.data_dir), *self.flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if " at http" in line)
        self.url = line.split(" at ")[1].split()[0]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0)
        wait_for(self.is_ready, "the models are loaded")

    def is_ready(self) -> bool:
        """Whether /ready says so."""
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.HTTPError, OSError):
            return False

    def workers(self) -> list[int]:
        """The process ids of the workers."""
        found = subprocess.run(
            ["pgrep", "-f", f"serve.start_worker {self.data_dir}"], capture_output=True, text=True
        )
        return [int(word) for word in found.stdout.split()]

    def stop(self, number: int) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def create(self, **fields: Any) -> Any:
        """Queue a video."""
        return self.client.videos.create(prompt="a ball", extra_body=fields)

    def wait(self, video: Any) -> Any:
        """The video once it is completed or failed."""
        wait_for(lambda: self.client.videos.retrieve(video.id).status in ("completed", "failed"), video.id)
        return self.client.videos.retrieve(video.id)


def wait_for(condition: Any, what: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("serve") / "data")
    yield running
    running.process.kill()


def test_client_creates_polls_and_downloads(server: Running, tmp_path: Path) -> None:
    video = server.client.videos.create_and_poll(
        prompt="a red ball", model="vace", size="64x48", seconds="1", poll_interval_ms=100
    )
    assert (video.status, video.progress) == ("completed", 100)
    path = tmp_path / "video.mp4"
    path.write_bytes(server.client.videos.download_content(video.id).read())
    reader = open_video(path)
    assert (reader.num_frames, reader.width, reader.height) == (17, 64, 48)


def test_result_equals_the_generate_command(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = server.wait(server.create(seed=11, steps=3))
    made = tmp_path / "video.mp4"
    made.write_bytes(server.client.videos.download_content(video.id).read())
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "cpu")
    request = server.data_dir / f"videos/{video.id}/request.json"
    vace(["generate", str(request), "--output-path", str(tmp_path)])
    ours, theirs = (open_video(path).read(range(17)) for path in (made, tmp_path / "video.mp4"))
    assert np.array_equal(ours, theirs)


def test_input_that_cannot_be_used_fails_its_job_alone(server: Running) -> None:
    source = ROOT / "examples/vace/inference/samples/room.mp4"
    bad = server.client.videos.create(
        prompt="a ball", extra_body={"num_frames": 101}, extra_query={}, input_reference=source.open("rb")
    )
    failed = server.wait(bad)
    assert failed.status == "failed"
    assert "src_video" in failed.error.message
    assert str(server.data_dir) not in failed.error.message
    assert server.wait(server.create(steps=1)).status == "completed"


def test_notes_say_what_becomes_of_the_inputs(server: Running) -> None:
    source = ROOT / "examples/vace/inference/samples/room.mp4"
    prompt = "a red ball on a table " * 20
    made = server.client.videos.create(
        prompt=prompt, extra_body={"steps": 1}, input_reference=source.open("rb")
    )
    notes = server.wait(made).notes
    assert [note.split(": ")[0] for note in notes] == [
        "src_video (81 frames, 16 fps)",
        "src_video",
        f"prompt {prompt[:40]!r}",
    ]
    assert str(server.data_dir) not in str(notes)


def test_lines_of_the_guide_run(server: Running, tmp_path: Path) -> None:
    text = (ROOT / "docs/guide/serve.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in text.split("```shell\n")[1:]]
    lines = "\n".join(block for block in blocks if "curl" in block).replace("\\\n", " ").splitlines()
    assert len([line for line in lines if line.startswith("curl")]) == 4
    samples, made = ROOT / "examples/vace/inference/samples", ""
    for line in (line for line in lines if line.startswith("curl")):
        words = shlex.split(line.replace("http://127.0.0.1:8000", server.url).replace("VIDEO_ID", made))
        words = [word.replace("=@", f"=@{samples}/") for word in words]
        if words[-1].endswith("/content"):
            server.wait(server.client.videos.retrieve(made))
        answer = subprocess.run(
            [*words, "-H", f"Authorization: Bearer {TOKEN}"],
            cwd=tmp_path,
            capture_output=True,
            check=True,
            text=True,
        )
        if "POST" not in words and not made:
            made = json.loads(answer.stdout)["id"]
        assert 'error":{' not in answer.stdout
    assert open_video(tmp_path / "video.mp4").num_frames == 17


def test_python_lines_of_the_guide_run(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs/guide/serve.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].partition("```")[0]
    code = code.replace("http://127.0.0.1:8000", server.url).replace('"none"', f'"{TOKEN}"')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "serve.md", "exec"), {})
    assert open_video(tmp_path / "ball.mp4").num_frames == 17


def test_generate_command_lets_a_server_work(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = ROOT / "examples/vace/inference/samples"
    values = {
        **json.loads((ROOT / "examples/vace/tiny/inference.json").read_text()),
        "model": {"transformer": "nowhere", "vae": "nowhere", "text_encoder": "nowhere"},
        "output_path": str(tmp_path / "out"),
        "video_path": str(samples / "room.mp4"),
        "mask_path": str(samples / "mask.mp4"),
        "image_path": str(samples / "ball.jpg"),
        "tasks": [{"prompt": "a ball", "steps": 2}, {"prompt": "a cube", "steps": 3, "context_scale": 0.5}],
    }
    (tmp_path / "job.json").write_text(json.dumps(values))
    command = [sys.executable, "-m", "mindspeed_mm.cli", "generate", str(tmp_path / "job.json"), "--server"]
    done = subprocess.run(
        [*command, server.url], env={**os.environ, "VACE_TOKEN": TOKEN}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, scale in (("video1", 1.0), ("video2", 0.5)):
        assert open_video(tmp_path / f"out/{name}.mp4").num_frames == 17
        known = json.loads((tmp_path / f"out/{name}.json").read_text())
        assert known["video"]["request"]["context_scale"] == scale
        assert list(known["video"]["request"]["src_ref_images"]) == ["src_ref_images_0.jpg"]
    for url, token, fact in (
        (server.url, "wrong" * 4, "VACE_TOKEN"),
        ("http://127.0.0.1:9", TOKEN, "vace serve"),
        ("nowhere", TOKEN, "http://"),
    ):
        monkeypatch.setenv("VACE_TOKEN", token)
        with pytest.raises(SystemExit) as ended:
            vace(["generate", str(tmp_path / "job.json"), "--server", url])
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert fact in said
        assert len(said.splitlines()) == 1


def test_cancelled_video_stops_at_its_next_step(server: Running) -> None:
    video = server.create(steps=1000)
    wait_for(lambda: server.client.videos.retrieve(video.id).progress > 0, "the first step")
    server.client.videos.delete(video.id)
    assert server.wait(server.create(steps=1)).status == "completed"
    wait_for(lambda: not (server.data_dir / "videos" / video.id).exists(), "its files are gone", 10)


def test_job_of_a_killed_worker_is_recreated(server: Running) -> None:
    video = server.create(steps=100)
    wait_for(lambda: server.client.videos.retrieve(video.id).status == "in_progress", "the job is taken")
    os.kill(server.workers()[-1], signal.SIGKILL)
    assert server.wait(video).status == "completed"


def test_killed_server_resumes_its_queue(server: Running) -> None:
    done = server.wait(server.create(steps=1))
    queued = [server.create(steps=steps, seed=steps) for steps in (40, 2, 3)]  # the first is being made
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: not server.workers(), "no worker is left", 10)
    server.start()
    assert [server.wait(video).status for video in queued] == ["completed"] * 3
    assert server.client.videos.retrieve(done.id).status == "completed"


def test_signal_ends_server_and_workers(server: Running) -> None:
    assert server.stop(signal.SIGTERM) in (143, -signal.SIGTERM)
    assert server.workers() == []


def test_processes_that_share_a_video_survive_a_killed_one(tmp_path: Path) -> None:
    running = Running(tmp_path / "data", "--devices", "2")
    try:
        cancelled, video = running.create(steps=1000), running.create(steps=40)
        wait_for(lambda: running.client.videos.retrieve(cancelled.id).progress > 0, "the first step")
        running.client.videos.delete(cancelled.id)
        wait_for(lambda: running.client.videos.retrieve(video.id).progress > 0, "both continue")
        os.kill(running.workers()[-1], signal.SIGKILL)
        assert running.wait(video).status == "completed"
        assert running.stop(signal.SIGINT) in (130, -signal.SIGINT)
        assert running.workers() == []
    finally:
        running.process.kill()
