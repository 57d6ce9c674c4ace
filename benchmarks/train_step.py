"""Time and memory of one training step, by recompute mode and with torch.compile on or off; beside diffusers' if asked.

    python benchmarks/train_step.py --json benchmarks/mid_size.json --latents 9 16 16 --dtype fp32 --peer diffusers
    python benchmarks/train_step.py --preset Wan2.1-VACE-1.3B --frames 81 --height 480 --width 832 --compile on

Each variant has a process of its own. The time is the median step; on a CPU with one thread it is CPU time, which a busy
machine does not change. Peak memory is what the process added to what it held before the model was built.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mindspeed_mm.config.schema import parse, read_json
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.models.wan.config import BRANCH, PRESETS, PredictorConfig, VaceConfig

logger = get_logger(__name__)
PEER = "diffusers"


@dataclass(frozen=True)
class Case:
    """What is trained: sizes, one sample, dtype."""

    config: VaceConfig
    grid: tuple[int, int, int]  # latents (R+F, h, w)
    text: int  # caption tokens
    dtype: str  # bf16 | fp32
    trainable: str
    device: str | None


@dataclass(frozen=True)
class Variant:
    """One way to train it."""

    recompute: str  # none | selective | full, or full:3 = the first 3 blocks of trunk and of branch
    compiled: bool

    @property
    def name(self) -> str:
        """`full, compiled`"""
        return self.recompute + (", compiled" if self.compiled else "")


@dataclass(frozen=True)
class Measured:
    """One variant's numbers."""

    name: str
    seconds: float
    peak: float  # bytes
    first_loss: float
    tokens: int
    model_tflop: float
    hardware_tflop: float


Step = Callable[[], float]


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Measure, print a table, and write it if asked."""
    args = _parser().parse_args(argv)
    case = _case(args)
    variants = [Variant(mode, compiled == "on") for compiled in args.compile for mode in args.recompute]
    rows = measure(case, variants, args.peer, args.steps)
    report = "\n".join(_report(case, rows, args.peak_tflops))
    logger.info(report)
    if args.output:
        Path(args.output).write_text(_heading(argv) + report + "\n", encoding="utf-8")


def measure(case: Case, variants: Sequence[Variant], peer: str | None, steps: int) -> list[tuple[str, Measured]]:
    """All variants, then the peer, one process after the other. → (name, numbers); the peer's name is `diffusers`."""
    context = mp.get_context("spawn")
    found = []
    for variant in [*variants, *([PEER] if peer else [])]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, case, variant, steps), daemon=True)
        process.start()
        theirs.close()
        try:
            row = ours.recv()
        except EOFError:
            row = None  # its own error, out of memory for instance, stands above
        process.join()
        if row is not None:
            found.append((row.name, row))
            logger.info(f"{row.name}: {row.seconds:.3f} s")
    return found


def _serve(pipe: Connection, case: Case, variant: Variant | str, steps: int) -> None:
    """One variant's process: build, warm up, measure."""
    import torch

    from mindspeed_mm.accelerator import Accelerator
    from mindspeed_mm.distributed.launch import launch
    from mindspeed_mm.training.flops import step_flops, tokens_of

    with launch(Accelerator.detect(case.device)) as accelerator:
        inputs = _inputs(case, torch.Generator().manual_seed(0), accelerator.device)
        before = accelerator.memory_allocated() if accelerator.kind == "cpu" else 0
        step = (
            _peer(case, inputs, accelerator) if isinstance(variant, str) else _ours(case, variant, inputs, accelerator)
        )
        loss = step()
        step()
        accelerator.reset_peak_memory()
        # alone on one thread, CPU time is what an idle machine's clock would show
        clock = time.process_time if accelerator.kind == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        times = []
        for _ in range(steps):
            accelerator.synchronize()
            start = clock()
            step()
            accelerator.synchronize()
            times.append(clock() - start)
        tokens = tokens_of(case.grid, case.config)
        share = 1.0 if isinstance(variant, str) else _recomputed_share(case, variant, tokens)
        flops = step_flops(case.config, tokens, case.trainable, share)  # type: ignore[arg-type]
        peak = accelerator.max_memory_allocated() - before
        name = variant if isinstance(variant, str) else variant.name
        work = (flops.model / 1e12, flops.hardware / 1e12)
        pipe.send(Measured(name, statistics.median(times), peak, loss, tokens, *work))


