"""Generation against diffusers.WanVACEPipeline: the same weights, pixels, noise and sigmas in the same run.

    python benchmarks/generate.py --size mid --repeats 2
    python benchmarks/generate.py --size 14B --dtype bf16 --frames 81 --height 480 --width 832 --steps 3

Both sides take turns in one process: seconds of a denoising step (guidance on: two prompts), of the VAE and
of the whole video, and how far the latents differ. Then each side makes one video in a process of its own,
for its peak memory.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
from PIL import Image
from torch import Tensor, nn

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.noise import make_noise
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.request import GenerationRequest, Inputs
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.solver import sigma_table, timestep_table
from mindspeed_mm.log import get_logger, setup_logging
from mindspeed_mm.models.load_model import build_on_meta
from mindspeed_mm.models.wan.config import FP32_MODULES, VACE_1_3B, VACE_14B, VaceConfig, WanConfig
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.wan.vace import VaceTransformer
from mindspeed_mm.models.wan.vae import WanVae

LOGGER = get_logger("benchmarks.generate")
SIZES = {
    "tiny": VaceConfig(
        trunk=WanConfig(hidden_size=96, ffn_dim=384, num_heads=4, num_layers=4, text_dim=64),
        vace_layers=(0, 2),
    ),
    "mid": VaceConfig(
        trunk=WanConfig(hidden_size=512, ffn_dim=2048, num_heads=4, num_layers=8, text_dim=512),
        vace_layers=(0, 2, 4, 6),
    ),
    "1.3B": VACE_1_3B,
    "14B": VACE_14B,
}
VAE_WIDTH = {"tiny": 8, "mid": 16, "1.3B": 96, "14B": 96}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KEPT_FP32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")  # diffusers' own list


@dataclass
class Costs:
    """What one side took, by phase."""

    steps: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Medians."""
        phases = {
            "denoising step": self.steps,
            "VAE encode": self.encode,
            "VAE decode": self.decode,
            "whole video": self.total,
        }
        return {name: statistics.median(values) for name, values in phases.items()}


