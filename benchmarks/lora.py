"""What a LoRA costs: a training step against the whole branch, a pass with LoRAs added, and reading fp8.

    OMP_NUM_THREADS=1 python benchmarks/lora.py --output benchmarks/results/2026-11-29_cpu_lora.md

All variants live in one process and step in turns. Time is CPU time, which a busy machine changes little;
memory is the most that tensors held in a step, weights and moments included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.files import read_json
from mindspeed_mm.generation import loras as applying
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.loras_config import LoraUse
from mindspeed_mm.log import get_logger, one_line_errors, setup_logging
from mindspeed_mm.models.containers.rounded import expand
from mindspeed_mm.models.containers.safetensors import read_safetensors
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.config import LoraConfig, QuantizeConfig
from mindspeed_mm.models.transforms.plan import plan_transforms
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.models.wan.vace import VaceTransformer
from mindspeed_mm.training.build import fill_parameters

logger = get_logger(__name__)
HERE = Path(__file__).parent


@dataclass
class Trained:
    """One variant: its model, optimizer, and CPU seconds so far."""

    name: str
    model: VaceTransformer
    optimizer: torch.optim.Optimizer
    seconds: list[float]
    peak: float = 0.0

    @property
    def trained(self) -> int:
        """Weights that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def build(name: str, predictor: PredictorConfig, *transforms: Config) -> Trained:
    """A model of random weights, with these transforms."""
    with torch.device("meta"):
        model = VaceTransformer(predictor.model)
    plan = plan_transforms(MODELS.get("vace"), "branch", torch.float32, transforms)
    for transform in plan:
        transform.apply(model)
    model.to_empty(device="cpu")
    fill_parameters(model, None, 0, plan)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trained(name, model.train(), torch.optim.AdamW(trained, lr=1e-5, fused=True), [])


def inputs_of(predictor: PredictorConfig, grid: Sequence[int]) -> dict[str, Tensor]:
    """One sample."""
    generator = torch.Generator().manual_seed(0)
    sizes = predictor.model
    return {
        "latents": torch.randn(1, sizes.trunk.in_dim, *grid, generator=generator),
        "timestep": torch.tensor([500.0]),
        "prompt_embeds": torch.randn(1, 64, sizes.trunk.text_dim, generator=generator),
        "vace_context": torch.randn(1, sizes.vace_in_dim, *grid, generator=generator),
    }


def step(one: Trained, inputs: dict[str, Tensor]) -> None:
    """Forward, backward, AdamW."""
    one.model(**inputs).square().mean().backward()
    one.optimizer.step()
    one.optimizer.zero_grad(set_to_none=True)


def seconds_of(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def peak_of(one: Trained, inputs: dict[str, Tensor]) -> float:
    """The most bytes of tensors in a step of this variant."""
    gc.collect()
    moments = [value for state in one.optimizer.state.values() for value in state.values()]
    held = [*one.model.parameters(), *one.model.buffers(), *moments]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(one, inputs)
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    found = [event for event in results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    levels = accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns()))
    return float(sum(tensor.untyped_storage().nbytes() for tensor in held) + max(levels))


def training(predictor: PredictorConfig, grid: Sequence[int], rank: int, steps: int) -> list[str]:
    """The table of training."""
    lora = {on: LoraConfig(rank=rank, on=on) for on in ("branch", "trunk", "both")}
    everybody = [
        build("whole branch", predictor),
        *(build(f"LoRA, {on}", predictor, config) for on, config in lora.items()),
        build("LoRA, both, int8 base", predictor, lora["both"], QuantizeConfig()),
        build("whole branch, int8 trunk", predictor, QuantizeConfig()),
    ]
    inputs = inputs_of(predictor, grid)
    for one in everybody:
        step(one, inputs)
    for _ in range(steps):
        for one in everybody:
            one.seconds.append(seconds_of(lambda one=one: step(one, inputs)))  # type: ignore[misc]
    for one in everybody:
        one.peak = peak_of(one, inputs)
    first = everybody[0]
    lines = ["| variant | trained | CPU s/step | of the branch's | tensors (MB) |", "|-|-|-|-|-|"]
    for one in everybody:
        seconds = statistics.median(one.seconds)
        ratio = seconds / statistics.median(first.seconds)
        lines.append(
            f"| {one.name} | {one.trained / 1e6:.2f} M | {seconds:.2f} | {ratio:.2f} | {one.peak / 1e6:.0f} |"
        )
    return lines


