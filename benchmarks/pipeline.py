"""Step time of two pipeline stages against FSDP2 on two processes, and the bubble against its formula.

    OMP_NUM_THREADS=1 python benchmarks/pipeline.py --output benchmarks/results/2026-11-29_cpu_pipeline.md

All variants live in the same two processes and step in turns: forward and backward of the same samples, the
sum of gradients over ranks included. A rank is busy while it computes in its stages, and waits otherwise.
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
from collections.abc import Callable, Sequence
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
from mindspeed_mm.distributed.fsdp import last_micro_batch
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


@dataclass
class Variant:
    """One way to train, and its numbers on this rank."""

    name: str
    parallel: ParallelConfig
    samples: int  # of both ranks together
    model: nn.Module | None = None
    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
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
    """Forward and backward. → the mean loss over this rank's samples; with stages, on the last rank."""
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
        last_micro_batch(model, number == own[-1])
        velocity = model(batch.latents, batch.timestep, batch.prompt_embeds, batch.vace_context)
        (loss_of(velocity, number) / len(own)).backward()  # type: ignore[no-untyped-call]
    return float(total) / len(own)


@contextmanager
def measuring(busy: list[float]) -> Any:
    """Adds to `busy` what each forward and backward of a stage takes."""
    makes = {name: getattr(PipelineStage, name) for name in ("forward_one_chunk", "backward_one_chunk")}

    def timed(make: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            made = make(*args, **more)
            busy.append(time.perf_counter() - began)
            return made

        return run

    for name, make in makes.items():
        setattr(PipelineStage, name, timed(make))
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
                busy: list[float] = []
                dist.barrier()
                began = time.perf_counter()
                with measuring(busy):
                    variant.loss = step(variant, samples)
                dist.barrier()
                if turn:  # the first warms up
                    variant.seconds.append(time.perf_counter() - began)
                    variant.busy.append(sum(busy))
                for parameter in models[variant.name].parameters():
                    parameter.grad = None
        pipe.send([(variant.seconds, variant.busy, variant.loss) for variant in everybody])


def report(
    args: argparse.Namespace, numbers: Sequence[Sequence[tuple[list[float], list[float], float]]]
) -> list[str]:
    """The table; `numbers` of each rank."""
    everybody = variants(args.samples)
    base: dict[int, float] = {}
    lines = [
        "| variant | samples | s/step | of FSDP2's | bubble | by the formula | loss |",
        "|-|-|-|-|-|-|-|",
    ]
    for place, variant in enumerate(everybody):
        found = [rank[place] for rank in numbers]
        seconds = statistics.median(found[0][0])
        base.setdefault(variant.samples, seconds)
        waits, share = "", ""
        if variant.has_stages:
            turns = zip(
                *([1 - b / s for s, b in zip(rank[0], rank[1], strict=True)] for rank in found), strict=True
            )
            waits = f"{100 * statistics.median(sum(turn) / len(turn) for turn in turns):.0f} %"
            share = f"{100 * bubble(RANKS, variant.parallel.virtual_size, variant.samples):.0f} %"
            loss = found[-1][2]
        else:
            loss = sum(rank[2] for rank in found) / len(found)
        ratio = seconds / base[variant.samples]
        cells = [variant.name, variant.samples, f"{seconds:.2f}", f"{ratio:.2f}", waits, share, f"{loss:.6f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
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
            f"the median of {args.steps} steps in turns, by the clock",
            f"- load of the machine (1 minute): {before:.1f} before, {os.getloadavg()[0]:.1f} after the run",
            "- bubble: the share of a step in which a rank does not compute in its stages (mean of both)",
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