def _inputs(case: Case, generator: Any, device: Any) -> dict[str, Any]:
    """One sample: model inputs and the velocity to be learnt."""
    import torch

    trunk = case.config.trunk

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "latents": normal(1, trunk.in_dim, *case.grid),
        "timestep": torch.tensor([700.0], device=device),
        "prompt_embeds": normal(1, case.text, trunk.text_dim),
        "vace_context": normal(1, case.config.vace_in_dim, *case.grid),
        "target": normal(1, trunk.out_dim, *case.grid),
    }


def _ours(case: Case, variant: Variant, inputs: dict[str, Any], accelerator: Any) -> Step:
    from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
    from mindspeed_mm.distributed.mesh import build_mesh
    from mindspeed_mm.training.build import build_model

    mode, _, first = variant.recompute.partition(":")
    parallel = ParallelConfig(
        recompute_granularity=None if mode == "none" else mode,
        recompute_method="block" if first else None,
        recompute_num_layers=int(first) if first else None,
    )
    fsdp = Fsdp2Config(param_dtype=case.dtype, compile=variant.compiled)
    sizes = {**case.config.trunk.model_dump(), "dtype": case.dtype, "trainable": case.trainable}
    branch = {"vace_layers": case.config.vace_layers, "in_dim": case.config.vace_in_dim}
    predictor = PredictorConfig(**sizes, vace_dit=branch)
    mesh = build_mesh(parallel, accelerator, fsdp)
    model = build_model(predictor, parallel, fsdp, mesh, accelerator, source=None)
    return _step(
        model, [p for p in model.parameters() if p.requires_grad], lambda: model(**_without_target(inputs)), inputs
    )


def _peer(case: Case, inputs: dict[str, Any], accelerator: Any) -> Step:
    """diffusers' model: the same weights train, its own gradient checkpointing, the caption padded to its full length."""
    import torch
    import torch.nn.functional as F
    from diffusers import WanVACETransformer3DModel

    from mindspeed_mm.models.wan.state_dict import KEY_MAPS
    from mindspeed_mm.training.build import initial_weight, trains

    trunk = case.config.trunk
    with torch.device(accelerator.device):
        model = WanVACETransformer3DModel(
            patch_size=trunk.patch_size,
            num_attention_heads=trunk.num_heads,
            attention_head_dim=trunk.head_dim,
            in_channels=trunk.in_dim,
            out_channels=trunk.out_dim,
            text_dim=trunk.text_dim,
            freq_dim=trunk.freq_dim,
            ffn_dim=trunk.ffn_dim,
            num_layers=trunk.num_layers,
            vace_layers=list(case.config.vace_layers),
            vace_in_channels=case.config.vace_in_dim,
        )
    names = KEY_MAPS["diffusers"]
    half = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    for theirs, parameter in model.named_parameters():
        name = names.to_ours(theirs)
        parameter.data.copy_(initial_weight(name, parameter.shape, 0))
        parameter.requires_grad_(trains(name, case.trainable, BRANCH))
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(half)
    model.enable_gradient_checkpointing()
    model.train()
    text = F.pad(inputs["prompt_embeds"], (0, 0, 0, trunk.text_len - case.text))

    def forward() -> Any:
        with torch.autocast(accelerator.kind, torch.bfloat16, enabled=case.dtype == "bf16"):
            return model(
                hidden_states=inputs["latents"].to(half),
                timestep=inputs["timestep"],
                encoder_hidden_states=text.to(half),
                control_hidden_states=inputs["vace_context"].to(half),
                return_dict=False,
            )[0]

    return _step(model, [p for p in model.parameters() if p.requires_grad], forward, inputs)


