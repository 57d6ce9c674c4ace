"""One run a folder: who is refused, who takes over, and which temporary files go."""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mindspeed_mm import locks
from mindspeed_mm.errors import LaunchError
from mindspeed_mm.leftovers import sweep, temporary_name
from mindspeed_mm.locks import LOCK_FILE, Holder, check_unlocked, lock_folder, read_holder
from mindspeed_mm.process_ids import is_alive, machine, process_start
from tests.support.errors import raises

pytestmark = pytest.mark.medium

HOLD = """
import sys, time
from pathlib import Path
from mindspeed_mm.leftovers import temporary_name
from mindspeed_mm.locks import lock_folder
folder = Path(sys.argv[1])
with lock_folder(folder, choose="--save"):
    (folder / temporary_name("video.mp4")).write_text("half")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mindspeed_mm"), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def gone() -> int:
    """A process id that no process has."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def leave_lock(folder: Path, **changes) -> Holder:
    holder = replace(Holder.this_process(), **changes)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return holder


def test_second_run_is_rejected_until_the_first_is_killed(tmp_path, said):
    folder = tmp_path / "save"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(LaunchError) as early:
            check_unlocked(folder, choose="--save")
        with pytest.raises(LaunchError) as late, lock_folder(folder, choose="--save"):
            pass
        for error in (early, late):
            assert f"process {first.pid} on" in str(error.value)
            assert "--save" in str(error.value)
        assert sweep([folder]) == 0  # a living process's file
        first.send_signal(signal.SIGKILL)
        with first.stdout:
            pass
        while is_alive(first.pid):  # a zombie from here on
            time.sleep(0.01)
        started = time.monotonic()
        with lock_folder(folder, choose="--save"):
            assert time.monotonic() - started < 2
            assert read_holder(folder).pid == os.getpid()
            assert [path.name for path in folder.iterdir()] == [LOCK_FILE]  # its temporary file is gone
    finally:
        first.kill()
        first.wait()
    assert not folder.exists() or list(folder.iterdir()) == []
    assert [line for line in said() if str(first.pid) in line]
    assert [line for line in said() if "removed 1" in line]


def test_lock_goes_with_its_run_and_so_does_an_empty_folder(tmp_path):
    with lock_folder(tmp_path / "a/b", choose="--save"):
        assert (tmp_path / "a/b" / LOCK_FILE).is_file()
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path / "a", choose="--save"):
        (tmp_path / "a/kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_only_the_first_rank_locks(tmp_path, monkeypatch):
    leave_lock(tmp_path)
    monkeypatch.setenv("RANK", "1")
    with lock_folder(tmp_path, choose="--save"):
        pass


@pytest.mark.parametrize("has_kernel_locks", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{"pid": gone()}, {"pid": os.getppid(), "start": 1}, {"boot": "another"}],
    ids=["pid", "start", "boot"],
)
def test_lock_of_a_process_that_is_missing_is_taken_over(tmp_path, monkeypatch, changes, has_kernel_locks):
    if not has_kernel_locks:
        monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
        monkeypatch.setattr(locks, "SETTLE", 0.01)
    leave_lock(tmp_path, **changes)
    check_unlocked(tmp_path, choose="--save")
    with lock_folder(tmp_path, choose="--save"):
        assert read_holder(tmp_path).pid == os.getpid()


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_living_holder_counts_without_kernel_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
    leave_lock(tmp_path, pid=os.getppid(), start=process_start(os.getppid()))
    with raises(LaunchError, os.getppid()), lock_folder(tmp_path, choose="--save"):
        pass


@pytest.mark.parametrize("lives", [True, False])
def test_another_machine_is_checked_by_its_heartbeat(tmp_path, monkeypatch, lives):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    leave_lock(tmp_path, machine="00000000", boot="another", host="node-7")
    check_unlocked(tmp_path, choose="--save")  # which does not wait
    over = threading.Event()
    handle = os.open(tmp_path / LOCK_FILE, os.O_RDWR)
    beat = threading.Thread(target=locks._beat, args=(handle, over))
    if lives:
        beat.start()
    try:
        if lives:
            with (
                raises(LaunchError, "node-7", LOCK_FILE),
                lock_folder(tmp_path, choose="x"),
            ):
                pass
        else:
            with lock_folder(tmp_path, choose="x"):
                assert read_holder(tmp_path).pid == os.getpid()
    finally:
        over.set()
        os.close(handle)


