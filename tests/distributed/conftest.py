"""Four gloo ranks, started once for all tests of this folder.

A test runs a function on the first n of them.
"""

import contextlib
import os
import pickle
import traceback

import pytest

from tests.support.ranks import warm_processes
from tests.support.runs import free_port


class World:
    """Processes that keep running between tests; each job has its own process group."""

    def __init__(self, size=4):
        context = warm_processes()
        self.pipes = []
        self.processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, size, job, *args, **settings):
        """Run `job(*args, **settings)` inside `launch` on `size` ranks. Return the results by rank."""
        port = free_port()
        for rank, pipe in enumerate(self.pipes[:size]):
            pipe.send((rank, size, port, job, args, settings))
        answers = [
            pickle.loads(pipe.recv_bytes()) if pipe.poll(600) else (False, "no answer in 600 s")
            for pipe in self.pipes[:size]
        ]
        failed = [f"rank {rank}: {answer}" for rank, (fine, answer) in enumerate(answers) if not fine]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def run_to_death(self, size, job, *args, **settings):
        """Like `run`, for a job that kills its processes. Return the exit codes.

        The world cannot be used afterwards.
        """
        with contextlib.suppress(AssertionError, EOFError, OSError):
            self.run(size, job, *args, **settings)
        for pipe in self.pipes:  # one that survived waits for the next job
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(20)
        return [process.exitcode for process in self.processes]

    def close(self):
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(pipe):
    import torch

    torch.set_num_threads(1)
    from mindspeed_mm.accelerator import Accelerator
    from mindspeed_mm.distributed.launch import launch

    while (order := pipe.recv()) is not None:
        rank, size, port, job, args, settings = order
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size)
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            with launch(Accelerator.detect("cpu")):
                answer = job(*args, **settings)
            answered = True, answer
        except BaseException:
            answered = False, traceback.format_exc()
        # Not `send`: it shares every tensor by a descriptor of its own.
        pipe.send_bytes(pickle.dumps(answered))


@pytest.fixture(scope="session")
def world():
    started = World()
    yield started
    started.close()


@pytest.fixture
def mortal_world():
    """Two ranks of a test's own, which it may kill."""
    started = World(2)
    yield started
    started.close()