class Bench:
    """One size: both sides on the same weights."""

    def __init__(self, arguments: argparse.Namespace, accelerator: Accelerator) -> None:
        self.accelerator, self.arguments = accelerator, arguments
        self.sampling = SamplingConfig(
            height=arguments.height,
            width=arguments.width,
            num_frames=arguments.frames,
            steps=arguments.steps,
            shift=5.0,
        )
        self.before = accelerator.memory_allocated()
        dtype = DTYPES[arguments.dtype]
        model = random_transformer(SIZES[arguments.size], dtype, accelerator.device)
        torch.manual_seed(0)
        vae = AutoencoderKLWan(base_dim=VAE_WIDTH[arguments.size], z_dim=16).eval().requires_grad_(False)
        if arguments.only != "ours":
            self.theirs_model = diffusers_twin(model, dtype)
            self.theirs_vae = copy.deepcopy(vae).to(accelerator.device)
        if arguments.only != "diffusers":
            self.experts, self.vae = Experts([model], accelerator), WanVae(vae, "random")
        self.text_len = model.config.trunk.text_len
        rng = np.random.default_rng(0)
        self.video = rng.integers(
            0, 256, (arguments.frames, arguments.height, arguments.width, 3), dtype=np.uint8
        )
        grid = ((arguments.frames + 3) // 4, arguments.height // 8, arguments.width // 8)
        self.noise = make_noise(grid, 1)
        width = model.config.trunk.text_dim
        generator = torch.Generator().manual_seed(0)
        self.texts = {
            name: torch.randn(n, width, generator=generator).to(dtype) for name, n in (("p", 40), ("n", 126))
        }

    def run_ours(self, costs: Costs) -> Tensor:
        """One video by this package, by a pipeline that remembers nothing of earlier ones."""
        models = ModelStore(self.experts, self.vae, None, accelerator=self.accelerator, tiled="never")
        models.cached_prompts.update(self.texts)
        inputs = Inputs(src_video=self.video)
        request = GenerationRequest(
            prompt="p", negative_prompt="n", inputs=inputs, sampling=self.sampling, noise=self.noise
        )
        with measured(self.accelerator, costs):
            result = VacePipeline(models).generate(request)
        costs.steps += models.timings.steps[1:]  # theirs can only be timed from the second one
        costs.encode.append(models.timings.seconds["vae_encode"])
        costs.decode.append(models.timings.seconds["vae_decode"])
        return result.latents

    def run_theirs(self, costs: Costs) -> Tensor:
        """One video by diffusers."""
        device, vae = self.accelerator.device, self.theirs_vae
        pipe = WanVACEPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=self._scheduler(),
            transformer=self.theirs_model,
        )
        pipe.set_progress_bar_config(disable=True)
        padded = {
            name: nn.functional.pad(rows, (0, 0, 0, self.text_len - len(rows)))[None].to(device)
            for name, rows in self.texts.items()
        }
        marks: list[float] = []
        kept: list[Tensor] = []

        def on_step(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            self.accelerator.synchronize()
            marks.append(time.perf_counter())
            kept[:] = [values["latents"]]
            return values

        encodes, decodes = (
            timed_method(vae, "encode", self.accelerator),
            timed_method(vae, "decode", self.accelerator),
        )
        with measured(self.accelerator, costs):
            pipe(
                prompt_embeds=padded["p"],
                negative_prompt_embeds=padded["n"],
                video=[Image.fromarray(frame) for frame in self.video],
                height=self.sampling.height,
                width=self.sampling.width,
                num_frames=self.sampling.num_frames,
                num_inference_steps=self.sampling.steps,
                guidance_scale=self.sampling.guidance_scale,
                latents=self.noise[None].clone(),
                callback_on_step_end=on_step,
                output_type="np",
            )
        costs.steps += [after - before for before, after in itertools.pairwise(marks)]
        costs.encode.append(sum(encodes))
        costs.decode.append(sum(decodes))
        return kept[0][0].float().cpu()

    def _scheduler(self) -> UniPCMultistepScheduler:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        own = scheduler.set_timesteps

        def set_timesteps(steps: int, device: Any = None) -> None:
            own(steps)
            scheduler.sigmas, scheduler.timesteps = (
                sigma_table(self.sampling),
                timestep_table(self.sampling).to(device),
            )
            scheduler.set_begin_index(0)

        scheduler.set_timesteps = set_timesteps
        return scheduler


class measured:
    """Wall time of a block."""

    def __init__(self, accelerator: Accelerator, costs: Costs) -> None:
        self.accelerator, self.costs = accelerator, costs

    def __enter__(self) -> None:
        gc.collect()
        self.accelerator.empty_cache()
        self.accelerator.synchronize()
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.accelerator.synchronize()
        self.costs.total.append(time.perf_counter() - self.start)


def peak_of_one(bench: Bench) -> float:
    """GB that the models and one video of the side `--only` add to this process.

    On a device: that they take there.
    """
    gc.collect()
    bench.accelerator.reset_peak_memory()
    if bench.accelerator.kind == "cpu":
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # a Linux process can start a new peak of its resident size
    (bench.run_ours if bench.arguments.only == "ours" else bench.run_theirs)(Costs())
    return (bench.accelerator.max_memory_allocated() - bench.before) / 1e9


def peak_in_own_process(side: str) -> float:
    """The same command again with `--only side`; what it prints."""
    command = [sys.executable, *sys.argv, "--only", side]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(ran.stdout.split()[-1])


def timed_method(owner: Any, name: str, accelerator: Accelerator) -> list[float]:
    """Replace a method by one that writes its seconds into the list."""
    seconds: list[float] = []
    method: Callable[..., Any] = getattr(type(owner), name).__get__(owner)

    def timed(*args: Any, **kwargs: Any) -> Any:
        accelerator.synchronize()
        start = time.perf_counter()
        answer = method(*args, **kwargs)
        accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
        return answer

    setattr(owner, name, timed)
    return seconds


def random_transformer(config: VaceConfig, dtype: torch.dtype, device: torch.device) -> VaceTransformer:
    """Random weights of a sensible size, made on the device."""
    model = build_on_meta(config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.split(".")[0] in FP32_MODULES else dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
        parameter.data.normal_(1.0 if norm else 0.0, 0.02, generator=generator)
    return model


def diffusers_twin(model: VaceTransformer, dtype: torch.dtype) -> WanVACETransformer3DModel:
    """diffusers' transformer on the same weights, in the dtypes it would load them in."""
    trunk = model.config.trunk
    with torch.device("meta"):
        twin = WanVACETransformer3DModel(
            num_attention_heads=trunk.num_heads,
            attention_head_dim=trunk.head_dim,
            text_dim=trunk.text_dim,
            freq_dim=trunk.freq_dim,
            ffn_dim=trunk.ffn_dim,
            num_layers=trunk.num_layers,
            vace_layers=list(model.config.vace_layers),
        )
    names = KEY_MAPS["diffusers"]
    state = {names.to_theirs(name): weight for name, weight in model.state_dict().items()}
    kept = {
        name: weight.to(torch.float32 if any(k in name for k in _KEPT_FP32) else dtype)
        for name, weight in state.items()
    }
    twin.load_state_dict(kept, assign=True)
    rope = WanVACETransformer3DModel.from_config({**twin.config, "num_layers": 1, "vace_layers": [0]}).rope
    twin.rope = rope.to(model.head.head.weight.device)  # its tables are buffers outside the state dict
    return twin.eval().requires_grad_(False)


def report(bench: Bench, ours: Costs, theirs: Costs, difference: float) -> None:
    """The table of the results page, all but its last row."""
    a = bench.arguments
    LOGGER.info(
        "%s, %s, %d threads, torch %s: %s, %s, %dx%d, %d frames, %d steps, median of %d",
        bench.accelerator.device_name(), bench.accelerator.kind, torch.get_num_threads(), torch.__version__,
        a.size, a.dtype, a.width, a.height, a.frames, a.steps, a.repeats,
    )  # fmt: skip
    LOGGER.info("largest difference of the latents: %.1e (latents are of order 1)", difference)
    LOGGER.info("| | ours | diffusers | ratio |\n|-|-|-|-|")
    mine, other = ours.row(), theirs.row()
    for name, value in mine.items():
        line(name, "s", value, other[name])


def line(name: str, unit: str, ours: float, theirs: float) -> None:
    """One row of the table."""
    LOGGER.info("| %s (%s) | %.3f | %.3f | %.2f |", name, unit, ours, theirs, theirs / max(ours, 1e-9))


def main() -> None:
    """Measure both sides in turn, after one round to warm up; then the memory of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    for name, value in (("frames", 17), ("height", 192), ("width", 320), ("steps", 3), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--only", choices=("ours", "diffusers"), help="print this side's peak memory in GB, nothing else"
    )
    setup_logging()
    bench = Bench(parser.parse_args(), Accelerator.detect())
    if bench.arguments.only:
        LOGGER.info("%f", peak_of_one(bench))
        return
    ours, theirs = Costs(), Costs()
    difference = float((bench.run_ours(Costs()) - bench.run_theirs(Costs())).abs().max())
    for _ in range(bench.arguments.repeats):
        bench.run_theirs(theirs)
        bench.run_ours(ours)
    report(bench, ours, theirs, difference)
    del bench
    gc.collect()
    line("peak memory", "GB", peak_in_own_process("ours"), peak_in_own_process("diffusers"))


if __name__ == "__main__":
    main()
