"""feature_extraction.sh as a user runs it: it checks before launch, stops at any time, and resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mindspeed_mm.data.video_writer import write_video
from tests.support.clips import numbered
from tests.support.extract_job import make_job
from tests.support.ranks import Ran, run_ranks
from tests.support.runs import alive, family, free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/vace/feature_extract/feature_extraction.sh"


def start(root: Path, *flags: str, ranks: int = 1, readers: int = 1) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "MM_DATA": str(root / "data.json"),
        "MM_MODEL": str(root / "model.json"),
        "LOG_DIR": str(root / "logs"),
        "NPUS_PER_NODE": str(ranks),
        "NUM_WORKERS": str(readers),
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": free_port(),
    }
    command = ["bash", str(SCRIPT), "--save-path", str(root / "out"), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(script: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = script.communicate(timeout=400)
    return script.returncode, said


def without_script(root: Path, ranks: int) -> Ran:
    """What the script starts, on ranks that have imported everything already."""
    flags = [part for name in ("data", "model") for part in (f"--mm-{name}", root / f"{name}.json")]
    flags += ["--mm-tool", ROOT / "mindspeed_mm/tools/tools.json", "--num-workers", 0]
    flags += ["--save-path", root / "out"]
    return run_ranks("mindspeed_mm.tasks.extract", flags, root / "printed", ranks=ranks)


def again(root: Path, ranks: int) -> str:
    """What the ranks of a second run print."""
    ran = without_script(root, ranks)
    assert ran.returncodes == [0] * ranks, ran.stdout + ran.stderr
    return ran.stdout


def features(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (root / "out/features").glob("*.safetensors")}


@pytest.mark.slow
def test_extraction_logs_once_and_second_run_opens_no_clip(tmp_path: Path) -> None:
    root = tmp_path / "a folder"
    root.mkdir()
    make_job(root)
    code, said = ended(start(root))
    assert code == 0, said
    (log,) = (root / "logs").iterdir()
    for text in (said, log.read_text()):
        for words in ("output      ", "clips       6 of 6", "extracted 6 clips", "rank 0 spent"):
            assert text.count(words) == 1, words
    written = features(root)
    for clip in (root / "clips datası").glob("*.mp4"):  # only opening a clip shows that it is broken
        times = clip.stat()
        clip.write_bytes(b"\0" * times.st_size)
        os.utime(clip, ns=(times.st_atime_ns, times.st_mtime_ns))
    said = again(root, ranks=1)
    assert "clips       6 of 6" in said
    assert "extracted 0 clips" in said
    assert features(root) == written


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_error_on_a_rank_is_one_line(tmp_path: Path, ranks: int) -> None:
    make_job(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/features").write_text("no folder can be made here")
    if ranks == 1:
        ran = without_script(tmp_path, ranks)
        code, said = ran.returncodes[0], ran.stdout + ran.stderr
    else:
        code, said = ended(start(tmp_path, ranks=ranks, readers=0))
    assert code == 1
    assert len(re.findall(rf"{tmp_path / 'out/features'}\b.*\bwritten\b", said)) == 1, said
    assert "[rank 0] MindSpeedMMError: " in said
    assert "Traceback" not in said
    assert "ChildFailedError" not in said


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True], ids=["the script", "its whole session"])
def test_sigterm_ends_ranks_after_their_clip(tmp_path: Path, whole_group: bool) -> None:
    make_job(tmp_path, max_hxw=36864)
    folder = tmp_path / "clips datası"
    # All clips differ, so each takes time: the signal must arrive long before the last one is done.
    clips = [
        write_video(folder / f"{n}.mp4", numbered(9, 192, 192 + 16 * (n % 3), first=5 * n), 16)
        for n in range(24)
    ]
    rows = [{"video": clip.name, "cap": f"clip {number}"} for number, clip in enumerate(clips)]
    (folder / "data.json").write_text(json.dumps(rows))
    script = start(tmp_path, ranks=2)
    try:
        deadline = time.monotonic() + 300
        while not features_or_none(tmp_path) and script.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        job = family(script.pid)
        for pid in job if whole_group else [script.pid]:
            os.kill(pid, signal.SIGTERM)
        code, said = ended(script)
    finally:
        script.kill()
    assert code != 0
    assert said.count("stopped by SIGTERM after") == 2, said
    assert "Traceback" not in said
    assert not alive(job)
    survivors = features(tmp_path)
    assert 0 < len(survivors) < 24
    assert not list((tmp_path / "out/features").glob(".*.tmp"))
    if whole_group:  # what is left is the same
        return
    said = again(tmp_path, ranks=2)
    assert f"extracted {24 - len(survivors)} clips" in said
    assert {name: features(tmp_path)[name] for name in survivors} == survivors
    assert len((tmp_path / "out/data.jsonl").read_text().splitlines()) == 24


def features_or_none(root: Path) -> dict[str, int]:
    return features(root) if (root / "out/features").is_dir() else {}
