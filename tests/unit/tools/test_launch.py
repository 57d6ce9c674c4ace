"""The launcher's exit code and last line, with ranks that are a few lines of Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.errors import LaunchError
from mindspeed_mm.tools.launch import main

ONE_STOPS = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
signal.signal(signal.SIGTERM, signal.SIG_DFL if {default} else lambda number, frame: sys.exit(143))
signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(129))
if rank == {rank}:
    time.sleep(0.2)  # the other has its handlers, too
    {end}
time.sleep(30)
"""


def launch(folder: Path, script: str, *flags: str) -> tuple[int, list[str]]:
    """Run a script on two ranks. Return the exit code and the printed lines, except the log's name."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "mindspeed_mm.tools.launch", "--nproc_per_node=2", f"--log_dir={folder}"]
    ran = subprocess.run(
        [*command, *flags, str(folder / "script.py")], capture_output=True, text=True, timeout=60
    )
    return ran.returncode, [line for line in (ran.stdout + ran.stderr).splitlines() if line[:5] != "log: "]


@pytest.mark.medium
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("default", "end", "code", "line"),
    [
        (False, "os.kill(os.getpid(), signal.SIGTERM)", 143, "stopped by SIGTERM"),
        (False, "os.kill(os.getpid(), signal.SIGHUP)", 129, "stopped by SIGHUP"),
        (True, "os.kill(os.getpid(), signal.SIGTERM)", 143, "stopped by SIGTERM"),
    ],
)
def test_signal_to_one_rank_stops_the_run(
    tmp_path: Path, rank: int, default: bool, end: str, code: int, line: str
) -> None:
    script = ONE_STOPS.format(rank=rank, default=default, end=end)
    assert launch(tmp_path, script) == (code, [line])


@pytest.mark.medium
def test_failure_after_a_signal_to_one_rank_is_an_error(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
def fail(number, frame):
    print("[rank 0] DataError: clip 7", flush=True)
    sys.exit(1)
signal.signal(signal.SIGTERM, fail)
if os.environ["RANK"] == "1":
    time.sleep(0.2)
    sys.exit(143)
time.sleep(30)
"""
    assert launch(tmp_path, script) == (1, ["[rank 0] DataError: clip 7"])


@pytest.mark.parametrize("port", ["80000", "-1"])
def test_port_out_of_range_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([f"--master_port={port}", f"--log_dir={tmp_path}", str(tmp_path / "none.py")])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{LaunchError.__name__}: MASTER_PORT: ")
    assert port in line
    assert "65535" in line
