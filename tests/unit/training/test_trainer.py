"""The trainer: what it says, when it stops, what it survives."""

import fcntl
import json
import logging
import math
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from datetime import datetime
from types import ModuleType

import pytest
import torch

from mindspeed_mm.data.config import LoaderConfig
from mindspeed_mm.data.loader import Collate, TrainLoader
from mindspeed_mm.errors import ConfigError, DataError, LaunchError, TrainingError
from mindspeed_mm.processes import Stopped
from mindspeed_mm.training.config import ExitConfig
from mindspeed_mm.training.exits import ExitWatch
from mindspeed_mm.training.hooks.metric_writers import JsonLines, TensorBoard, open_writers
from mindspeed_mm.training.hooks.spikes import SpikeWatch
from mindspeed_mm.training.step import SampleNote
from tests.support.errors import raises
from tests.support.loops import Recorder, random_records, trainer, training
from tests.support.tiny import tiny_transformer

pytestmark = pytest.mark.medium

LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration {8}1/ {7}2 \| consumed samples: {12}2 \| "
    r"elapsed time per iteration \(ms\): \d+\.\d \| learning rate: 1\.000000E-03 \| "
    r"global batch size: {5}2 \| "
    r"loss: \d\.\d{6}E[+-]\d\d \| loss scale: 1\.0 \| grad norm: \d+\.\d{3} \| "
    r"number of skipped iterations: {3}0 \| number of nan iterations: {3}0 \|"
)


