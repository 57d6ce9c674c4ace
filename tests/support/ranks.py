"""Processes that start at once: children of a server process that has imported what they need."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.support.runs import free_port

_IMPORTED = (
    "checkpoint.convert",
    "mindspeed_mm.tasks.assembly",
    "mindspeed_mm.tasks.extraction",
    "mindspeed_mm.tasks.generate_videos",
    "tests.distributed.jobs",
    "tests.support.preload",
)


def warm_processes() -> ForkServerContext:
    """`multiprocessing` whose processes need no time to import: they are forked from one without threads."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


@dataclass(frozen=True)
class Ran:
    """How the ranks ended, and what they printed."""

    returncodes: list[int]
    stdout: str
    stderr: str


def run_ranks(
    command: str, argv: Sequence[object], folder: Path, *, ranks: int = 2, seconds: float = 120
) -> Ran:
    """`main(argv)` of the module `command` on every rank, with the variables that torchrun sets.

    Nobody ends a rank when another fails: what ends them all must be the command itself. Ranks that still
    run after `seconds` are killed. `folder` takes what they print.
    """
    context = warm_processes()
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": free_port(), "MINDSPEED_MM_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(ranks):
        variables = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        out = str(folder / f"rank{rank}")
        process = context.Process(target=_rank, args=(command, [str(word) for word in argv], variables, out))
        process.start()
        started.append(process)
    until = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    printed = {
        end: "".join((folder / f"rank{rank}.{end}").read_text(encoding="utf-8") for rank in range(ranks))
        for end in ("out", "err")
    }
    return Ran([int(process.exitcode or 0) for process in started], printed["out"], printed["err"])


def _rank(command: str, argv: list[str], variables: dict[str, str], out: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, end in ((1, "out"), (2, "err")):
        file = os.open(f"{out}.{end}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    for number in (1, 2):
        stream = os.fdopen(number, "w", encoding="utf-8", buffering=1, closefd=False)
        setattr(sys, "stdout" if number == 1 else "stderr", stream)
    sys.argv = [command, *argv]
    importlib.import_module(command).main(argv)
