"""Reading in other processes: in order, bounded, and nothing that goes wrong there ends the run."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mindspeed_mm.data.readahead import ReadAhead
from mindspeed_mm.errors import DataError
from tests.support.errors import names

pytestmark = pytest.mark.medium


def work(task):
    if task == "bad":
        raise DataError("no frames")
    if task == "odd":
        raise ValueError("a decoder's own error")
    if task == "hang":
        time.sleep(600)
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(0.05 if task == "slow" else 0)
    return f"{task} read"


def slowly(task):
    time.sleep(2)
    return f"{task} read"


def warm(ahead, timeout):
    """Both readers have started: what is read now is all that `timeout` seconds are for."""
    assert len(list(ahead.map(["slow", "slow"]))) == 2
    ahead.timeout = timeout


def outcomes(tasks, timeout=60.0, **settings):
    with ReadAhead(work, **{"num_workers": 2, "timeout": 60.0, **settings}) as ahead:
        if timeout < 60:
            warm(ahead, timeout)
        return [
            (task, str(result) if isinstance(result, DataError) else result)
            for task, result in ahead.map(tasks)
        ]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_keep_the_order_and_hold_errors(num_workers):
    tasks = ["slow", "a", "bad", "b", "odd", "c"]
    assert outcomes(tasks, num_workers=num_workers) == [
        ("slow", "slow read"),
        ("a", "a read"),
        ("bad", "no frames"),
        ("b", "b read"),
        ("odd", "ValueError: a decoder's own error"),
        ("c", "c read"),
    ]


def test_crash_and_a_hang_cost_one_task_each():
    found = dict(outcomes(["a", "crash", "hang", "b", "c"], timeout=5.0))
    assert "(exit code -11)" in found["crash"]
    assert "5 s (--sample-timeout)" in found["hang"]
    assert [found[task] for task in "abc"] == ["a read", "b read", "c read"]


def test_chunks_lose_only_the_task_at_fault():
    with ReadAhead(work, num_workers=2, timeout=60.0) as ahead:
        warm(ahead, 5.0)
        found = list(ahead.map(["a", "bad", "b", "crash", "hang", "c", "d"], chunk=3))
    said = [result if isinstance(result, str) else type(result).__name__ for _, result in found]
    assert said == ["a read", "DataError", "b read", "DataError", "DataError", "c read", "d read"]
    assert "(exit code -11)" in found[3][1].problem
    assert names(found[4][1].problem, "5 s")


def test_readahead_is_bounded():
    given = []

    def tasks():
        for number in range(20):
            given.append(number)
            yield str(number)

    with ReadAhead(work, num_workers=2, timeout=60.0) as ahead:
        rows = ahead.map(tasks())
        for taken in range(1, 21):
            next(rows)
            assert len(given) <= taken + 4
        assert len(given) == 20


def test_no_process_outlives_the_block():
    with ReadAhead(work, num_workers=2, timeout=60.0) as ahead:
        assert len(list(ahead.map("abcd"))) == 4
        processes = [reader.process for reader in ahead._readers]
    assert processes
    assert not any(process.is_alive() for process in processes)


def test_sigterm_to_the_whole_process_group_costs_no_task(tmp_path):
    """So torchrun and schedulers stop a run; the process that asks decides what is still finished."""
    script = (
        "import os, signal, sys, threading; sys.path.insert(0, '.')\n"
        "from tests.unit.data.test_readahead import slowly\n"
        "from mindspeed_mm.data.readahead import ReadAhead\n"
        "if __name__ == '__main__':\n"
        "    heard = []\n"
        "    signal.signal(signal.SIGTERM, lambda *_: heard.append('SIGTERM'))\n"
        "    with ReadAhead(slowly, num_workers=1, timeout=60.0) as ahead:\n"
        "        rows = ahead.map('ab'); next(rows)\n"
        "        threading.Timer(0.2, os.killpg, (0, signal.SIGTERM)).start()\n"
        "        print(next(rows), heard)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    command = [sys.executable, tmp_path / "parent.py"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert found.stdout.strip() == "('b', 'b read') ['SIGTERM']", found.stderr


def test_readers_end_with_a_parent_that_was_killed(tmp_path):
    script = (
        "import sys, os; sys.path.insert(0, '.')\n"
        "from tests.unit.data.test_readahead import work\n"
        "from mindspeed_mm.data.readahead import ReadAhead\n"
        "if __name__ == '__main__':\n"
        "    ahead = ReadAhead(work, num_workers=1, timeout=60.0)\n"
        "    rows = ahead.map('ab'); next(rows)\n"
        "    print(ahead._readers[0].process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    found = subprocess.run(
        [sys.executable, tmp_path / "parent.py"], capture_output=True, text=True, timeout=120
    )
    reader = int(found.stdout.split()[0])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(reader, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("the reading process is still there")