@pytest.fixture
def lines():
    """Every log line of the package."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mindspeed_mm")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


class Saves:
    """Stands for a Checkpointer."""

    def __init__(self) -> None:
        self.at: list[int] = []
        self.waited = False

    def save(self, state, best=None):
        self.at.append(state.iteration)

    def poll(self):
        pass

    def wait(self):
        self.waited = True


def test_log_line_matches_megatron(lines, tmp_path):
    config = training(batch={"train_iters": 2})
    trainer(tiny_transformer(), config).run()
    said = [line for line in lines if "iteration " in line]
    assert LINE.fullmatch(said[0])
    log = tmp_path / "train.log"
    log.write_text("\n".join(lines) + "\n")
    guide = (
        "grep 'elapsed time per iteration' \"$1\" | awk -F ':' '{print$5}' | awk -F '|' '{print$1}' | head "
        "-n 200 | "
        "tail -n 100 | awk '{sum+=$1} END {if (NR != 0) printf(\"%.1f\",sum/NR)}'"
    )
    piped = subprocess.run(
        ["bash", "-c", guide, "_", str(log)], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(
        r"elapsed time per iteration \(ms\):\s+([0-9.]+)\s+\|.*?loss:\s+([0-9.]+E[+-][0-9]+)", log.read_text()
    )
    assert len(found) == 2
    assert float(piped) == pytest.approx(sum(float(ms) for ms, _ in found) / 2, abs=0.051)


def test_memory_line_follows_the_first_log_line_only(lines):
    config = training()
    trainer(tiny_transformer(), config).run()
    memory = [line for line in lines if "memory (MB)" in line]
    assert len(memory) == 1
    assert re.fullmatch(
        r"\[Rank 0\] \(after 1 iterations\) memory \(MB\) \| allocated: \d+\.\d \| max allocated: \d+\.\d",
        memory[0],
    )


def test_log_interval_of_two_says_the_mean_of_two_losses(lines):
    config = training(batch={"train_iters": 2}, log={"log_interval": 2})
    recorder = Recorder()
    trainer(tiny_transformer(), config, writers=[recorder]).run()
    mean = sum(values["loss"] for _, values in recorder.rows) / 2
    said = [line for line in lines if "loss:" in line]
    assert len(said) == 1
    assert f"loss: {mean:.6E}" in said[0]


def test_metrics_jsonl_holds_every_iteration(tmp_path):
    config = training()
    trainer(tiny_transformer(), config, writers=[JsonLines(tmp_path / "metrics.jsonl")]).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[0]["tokens"] == 2 * 3 * 2 * 3  # two clips of 3 x 4 x 6 latents, patches of 1 x 2 x 2
    phases = sum(value for name, value in rows[0].items() if name.startswith("seconds/"))
    assert 0.5 * rows[0]["seconds"] < phases <= rows[0]["seconds"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_full_disk_leaves_whole_metric_records(tmp_path, name, capfd, monkeypatch):
    # the limit below counts for the file behind a handler of an earlier test, too
    monkeypatch.setattr(logging.getLogger("mindspeed_mm"), "handlers", [])
    writer = (
        TensorBoard(str(tmp_path / name), interval=1) if name == "tensorboard" else JsonLines(tmp_path / name)
    )
    flag, config = "--tensorboard-dir" if name == "tensorboard" else "--save", training()
    writer.write(0, {})
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    kept = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # what a full disk does to a writer: part of a record fits
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 80, hard))
    try:
        with raises(TrainingError, path.name, flag) as error:
            trainer(tiny_transformer(), config, writers=[writer]).run()  # closes it, too
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    assert path.read_bytes() == kept


def test_metrics_folder_that_is_a_file_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    with raises(TrainingError, "metrics.jsonl"):
        JsonLines(tmp_path / "file" / "metrics.jsonl")


def test_same_seed_trains_the_same_and_another_does_not():
    def losses(seed: int) -> list[float]:
        recorder, config = Recorder(), training(batch={"seed": seed})
        trainer(tiny_transformer(), config, writers=[recorder]).run()
        return [values["loss"] for _, values in recorder.rows]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_accumulated_micro_batches_equal_one_big_batch():
    def trained(micro: int) -> tuple[list[float], torch.Tensor]:
        config = training(batch={"micro_batch_size": micro, "global_batch_size": 4, "train_iters": 2})
        # noise is drawn for a place in the stream: unshuffled, both sizes see the same samples at the same
        # places
        unshuffled = LoaderConfig(shuffle=False)
        loader = TrainLoader(random_records(4), unshuffled, Collate(seed=7), micro_batch_size=micro, seed=7)
        recorder = Recorder()
        run = trainer(tiny_transformer(), config, batches=loader.batches(), writers=[recorder])
        run.run()
        numbers = [values[name] for _, values in recorder.rows for name in ("loss", "grad_norm")]
        return numbers, torch.cat([p.detach().flatten() for p in run.state.model.parameters()])

    numbers, weights = trained(1)
    wanted_numbers, wanted = trained(4)
    assert numbers == pytest.approx(
        wanted_numbers, rel=1e-5
    )  # Adam alone would not see a gradient of another scale
    # two updates of 1e-3 each; Adam divides by the gradient's size, which lifts the rounding of the smallest
    # ones
    torch.testing.assert_close(weights, wanted, atol=5e-5, rtol=0)


def test_checkpoint_is_written_at_the_interval_and_at_the_end():
    saves, config = Saves(), training(batch={"train_iters": 5}, checkpoint={"save_interval": 2})
    trainer(tiny_transformer(), config, checkpoints=saves).run()
    assert saves.at == [2, 4, 5]
    assert saves.waited


def test_exit_interval_saves_and_stops(lines):
    saves, config = Saves(), training(batch={"train_iters": 5}, exit={"exit_interval": 2})
    trainer(tiny_transformer(), config, checkpoints=saves).run()
    assert saves.at == [2]
    assert "exiting after iteration 2: --exit-interval 2 is reached" in lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_finishes_the_iteration_saves_and_stops(lines, number):
    saves, config = Saves(), training(batch={"train_iters": 50})
    run = trainer(
        tiny_transformer(),
        config,
        checkpoints=saves,
        observe=lambda iteration: os.kill(os.getpid(), number) if iteration == 1 else None,
    )
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        run.run()
    assert stopped.value.exit_code == 128 + number
    assert saves.at == [2]  # the signal came after iteration 1 had asked; iteration 2 sees it
    assert f"exiting after iteration 2: {number.name} was received" in lines
    assert signal.getsignal(number) is before


def test_exit_duration_counts_minutes():
    now = [0.0]
    watch = ExitWatch(ExitConfig(exit_duration_in_mins=2), clock=lambda: now[0])
    assert watch.reason(1, watch.local()) is None
    now[0] = 121
    assert watch.reason(2, watch.local()) == "--exit-duration-in-mins 2 is over"


def poisoned(bad: int):
    records = random_records(4)
    records[bad].latents.fill_(math.nan)
    return records


def test_nonfinite_iteration_is_skipped_and_counted(lines):
    config = training(batch={"train_iters": 4, "global_batch_size": 1})
    run = trainer(tiny_transformer(), config, poisoned(2))
    run.run()
    skipped = [line for line in lines if "skipped: loss nan" in line]
    assert len(skipped) == 1  # each of the four clips is seen once
    assert "clip2" in skipped[0]
    assert (
        sum("number of skipped iterations:   1 | number of nan iterations:   1 |" in line for line in lines)
        == 1
    )
    assert all(p.isfinite().all() for p in run.state.model.parameters())
    assert (
        run.state.scheduler.num_steps == 3
    )  # a skipped iteration moves no schedule, but samples are consumed
    assert run.state.consumed_samples == 4


def test_too_many_in_a_row_stop_the_run_naming_the_samples():
    config = training(batch={"train_iters": 9}, exit={"max_skipped_iterations": 2})
    records = random_records(2)
    for record in records:
        record.latents.fill_(math.inf)
    run = trainer(tiny_transformer(), config, records)
    with raises(TrainingError, 3, *(record.key for record in records)):
        run.run()
    assert run.state.skips.in_a_row == 3


def test_restarted_run_continues_the_count():
    """Else a job that is restarted each time it stops would never stop at all."""
    config = training(batch={"train_iters": 9, "global_batch_size": 1}, exit={"max_skipped_iterations": 2})
    records = random_records(1)
    records[0].latents.fill_(math.nan)
    run = trainer(tiny_transformer(), config, records)
    run.state.skips.in_a_row = 2  # as a checkpoint may say
    with raises(TrainingError, 3):
        run.run()
    assert (run.state.skips.in_a_row, run.state.skips.total) == (3, 1)


def test_check_for_nan_stops_at_the_first():
    config = training(batch={"train_iters": 9}, exit={"check_for_nan_in_loss_and_grad": True})
    run = trainer(tiny_transformer(), config, poisoned(0))
    with raises(TrainingError, 1):
        run.run()
    assert run.state.skips.in_a_row == 1


def test_loss_spike_names_sample_and_timestep():
    watch = SpikeWatch(3.0, 1000)
    for index in range(40):
        assert (
            watch.check(
                [
                    SampleNote("clip", index, 450.0, 1.0 + 0.1 * (index % 3)),
                    SampleNote("x", index, 950.0, 9.0),
                ]
            )
            == []
        )
    said = watch.check([SampleNote("odd", 41, 455.0, 5.0), SampleNote("x", 41, 950.0, 9.0)])
    assert len(said) == 1
    assert "sample 41 (odd)" in said[0]
    assert "timestep 455.0" in said[0]


class FakeWandb(ModuleType):
    """Stands for the package: takes what a run sends, as its public functions do."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.asked: dict[str, object] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def init(self, *, project, name, dir, config):
        self.asked = {"project": project, "name": name, "dir": dir, "config": config}
        return self

    def log(self, values, step):
        assert not self.logged or step >= self.logged[-1][0], "wandb drops steps that go back"
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_gets_every_iteration_and_held_out_loss(monkeypatch, tmp_path):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = training(
        batch={"train_iters": 3},
        eval={"eval_interval": 2},
        log={"wandb_project": "vace", "wandb_exp_name": "first", "wandb_save_dir": str(tmp_path)},
    )
    writers = open_writers(config.log, None, {"seed": 7})
    run = trainer(tiny_transformer(), config, evaluate=lambda: {"validation/loss": 0.5}, writers=writers)
    run.run()
    assert wandb.asked == {"project": "vace", "name": "first", "dir": str(tmp_path), "config": {"seed": 7}}
    assert [step for step, values in wandb.logged if "loss" in values] == [1, 2, 3]
    assert (2, {"validation/loss": 0.5}) in wandb.logged
    assert wandb.finished


