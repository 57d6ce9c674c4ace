"""Step time of two pipeline stages against FSDP2 on two processes, and the bubble against its formula.

    OMP_NUM_THREADS=1 python benchmarks/pipeline.py --output benchmarks/results/2026-11-29_cpu_pipeline.md

All variants live in the same two processes and step in turns: forward and backward of the same samples, the
sum of gradients over ranks included. A busy machine changes CPU time little, so steps of stages are replayed:
each forward and backward takes the CPU time that it took, and starts when its rank and its inputs are ready.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import shlex
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megatron.mm import groups
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.config.schema import parse
from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig, bubble
from mindspeed_mm.distributed.fsdp import set_last_micro_batch
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.distributed.mesh import build_mesh
from mindspeed_mm.distributed.pipeline import Pipeline
from mindspeed_mm.files import read_json
from mindspeed_mm.log import get_logger, one_line_errors, setup_logging
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.models.wan.stages import even_layers
from mindspeed_mm.ops.stages import MicroBatch
from mindspeed_mm.training.build import build_model

logger = get_logger(__name__)
HERE = Path(__file__).parent
RANKS = 2


@dataclass(frozen=True)
class Work:
    """A forward or backward of one micro-batch through one stage."""

    forward: bool
    stage: int
    batch: int
    seconds: float  # of CPU time

    def reads(self, last: int) -> list[tuple[bool, int, int]]:
        """What must be over before it starts."""
        if self.forward:
            return [(True, self.stage - 1, self.batch)] if self.stage else []
        above = [(False, self.stage + 1, self.batch)] if self.stage < last else []
        return [(True, self.stage, self.batch), *above]


def replay(ranks: Sequence[Sequence[Work]]) -> tuple[float, float]:
    """Return the length of a step on undisturbed ranks, and the fraction of it that they wait."""
    last = max(work.stage for rank in ranks for work in rank)
    over: dict[tuple[bool, int, int], float] = {}
    free, left = [0.0] * len(ranks), [list(rank) for rank in ranks]
    while any(left):
        for rank, queue in enumerate(left):
            while queue and all(key in over for key in queue[0].reads(last)):
                work = queue.pop(0)
                start = max([free[rank], *(over[key] for key in work.reads(last))])
                free[rank] = over[work.forward, work.stage, work.batch] = start + work.seconds
    busy = sum(work.seconds for rank in ranks for work in rank)
    return max(free), 1 - busy / (len(ranks) * max(free))


@dataclass
class Variant:
    """One way to train, and its numbers on this rank."""

    name: str
    parallel: ParallelConfig
    samples: int  # of both ranks together
    model: nn.Module | None = None
    clock: list[float] = field(default_factory=list)  # seconds of each step
    cpu: list[float] = field(default_factory=list)  # of this process
    work: list[list[Work]] = field(default_factory=list)  # of this rank's stages, in order
    loss: float = 0.0

    @property
    def has_stages(self) -> bool:
        """Whether the ranks hold other layers."""
        return self.parallel.pipeline_model_parallel_size > 1


def variants(samples: Sequence[int]) -> list[Variant]:
    """FSDP2, then stages and virtual stages."""
    stages = {
        virtual: ParallelConfig(
            pipeline_model_parallel_size=RANKS, virtual_pipeline_model_parallel_size=virtual
        )
        for virtual in (1, 2)
    }
    found = [Variant("FSDP2", ParallelConfig(), count) for count in samples]
    for virtual, parallel in stages.items():
        name = "PP 2" if virtual == 1 else f"PP 2, VP {virtual}"
        found += [Variant(name, parallel, count) for count in samples]
    return found


def sample(predictor: PredictorConfig, grid: Sequence[int], number: int) -> tuple[MicroBatch, Tensor]:
    """Inputs and target number `number`, the same on every rank."""
    generator = torch.Generator().manual_seed(number)
    sizes = predictor.model
    batch = MicroBatch(
        torch.randn(1, sizes.trunk.in_dim, *grid, generator=generator),
        torch.tensor([100.0 + 50 * number]),
        torch.randn(1, 64, sizes.trunk.text_dim, generator=generator),
        torch.randn(1, sizes.vace_in_dim, *grid, generator=generator),
    )
    return batch, torch.randn(1, sizes.trunk.in_dim, *grid, generator=generator)


def step(variant: Variant, samples: Sequence[tuple[MicroBatch, Tensor]]) -> float:
    """Run forward and backward. Return the mean loss of this rank's samples (the last rank's with stages)."""
    model, count = variant.model, variant.samples
    total = torch.zeros(())

    def loss_of(velocity: Tensor, number: int) -> Tensor:
        loss = (velocity - samples[number][1]).square().mean()
        total.add_(loss.detach())
        return loss

    if isinstance(model, Pipeline):
        model.forward_backward([batch for batch, _ in samples[:count]], lambda v, n: loss_of(v, n) / count)
        return float(total) / count
    assert model is not None
    own = range(dist.get_rank(), count, RANKS)
    for number in own:
        batch = samples[number][0]
        set_last_micro_batch(model, number == own[-1])
        velocity = model(batch.latents, batch.timestep, batch.prompt_embeds, batch.vace_context)
        (loss_of(velocity, number) / len(own)).backward()  # type: ignore[no-untyped-call]
    return float(total) / len(own)


@contextmanager
def recording(done: list[Work]) -> Iterator[None]:
    """Adds to `done` each forward and backward of a stage."""
    makes = {name: getattr(PipelineStage, name) for name in ("forward_one_chunk", "backward_one_chunk")}

    def timed(name: str) -> Callable[..., Any]:
        def run(stage: PipelineStage, batch: int, *args: Any, **more: Any) -> Any:
            began = time.thread_time()
            made = makes[name](stage, batch, *args, **more)
            spent = time.thread_time() - began
            done.append(Work(name.startswith("forward"), stage.stage_index, batch, spent))
            return made

        return run

    for name in makes:
        setattr(PipelineStage, name, timed(name))
    try:
        yield
    finally:
        for name, make in makes.items():
            setattr(PipelineStage, name, make)


def rank_main(pipe: Any, rank: int, port: str, args: argparse.Namespace) -> None:
    """One process: build every variant, let them step in turns, and answer with the numbers."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    predictor = parse(
        PredictorConfig, {**read_json(args.json), "dtype": "fp32", "trainable": "all"}, str(args.json)
    )
    everybody = variants(args.samples)
    with launch(Accelerator.detect("cpu")) as accelerator:
        models: dict[str, nn.Module] = {}
        for variant in everybody:
            if variant.name not in models:
                groups.destroy()  # each way to train has groups of its own
                fsdp = Fsdp2Config(param_dtype="fp32")
                mesh = build_mesh(variant.parallel, accelerator, fsdp)
                layers = even_layers(predictor.num_layers, variant.parallel.num_stages)
                models[variant.name] = build_model(
                    predictor, variant.parallel, fsdp, mesh, accelerator, source=None, layers=layers
                )
            variant.model = models[variant.name]
        samples = [sample(predictor, args.latents, number) for number in range(max(args.samples))]
        for turn in range(args.steps + 1):
            for variant in everybody:
                done: list[Work] = []
                dist.barrier()
                clock, cpu = time.perf_counter(), time.process_time()
                with recording(done):
                    variant.loss = step(variant, samples)
                dist.barrier()
                if turn:  # the first warms up
                    variant.clock.append(time.perf_counter() - clock)
                    variant.cpu.append(time.process_time() - cpu)
                    variant.work.append(done)
                for parameter in models[variant.name].parameters():
                    parameter.grad = None
        for variant in everybody:
            variant.model = None
        pipe.send(everybody)