def test_ended_container_is_detected_by_the_kernel(tmp_path):
    leave_lock(tmp_path, machine="00000000", host="container")
    started = time.monotonic()
    with lock_folder(tmp_path, choose="x"):
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", '{"pid": "x", "since": 1e300}'])
def test_damaged_lock_file_is_taken_over(tmp_path, monkeypatch, text):
    monkeypatch.setattr(locks, "SETTLE", 0.001)
    (tmp_path / LOCK_FILE).write_text(text)
    with lock_folder(tmp_path, choose="x"):
        assert read_holder(tmp_path).pid == os.getpid()


@pytest.mark.parametrize("has_kernel_locks", [True, False])
def test_of_several_starters_one_gets_the_lock(tmp_path, monkeypatch, has_kernel_locks):
    if not has_kernel_locks:
        monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
    leave_lock(tmp_path, pid=gone())
    over, let_go = os.pipe()
    waiting = select.poll()  # select.select refuses descriptors above 1023
    waiting.register(over, select.POLLIN)
    for _ in range(6):
        if not os.fork():
            code = 1
            try:
                with lock_folder(tmp_path, choose="x"):
                    waiting.poll(30_000)  # held until the others have given up
                    code = 0
            finally:
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) for _ in range(5)]
    os.write(let_go, b"x")
    codes.append(os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]))
    assert codes == [1, 1, 1, 1, 1, 0]


def test_locking_a_folder_removes_leftovers_of_killed_runs(tmp_path):
    left = tmp_path / temporary_name("a.mp4").replace(f".{os.getpid()}-", f".{gone()}-")
    mine = tmp_path / temporary_name("b.mp4")
    for path in (left, mine, tmp_path / "c.mp4"):
        path.touch()
    with lock_folder(tmp_path, choose="--out"):
        assert not left.exists()
        assert mine.exists()
        assert (tmp_path / "c.mp4").exists()


def test_sweep_removes_only_what_a_dead_process_left(tmp_path):
    dead = temporary_name("a.mp4").replace(f".{os.getpid()}-", f".{gone()}-")
    other = temporary_name("b.mp4").replace(machine(), "00000000")
    former, former_new = f".c.mp4.{gone()}.tmp", f".d.mp4.{gone()}.tmp"
    mine = [temporary_name("a.mp4"), "notes.tmp", ".hidden", ".x.1.tmp.mp4", "video.mp4", other, former_new]
    for name in [*mine, dead, former]:
        (tmp_path / name).touch()
    (tmp_path / dead).unlink()
    (tmp_path / dead).mkdir()
    (tmp_path / dead / "part").touch()
    os.utime(tmp_path / former, (0, 0))
    assert sweep([tmp_path, tmp_path / "missing"]) == 2
    assert sorted(os.listdir(tmp_path)) == sorted(mine)
    os.utime(tmp_path / other, (0, 0))
    assert sweep([tmp_path]) == 1


@pytest.mark.parametrize("name", ["x" * 255, "猫" * 85, "\udcff" * 255])
def test_temporary_name_fits_the_file_system(tmp_path, name):
    (tmp_path / temporary_name(name)).touch()
    assert temporary_name(name) != temporary_name(name[:-1])


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with raises(LaunchError, "--save"), lock_folder(tmp_path / "file/save", choose="--save"):
        pass


@pytest.mark.parametrize("kind", ["fifo", "zero", "link", "folder"])
def test_special_lock_file_is_rejected(tmp_path, kind):
    path = tmp_path / LOCK_FILE
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "file").write_text("the user's own")
        path.symlink_to("/dev/zero" if kind == "zero" else tmp_path / "file")
    assert read_holder(tmp_path) is None
    check_unlocked(tmp_path, choose="--save")
    with raises(LaunchError, "--save", where=path), lock_folder(tmp_path, choose="--save"):
        pass
    if kind == "link":
        assert (tmp_path / "file").read_text() == "the user's own"
    if kind == "fifo":  # a writer makes reads wait
        with open(os.open(path, os.O_RDWR), "wb"):
            assert read_holder(tmp_path) is None


def test_lock_file_of_any_length_is_read_in_part(tmp_path):
    with open(tmp_path / LOCK_FILE, "wb") as file:
        file.truncate(1 << 40)
    assert read_holder(tmp_path) is None


def test_lock_file_cannot_control_a_terminal(tmp_path):
    values = {
        **asdict(Holder.this_process()),
        "command": "\x1b[2J" + "x" * 5000,
        "host": "\x1b]0;title\x07\n",
    }
    (tmp_path / LOCK_FILE).write_text(json.dumps(values))
    said = read_holder(tmp_path).describe()
    assert said.isprintable()
    assert r"\x1b[2J" in said
    assert len(said) < 250
