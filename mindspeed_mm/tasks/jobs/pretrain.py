"""PretrainJob: the settings of a training run, frozen and checked before torch or a device is used."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from pydantic import Field, SerializeAsAny

from megatron.mm.arguments import build_parser, parse_arguments
from megatron.mm.schedules import check_batch, schedule_steps
from mindspeed_mm.config.flags import FlagParser
from mindspeed_mm.config.overrides import OverrideConfig, Overrides
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.config.yaml_file import read_yaml
from mindspeed_mm.data.config import VaceDatasetConfig
from mindspeed_mm.data.manifest import read_manifest
from mindspeed_mm.data.registry import DataConfig, parse_data_config
from mindspeed_mm.distributed.config import (
    Fsdp2Config,
    ParallelConfig,
    check_context_parallel,
    check_micro_batches,
    data_parallel_size,
)
from mindspeed_mm.errors import ConfigError, DataError, WeightsError
from mindspeed_mm.files import format_json, read_json
from mindspeed_mm.locks import check_unlocked
from mindspeed_mm.log import rank, world_size
from mindspeed_mm.models.find import find_files
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.config import QuantizeConfig
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.models.wan.stages import stage_layers
from mindspeed_mm.outputs import check_folder
from mindspeed_mm.tasks.jobs.check_parallel import check_dtype, check_modules, check_sharding
from mindspeed_mm.tasks.jobs.evaluation import check_evaluation, check_evaluation_folder, check_prompts
from mindspeed_mm.tasks.jobs.extract import check_encoders
from mindspeed_mm.tasks.jobs.model_json import ModelConfig, RawModelConfig, model_schema, parse_model
from mindspeed_mm.tasks.jobs.transforms import LoraFlags, check_lora_files, check_transforms, for_expert
from mindspeed_mm.training.checkpoint_folder import check_save_folder
from mindspeed_mm.training.config import (
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    ExitConfig,
    LogConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainingConfig,
)
from mindspeed_mm.training.tools_config import ToolsConfig

PROG = "pretrain_vace.py"
OVERRIDDEN = ("model", "data", "tools", "fsdp2")  # names of the files in `--set`


class FileConfig(Config):
    """The files that a job reads, and what to do with the job."""

    mm_model: str | None = Field(default=None, description="model JSON (required)")
    mm_data: str | None = Field(default=None, description="data JSON (required)")
    mm_tool: str | None = Field(default=None, description="tools JSON (default: nothing is recorded)")
    bf16: bool = Field(
        default=False, description="compute matrix products in bf16; must agree with predictor.dtype"
    )
    dry_run: bool = Field(default=False, description="check everything, then stop; needs no weights")
    print_config: bool = Field(default=False, description="print the whole job as JSON, then stop")
    check_inputs: bool = Field(
        default=False, description="with --dry-run: also check that features and weights exist"
    )


SCHEMAS: Sequence[tuple[type[Config], str]] = (
    (FileConfig, "files"),
    (OverrideConfig, "keys of the files"),
    (LoraFlags, "LoRA, 8 bits"),
    (BatchConfig, "batches"),
    (OptimizerConfig, "optimizer"),
    (ParallelConfig, "parallel"),
    (CheckpointConfig, "checkpoints"),
    (LogConfig, "logging"),
    (EvalConfig, "evaluation"),
    (ExitConfig, "exits"),
    (ProfileConfig, "profiler"),
)


class PretrainJob(Config):
    """Everything that determines what a run does. Saved as job.json with each checkpoint."""

    model: SerializeAsAny[ModelConfig]
    data: SerializeAsAny[DataConfig]
    tools: ToolsConfig = ToolsConfig()
    parallel: ParallelConfig = ParallelConfig()
    fsdp2: Fsdp2Config = Fsdp2Config()
    training: TrainingConfig = TrainingConfig()
    files: FileConfig = FileConfig()
    world_size: int = Field(default=1, gt=0)
    notes: tuple[str, ...] = ()

    @classmethod
    def from_argv(cls, argv: Sequence[str], ranks: int | None = None, prog: str = PROG) -> PretrainJob:
        """Parse the flags and the files that they name into a job.

        `ranks` is the number of processes; by default, that of torchrun. Raises ConfigError.
        """
        given, notes = parse_arguments(job_parser(prog), argv, SCHEMAS)
        part = {schema: parse(schema, values, prog) for schema, values in given.items()}
        files = cast(FileConfig, part[FileConfig])
        if files.mm_model is None or files.mm_data is None:
            missing = "--mm-model" if files.mm_model is None else "--mm-data"
            raise ConfigError(f"{missing} is missing", where=prog, fix="set it to the path of a JSON file")
        overrides = Overrides.parse(cast(OverrideConfig, part[OverrideConfig]).set, OVERRIDDEN)
        parallel = cast(ParallelConfig, part[ParallelConfig])
        model = overrides.apply(read_json(files.mm_model), "model")
        model = cast(LoraFlags, part[LoraFlags]).apply(model, prog)
        data = overrides.apply(read_json(files.mm_data), "data")
        tools = overrides.apply(read_json(files.mm_tool) if files.mm_tool else {}, "tools")
        fsdp2_path = parallel.fsdp2_config_path
        fsdp2 = overrides.apply(read_yaml(fsdp2_path) or {} if fsdp2_path else {}, "fsdp2")
        parsed = parse_data_config(data, files.mm_data, notes)
        job = cls(
            files=files,
            model=parse_model(
                model,
                Path(files.mm_model).name,
                notes,
                model_schema(parsed, model, mm_data=files.mm_data, mm_model=files.mm_model),
            ),
            data=parsed,
            tools=parse(ToolsConfig, tools, Path(files.mm_tool or "tools.json").name, notes),
            parallel=parallel,
            fsdp2=parse(Fsdp2Config, fsdp2, Path(fsdp2_path or "fsdp2_config.yaml").name, notes),
            training=TrainingConfig(
                optimizer=part[OptimizerConfig],
                batch=part[BatchConfig],
                checkpoint=part[CheckpointConfig],
                log=part[LogConfig],
                eval=part[EvalConfig],
                exit=part[ExitConfig],
                profile=part[ProfileConfig],
            ),
            world_size=ranks or world_size(),
        )
        return job.checked(notes, prog)

    @classmethod
    def from_file(cls, path: str | Path) -> PretrainJob:
        """Read a job from its job.json. Raises ConfigError."""
        values = read_json(path)
        model_values = values.get("model")
        is_raw = isinstance(model_values, Mapping) and model_values.get("ae") is not None
        base = RawModelConfig if is_raw else ModelConfig
        model = parse_model(model_values, f"{path}:model", None, base)
        return parse(cls, {**values, "model": model}, str(path))

    def checked(self, notes: Sequence[str], prog: str = PROG) -> PretrainJob:
        """Return the job with its sizes filled in. Raises ConfigError if parts of the job conflict."""
        batch, optimizer = self.training.batch, self.training.optimizer
        if optimizer.lr is None:
            raise ConfigError("--lr is missing", where=prog, fix="set it; examples/vace uses 5e-5")
        check_dtype(self.predictor, self.fsdp2, bf16=self.files.bf16)
        is_hybrid = self.parallel.context_parallel_algo == "hybrid_cp_algo"
        flag = "--ulysses-degree-in-cp" if is_hybrid else "--context-parallel-size"
        check_context_parallel(self.predictor.num_heads, self.parallel.ulysses_size, flag)
        dp_size = self.dp_size  # raises before the checks below if the ranks cannot be divided
        check_sharding(self.fsdp2, self.world_size // self.parallel.pipeline_model_parallel_size)
        check_modules(self.predictor, self.fsdp2)
        spec = MODELS.get(self.predictor.model_id)
        check_transforms(self.model.transforms, self.predictor, spec, str(self.files.mm_model))
        if self.training.checkpoint.save_full_model and any(
            isinstance(config, QuantizeConfig) for config in self.model.transforms
        ):
            raise ConfigError(
                "8-bit weights are not saved, because the base model has them exactly",
                where=f"{prog}: --save-full-model",
                fix="remove it; mm-convert mm_to_hf writes the whole model afterwards",
            )
        size = check_batch(batch.micro_batch_size, batch.global_batch_size, dp_size)
        unit = batch.micro_batch_size * dp_size
        check_micro_batches(self.parallel, size // unit, unit)
        _check_stages(self)
        check_evaluation(self)
        check_prompts(self)
        if batch.train_iters is None and batch.train_samples is None:
            raise ConfigError("--train-iters is missing", where=prog, fix="set it or --train-samples")
        iters = batch.train_iters or cast(int, batch.train_samples) // size
        if iters == 0:
            raise ConfigError(
                f"{batch.train_samples} is less than one global batch of {size}", where="--train-samples"
            )
        schedule_steps(optimizer, iters, size)
        batch = batch.model_copy(update={"global_batch_size": size, "train_iters": iters})
        training = self.training.model_copy(update={"batch": batch})
        transforms = for_expert(self.model.transforms, self.model.diffusion.role)
        model = self.model.model_copy(update={"transforms": transforms})
        found = [*notes, *filter(None, [self.model.diffusion.boundary_note()])]
        return self.model_copy(
            update={"training": training, "model": model, "notes": tuple(dict.fromkeys(found))}
        )

    def check_inputs(self) -> None:
        """Raise DataError if the data is missing, and WeightsError if weights are missing."""
        source = getattr(self.data.dataset_param, "basic_parameters", None)
        data_path = getattr(source, "data_path", None)
        if data_path and not os.path.exists(data_path):
            raise DataError(
                f"{data_path} not found",
                where=f"{self.files.mm_data}:dataset_param.basic_parameters.data_path",
                fix="run feature extraction, or set it to the data.jsonl that it wrote",
            )
        if self.raw_clips is not None:
            self._check_raw_inputs(self.raw_clips)
        check_lora_files(self.model.transforms, str(self.files.mm_model))
        for key, weights in self.predictor.weight_paths.items():
            if not os.path.exists(weights):
                raise WeightsError(
                    f"{weights} not found",
                    where=f"{self.files.mm_model}:predictor.{key}",
                    fix="set it to an existing folder or file of weights (mm-convert writes one)",
                )
            find_files(Path(weights))  # raises before any rank starts if a folder has no model or several

    def _check_raw_inputs(self, clips: VaceDatasetConfig) -> None:
        """Check the recipe, VAE, text encoder, tokenizer and rows. Raises MindSpeedMMError."""
        model = cast(RawModelConfig, self.model)
        check_encoders(
            model.ae,
            model.text_encoder,
            clips.tokenizer_config.from_pretrained,
            mm_model=str(self.files.mm_model),
            mm_data=str(self.files.mm_data),
        )
        if clips.synthesis is not None:
            from mindspeed_mm.conditioning.recipe import read_recipe  # lazy: imports OpenCV

            read_recipe(clips.synthesis)
        read_manifest(clips.basic_parameters.data_path, clips.basic_parameters.data_folder)

    def check_outputs(self) -> None:
        """Check on rank 0 that the output folders can be written.

        Raises ConfigError if a folder is not writable, LaunchError if another run writes to --save, and
        WeightsError if --save has checkpoints of another run that this run does not load. A plain --dry-run
        does not check whether the folders can be created, because the run may be on another machine.
        """
        check_evaluation_folder(self)
        if rank() != 0:
            return
        is_here = not self.files.dry_run or self.files.check_inputs
        for flag, folder in self._output_folders().items():
            check_folder(folder, flag, probe=is_here)
        if is_here and self.training.checkpoint.save:
            check_unlocked(Path(self.training.checkpoint.save), choose="--save")
            check_save_folder(self.training.checkpoint)

    def _output_folders(self) -> dict[str, str]:
        """Map each flag or key to the folder that it names."""
        log, tools = self.training.log, self.tools
        found = {
            "--save": self.training.checkpoint.save,
            "--tensorboard-dir": log.tensorboard_dir,
            "--wandb-save-dir": log.wandb_save_dir if log.wandb_project else None,
            f"{self.files.mm_tool}:profile.static_param.save_path": tools.profile.static_param.save_path
            if tools.profile.enable or self.training.profile.profile
            else None,
            f"{self.files.mm_tool}:memory_profile.save_path": tools.memory_profile.save_path
            if tools.memory_profile.enable
            else None,
        }
        return {name: folder for name, folder in found.items() if folder is not None}

    @property
    def predictor(self) -> PredictorConfig:
        """The model's sizes, its weights, and the part that is trained."""
        return cast(PredictorConfig, self.model.predictor)

    @property
    def raw_clips(self) -> VaceDatasetConfig | None:
        """The config of a dataset of raw clips, which are encoded during training, or None."""
        param = self.data.dataset_param
        return param if isinstance(param, VaceDatasetConfig) else None

    @property
    def dp_size(self) -> int:
        """The number of data-parallel groups. Each reads different samples."""
        return data_parallel_size(self.parallel, self.world_size)

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches that each rank accumulates per iteration.

        It is 1 if there is no global batch size.
        """
        unit = self.training.batch.micro_batch_size * self.dp_size
        return (self.training.batch.global_batch_size or unit) // unit

    def to_json(self) -> str:
        """Return the content of job.json."""
        return format_json(self.model_dump(mode="json"), indent=2)


def job_parser(prog: str = PROG) -> FlagParser:
    """Build the parser of pretrain_vace.py and of `vace train`."""
    return build_parser(prog, "Pre-train or fine-tune VACE on extracted features or on raw clips.", SCHEMAS)


def _check_stages(job: PretrainJob) -> None:
    """Raise ConfigError if the pipeline stages do not fit the model JSON."""
    parallel, predictor = job.parallel, job.predictor
    if parallel.pipeline_model_parallel_size == 1:
        return
    where = f"{job.files.mm_model}:predictor.pipeline_num_layers"
    if not MODELS.get(predictor.model_id).stages:
        raise ConfigError(
            f"model {predictor.model_id} cannot be split into pipeline stages",
            where=f"{job.files.mm_model}:predictor.model_id",
            fix="set --pipeline-model-parallel-size to 1",
        )
    if parallel.num_stages > predictor.num_layers:
        raise ConfigError(
            f"{parallel.num_stages} stages for a model of {predictor.num_layers} layers",
            where="--pipeline-model-parallel-size",
            fix="lower it, or --virtual-pipeline-model-parallel-size",
        )
    if predictor.pipeline_num_layers is not None:
        stage_layers(predictor.pipeline_num_layers, predictor.num_layers, parallel.num_stages, where)