def test_wandb_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    with raises(ConfigError, "wandb", where="--wandb-project"):
        open_writers(training(log={"wandb_project": "vace"}).log, None, {})


def test_tensorboard_holds_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, kept = TensorBoard(str(tmp_path), interval=2), Recorder()
    config = training(batch={"train_iters": 4}, eval={"eval_interval": 3})
    run = trainer(
        tiny_transformer(), config, evaluate=lambda: {"validation/loss": 0.5}, writers=[board, kept]
    )
    run.run()
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = {iteration: row["loss"] for iteration, row in kept.rows if "loss" in row}
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(2, pytest.approx(losses[2])), (4, pytest.approx(losses[4]))]
    assert [(event.step, event.value) for event in events.Scalars("validation/loss")] == [(3, 0.5)]


def test_bar_reaches_the_terminal_past_a_stdout_pipe(monkeypatch):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    monkeypatch.setenv("MINDSPEED_MM_TERMINAL", os.ttyname(theirs))
    config = training()
    trainer(tiny_transformer(), config).run()
    os.set_blocking(ours, False)
    shown = ""
    with suppress(BlockingIOError):  # one read gives a few kB at most
        while part := os.read(ours, 65536):
            shown += part.decode()
    os.close(ours)
    os.close(theirs)
    assert "3/3" in shown
    assert "loss=" in shown


