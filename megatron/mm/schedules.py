"""Megatron's batch arithmetic and learning-rate schedule, driven by our configs.

Warm-up and decay are counted in samples.
"""

from __future__ import annotations

from typing import Any, Protocol

from megatron.mm.core import core
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.training.config import OptimizerConfig


class ParamScheduler(Protocol):
    """The part of megatron.core's OptimizerParamScheduler that we use."""

    num_steps: int

    def step(self, increment: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def check_batch(micro_batch_size: int, global_batch_size: int | None, data_parallel_size: int) -> int:
    """Return the global batch size, by default one micro-batch per data-parallel rank.

    Raises ConfigError if it is not a multiple of the micro-batch size times the data-parallel size.
    """
    unit = micro_batch_size * data_parallel_size
    size = global_batch_size or unit
    if size % unit:
        raise ConfigError(
            f"got {size}",
            where="--global-batch-size",
            expected=(
                f"a multiple of --micro-batch-size {micro_batch_size} times the data-parallel size "
                f"{data_parallel_size} (= {unit})"
            ),
            fix=f"give {max(unit, size - size % unit)}",
        )
    return size


def num_micro_batches(micro_batch_size: int, global_batch_size: int, data_parallel_size: int) -> int:
    """Return the number of micro-batches that each rank accumulates, by Megatron's calculator."""
    calculator = core("num_microbatches_calculator").ConstantNumMicroBatchesCalculator(
        global_batch_size, micro_batch_size, data_parallel_size, False, 0
    )
    return int(calculator.get())


def schedule_steps(
    config: OptimizerConfig, train_iters: int, global_batch_size: int
) -> tuple[int, int, int | None]:
    """Return the lengths of warm-up, decay and WSD decay in samples.

    Raises ConfigError if the decay is too short for the warm-up or the WSD decay.
    """
    decay = config.lr_decay_samples or (config.lr_decay_iters or train_iters) * global_batch_size
    if config.lr_warmup_fraction is not None:
        warmup = int(config.lr_warmup_fraction * decay)
    else:
        warmup = config.lr_warmup_samples or config.lr_warmup_iters * global_batch_size
    if warmup >= decay:
        given = (
            f"--lr-warmup-samples {config.lr_warmup_samples}"
            if config.lr_warmup_samples
            else f"--lr-warmup-iters {config.lr_warmup_iters}"
        )
        raise ConfigError(
            f"{given} must be less than the decay's {decay // global_batch_size} iterations or {decay} "
            "samples",
            fix="change it, or --lr-decay-iters, --lr-decay-samples or --train-iters",
        )
    wsd = config.lr_wsd_decay_samples or (config.lr_wsd_decay_iters or 0) * global_batch_size or None
    if wsd is not None and wsd > decay:
        raise ConfigError(f"{wsd} samples exceed the whole decay of {decay}", where="--lr-wsd-decay-*")
    return warmup, decay, wsd


def param_scheduler(
    optimizer: Any, config: OptimizerConfig, *, train_iters: int, global_batch_size: int
) -> ParamScheduler:
    """Build megatron.core's schedule for `optimizer`. Call `.step(global_batch_size)` after each update."""
    warmup, decay, wsd = schedule_steps(config, train_iters, global_batch_size)
    scheduler: ParamScheduler = core("optimizer_param_scheduler").OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_iters * global_batch_size,
        wd_incr_style="constant",
        wsd_decay_steps=wsd,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
        # The checkpoint sets the position in the schedule, and the flags its shape, so a new --lr takes
        # effect on resume.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return scheduler
