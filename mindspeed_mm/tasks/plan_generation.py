"""`vace plan --generate CONFIG.json`: estimates the memory and time of a generation run before its launch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import display_path, format_json
from mindspeed_mm.generation.layout import choose_layout
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.log import get_logger, log_table
from mindspeed_mm.models.wan.config import PRESETS, VaceConfig
from mindspeed_mm.planning.calibrate import read_calibration
from mindspeed_mm.planning.devices import Device, find_device
from mindspeed_mm.planning.fit import Change
from mindspeed_mm.planning.generation import (
    TEXT_PARAMETERS,
    GenerationMemory,
    GenerationRun,
    GenerationTime,
    generation_changes,
    generation_memory,
    generation_time,
)
from mindspeed_mm.tasks.jobs.generate import GenerateJob, job_parser
from mindspeed_mm.tasks.jobs.plan import BYTES, DeviceFlags
from mindspeed_mm.tasks.summary import Rows

logger = get_logger(__name__)
GIB = 2.0**30
FLAG = "--generate"


class GenerationPlanFlags(DeviceFlags):
    """The kind and number of devices to plan a generation run for."""

    devices: int = Field(default=1, gt=0, le=65536, description="how many of them")


@dataclass(frozen=True)
class GenerationPlan:
    """The estimate of a run on one kind of device, for the video that needs the most memory."""

    device: Device
    name: str  # name of the video
    run: GenerationRun
    model: str
    dtype: str
    memory: GenerationMemory
    time: GenerationTime
    frames: int  # frames of the whole video
    devices: int
    seconds: float  # time for all videos
    changes: Sequence[Change]

    @property
    def kwh(self) -> float | None:
        """The energy of all videos at the devices' power limit in kWh, or None if the limit is unknown."""
        return self.seconds / 3600 * self.devices * self.device.watts / 1000 if self.device.watts else None

    @property
    def fits(self) -> bool:
        """Whether the estimate fits in the device's memory."""
        return self.memory.total <= self.run.capacity


def plan_parser(prog: str) -> FlagParser:
    """Build the parser with the flags of generation and of the planner."""
    parser = job_parser(prog, config=FLAG)
    add_flags(parser, GenerationPlanFlags, "plan")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: Sequence[str], prog: str) -> None:
    """Print the plan as a table or as JSON."""
    arguments = plan_parser(prog).parse_strict(argv)
    flags = parse(GenerationPlanFlags, given(arguments, GenerationPlanFlags), prog)
    job = GenerateJob.from_argv([arguments.generate, *_without_own(argv)], prog, needs_weights=False)
    if arguments.print_config:
        logger.info(job.to_json())
        return
    plan = make_plan(job, flags)
    if arguments.json:
        logger.info(format_json(as_json(plan), indent=2))
        return
    log_table(table(plan))


def make_plan(job: GenerateJob, flags: GenerationPlanFlags) -> GenerationPlan:
    """Estimate the memory and time of a job.

    Raises ConfigError for an unknown device or a model of unknown size.
    """
    if job.run.from_latents is not None:
        raise ConfigError("only decodes", where="from_latents", fix="remove it to plan a generation run")
    device = read_calibration(job.run.dtype) if flags.device == "here" else find_device(flags.device)
    if flags.mfu:
        device = replace(device, products=flags.mfu, attention=flags.mfu)
    model, name = model_of(job)
    runs = {video.name: run_of(job, video, model, device, flags.devices) for video in job.videos}
    largest = max(runs, key=lambda video: generation_memory(runs[video]).total)
    run, dtype = runs[largest], job.run.dtype
    memory = generation_memory(run)
    groups = flags.devices if job.run.data_parallel else 1
    return GenerationPlan(
        device=device,
        name=largest,
        frames=next(video.sampling.num_frames for video in job.videos if video.name == largest),
        devices=flags.devices,
        run=run,
        model=name,
        dtype=dtype,
        memory=memory,
        time=generation_time(run, device, dtype),
        seconds=sum(generation_time(each, device, dtype).total for each in runs.values()) / groups,
        changes=generation_changes(run, device, dtype, run.capacity) if memory.total > run.capacity else [],
    )


