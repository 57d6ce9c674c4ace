"""Reads samples in other processes while this one computes.

A read that hangs or crashes loses one sample; the run continues.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, Generic, TypeVar, cast

from mindspeed_mm.errors import DataError, MindSpeedMMError
from mindspeed_mm.processes import become_helper, stop_signal

Task = TypeVar("Task")
Result = TypeVar("Result")
_LISTEN = 0.5  # seconds between checks for a stop signal
_PRELOAD = ["mindspeed_mm.data.transforms"]


@dataclass
class _Reader:
    """One reading process and its current tasks."""

    process: ForkServerProcess
    pipe: Connection
    tickets: Sequence[int] = ()  # indices of the tasks that the process is working on
    deadline: float = 0.0

    def stop(self) -> None:
        self.process.kill()  # readers ignore SIGTERM
        self.process.join()
        self.pipe.close()


class ReadAhead(Generic[Task, Result]):
    """Applies `function` to tasks in `num_workers` processes and returns results in order.

    A result is a value or a DataError. The error reports an exception in the function, a read that took
    longer than `timeout` seconds, or a process that died. With `num_workers=0` there is no timeout. `flag` is
    the command-line flag that sets the timeout; the message names it.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        *,
        num_workers: int,
        timeout: float,
        flag: str = "--sample-timeout",
    ) -> None:
        self.function, self.flag = function, flag
        self.num_workers = num_workers
        self.timeout = timeout
        self._readers: list[_Reader] = []

    def __enter__(self) -> ReadAhead[Task, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.stop()
        self._readers.clear()

    def map(self, tasks: Iterable[Task], *, chunk: int = 1) -> Iterator[tuple[Task, Result | DataError]]:
        """Yield each task with its result, in the order of `tasks`.

        At most two chunks per process are in flight. `chunk` is the number of tasks sent at once; a larger
        value helps with many short tasks. When a chunk exceeds `timeout` or its process dies, its tasks are
        retried one by one, so that only the failing task is lost. After a stop signal (see `processes`) the
        iterator ends as soon as the next result is not ready.
        """
        if self.num_workers == 0:
            for task in tasks:
                yield task, cast("Result | DataError", _attempt(self.function, task))
            return
        yield from self._ordered(iter(tasks), chunk)

    def _ordered(self, tasks: Iterator[Task], chunk: int) -> Iterator[tuple[Task, Result | DataError]]:
        open_tasks: dict[int, Task] = {}
        results: dict[int, Any] = {}
        again: deque[int] = deque()
        given = taken = 0
        exhausted = False
        while True:
            while again or (not exhausted and given - taken < 2 * self.num_workers * chunk):
                busy = sum(bool(reader.tickets) for reader in self._readers)
                if busy == self.num_workers:
                    break
                tickets = [again.popleft()] if again else []
                if not tickets:
                    fresh = list(islice(tasks, chunk))
                    if not fresh:
                        exhausted = True
                        break
                    tickets = list(range(given, given + len(fresh)))
                    open_tasks.update(zip(tickets, fresh, strict=True))
                    given += len(fresh)
                self._give(self._idle(), tickets, [open_tasks[ticket] for ticket in tickets])
            if exhausted and taken == given:
                return
            if taken not in results:
                if stop_signal():
                    return
                self._collect(results, again)
                continue
            yield open_tasks.pop(taken), results.pop(taken)
            taken += 1
            self._collect(results, again, block=False)

    def _idle(self) -> _Reader:
        """Return a process without a task. Starts one if all are busy."""
        for reader in self._readers:
            if not reader.tickets:
                return reader
        self._readers.append(self._start())
        return self._readers[-1]

    def _give(self, reader: _Reader, tickets: Sequence[int], tasks: Sequence[Task]) -> None:
        reader.tickets, reader.deadline = tickets, time.monotonic() + self.timeout
        reader.pipe.send(tasks)

    def _collect(self, results: dict[int, Any], again: deque[int], *, block: bool = True) -> None:
        """Store results that have arrived, and give up on tasks past their deadline."""
        busy = {reader.pipe: reader for reader in self._readers if reader.tickets}
        if not busy:
            return
        nearest = min(reader.deadline for reader in busy.values()) - time.monotonic()
        arrived = wait(list(busy), timeout=max(0.0, min(nearest, _LISTEN)) if block else 0)
        for pipe in arrived:
            reader = busy.pop(cast(Connection, pipe))
            self._take(reader, results, again)
        for reader in busy.values():
            if reader.deadline <= time.monotonic() and not reader.pipe.poll():
                flag = f" ({self.flag})" * bool(self.flag)
                error = DataError(f"not read after {self.timeout:g} s{flag}", fix="check the file for damage")
                self._give_up(reader, results, again, error)

    def _take(self, reader: _Reader, results: dict[int, Any], again: deque[int]) -> None:
        try:
            outcomes = reader.pipe.recv()
        except (EOFError, OSError):
            reader.process.join()
            died = f"the process that read it died (exit code {reader.process.exitcode})"
            error = DataError(died, fix="check the file, and lower the number of workers if memory ran out")
            self._give_up(reader, results, again, error)
            return
        results.update(zip(reader.tickets, outcomes, strict=True))
        reader.tickets = ()

    def _give_up(self, reader: _Reader, results: dict[int, Any], again: deque[int], error: DataError) -> None:
        if len(reader.tickets) == 1:
            results[reader.tickets[0]] = error
        else:
            again.extend(reader.tickets)
        reader.stop()
        self._readers[self._readers.index(reader)] = self._start()

    def _start(self) -> _Reader:
        # A fork server restarts quickly, and its children do not inherit this process's device, threads or
        # open pipes.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.function), daemon=True)
        _start_fork_server()
        process.start()
        theirs.close()
        return _Reader(process, ours)


def _start_fork_server() -> None:
    """Start a fork server with SIGTERM and SIGHUP blocked.

    Without the block, a signal to the process group would end the server and the rows being read, while this
    process still finishes its current row.
    """
    resource_tracker.ensure_running()  # first, because starting it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _attempt(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except MindSpeedMMError as error:
        return error if isinstance(error, DataError) else error.as_kind(DataError)
    except Exception as error:  # a decoder may raise anything on a damaged file
        return DataError(f"{type(error).__name__}: {error}")


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """Run the loop of a reading process until the parent closes the pipe."""
    become_helper()  # the parent process decides when reading ends
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            tasks = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send([_attempt(function, task) for task in tasks])
        except OSError:
            return
