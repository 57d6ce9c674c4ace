"""Where the numbers of iterations are written: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mindspeed_mm.errors import ConfigError, TrainingError
from mindspeed_mm.files import atomic_path, open_append
from mindspeed_mm.log import world_size
from mindspeed_mm.training.config import LogConfig
from mindspeed_mm.training.hooks.base import Hook, StepEvent
from mindspeed_mm.training.metrics import StepReport, rates


class Writer(Protocol):
    """Takes named numbers at an iteration."""

    def write(self, iteration: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricWriters(Hook):
    """Logs every iteration, and gives all that hooks log to `writers`."""

    def __init__(self, writers: Sequence[Writer], peak_tflops: float | None = None) -> None:
        """`writers`: none but on the logging rank. `peak_tflops`: the device's, for MFU and HFU."""
        self._writers, self._peak = writers, peak_tflops

    def on_step(self, event: StepEvent) -> None:
        """Log the report and its rates."""
        event.log(flat(event.report, rates(event.report, world_size(), self._peak)))

    def on_metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write. Raises TrainingError."""
        for writer in self._writers:
            writer.write(iteration, dict(values))

    def close(self) -> None:
        """Close the writers. Raises TrainingError."""
        for writer in self._writers:
            writer.close()


class _WholePieces:
    """A file that grows by whole pieces, each written at once.

    When one finds no room, what stood there before stays.
    """

    def __init__(self, path: Path, flag: str) -> None:
        """`flag`: the one that names the place, for errors."""
        self._path, self._flag = path, flag
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_append(path)

    def write(self, piece: bytes) -> None:
        """Append. Raises TrainingError when it cannot be written."""
        with self._explained():
            whole = self._file.tell()
            try:
                self._file.write(piece)
                self._file.flush()
            except OSError:
                with suppress(OSError):  # closing tries once more to write what is buffered
                    self._file.close()
                with suppress(OSError):
                    os.truncate(self._path, whole)
                raise

    def close(self) -> None:
        """Close the file. Raises TrainingError."""
        with self._explained():
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot be written: {error.strerror or error}",
                where=self._path,
                fix=(
                    f"free space or choose another {self._flag}, then continue from the last checkpoint with "
                    "--load"
                ),
            ) from error


class JsonLines:
    """metrics.jsonl: one object for each iteration.

    A number that is not finite is written as null, for strict readers.
    """

    def __init__(self, path: Path, resumed: int = 0) -> None:
        """Continue after iteration `resumed`.

        What a run wrote after its last checkpoint is written once more, and only once.
        """
        try:
            _forget_after(path, resumed)
        except OSError as error:
            raise TrainingError(
                f"cannot be read or written: {error.strerror or error}",
                where=path,
                fix="choose another --save",
            ) from None
        self._file = _WholePieces(path, "--save")

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Append one line, at once. Raises TrainingError."""
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write((json.dumps({"iteration": iteration, **row}) + "\n").encode())

    def close(self) -> None:
        """Close the file. Raises TrainingError."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard.

    Its own writer would write in a thread, whose errors end nothing and fill the screen.
    """

    def __init__(self, folder: str, interval: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = _WholePieces(Path(folder) / name, "--tensorboard-dir")
        self._interval, self._event = interval, Event
        self._records = RecordWriter(self._file)
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Every `interval` iterations; held-out numbers always. Raises TrainingError."""
        if iteration % self._interval and "loss" in values:
            return
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        event = self._event(wall_time=time.time(), step=iteration, summary={"value": scalars})
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file. Raises TrainingError."""
        self._file.close()


class Wandb:
    """Weights & Biases, where it is installed and requested."""

    def __init__(self, config: LogConfig, job: dict[str, Any]) -> None:
        try:
            wandb = import_module("wandb")
        except ImportError:
            raise ConfigError(
                "needs the package wandb", where="--wandb-project", fix="install it, or leave the flag out"
            ) from None
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_exp_name or None,
            dir=config.wandb_save_dir or None,
            config=job,
        )

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Send one iteration."""
        self._run.log(values, step=iteration)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _forget_after(path: Path, iteration: int) -> None:
    """Drop the lines of later iterations, and one that was cut off.

    A file of another run, from before iteration 1, is set aside.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # a run was killed while it wrote
    numbers = [_iteration_of(line) for line in lines]
    if iteration == 0 and any(numbers):
        taken = sum(1 for _ in path.parent.glob(f"{path.stem}.before-*{path.suffix}"))
        path.rename(path.with_name(f"{path.stem}.before-{taken + 1}{path.suffix}"))
        return
    kept = b"".join(
        line for line, number in zip(lines, numbers, strict=True) if number is None or number <= iteration
    )
    if kept != content:
        with atomic_path(path) as temporary:
            temporary.write_bytes(kept)


def _iteration_of(line: bytes) -> int | None:
    """The iteration of a line; None for one that is not ours, which stays."""
    try:
        number = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return number if type(number) is int else None


def open_writers(config: LogConfig, save: str | None, job: dict[str, Any], resumed: int = 0) -> list[Writer]:
    """The writers of the logging rank, of a run that continues after iteration `resumed`.

    metrics.jsonl needs --save.
    """
    writers: list[Writer] = []
    if save:
        writers.append(JsonLines(Path(save) / "metrics.jsonl", resumed))
    if config.tensorboard_dir:
        writers.append(TensorBoard(config.tensorboard_dir, config.tensorboard_log_interval))
    if config.wandb_project:
        writers.append(Wandb(config, job))
    return writers


def flat(report: StepReport, speed: dict[str, float]) -> dict[str, float]:
    """A report as flat numbers: phases become `seconds/data` and so on."""
    values = {name: float(value) for name, value in asdict(report).items() if isinstance(value, (int, float))}
    values.pop("iteration")
    seconds = {f"seconds/{name}": value for name, value in {**report.phases, **report.costs}.items()}
    return {**values, **{f"loss/{name}": value for name, value in report.losses.items()}, **seconds, **speed}