def estimate(job: GenerateJob, processes: int) -> str:
    """Summarize the memory of one device in one line, for the end of a dry run.

    The estimate uses only the name of the model. It opens no weights and does not import torch. Returns ""
    if the name is unknown.
    """
    name = _size_in(job.model.experts[0][0])
    if name is None:
        return ""
    roomy = Device("", math.inf, 1.0, 1.0, 1.0, 1.0, 1.0, 8, None)
    try:
        model = PRESETS[name]
        runs = [run_of(job, video, model, roomy, processes, TEXT_PARAMETERS) for video in job.videos]
    except ConfigError:  # the processes cannot share a video, which the run itself reports
        return ""
    found = [generation_memory(run) for run in runs]
    memory = max(found, key=lambda each: each.total)
    largest = sorted(memory.terms.items(), key=lambda term: -term[1])[:3]
    terms = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    return (
        f"up to {memory.total / GIB:.1f} GiB a device, at the {memory.moment}: {terms}, …; what fits a "
        "device by name: vace plan --generate"
    )


def model_of(job: GenerateJob) -> tuple[VaceConfig, str]:
    """Return the sizes of a job's transformer, and its name.

    The sizes come from its files or, if they are missing, from the model size in its path.
    """
    if not job.not_found:
        from mindspeed_mm.generation.loaders import inspect_experts

        return inspect_experts(job.model), Path(job.model.experts[0][0]).name
    path = job.model.experts[0][0]
    name = _size_in(path)
    if name is not None:
        return PRESETS[name], f"{name}, by its name"
    raise ConfigError(
        f"{display_path(path)} does not exist, and its name contains no model size",
        where="model.transformer",
        fix=f"set it to existing weights, or to a folder such as {next(iter(PRESETS))}",
    )


def _size_in(path: str) -> str | None:
    """Return the name of the published model whose size is in a path, or None."""
    for size, name in (
        ("A14B", "Wan2.2-VACE-A14B"),
        ("14B", "Wan2.1-VACE-14B"),
        ("1.3B", "Wan2.1-VACE-1.3B"),
    ):
        if re.search(rf"(?<![\d.]){re.escape(size)}", path, re.IGNORECASE):
            return name
    return None


def run_of(
    job: GenerateJob,
    video: GenerationRequest,
    model: VaceConfig,
    device: Device,
    devices: int,
    text: float | None = None,
) -> GenerationRun:
    """Return the settings of a video that determine its memory and time.

    `text` is the number of weights of the text encoder; None reads it from the files. Raises ConfigError if
    the devices cannot share the video.
    """
    sampling, run = video.sampling, job.run
    guided = sampling.needs_guidance
    ranks = 1 if run.data_parallel else devices
    layout = choose_layout(
        ranks,
        model.trunk.num_heads,
        guided=guided,
        cfg_parallel=run.cfg_parallel,
        context=run.context_parallel_size,
    )
    scale = sampling.context_scale
    given_clip = video.inputs.given or video.task is not None
    return GenerationRun(
        model=model,
        experts=len(job.model.experts),
        frames=sampling.frames_at_once,
        height=sampling.height,
        width=sampling.width,
        refs=len(video.inputs.src_ref_images),
        steps=sampling.steps,
        passes=2.0 if guided else 1.0,
        branch=(any(scale) if isinstance(scale, tuple) else scale != 0) and bool(model.vace_layers),
        encodes=2 if given_clip else 1,
        product=BYTES[run.dtype],
        vae=BYTES[run.vae_dtype],
        text=text or text_parameters(job.model.text_encoder),
        quantized=run.quantize is not None,
        offload=run.offload,
        tiled=run.tiled,
        shard=run.shard_weights and ranks > 1,
        ranks=ranks,
        context_parallel=layout.context,
        halves=layout.halves,
        windows=len(sampling.windows),
        whole=sampling.num_frames if sampling.window_mode == "context_windows" else None,
        videos=len(job.videos),
        capacity=device.memory * GIB,
    )


def text_parameters(path: str) -> float:
    """Return the number of weights of the text encoder, from its files or, if they are missing, of umT5-XXL.

    Raises WeightsError if the files contain no weights.
    """
    if not os.path.exists(path):
        return TEXT_PARAMETERS
    from mindspeed_mm.models.umt5.encoder import count_weights

    return float(count_weights(Path(path)))


