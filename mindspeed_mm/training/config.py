"""Megatron's training arguments: optimizer, batches, checkpoints, logging, exits and profiler.

Each field is a flag. Defaults are those of Megatron core 0.12. Our recipe is in the scripts under
examples/vace/.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from mindspeed_mm.config.schema import Config


class OptimizerConfig(Config):
    """AdamW or Muon, the learning rate over time, and clipping."""

    lr: float | None = Field(default=None, gt=0, le=1000, description="peak learning rate (required)")
    min_lr: float = Field(default=0.0, ge=0, description="final learning rate after the decay")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = Field(
        default="linear", description="how the learning rate decays"
    )
    lr_decay_iters: int | None = Field(
        default=None, gt=0, description="length of the decay in iterations (default: the whole run)"
    )
    lr_decay_samples: int | None = Field(default=None, gt=0, description="length of the decay in samples")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        default="exponential", description="how the learning rate decays at the end of WSD"
    )
    lr_wsd_decay_iters: int | None = Field(
        default=None, gt=0, description="length of the final decay of WSD in iterations"
    )
    lr_wsd_decay_samples: int | None = Field(
        default=None, gt=0, description="length of the final decay of WSD in samples"
    )
    lr_warmup_init: float = Field(default=0.0, ge=0, description="learning rate at the start of the warm-up")
    lr_warmup_iters: int = Field(default=0, ge=0, description="length of the linear warm-up in iterations")
    lr_warmup_samples: int = Field(default=0, ge=0, description="length of the linear warm-up in samples")
    lr_warmup_fraction: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="length of the warm-up as a fraction of the decay, instead of --lr-warmup-iters",
    )
    optimizer: Literal["adam", "muon"] = Field(
        default="adam",
        description=(
            "adam (AdamW), or muon, which updates the matrices of hidden layers with Muon and all "
            "other parameters with AdamW; lr and weight decay apply to both"
        ),
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon: decay of the momentum")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the second moment")
    adam_eps: float = Field(
        default=1e-8, gt=0, le=1, description="added to the square root of the second moment"
    )
    weight_decay: float = Field(default=0.01, ge=0, le=1000, description="decoupled weight decay")
    weight_decay_all: bool = Field(
        default=False,
        description=(
            "also apply weight decay to biases, norms and modulation, as the published trainer does"
        ),
    )
    clip_grad: float = Field(
        default=1.0, ge=0, le=1000000.0, description="maximum global gradient norm; 0 = no clipping"
    )
    optimizer_selection: Literal["fused_torch_adamw", "fused_adamw", "apex", "npu", "torch"] = Field(
        default="fused_torch_adamw",
        description=(
            "AdamW implementation: fused_torch_adamw (fused if the device supports it), torch "
            "(never fused), apex, or npu (= fused_adamw); install apex or torch_npu first"
        ),
    )

    @model_validator(mode="after")
    def _muon_needs_torch_adamw(self) -> OptimizerConfig:
        if self.optimizer == "muon" and self.optimizer_selection not in ("fused_torch_adamw", "torch"):
            raise ValueError(
                "--optimizer muon needs torch's AdamW; remove --optimizer-selection "
                f"{self.optimizer_selection}"
            )
        return self

    @model_validator(mode="after")
    def _rates_are_ordered(self) -> OptimizerConfig:
        if self.lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; set --min-lr to at most --lr")
        if self.lr is not None and self.lr_warmup_init > self.lr:
            raise ValueError(f"lr_warmup_init {self.lr_warmup_init:g} is above lr {self.lr:g}")
        if self.lr_decay_style == "WSD" and not (self.lr_wsd_decay_iters or self.lr_wsd_decay_samples):
            raise ValueError("--lr-decay-style WSD needs --lr-wsd-decay-iters")
        return self

    @model_validator(mode="after")
    def _one_unit_per_length(self) -> OptimizerConfig:
        same = (
            ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples"),
            ("lr_decay_iters", "lr_decay_samples"),
            ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
        )
        for names in same:
            given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} set the same value; use only one")
        return self


class BatchConfig(Config):
    """Batch sizes, length of the run, and seed."""

    micro_batch_size: int = Field(
        default=1, gt=0, le=65536, description="samples per forward and backward pass on one rank"
    )
    global_batch_size: int | None = Field(
        default=None,
        gt=0,
        le=1 << 24,
        description="samples per iteration (default: micro-batch size · data-parallel size)",
    )
    train_iters: int | None = Field(default=None, gt=0, description="number of iterations to train")
    train_samples: int | None = Field(
        default=None, gt=0, description="number of samples to train, instead of --train-iters"
    )
    num_workers: int = Field(
        default=2, ge=0, le=1024, description="processes per rank that prefetch features"
    )
    seed: int = Field(
        default=1234,
        ge=0,
        lt=1 << 63,
        description="seed of data order, timesteps, noise and caption choice",
    )

    @model_validator(mode="after")
    def _one_length(self) -> BatchConfig:
        if self.train_iters and self.train_samples:
            raise ValueError("--train-iters and --train-samples set the same value; use only one")
        return self


class CheckpointConfig(Config):
    """Which checkpoints to save and to load."""

    save: str | None = Field(default=None, description="folder for checkpoints, metrics and job.json")
    save_interval: int | None = Field(default=None, gt=0, description="iterations between checkpoints")
    load: str | None = Field(default=None, min_length=1, description="folder of checkpoints to resume from")
    ckpt_step: int | None = Field(
        default=None, gt=0, description="iteration to load (default: the one in the tracker file)"
    )
    finetune: bool = Field(
        default=False,
        description="load only the model; start at iteration 0 with a new optimizer and schedule",
    )
    ignore_existing_checkpoints: bool = Field(
        default=False,
        description=(
            "start at iteration 0 even if --load or --save contains checkpoints; each of them is "
            "kept until this run saves the same iteration"
        ),
    )
    exit_on_missing_checkpoint: bool = Field(
        default=False,
        description="stop if --load contains no checkpoint, even if --save is the same folder",
    )
    ckpt_format: Literal["torch_dcp"] = Field(default="torch_dcp", description="torch.distributed.checkpoint")
    async_save: bool = Field(
        default=False, description="write checkpoints in the background while training continues"
    )
    save_retain_interval: int | None = Field(
        default=None,
        gt=0,
        description="keep only the newest checkpoint and those at multiples of this iteration",
    )
    save_best: bool = Field(
        default=False,
        description="save after an evaluation with the lowest held-out loss so far, keep that "
        "checkpoint, and name it in best.json",
    )
    save_full_model: bool = Field(
        default=False, description="also save the frozen weights, not only a reference to them"
    )
    no_load_optim: bool = Field(default=False, description="do not load the optimizer state")
    no_load_rng: bool = Field(default=False, description="do not load the random states")
    no_save_optim: bool = Field(
        default=False, description="do not save the optimizer state; the run cannot be resumed exactly"
    )
    no_save_rng: bool = Field(default=False, description="do not save the random states")
    no_verify_checksums: bool = Field(
        default=False, description="skip checksum verification; a damaged file may go unnoticed"
    )


class LogConfig(Config):
    """Log lines, TensorBoard and Weights & Biases."""

    log_interval: int = Field(default=100, gt=0, description="iterations between log lines")
    log_throughput: bool = Field(default=False, description="add TFLOP/s per device to the log line")
    timing_log_level: int = Field(
        default=0, ge=0, le=2, description="1 = print phase times with each log line"
    )
    tensorboard_dir: str | None = Field(default=None, description="folder for TensorBoard events")
    tensorboard_log_interval: int = Field(
        default=1, gt=0, description="iterations between TensorBoard points"
    )
    wandb_project: str = Field(
        default="", description="log to this Weights & Biases project (install wandb first)"
    )
    wandb_exp_name: str = Field(default="", description="name of the run in Weights & Biases")
    wandb_save_dir: str = Field(default="", description="folder for the files of Weights & Biases")
    peak_tflops: float | None = Field(
        default=None, gt=0, description="peak of the device for MFU (default: built in for common devices)"
    )
    spike_factor: float = Field(
        default=3.0,
        gt=1,
        description="report the samples of a loss that exceeds its running mean by this factor",
    )

    @field_validator("tensorboard_dir")
    @classmethod
    def _local(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError(f"{value} is an address; events are written to a folder of this machine")
        return value


class EvalConfig(Config):
    """Held-out loss; runs when the data JSON names a validation set."""

    eval_interval: int = Field(default=1000, gt=0, description="iterations between evaluations")
    eval_iters: int = Field(
        default=100, ge=0, description="maximum number of global batches per evaluation; 0 = no evaluation"
    )
    eval_videos: bool = Field(
        default=False,
        description=(
            "score the videos of validation.prompts as vace eval does, and log the scores to "
            "metrics.jsonl and TensorBoard"
        ),
    )
    eval_quantiles: int = Field(
        default=4,
        gt=0,
        le=100000,
        description="number of fixed timesteps at which each held-out clip is evaluated",
    )


class ExitConfig(Config):
    """When to stop early, and what to do if a loss is not finite."""

    exit_interval: int | None = Field(
        default=None, gt=0, description="save and stop at multiples of this iteration"
    )
    exit_duration_in_mins: float | None = Field(
        default=None, gt=0, description="save and stop after this many minutes"
    )
    exit_signal_handler: bool = Field(
        default=False,
        description="on SIGINT, SIGTERM or SIGHUP, finish the iteration, save and stop; this is always on",
    )
    check_for_nan_in_loss_and_grad: bool = Field(
        default=False,
        description=(
            "stop at the first loss or gradient that is not finite, instead of skipping the iteration"
        ),
    )
    max_skipped_iterations: int = Field(
        default=10,
        gt=0,
        description=(
            "maximum number of consecutive iterations to skip because a loss or gradient is not finite"
        ),
    )


class ProfileConfig(Config):
    """Traces of a few iterations. `profile` in tools.json has more settings."""

    profile: bool = Field(default=False, description="record a trace")
    profile_step_start: int = Field(default=10, ge=0, description="first iteration of the trace")
    profile_step_end: int = Field(default=12, ge=0, description="iteration before which the trace stops")
    profile_ranks: tuple[int, ...] = Field(default=(0,), description="global ranks that record a trace")


class TrainingConfig(Config):
    """All training settings of a job."""

    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    exit: ExitConfig = ExitConfig()
    profile: ProfileConfig = ProfileConfig()
