"""Describes a training job for the planner: the run, its largest sample and the devices.

Does not import torch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from megatron.mm.arguments import build_parser, parse_arguments
from mindspeed_mm.config.flags import FlagParser, flag_name
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.config import FeatureRow
from mindspeed_mm.distributed.patterns import recompute_plan
from mindspeed_mm.errors import ConfigError, DataError, MindSpeedMMError
from mindspeed_mm.files import LIST_BYTES, json_lines, read_text
from mindspeed_mm.geometry import WAN
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.config import LoraConfig, QuantizeConfig
from mindspeed_mm.models.transforms.match import matching
from mindspeed_mm.models.wan.config import BRANCH, PredictorConfig
from mindspeed_mm.models.wan.shapes import layout
from mindspeed_mm.models.wan.stages import even_layers, stage_layers
from mindspeed_mm.planning.memory import training_memory
from mindspeed_mm.planning.units import TrainingRun
from mindspeed_mm.tasks.jobs.pretrain import SCHEMAS, PretrainJob

PROG = "vace plan"
BYTES = {"bf16": 2, "fp32": 4}


class DeviceFlags(Config):
    """The kind of device to plan a run for."""

    device: str = Field(
        default="H100",
        description=(
            "H100, H200, A100, B200, RTX 4090, RTX 5090, Ascend 910B, Ascend 910C, or here: as calibrated"
        ),
    )
    mfu: float | None = Field(
        default=None, gt=0, le=1, description="share of the peak that products and attention reach"
    )


class PlanFlags(DeviceFlags):
    """What to plan a training job for."""

    devices: int = Field(default=8, gt=0, le=65536, description="how many of them")
    frames: int | None = Field(
        default=None, gt=0, le=4097, description="frames of a clip (default: the data's longest, or 81)"
    )
    height: int | None = Field(
        default=None, gt=0, le=8192, description="its height (default: the data's largest, or 480)"
    )
    width: int | None = Field(
        default=None, gt=0, le=8192, description="its width (default: the data's largest, or 832)"
    )
    refs: int = Field(default=0, ge=0, le=16, description="reference images of a clip")
    picture: str | None = Field(
        default=None, description="PNG to draw: memory on 1 to 1024 devices as stacked bars"
    )
    calibrate: bool = Field(
        default=False, description="measure this device in a minute, for --device here, and stop"
    )


class Clip(NamedTuple):
    """The largest sample of a run."""

    grid: tuple[int, int, int]  # latent (R+F, h, w)
    origin: str
    rows: int = 0  # number of data rows with a shape
    refs: int = 0  # number of reference frames in the grid

    @property
    def size(self) -> str:
        """The number of video frames and the size in pixels."""
        frames, height, width = self.grid
        more = f" with {self.refs} reference{'s' if self.refs > 1 else ''}" if self.refs else ""
        _, rows, columns = WAN.stride
        length = WAN.video_frames(frames - self.refs)
        return f"{length} frames of {rows * height}x{columns * width}{more}"


_ALIASES = {"--model": "--mm-model", "--data": "--mm-data"}
_ALL: Sequence[tuple[type[Config], str]] = (*SCHEMAS, (PlanFlags, "plan"))


def plan_parser(prog: str = PROG) -> FlagParser:
    """Build the parser with the flags of training and of the planner."""
    parser = build_parser(prog, "Memory and time of a training run before its launch.", _ALL)
    group = parser.add_argument_group("plan, as data")
    group.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for short, flag in _ALIASES.items():
        group.add_argument(
            short, dest=flag[2:].replace("-", "_"), default=argparse.SUPPRESS, help=f"the same as {flag}"
        )
    return parser


def read_job(argv: Sequence[str], prog: str = PROG) -> tuple[PretrainJob, PlanFlags]:
    """Parse the flags of training and of the planner. Raises the same ConfigErrors as training."""
    given, _ = parse_arguments(plan_parser(prog), argv, _ALL)
    flags = parse(PlanFlags, given[PlanFlags], prog)
    training = list(_training_words(argv))
    named = {word.partition("=")[0] for word in training}
    if "--lr" not in named:  # training requires these flags, but they do not affect memory
        training += ["--lr", "1e-5"]
    if not {"--train-iters", "--train-samples"} & named:
        training += ["--train-iters", "1"]
    return PretrainJob.from_argv(training, flags.devices, prog), flags


def _training_words(words: Sequence[str]) -> Iterator[str]:
    """Yield `words` without the planner's flags, with aliases replaced by training's flags."""
    own = {flag_name(name) for name in PlanFlags.model_fields}
    is_value = False
    for word in words:
        name, equals, value = word.partition("=")
        if is_value:
            is_value = False
        elif name in own:
            is_value = (
                not equals and PlanFlags.model_fields[name[2:].replace("-", "_")].annotation is not bool
            )
        elif name != "--json":
            yield _ALIASES.get(name, name) + equals + value


def run_of(job: PretrainJob, grid: tuple[int, int, int], *, on_cpu: bool = False) -> TrainingRun:
    """Return the settings of a job that determine its memory.

    Raises ConfigError for a model whose sizes the planner does not know.
    """
    predictor, fsdp, batch = job.predictor, job.fsdp2, job.training.batch
    if not isinstance(predictor, PredictorConfig):
        raise ConfigError(
            f"no plan for model_id {job.model.predictor.model_id!r}", where="predictor.model_id"
        )
    spec = MODELS.get(predictor.model_id)
    if not spec.modules:
        raise ConfigError(f"no plan for model_id {predictor.model_id!r}", where="predictor.model_id")
    sizes = predictor.model
    names = spec.module_names(sizes)
    pipeline = job.parallel.pipeline_model_parallel_size
    shards = fsdp.sharding_size if isinstance(fsdp.sharding_size, int) else job.world_size // pipeline
    return TrainingRun(
        model=sizes,
        grid=grid,
        trainable=predictor.trainable,
        lora=lora_layers(job),
        quantized=quantized_layers(job),
        batch=batch.micro_batch_size,
        micro_batches=job.micro_batches,
        ranks=job.world_size,
        stages=layers_of_stages(job),
        pipeline=pipeline,
        gpipe=job.parallel.pipeline_schedule == "gpipe",
        shards=shards,
        context_parallel=job.parallel.context_parallel_size,
        ulysses=job.parallel.ulysses_size
        if job.parallel.context_parallel_algo != "ulysses_cp_algo"
        else None,
        product=BYTES[predictor.dtype],
        residual=BYTES[predictor.residual_dtype],
        reduce=BYTES[fsdp.reduce_dtype],
        recompute=recompute_plan(names, spec.units, fsdp, job.parallel),
        optimizer=job.training.optimizer.optimizer,
        fused=job.training.optimizer.optimizer_selection != "torch",
        reshard=bool(fsdp.reshard_after_forward),
        prefetch=fsdp.num_to_backward_prefetch or 1,  # by default, FSDP2 prefetches one unit in backward
        offload=fsdp.offload_to_cpu,
        offload_inputs=fsdp.offload_block_inputs,
        on_cpu=on_cpu,
    )


def layers_of_stages(job: PretrainJob) -> tuple[int, ...]:
    """Return the number of trunk blocks of each stage, from the model JSON or else split evenly.

    Unlike training, this does not open weights that are already split into stages.
    """
    count = job.parallel.num_stages
    if count == 1:
        return ()
    total, given = job.predictor.num_layers, job.predictor.pipeline_num_layers
    if given is None:
        return tuple(even_layers(total, count))
    return tuple(stage_layers(given, total, count, "predictor.pipeline_num_layers"))


def lora_layers(job: PretrainJob) -> dict[str, int]:
    """Map each linear layer with a LoRA to the rank of the LoRA."""
    spec = MODELS.get(job.predictor.model_id)
    found: dict[str, int] = {}
    shapes = layout(job.predictor.model)
    linear = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight")
    ]
    for config in job.model.transforms:
        if isinstance(config, LoraConfig):
            part = config.on or {"all": "both"}.get(job.predictor.trainable, job.predictor.trainable)
            chosen = matching(config.match or spec.adapted, linear, "transforms: lora.match")
            wanted = [
                name for name in chosen if part == "both" or name.startswith(BRANCH) == (part == "branch")
            ]
            found |= dict.fromkeys(wanted, config.rank)
    return found


def quantized_layers(job: PretrainJob) -> frozenset[str] | None:
    """Return the linear layers that a job keeps in 8 bits, as in `TrainingRun.quantized`."""
    configs = [config for config in job.model.transforms if isinstance(config, QuantizeConfig)]
    if not configs:
        return None
    if any(not config.match for config in configs):
        return frozenset()
    spec = MODELS.get(job.predictor.model_id)
    usual = matching(spec.adapted, spec.linear_shapes(job.predictor.model), "transforms: quantize.match")
    return frozenset(
        name for config in configs for name in matching(config.match, usual, "transforms: quantize.match")
    )


def largest_clip(job: PretrainJob, flags: PlanFlags) -> Clip:
    """Find the largest sample.

    Its size comes from the flags, or else from the data.jsonl rows with a shape. The default is 81 frames of
    480x832.
    """
    if not (flags.frames or flags.height or flags.width):
        source: Any = getattr(job.data.dataset_param, "basic_parameters", None)
        path = Path(getattr(source, "data_path", "") or "")
        shapes = list(_shapes(path)) if path.is_file() and path.suffix == ".jsonl" else []
        if shapes:
            grid, refs = max(shapes, key=lambda found: math.prod(found[0]))
            return Clip(grid, f"the largest of {len(shapes)} in {path.name}", len(shapes), refs)
    frames, height, width = flags.frames or 81, flags.height or 480, flags.width or 832
    if not WAN.fits_frames(frames) or height % WAN.token_side or width % WAN.token_side:
        raise ConfigError(
            f"got {frames} frames of {height}x{width}",
            where="--frames, --height, --width",
            expected="4n+1 frames, and sides that 16 divides",
        )
    origin = (
        "by the flags" if flags.frames or flags.height or flags.width else "assumed; the data names no shapes"
    )
    return Clip(WAN.grid(frames, height, width, flags.refs), origin, refs=flags.refs)


def estimate(job: PretrainJob) -> str:
    """Summarize the memory of one device in one line, for the end of a dry run.

    Returns "" for a job that the planner does not support.
    """
    try:
        clip = largest_clip(job, PlanFlags())
        memory = training_memory(run_of(job, clip.grid))
    except MindSpeedMMError:
        return ""
    largest = sorted(memory.terms.items(), key=lambda term: -term[1])[:4]
    terms = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest)
    total = f"about {memory.total / 2**30:.1f} GiB a device"
    return f"{total} for {clip.size} ({clip.origin}): {terms}, …; more by vace plan"


def _shapes(path: Path) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Yield each shape in a list of features with its number of reference frames.

    Raises DataError for a line that is not JSON, or an invalid shape.
    """
    text = read_text(path, DataError, max_bytes=LIST_BYTES)
    for number, row in json_lines(text, str(path), DataError):
        if isinstance(row, dict) and row.get("shape") is not None:
            values = {"file": "-", "shape": row["shape"], "num_refs": row.get("num_refs")}
            feature = parse(FeatureRow, values, f"{path}:{number}")
            if feature.shape is not None:
                yield feature.shape, feature.num_refs or 0