def table(plan: GenerationPlan) -> Rows:
    """Return the rows of the plan's table, about 15 lines."""
    device, run, memory, time = plan.device, plan.run, plan.memory, plan.time
    experts = f"{run.experts} x " if run.experts > 1 else ""
    ahead = " (conditions and guidance together)" if run.is_batched and run.passes > 1 else ""
    rows = [
        ("device", f"{run.ranks} x {device.name}, {device.memory:g} GiB each"),
        ("model", f"{experts}{plan.model}: {run.model.trunk.num_layers} layers of "
        f"{run.model.trunk.hidden_size}, "
         f"{plan.dtype}{', 8 bits' * run.quantized}, offload {run.mode}"),
        ("video", f"{plan.name}: {plan.frames} frames of {run.height}x{run.width}, {run.tokens} tokens"
         f"{f', in each of {run.windows} windows of {run.frames} frames' if run.windows > 1 else ''}"),
    ]  # fmt: skip
    rows += [
        ("memory" if not number else "", f"{size / GIB:8.2f} GiB  {name}")
        for number, (name, size) in enumerate((name, size) for name, size in memory.terms.items() if size)
    ]
    verdict = "fits" if plan.fits else "does not fit"
    tiles = ", VAE in tiles" if memory.tiled else ""
    rows.append(("", f"{memory.total / GIB:8.2f} GiB  in all, at the {memory.moment}{tiles}: {verdict}"))
    rows += [
        ("moments" if not number else "", f"{size / GIB:8.2f} GiB  {name}")
        for number, (name, size) in enumerate(memory.moments.items())
    ]
    if memory.host:
        rows.append(("host", f"{memory.host / GIB:8.2f} GiB  for each process"))
    rows += [("to fit" if not number else "", line) for number, line in enumerate(_changes(plan))]
    passes = "2 passes" if run.passes > 1 else "1 pass"
    rows.append(("step", f"{time.step:.2f} s, {passes}{ahead}"))
    rows.append(
        ("video", f"{time.total:.0f} s = prompts {time.text:.1f} + VAE {time.encode + time.decode:.1f} + "
         f"{f'{run.windows} x ' if run.windows > 1 else ''}{time.steps} steps {time.denoising:.1f} + "
         f"weights {time.move:.1f}")
    )  # fmt: skip
    rows.append(
        ("assumed", f"{device.products:.0%} of {device.peak(plan.dtype) / 1e12:g} TFLOP/s in products, "
         f"{device.attention:.0%} in attention; without reading weights from the disk")
    )  # fmt: skip
    count = "1 video" if run.videos == 1 else f"{run.videos} videos"
    energy = f", {plan.kwh:.3g} kWh at the boards' limit" if plan.kwh is not None else ""
    return [*rows, ("run", f"{count}: {plan.seconds / 60:.1f} minutes{energy}")]


def as_json(plan: GenerationPlan) -> dict[str, Any]:
    """Return the plan as JSON data, in bytes and seconds."""
    return {
        "device": asdict(plan.device),
        "devices": plan.run.ranks,
        "video": plan.name,
        "grid": list(plan.run.grid),
        "frames": plan.frames,
        "windows": plan.run.windows,
        "memory": {**plan.memory.terms, "total": plan.memory.total, "moment": plan.memory.moment},
        "moments": dict(plan.memory.moments),
        "host_memory": plan.memory.host,
        "capacity": plan.run.capacity,
        "fits": plan.fits,
        "offload": plan.run.mode,
        "tiled": plan.memory.tiled,
        "changes": [asdict(change) for change in plan.changes],
        "step_seconds": plan.time.step,
        "video_seconds": {**asdict(plan.time), "total": plan.time.total},
        "run_seconds": plan.seconds,
        "kwh": plan.kwh,
    }


def _changes(plan: GenerationPlan) -> list[str]:
    if plan.fits:
        return []
    lines = [
        f"{', '.join(change.settings)}: {change.memory / GIB:.1f} GiB, {change.cost:.2f} x the time"
        + ("" if change.keeps_result else ", another result")
        for change in plan.changes
    ]
    return lines or ["no three settings are enough; use more devices or a device with more memory"]


def _without_own(words: Sequence[str]) -> list[str]:
    """Return `words` without the planner's flags."""
    own = {FLAG, *(f"--{name}" for name in GenerationPlanFlags.model_fields)}
    found: list[str] = []
    skip = False
    for word in words:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in own:
            skip = not equals
        elif name != "--json":
            found.append(word)
    return found