def test_terminal_that_cannot_be_opened_costs_the_bar_alone(monkeypatch):
    monkeypatch.setenv("MINDSPEED_MM_TERMINAL", "/no/such/terminal")
    config, recorder = training(), Recorder()
    trainer(tiny_transformer(), config, writers=[recorder]).run()
    assert len(recorder.rows) == 3


def test_evaluation_runs_at_its_interval_and_reaches_the_writers(lines):
    recorder, config = Recorder(), training(batch={"train_iters": 4}, eval={"eval_interval": 2})
    run = trainer(tiny_transformer(), config, evaluate=lambda: {"validation/loss": 0.5}, writers=[recorder])
    run.run()
    assert [i for i, values in recorder.rows if "validation/loss" in values] == [2, 4]
    assert " validation loss at iteration 2 | loss: 5.000000E-01 |" in lines


def test_line_is_timed_in_local_time(lines):
    config = training(batch={"train_iters": 1})
    trainer(tiny_transformer(), config).run()
    stamp = datetime.strptime(lines[0][2:21], "%Y-%m-%d %H:%M:%S")
    assert abs((datetime.now() - stamp).total_seconds()) < 60


def test_rank_that_loses_the_others_says_where_it_was():
    def evaluate():
        raise RuntimeError("[gloo] Timed out waiting 60000ms for recv operation to complete")

    config = training(eval={"eval_interval": 2})
    with raises(LaunchError, "iteration 3", "Timed out", where="rank 0 of 1"):
        trainer(tiny_transformer(), config, evaluate=evaluate).run()


def test_throughput_is_logged_and_time_is_the_fifth_field(lines):
    config = training(batch={"train_iters": 1}, log={"log_throughput": True, "timing_log_level": 1})
    trainer(tiny_transformer(), config, peak_tflops=1.0).run()
    said = next(line for line in lines if "throughput per GPU (TFLOP/s/GPU)" in line)
    assert re.fullmatch(r" \d+\.\d ", said.split(":")[4].split("|")[0])
    speed = next(line for line in lines if line.startswith(" speed of iteration 1"))
    assert re.fullmatch(
        r" speed of iteration 1 \| tokens/s: \d+\.\d \| TFLOP/s per device: \d+\.\d \| "
        r"MFU: [\d.]+ % \| HFU: [\d.]+ % \|",
        speed,
    )
    assert any(line.startswith(" times of iteration 1 (ms) | data:") for line in lines)


@pytest.mark.parametrize("where", ["reading", "elsewhere"])
def test_dead_data_worker_is_one_line_in_any_phase(where):
    """torch reports it from a signal handler, wherever the main thread is."""

    def die(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    config = training(batch={"train_iters": 3})
    given = trainer(tiny_transformer(), config).data.batches
    others = {"batches": map(die, given)} if where == "reading" else {"observe": die}
    with raises(DataError, "rank 0", "iteration 1" if where == "reading" else "iteration 2", "pid 7"):
        trainer(tiny_transformer(), config, **others).run()