def _step(model: Any, parameters: list[Any], forward: Callable[[], Any], inputs: dict[str, Any]) -> Step:
    """Forward, loss, backward, clipped AdamW: the same for both."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=5e-5, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True)

    def step() -> float:
        loss = (forward().float() - inputs["target"]).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _without_target(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "target"}


def _recomputed_share(case: Case, variant: Variant, tokens: int) -> float:
    """The share of all blocks' forward work that runs twice."""
    from mindspeed_mm.training.flops import recomputed_share

    mode, _, first = variant.recompute.partition(":")
    numbers = {"blocks": case.config.trunk.num_layers, "vace_blocks": len(case.config.vace_layers)}
    some = [f"{kind}.{i}" for kind, count in numbers.items() for i in range(min(int(first or count), count))]
    plan = {} if mode == "none" else dict.fromkeys(some, mode)
    return recomputed_share(case.config, plan, case.trainable, tokens)  # type: ignore[arg-type]


def _report(case: Case, rows: list[tuple[str, Measured]], peak_tflops: float | None) -> list[str]:
    grid, tokens = "×".join(map(str, case.grid)), rows[0][1].tokens
    lines = [
        f"{tokens} tokens (latents {grid}), caption {case.text} tokens, {case.dtype}, trainable {case.trainable}",
        "",
        "| variant | s/step | tokens/s | TFLOP/s | MFU | HFU | peak memory (MB) | first loss |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for name, row in rows:
        used = [
            f"{100 * work / row.seconds / peak_tflops:.1f} %" if peak_tflops else "–"
            for work in (row.model_tflop, row.hardware_tflop)
        ]
        lines.append(
            f"| {name} | {row.seconds:.3f} | {row.tokens / row.seconds:.0f} | {row.model_tflop / row.seconds:.2f} | "
            f"{used[0]} | {used[1]} | {row.peak / 2**20:.0f} | {row.first_loss:.5f} |"
        )
    theirs = dict(rows).get(PEER)
    if theirs is not None:
        lines += ["", *_comparison([row for name, row in rows if name != PEER], theirs)]
    return lines


def _comparison(ours: list[Measured], theirs: Measured) -> list[str]:
    """Our fastest variant that needs no more memory than the peer, and our fastest of all."""
    fitting = [row for row in ours if row.peak <= theirs.peak]
    lines = []
    for title, rows in (("in the peer's memory", fitting), ("in any memory", ours)):
        if rows:
            best = min(rows, key=lambda row: row.seconds)
            lines.append(
                f"Fastest {title}: {best.name}: {theirs.seconds / best.seconds:.2f} × the speed of {PEER}, "
                f"peak {best.peak / 2**20:.0f} MB against {theirs.peak / 2**20:.0f} MB."
            )
        else:
            lines.append(f"No variant fits {title} ({theirs.peak / 2**20:.0f} MB).")
    return lines


def _heading(argv: Sequence[str]) -> str:
    import subprocess

    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = f"{torch.cuda.get_device_name()}" if torch.cuda.is_available() else _cpu_name()
    return (
        f"# Training step\n\n- command: `python benchmarks/train_step.py {' '.join(argv)}`\n"
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
    return Case(config, grid, min(args.text, config.trunk.text_len), args.dtype, args.trainable, args.device)  # type: ignore[arg-type]


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
    parser.add_argument("--trainable", choices=("branch", "trunk", "all"), default="branch")
    parser.add_argument(
        "--recompute", nargs="+", default=["none", "selective", "full"], help="none, selective, full, full:N"
    )
    parser.add_argument("--compile", nargs="+", choices=("on", "off"), default=["off"])
    parser.add_argument("--peer", choices=(PEER,), help="train diffusers' model in the same run")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each variant, after two to warm up")
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), help="default: what is there")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak, for MFU and HFU")
    parser.add_argument("--output", help="write the table to this file")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
