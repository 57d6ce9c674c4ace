"""What a run reports.

The log line's interval means, metrics.jsonl, TensorBoard, Weights & Biases, loss spikes.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from megatron.mm.log_line import iteration_line
from mindspeed_mm.errors import ConfigError, TrainingError
from mindspeed_mm.files import atomic_path, open_append
from mindspeed_mm.log import get_logger
from mindspeed_mm.training.config import LogConfig
from mindspeed_mm.training.step import SampleNote

logger = get_logger(__name__)
READERS = "readers"  # of `StepReport.costs`: work of other processes, beside the iteration


@dataclass(frozen=True)
class StepReport:
    """One iteration in numbers, the same on every rank (seconds and memory are this rank's)."""

    iteration: int
    consumed_samples: int
    loss: float
    grad_norm: float
    lr: float  # of the next iteration, as in Megatron's log
    stepped: bool  # False: loss or gradient was not finite, the update was skipped
    seconds: float
    phases: dict[str, float]  # seconds of data, forward, backward, communication, optimizer
    tokens: float  # of the global batch
    model_tflop: float  # of the global batch
    hardware_tflop: float
    peak_memory: int  # bytes
    losses: dict[str, float] = field(
        default_factory=dict
    )  # unweighted, of each task and quarter of timesteps
    costs: dict[str, float] = field(default_factory=dict)  # seconds of making samples of raw clips


@dataclass
class Interval:
    """Means since the last log line, as Megatron prints them: skipped iterations count in no mean."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tflop: float = 0.0
    skipped: int = 0
    nans: int = 0

    def add(self, report: StepReport) -> None:
        """Count one iteration."""
        self.seconds.append(report.seconds)
        self.tflop += report.model_tflop
        if report.stepped:
            self.losses.append(report.loss)
        else:
            self.skipped += 1
            self.nans += not math.isfinite(report.loss)

    def line(
        self, report: StepReport, *, train_iters: int, global_batch_size: int, devices: int, rate: bool
    ) -> str:
        """Megatron's line for the iterations since the last one."""
        total = sum(self.seconds)
        return iteration_line(
            iteration=report.iteration,
            train_iters=train_iters,
            consumed_samples=report.consumed_samples,
            milliseconds=1000 * total / len(self.seconds),
            tflops=self.tflop / total / devices if rate else None,
            learning_rate=report.lr,
            global_batch_size=global_batch_size,
            loss=sum(self.losses) / len(self.losses) if self.losses else None,
            grad_norm=report.grad_norm if report.stepped else None,
            skipped=self.skipped,
            nans=self.nans,
        )


def rates(report: StepReport, devices: int, peak_tflops: float | None) -> dict[str, float]:
    """tokens/s of the run, TFLOP/s of one device, and MFU and HFU where the peak is known."""
    found = {
        "tokens_per_second": report.tokens / report.seconds,
        "tflops": report.model_tflop / report.seconds / devices,
    }
    if peak_tflops:
        found["mfu"] = found["tflops"] / peak_tflops
        found["hfu"] = report.hardware_tflop / report.seconds / devices / peak_tflops
    return found


class Writer(Protocol):
    """Takes named numbers at an iteration."""

    def write(self, iteration: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


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


def cost_line(report: StepReport) -> str:
    """What the samples of the next iteration took, beside the whole of this one.

    "" where they are read from features.
    """
    if not report.costs:
        return ""
    parts = " | ".join(f"{name}: {1000 * seconds:.1f}" for name, seconds in report.costs.items())
    share = sum(seconds for name, seconds in report.costs.items() if name != READERS) / report.seconds
    return (
        f" samples made in iteration {report.iteration} (ms) | {parts} | "
        f"share of the iteration: {100 * share:.1f} % |"
    )


class SpikeWatch:
    """Reports samples whose loss is far above what is usual at their timestep.

    Timesteps are compared in ten bands.
    """

    BANDS = 10
    WARM = 20  # samples of a band before its mean means something

    def __init__(
        self, factor: float, num_train_timesteps: int, means: dict[int, tuple[int, float]] | None = None
    ) -> None:
        """`means`: band → (samples seen, running mean), kept up to date in place; a checkpoint holds it."""
        self._factor, self._width = factor, num_train_timesteps / self.BANDS
        self._means = {} if means is None else means

    def see(self, notes: list[SampleNote]) -> list[str]:
        """Count the samples of one iteration.

        A sentence for each that is `factor` times its band's running mean.
        """
        said = []
        for note in notes:
            if not math.isfinite(note.loss):
                continue
            band = min(int(note.timestep / self._width), self.BANDS - 1)
            count, mean = self._means.get(band, (0, 0.0))
            if count >= self.WARM and note.loss > self._factor * mean:
                said.append(
                    f"loss spike: {note.loss:.4f} is {note.loss / mean:.1f} times the usual {mean:.4f} "
                    f"near timestep {note.timestep:.1f}: sample {note.sample_index} ({note.key})"
                )
            keep = max(0.02, 1 / (count + 1))
            self._means[band] = (count + 1, mean + keep * (note.loss - mean))
        return said
