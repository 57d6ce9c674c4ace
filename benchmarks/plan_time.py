"""Predicted against measured seconds of a training step on the device at hand, for five sizes.

OMP_NUM_THREADS=1 python benchmarks/plan_time.py
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from step_trainers import Case, Trainer, Variant, make_inputs, our_trainer

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.models.wan.config import VaceConfig, WanConfig
from mindspeed_mm.planning.calibrate import cpu_clock, device_of, rates
from mindspeed_mm.planning.time import step_time
from mindspeed_mm.planning.units import TrainingRun

logger = get_logger(__name__)
Size = tuple[int, int, int, tuple[int, int, int]]  # hidden_size, ffn_dim, heads, latents (F, h, w)
SIZES: Sequence[Size] = (
    (256, 1024, 4, (3, 16, 16)),
    (256, 1024, 4, (5, 32, 32)),
    (512, 2048, 8, (3, 16, 16)),
    (512, 2048, 8, (5, 32, 32)),
    (1024, 4096, 8, (3, 16, 32)),
)
ROUNDS = 4
AT_LEAST = 0.7  # seconds of each size in a round: short steps are disturbed more, and repeated more


@one_line_errors
def main() -> None:
    """Calibrate and measure, then one line for each size."""
    with launch(Accelerator.detect(), timedelta(minutes=5)) as accelerator:
        for (width, _, _, grid), (predicted, measured) in zip(
            SIZES, compare(SIZES, accelerator), strict=True
        ):
            logger.info(
                f"D {width}, grid {grid}: predicted {predicted:.3f} s, measured {measured:.3f} s, ratio "
                f"{predicted / measured:.2f}"
            )


def compare(
    sizes: Sequence[Size], accelerator: Accelerator, rounds: int = ROUNDS
) -> list[tuple[float, float]]:
    """Predicted and measured seconds of a step, by size.

    Rates and steps are measured in turns, so that both meet the same machine. The least of all turns counts:
    what other programs do beside them makes both longer, never shorter.
    """
    configs = [_config(size) for size in sizes]
    trainers = [
        _trainer(config, grid, accelerator) for config, (*_, grid) in zip(configs, sizes, strict=True)
    ]
    for trainer in trainers:
        trainer.step()
    best = rates(accelerator, ("single",))
    least = [_seconds(trainer, accelerator) for trainer in trainers]
    for _ in range(rounds):
        for number, trainer in enumerate(trainers):
            for _ in range(1 + int(AT_LEAST / least[number])):
                least[number] = min(least[number], _seconds(trainer, accelerator))
        for name, rate in rates(accelerator, ("single",)).items():
            best[name] = (min if name == "call" else max)(best[name], rate)
    device = device_of({**best, "half": 1.0, "memory": 1.0, "kind": accelerator.kind}, "fp32")
    return [
        (step_time(_run(config, grid), device, "fp32").total, seconds)
        for config, (*_, grid), seconds in zip(configs, sizes, least, strict=True)
    ]


def _config(size: Size) -> VaceConfig:
    width, ffn, heads, _ = size
    trunk = WanConfig(hidden_size=width, ffn_dim=ffn, num_heads=heads, num_layers=4)
    return VaceConfig(trunk=trunk, vace_layers=(0, 2))


def _run(config: VaceConfig, grid: Any) -> TrainingRun:
    return TrainingRun(model=config, grid=grid, text=32, product=4, prefetch=0)


def _trainer(config: VaceConfig, grid: Any, accelerator: Accelerator) -> Trainer:
    case = Case(
        config=config,
        grid=grid,
        text=32,
        dtype="fp32",
        residual_dtype="fp32",
        trainable="branch",
        device=accelerator.kind,
    )
    inputs = make_inputs(case, torch.Generator().manual_seed(0), accelerator.device)
    return our_trainer(case, Variant("none", False), inputs, accelerator)


def _seconds(trainer: Trainer, accelerator: Accelerator) -> float:
    clock = cpu_clock(accelerator)
    accelerator.synchronize()
    start = clock()
    trainer.step()
    accelerator.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