def report(args: argparse.Namespace, ranks: Sequence[Sequence[Variant]]) -> list[str]:
    """The table, from the variants of each rank."""
    lines = [
        "| variant | samples | clock s/step | CPU s/step | replayed s/step | bubble | by formula | loss |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for found in zip(*ranks, strict=True):
        one = found[0]
        cpu = max(statistics.median(variant.cpu) for variant in found)
        replayed, wait, share, loss = "", "", "", statistics.mean(variant.loss for variant in found)
        if one.has_stages:
            steps = [replay(turn) for turn in zip(*(variant.work for variant in found), strict=True)]
            replayed = f"{statistics.median(length for length, _ in steps):.2f}"
            wait = f"{100 * statistics.median(waits for _, waits in steps):.0f} %"
            share = f"{100 * bubble(RANKS, one.parallel.virtual_size, one.samples):.0f} %"
            loss = found[-1].loss
        cells = [one.name, one.samples, f"{min(one.clock):.2f}", f"{cpu:.2f}", replayed, wait, share]
        lines.append(f"| {' | '.join(map(str, cells))} | {loss:.6f} |")
    return lines


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Measure, print a table, and write it on request."""
    setup_logging()
    args = _parser().parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = mp.get_context("spawn")
    pipes, processes, before = [], [], os.getloadavg()[0]
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(theirs, rank, port, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    numbers = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    table = "\n".join(report(args, numbers))
    logger.info(table)
    if args.output:
        command = f"OMP_NUM_THREADS=1 python benchmarks/pipeline.py {shlex.join(argv)}".strip()
        heading = [
            "# Pipeline stages against FSDP2",
            "",
            f"- command: `{command}`",
            f"- torch {torch.__version__}, fp32, two processes of one thread, gloo, {os.cpu_count()} cores",
            f"- {Path(args.json).name}, latents {'×'.join(map(str, args.latents))}, everything trains; "
            f"{args.steps} steps of each in turns",
            f"- load of the machine (1 minute): {before:.1f} before, {os.getloadavg()[0]:.1f} after the run",
            "- clock: the shortest step; CPU: median of the busier rank; replayed: undisturbed, without",
            "  text, time and sending; bubble: the share of the replayed step in which a rank waits",
            "",
        ]
        Path(args.output).write_text("\n".join([*heading, table, ""]), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, default=HERE / "mid_size.json", help="the predictor of a model JSON"
    )
    parser.add_argument("--latents", type=int, nargs=3, default=[5, 16, 16], metavar=("F", "H", "W"))
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 4, 8], help="of a step, even numbers")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each variant")
    parser.add_argument("--output", type=Path, help="file for the table")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
