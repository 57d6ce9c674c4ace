"""Time and memory of one training step, by recompute mode and with torch.compile on or off.

Optionally compares with diffusers or DiffSynth-Studio (`pip install diffsynth`).

    python benchmarks/train_step.py --json benchmarks/mid_size.json --latents 9 16 16 --dtype fp32 \\
        --peer diffusers
    python benchmarks/train_step.py --preset Wan2.1-VACE-1.3B --frames 81 --height 480 --width 832 \\
        --compile on

Each variant has a process of its own. The time is the median step; on a CPU with one thread it is CPU time,
which a busy machine changes little. Memory is the most that tensors held at once; on a CPU also what the
process added, at its peak in the measured steps, to what it held with everything imported and nothing built.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing as mp
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from step_trainers import MODULES, PEERS, Case, Step, Variant, make_inputs, our_trainer, peer_trainer

from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import read_json
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.models.wan.config import PRESETS, PredictorConfig

logger = get_logger(__name__)


@dataclass(frozen=True)
class Measured:
    """One variant's numbers."""

    name: str
    seconds: float
    peak: float  # bytes of tensors
    process: float | None  # bytes of the process, on a CPU
    first_loss: float
    tokens: int
    model_tflop: float
    hardware_tflop: float
    product_rate: float  # TFLOP/s that the device can do: its data sheet's, or one large product's


PEAK_WIDTH = 2048  # of the square product whose rate stands for a device that no table knows


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Measure, print a table, and write it on request."""
    args = _parser().parse_args(argv)
    case = _case(args)
    variants = [Variant(mode, compiled == "on") for compiled in args.compile for mode in args.recompute]
    rows = measure(case, variants, args.peer, args.steps, in_turns=args.in_turns)
    report = "\n".join(_report(case, rows, args.peak_tflops or (rows[0].product_rate if rows else None)))
    logger.info(report)
    if args.output:
        Path(args.output).write_text(_heading(argv) + report + "\n", encoding="utf-8")


def measure(
    case: Case, variants: Sequence[Variant], peers: Sequence[str], steps: int, *, in_turns: bool
) -> list[Measured]:
    """All variants, then the peers, by their names.

    One process after the other, or all alive and stepping in turns.
    """
    everybody: list[Variant | str] = [*variants, *peers]
    if not in_turns:
        return [row for who in everybody for row in _finish(_start(case, who), steps)]
    workers = [worker for who in everybody if (worker := _start(case, who)).alive()]
    for _ in range(steps):
        for worker in workers:
            worker.pipe.send("step")
            worker.alive()
    return [row for worker in workers for row in _finish(worker, 0)]


@dataclass
class Worker:
    """One variant's process and the way to it."""

    pipe: Connection
    process: Any

    def alive(self) -> bool:
        """Wait until it has done its work; its own error, out of memory for instance, stands above."""
        try:
            return bool(self.pipe.recv())
        except (EOFError, OSError):
            return False


def _start(case: Case, variant: Variant | str) -> Worker:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, case, variant), daemon=True)
    process.start()
    theirs.close()
    return Worker(ours, process)


def _finish(worker: Worker, steps: int) -> list[Measured]:
    """Run `steps` more steps. Return the row, or None if the process died."""
    rows = []
    try:
        if steps:
            worker.alive()
        for _ in range(steps):
            worker.pipe.send("step")
            worker.pipe.recv()
        worker.pipe.send("report")
        rows.append(worker.pipe.recv())
        logger.info(f"{rows[0].name}: {rows[0].seconds:.3f} s")
    except (EOFError, OSError):
        logger.warning("one variant did not come to its end; its error stands above")
    worker.process.join()
    return rows


