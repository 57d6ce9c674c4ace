"""The summary of about a dozen lines that a run logs before it starts. The whole job is in job.json.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.distributed.config import bubble
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import write_text
from mindspeed_mm.log import world_size
from mindspeed_mm.models.transforms.config import LoraConfig, QuantizeConfig
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.models.wan.sizes import preset_name
from mindspeed_mm.tasks.jobs.extract import ExtractJob
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob

JOB_FILE = "job.json"
Rows = list[tuple[str, str]]


def write_job(folder: Path, text: str) -> None:
    """Write the whole job to `folder`/job.json. Raises DataError if it cannot be written."""
    try:
        write_text(folder / JOB_FILE, text + "\n")
    except OSError as error:
        raise DataError(
            f"cannot be written: {error.strerror}", where=folder / JOB_FILE, fix="free disk space"
        ) from None


def training_table(job: PretrainJob) -> Rows:
    """Return the rows of a training run: model, weights, data, batch, parallelism, memory, outputs."""
    training, batch, optimizer = job.training, job.training.batch, job.training.optimizer
    checkpoint, fsdp = training.checkpoint, job.fsdp2
    size, iters = batch.global_batch_size or 0, batch.train_iters or 0
    source: Any = getattr(job.data.dataset_param, "basic_parameters", None)
    validation: Any = getattr(job.data.dataset_param, "validation", None)
    return [
        ("model", describe_model(job.model.predictor, job.model.transforms)),
        ("weights", ", ".join(getattr(job.model.predictor, "weight_paths", {}).values()) or "random"),
        (
            "data",
            f"{getattr(source, 'data_path', job.files.mm_data)}"
            + (f"; held out: {validation.data_path}" if validation else ""),
        ),
        (
            "batch",
            (
                f"{size} = {batch.micro_batch_size} x {job.dp_size} ranks x "
                f"{_count(job.micro_batches, 'micro-batch', 'micro-batches')}"
            ),
        ),
        ("iterations", f"{iters}, seed {batch.seed}"),
        (
            "optimizer",
            (
                f"{optimizer.optimizer}, lr {optimizer.lr:g} {optimizer.lr_decay_style}, weight decay "
                f"{optimizer.weight_decay:g}"
            ),
        ),
        (
            "parallelism",
            f"{_count(job.world_size, 'rank', 'ranks')}, {_stages(job)}context parallel "
            f"{job.parallel.context_parallel_size}{_rings(job)}, "
            f"sharding {fsdp.sharding_size if fsdp.sharding_size is not None else 'over all'}",
        ),
        (
            "memory",
            (
                f"{fsdp.param_dtype} products, recompute "
                f"{job.parallel.recompute_granularity or 'by fsdp2_config.yaml'}"
            )
            + (", offload to the CPU" if fsdp.offload_to_cpu else ""),
        ),
        ("starts from", checkpoint.load or "iteration 0"),
        (
            "output",
            f"{checkpoint.save or 'nothing is saved'}"
            + (
                f", every {checkpoint.save_interval} iterations"
                if checkpoint.save and checkpoint.save_interval
                else ""
            ),
        ),
    ]


def extraction_table(job: ExtractJob) -> Rows:
    """Return the rows of a feature extraction: models, data, preprocessing, processes and outputs."""
    ae, text, extract = job.model.ae, job.model.text_encoder, job.extract
    source: Any = getattr(job.data.dataset_param, "basic_parameters", None)
    preprocess: Any = getattr(job.data.dataset_param, "preprocess_parameters", None)
    rows = [
        ("VAE", f"{ae.from_pretrained}, {ae.dtype}" + (", in tiles" if ae.enable_tiling else "")),
        ("text", f"{text.from_pretrained}, {text.dtype}, {job.text_len} tokens"),
        ("tokenizer", job.tokenizer_path or "next to the text encoder"),
        ("data", f"{getattr(source, 'data_path', job.files.mm_data)}"),
    ]
    if preprocess is not None and hasattr(preprocess, "max_hxw"):
        rows.append(
            (
                "clips up to",
                f"{preprocess.num_frames} frames at {preprocess.train_fps:g} fps, "
                f"{preprocess.max_hxw} pixels",
            )
        )
    ranks = _count(world_size(), "rank", "ranks")
    rows.append(("processes", f"{ranks}, {_count(extract.num_workers, 'reader', 'readers')} each"))
    return [*rows, ("output", job.save_path)]


def generation_table(job: GenerateJob) -> Rows:
    """Return the rows of a generation run: weights, videos, sampling, processes, memory and output."""
    run, model = job.run, job.model
    experts = ["; ".join(_parts(shards)) for shards in model.experts]
    rows = [("transformer" if len(experts) == 1 else "expert", text) for text in experts]
    rows += [("VAE", f"{model.vae}, {run.vae_dtype}"), ("text encoder", model.text_encoder)]
    names = [video.name for video in job.videos]
    rows.append(("videos", f"{len(names)}: {', '.join(names[:6])}{', …' if names[6:] else ''}"))
    settings = [video.sampling for video in job.videos]
    rows.append(
        (
            "size",
            _distinct(f"{s.width}x{s.height}, {s.num_frames} frames at {s.fps:g} fps" for s in settings),
        )
    )
    rows.append(
        (
            "sampling",
            _distinct(
                f"{s.solver}, {s.steps} steps, shift {s.shift:g}, guidance {s.guidance_scale:g}"
                for s in settings
            ),
        )
    )
    rows.append(("seed", _distinct(str(s.seed) for s in settings)))
    shared = "each generates its own videos" if run.data_parallel else "all share each video"
    rows.append(("processes", "1" if world_size() == 1 else f"{world_size()}, {shared}"))
    held = f"{run.dtype}, blocks in {run.quantize}" if run.quantize else run.dtype
    rows.append(("memory", f"{held}, offload {run.offload}, tiles {run.tiled}"))
    return [*rows, ("output", run.output_path)]


def describe_model(predictor: Any, transforms: Sequence[Any] = ()) -> str:
    """Describe a model: its preset, its sizes, and the part that is trained."""
    if not isinstance(predictor, PredictorConfig):
        return str(getattr(predictor, "model_id", type(predictor).__name__))
    config = predictor.model
    sizes = (
        f"{config.trunk.num_layers} layers of {config.trunk.hidden_size}, {len(config.vace_layers)} VACE "
        "blocks"
    )
    name = preset_name(config)
    parts = {"both": "branch and trunk", "all": "branch and trunk"}
    loras = [
        f"a LoRA of rank {config.rank} on the {parts.get(on := config.on or predictor.trainable, on)}"
        for config in transforms
        if isinstance(config, LoraConfig)
    ]
    rounded = sorted({config.format for config in transforms if isinstance(config, QuantizeConfig)})
    more = f", frozen linear layers in {' and '.join(rounded)}" if rounded else ""
    return f"{name or 'VACE'}: {sizes}; {', '.join(loras) or predictor.trainable} trains{more}"


def _parts(shards: Sequence[str]) -> list[str]:
    folders = {str(Path(shard).parent) for shard in shards}
    return (
        list(shards) if len(shards) < 3 or len(folders) > 1 else [f"{len(shards)} files in {folders.pop()}"]
    )


def _distinct(texts: Iterable[str]) -> str:
    found = list(dict.fromkeys(texts))
    return " | ".join(found[:3]) + (f" | … ({len(found)} kinds)" if found[3:] else "")


def _rings(job: PretrainJob) -> str:
    """Describe the rings of ranks that share the same heads, if there are any."""
    size = job.parallel.context_parallel_size // job.parallel.ulysses_size
    return f" (rings of {size})" if size > 1 else ""


def _stages(job: PretrainJob) -> str:
    """Describe the pipeline stages and the bubble as a fraction of the step, if there are any."""
    parallel = job.parallel
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_size
    if stages == 1:
        return ""
    each = f" of {virtual} chunks" if virtual > 1 else ""
    return (
        f"{stages} pipeline stages{each} (bubble {100 * bubble(stages, virtual, job.micro_batches):.0f} %), "
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
