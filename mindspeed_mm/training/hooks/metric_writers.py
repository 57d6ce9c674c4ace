"""Writers of training metrics: JSON Lines, TensorBoard and Weights & Biases."""

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


class MetricWriter(Protocol):
    """Receives the named numbers of an iteration."""

    def write(self, iteration: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricWriters(Hook):
    """Logs every iteration, and passes everything that hooks log to `writers`."""

    def __init__(self, writers: Sequence[MetricWriter], peak_tflops: float | None = None) -> None:
        """Create the hook.

        `writers` is empty on all ranks except the logging rank. `peak_tflops` is the device's peak, for MFU
        and HFU.
        """
        self._writers, self._peak = writers, peak_tflops

    def on_step(self, event: StepEvent) -> None:
        """Log the report and its rates."""
        event.log(flat(event.report, rates(event.report, world_size(), self._peak)))

    def on_metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """Pass `values` to all writers. Raises TrainingError if one cannot write."""
        for writer in self._writers:
            writer.write(iteration, dict(values))

    def close(self) -> None:
        """Close the writers. Raises TrainingError."""
        for writer in self._writers:
            writer.close()


class _WholePieces:
    """A file to which whole pieces are appended, each flushed immediately.

    If the disk is full, the incomplete piece is removed and the earlier pieces are unchanged.
    """

    def __init__(self, path: Path, flag: str) -> None:
        """Open `path` for appending. `flag` is the command-line flag that set the path, for errors."""
        self._path, self._flag = path, flag
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_append(path)

    def write(self, piece: bytes) -> None:
        """Append `piece`. Raises TrainingError if it cannot be written."""
        with self._explained():
            whole = self._file.tell()
            try:
                self._file.write(piece)
                self._file.flush()
            except OSError:
                with suppress(OSError):  # `close` tries again to write the buffered data
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
    """Writes metrics.jsonl, with one object per iteration.

    Numbers that are not finite are written as null, for strict JSON parsers.
    """

    def __init__(self, path: Path, resumed: int = 0) -> None:
        """Open the file to continue after iteration `resumed`.

        Lines that an earlier run wrote after that iteration are removed, so that none occurs twice.
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
        """Append one line and flush it. Raises TrainingError."""
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write((json.dumps({"iteration": iteration, **row}) + "\n").encode())

    def close(self) -> None:
        """Close the file. Raises TrainingError."""
        self._file.close()


class TensorBoard:
    """Writes scalars for TensorBoard.

    TensorBoard's own writer is not used: it writes in a thread, whose errors flood the log but do not end
    the run.
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
        """Write the numbers of every `interval`-th iteration, and all held-out numbers.

        Raises TrainingError.
        """
        if iteration % self._interval and "loss" in values:
            return
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        event = self._event(wall_time=time.time(), step=iteration, summary={"value": scalars})
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file. Raises TrainingError."""
        self._file.close()


class Wandb:
    """Sends metrics to Weights & Biases."""

    def __init__(self, config: LogConfig, job: dict[str, Any]) -> None:
        try:
            wandb = import_module("wandb")
        except ImportError:
            raise ConfigError(
                "needs the package wandb", where="--wandb-project", fix="install it, or remove the flag"
            ) from None
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_exp_name or None,
            dir=config.wandb_save_dir or None,
            config=job,
        )

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Send the numbers of one iteration."""
        self._run.log(values, step=iteration)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _forget_after(path: Path, iteration: int) -> None:
    """Drop the lines of later iterations, and an incomplete last line.

    If `iteration` is 0, a file with lines of an earlier run is renamed instead.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # the run was killed while it wrote this line
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
    """Return the iteration of a line, or None for a line in another format, which is kept."""
    try:
        number = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return number if type(number) is int else None


def open_writers(
    config: LogConfig, save: str | None, job: dict[str, Any], resumed: int = 0
) -> list[MetricWriter]:
    """Open the writers of the logging rank, for a run that continues after iteration `resumed`.

    metrics.jsonl is written only with --save.
    """
    writers: list[MetricWriter] = []
    if save:
        writers.append(JsonLines(Path(save) / "metrics.jsonl", resumed))
    if config.tensorboard_dir:
        writers.append(TensorBoard(config.tensorboard_dir, config.tensorboard_log_interval))
    if config.wandb_project:
        writers.append(Wandb(config, job))
    return writers


def flat(report: StepReport, speed: dict[str, float]) -> dict[str, float]:
    """Flatten a report to named numbers. Phases become `seconds/data` etc."""
    values = {name: float(value) for name, value in asdict(report).items() if isinstance(value, (int, float))}
    values.pop("iteration")
    seconds = {f"seconds/{name}": value for name, value in {**report.phases, **report.costs}.items()}
    return {**values, **{f"loss/{name}": value for name, value in report.losses.items()}, **seconds, **speed}