def _serve(pipe: Connection, case: Case, variant: Variant | str) -> None:
    """One variant's process: import, build, warm up, then steps and a report on request."""
    import torch
    from diffusers import WanVACETransformer3DModel  # noqa: F401  # both sides import the same before memory is looked at

    import mindspeed_mm.training.build  # noqa: F401
    from megatron.mm.core import core
    from mindspeed_mm.accelerator import Accelerator
    from mindspeed_mm.distributed.launch import launch
    from mindspeed_mm.models.wan.flops import peak_tflops

    core("parallel_state")
    with launch(Accelerator.detect(case.device)) as accelerator:
        rate = peak_tflops(accelerator.device_name(), case.dtype) or _product_rate(case, accelerator)
        inputs = make_inputs(case, torch.Generator().manual_seed(0), accelerator.device)
        if isinstance(variant, str):
            importlib.import_module(MODULES[variant])
        before = accelerator.memory_allocated()
        build = (
            partial(peer_trainer, case, variant)
            if isinstance(variant, str)
            else partial(our_trainer, case, variant)
        )
        trainer = build(inputs, accelerator)
        loss = trainer.step()
        trainer.step()
        accelerator.reset_peak_memory()
        pipe.send(True)
        seconds = []
        while pipe.recv() == "step":
            seconds.append(_timed(trainer.step, accelerator))
            pipe.send(True)
        most = accelerator.max_memory_allocated()
        on_cpu = accelerator.kind == "cpu"
        tensors = trainer.held() + _allocated_in(trainer.step) if on_cpu else most
        process = most - before if on_cpu else None
        name = variant if isinstance(variant, str) else variant.name
        work = _work(case, variant)
        pipe.send(Measured(name, statistics.median(seconds), tensors, process, loss, *work, rate))


def _work(case: Case, variant: Variant | str) -> tuple[int, float, float]:
    """Tokens, and TFLOP of a step: what the mathematics needs, and with what runs twice."""
    from mindspeed_mm.models.wan.flops import recomputed_share, step_flops, tokens_of

    tokens = tokens_of(case.grid, case.config)
    plan = (Variant("full", False) if isinstance(variant, str) else variant).plan(case.config)
    text = case.config.trunk.text_len if isinstance(variant, str) else case.text
    share = recomputed_share(case.config, plan, case.trainable, tokens, text)  # type: ignore[arg-type]
    flops = step_flops(case.config, tokens, case.trainable, share, text=text)  # type: ignore[arg-type]
    return tokens, flops.model / 1e12, flops.hardware / 1e12


def _timed(step: Step, accelerator: Any) -> float:
    import torch

    # alone on one thread, CPU time is what an idle machine's clock would show
    clock = (
        time.process_time if accelerator.kind == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    )
    accelerator.synchronize()
    start = clock()
    step()
    accelerator.synchronize()
    return clock() - start


def _allocated_in(step: Step) -> int:
    """The most bytes that one step holds beyond what it found, by torch's own allocation events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    profiler: Any = recorded.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    levels = accumulate(int(event.nbytes()) for event in sorted(events, key=lambda event: event.start_ns()))
    return max(levels, default=0)


def _product_rate(case: Case, accelerator: Any) -> float:
    """TFLOP/s of one large matrix product in the case's dtype: what this device can do."""
    import torch

    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    square = torch.randn(PEAK_WIDTH, PEAK_WIDTH, device=accelerator.device, dtype=dtype)
    seconds = min(_timed(lambda: float((square @ square)[0, 0]), accelerator) for _ in range(4))
    return 2 * PEAK_WIDTH**3 / seconds / 1e12


