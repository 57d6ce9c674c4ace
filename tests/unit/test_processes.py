"""How a process stops: signals raise or are noted, a hanging read ends, and nobody outlives a launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindspeed_mm import processes
from mindspeed_mm.processes import Stopped, deferred, handling_signals, stop_signal
from tests.support.errors import names
from tests.support.runs import alive

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def script(body: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command with `main` = `body` in its own session."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    source = (
        "import os, signal, sys, time\nfrom mindspeed_mm import processes\nfrom mindspeed_mm.log import "
        "one_line_errors\n"
        f"@one_line_errors\ndef main():\n{lines}\nmain()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-u", "-c", source],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_raises_immediately(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with handling_signals(), pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_deferred_signal_is_noted_once(number: signal.Signals) -> None:
    with handling_signals(), deferred():
        assert not stop_signal()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal() == number
        with pytest.raises(Stopped):
            processes.check_stop()


def test_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_signal()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_command_prints_one_line(number: signal.Signals) -> None:
    process = script("try:\n    print('ready')\n    time.sleep(60)\nfinally:\n    print('cleaned up')")
    first_line(process)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=20)
    assert printed == "cleaned up\n"
    assert errors.count("\n") == 1
    assert signal.Signals(number).name in errors
    # a shell ends its loop only when Ctrl-C killed the command
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number)


def test_second_ctrl_c_ends_immediately() -> None:
    process = script("with processes.deferred():\n    print('ready')\n    while True: time.sleep(0.1)")
    first_line(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    assert process.communicate()[1] == ""


@pytest.mark.parametrize(
    "block", ["processes.deferred(), processes.reading(path)", "processes.reading(path)"]
)
def test_read_that_hangs_ends_and_is_named(tmp_path: Path, block: str) -> None:
    path = tmp_path / "stalled.bin"
    os.mkfifo(path)
    # in C, where no Python handler runs, as torch and decoders read
    body = f"""path = {str(path)!r}
import ctypes
file, one = os.open(path, os.O_RDWR), ctypes.create_string_buffer(1)
signal.siginterrupt(signal.SIGTERM, False)
with {block}:
    print('ready')
    ctypes.CDLL(None).read(file, one, 1)"""
    process = script(body, MINDSPEED_MM_GRACE="1", RANK="1", WORLD_SIZE="2")
    first_line(process)
    time.sleep(0.5)  # by then it reads
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert "stalled.bin" in errors
    assert "[rank 1]" in errors
    assert "SIGTERM" in errors
    assert errors.count("\n") == 1


def test_process_in_c_code_ends_soon_after_a_signal() -> None:
    body = """import ctypes
processes._UNWIND = 0.2
end, _ = os.pipe()
signal.siginterrupt(signal.SIGTERM, False)
print('ready')
ctypes.CDLL(None).read(end, ctypes.create_string_buffer(1), 1)"""
    process = script(body)
    first_line(process)
    time.sleep(0.5)  # by then it reads
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 0.9
    assert names(process.communicate()[1], "SIGTERM")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stopped_command_skips_the_teardown(number: signal.Signals) -> None:
    body = """import atexit
class Slow:
    def __del__(self): os.write(1, b'teardown ')
sys.slow = Slow()
atexit.register(os.write, 1, b'exit handler')
print('ready')
time.sleep(60)"""
    process = script(body)
    first_line(process)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "exit handler"
    assert process.returncode == 128 + number


def test_limits_of_two_stops_fit_into_ten_seconds() -> None:
    # one rank leaves C code, then the other hears of it and does the same
    assert 2 * (processes._UNWIND + processes._TICK) < 10
    assert processes._UNWIND + processes._EXIT < 10


def test_rank_ends_with_its_launcher() -> None:
    body = (
        "import subprocess\n"
        "code = 'from mindspeed_mm.processes import handling_signals; import time\\nwith handling_signals(): "
        "print(1, flush=True); time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, "
        "start_new_session=True, "
        "env={**os.environ, 'MINDSPEED_MM_LAUNCHER': str(os.getpid())})\n"
        "child.stdout.readline()\nprint(child.pid)\ntime.sleep(60)"
    )
    process = script(body)
    child = int(first_line(process))
    process.kill()
    process.communicate()
    assert not alive([child], 5)


def test_forked_helper_ignores_signals_until_its_parent_ends() -> None:
    body = (
        "import multiprocessing\n"
        "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\nchild.start()\n"
        "os.kill(child.pid, signal.SIGTERM)\ntime.sleep(0.2)\nprint(child.pid, "
        "child.is_alive())\ntime.sleep(60)"
    )
    process = script(body)
    pid, lives = first_line(process).split()
    assert lives == "True"
    process.kill()
    process.communicate()
    assert not alive([int(pid)], 5)