def write_lora(path: Path, model: nn.Module, rank: int) -> None:
    """A LoRA of all linear layers of the blocks."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks." in name and "_proj" not in name:
            found[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(rank, module.in_features) * 0.01
            found[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(module.out_features, rank) * 0.01
    save_file(found, path)


@torch.no_grad()
def generating(predictor: PredictorConfig, grid: Sequence[int], rank: int, steps: int) -> list[str]:
    """The table of one pass with a LoRA merged, and added in every pass."""
    model = build("generation", predictor).model.eval().requires_grad_(False)
    inputs = inputs_of(predictor, grid)
    experts = Experts([model], Accelerator.detect("cpu"))
    rows: dict[str, list[float]] = {"no LoRA": [], "merged": [], "added in every pass": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        write_lora(path, model, rank)
        model(**inputs)
        for _ in range(steps):
            rows["no LoRA"].append(seconds_of(lambda: model(**inputs)))
            for name, strength in (("merged", 1.0), ("added in every pass", (1.0, 0.5))):
                use = LoraUse(path=str(path), strength=strength)
                with applying.applied(experts, [use]):
                    rows[name].append(seconds_of(lambda: model(**inputs)))
    plain = statistics.median(rows["no LoRA"])
    lines = ["| LoRA | CPU s/pass | of no LoRA |", "|-|-|-|"]
    for name, seconds in rows.items():
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} | {statistics.median(seconds) / plain:.2f} |"
        )
    return lines


def reading(steps: int) -> list[str]:
    """GB/s (of fp8 bytes) of expanding fp8 to bf16, and of copying bf16 of as many weights."""
    rows = []
    weight = torch.randn(4096, 4096)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp8.safetensors"
        scale = weight.abs().max() / 448
        fp8 = (weight / scale).to(torch.float8_e4m3fn)
        for name, found in {
            "plain fp8": {"a.weight": fp8},
            "fp8_scaled": {"a.weight": fp8, "a.scale_weight": scale},
            "bf16": {"a.weight": weight.bfloat16()},
        }.items():
            save_file(found, path)
            tensor = expand(read_safetensors([path]).tensors, path)["a.weight"]
            seconds = [seconds_of(lambda tensor=tensor: tensor.read().clone()) for _ in range(steps)]  # type: ignore[misc]
            rows.append(f"| {name} | {weight.numel() / statistics.median(seconds) / 1e9:.2f} |")
    return ["| file | 10⁹ weights per CPU second |", "|-|-|", *rows]


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Measure, print three tables, and write them on request."""
    setup_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--latents", type=int, nargs=3, default=(5, 16, 16), help="R+F, h, w of a sample")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", help="Markdown file to write")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    predictor = parse(PredictorConfig, read_json(HERE / "mid_size.json"), "mid_size.json")
    grid, rank, steps = given.latents, given.rank, given.steps
    tokens = grid[0] * grid[1] * grid[2] // 4
    lines = [
        "# LoRA",
        "",
        f"- command: `python benchmarks/lora.py {' '.join(argv)}`",
        f"- torch {torch.__version__}, one CPU thread, fp32; benchmarks/mid_size.json, {tokens} tokens",
        f"- rank {rank}; the median of {steps} steps, all variants in turns in one process",
        "",
        "## Training",
        "",
        *training(predictor, grid, rank, steps),
        "",
        "## Generation",
        "",
        *generating(predictor, grid, rank, steps),
        "",
        "## Reading",
        "",
        *reading(steps),
    ]
    logger.info("\n".join(lines))
    if given.output:
        Path(given.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