def _report(case: Case, rows: list[Measured], peak_tflops: float | None) -> list[str]:
    if not rows:
        return ["no variant ran to its end"]
    grid, tokens = "×".join(map(str, case.grid)), rows[0].tokens
    rate = f"; MFU and HFU of {peak_tflops:.3g} TFLOP/s" if peak_tflops else ""
    lines = [
        (
            f"{tokens} tokens (latents {grid}), caption {case.text} tokens, {case.dtype}, our residual "
            f"{case.residual_dtype}, trainable {case.trainable}{rate}"
        ),
        "",
        "| variant | s/step | tokens/s | TFLOP/s | MFU | HFU | tensors (MB) | process (MB) | first loss |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for row in rows:
        used = [
            f"{100 * work / row.seconds / peak_tflops:.1f} %" if peak_tflops else "–"
            for work in (row.model_tflop, row.hardware_tflop)
        ]
        process = "–" if row.process is None else f"{row.process / 2**20:.0f}"
        lines.append(
            f"| {row.name} | {row.seconds:.3f} | {row.tokens / row.seconds:.0f} | "
            f"{row.model_tflop / row.seconds:.3f} | "
            f"{used[0]} | {used[1]} | {row.peak / 2**20:.0f} | {process} | {row.first_loss:.5f} |"
        )
    for theirs in rows:
        if theirs.name in PEERS:
            lines += ["", *_comparison([row for row in rows if row.name not in PEERS], theirs)]
    return lines


def _comparison(ours: list[Measured], theirs: Measured) -> list[str]:
    """Our fastest variant with no more memory than the peer by both measures, and our fastest of all."""
    fitting = [row for row in ours if row.peak <= theirs.peak and (row.process or 0) <= (theirs.process or 0)]
    lines = []
    for title, rows in (("in the peer's memory", fitting), ("in any memory", ours)):
        if rows:
            best = min(rows, key=lambda row: row.seconds)
            lines.append(
                f"Fastest {title}: {best.name}: {theirs.seconds / best.seconds:.2f} × the speed of "
                f"{theirs.name}, "
                f"tensors {best.peak / 2**20:.0f} MB against {theirs.peak / 2**20:.0f} MB."
            )
        else:
            lines.append(f"No variant fits {title} ({theirs.peak / 2**20:.0f} MB of tensors).")
    return lines


def _heading(argv: Sequence[str]) -> str:
    import subprocess

    import torch

    command = shlex.join(["python", "benchmarks/train_step.py", *argv])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    device = f"{torch.cuda.get_device_name()}" if torch.cuda.is_available() else _cpu_name()
    return (
        f"# Training step\n\n- command: `{command}`\n"
        f"- commit: {commit.stdout.strip() or 'unknown'}\n"
        f"- device: {device}, {torch.get_num_threads()} thread(s); torch {torch.__version__}, "
        f"Python {platform.python_version()}\n\n"
    )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _case(args: argparse.Namespace) -> Case:
    if args.json:
        values = read_json(args.json)
        config = parse(PredictorConfig, values.get("predictor", values), args.json).model
    elif args.preset in PRESETS:
        config = PRESETS[args.preset]
    else:
        raise ConfigError(f"--preset {args.preset}: unknown; one of {', '.join(PRESETS)}")
    grid = tuple(args.latents or (args.refs + (args.frames + 3) // 4, args.height // 8, args.width // 8))
    return Case(
        config,
        grid,
        min(args.text, config.trunk.text_len),
        args.dtype,
        args.trainable,
        args.device,
        args.residual_dtype,
    )  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/train_step.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="Wan2.1-VACE-1.3B", help="a model by name")
    parser.add_argument("--json", help="a model JSON (or its predictor part) instead")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--refs", type=int, default=0, help="reference images")
    parser.add_argument(
        "--latents", type=int, nargs=3, metavar=("F", "H", "W"), help="latent grid instead of frames and size"
    )
    parser.add_argument("--text", type=int, default=64, help="caption tokens")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of matrix products")
    parser.add_argument(
        "--residual-dtype", choices=("bf16", "fp32"), default="fp32", help="of our residual stream"
    )
    parser.add_argument("--trainable", choices=("branch", "trunk", "all"), default="branch")
    parser.add_argument(
        "--recompute",
        nargs="+",
        default=["none", "selective", "full"],
        help=(
            "none, selective, full, or patterns as in fsdp2_config.yaml: "
            "blocks.{0-4}=selective,vace_blocks.{*}=full"
        ),
    )
    parser.add_argument("--compile", nargs="+", choices=("on", "off"), default=["off"])
    parser.add_argument(
        "--peer", nargs="+", default=[], choices=PEERS, help="train these projects' models in the same run"
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="measured steps of each variant, after two to warm up"
    )
    parser.add_argument(
        "--in-turns",
        action="store_true",
        help="keep all variants alive and let them step in turns (memory for all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), help="default: what is there")
    parser.add_argument(
        "--peak-tflops", type=float, help="for MFU and HFU (default: the data sheet's, or measured)"
    )
    parser.add_argument("--output", help="write the table to this file")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
