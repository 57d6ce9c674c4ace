"""Predicted against measured seconds of a training step on the device at hand, for five sizes.

OMP_NUM_THREADS=1 python benchmarks/plan_time.py
"""

from __future__ import annotations

import statistics
import time
from datetime import timedelta

import torch
from step_trainers import Case, Variant, make_inputs, our_trainer

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.models.wan.config import VaceConfig, WanConfig
from mindspeed_mm.planning.calibrate import calibrate, read_calibration
from mindspeed_mm.planning.time import step_time
from mindspeed_mm.planning.units import TrainingRun

logger = get_logger(__name__)
SIZES = (
    (256, 1024, 4, (3, 16, 16)),
    (256, 1024, 4, (5, 32, 32)),
    (512, 2048, 8, (3, 16, 16)),
    (512, 2048, 8, (5, 32, 32)),
    (1024, 4096, 8, (3, 16, 32)),
)


@one_line_errors
def main() -> None:
    """Calibrate, then one line for each size."""
    with launch(Accelerator.detect(), timedelta(minutes=5)) as accelerator:
        logger.info(f"calibrated: {calibrate(accelerator)}")
        device = read_calibration("fp32")
        for width, ffn, heads, grid in SIZES:
            trunk = WanConfig(hidden_size=width, ffn_dim=ffn, num_heads=heads, num_layers=4)
            config = VaceConfig(trunk=trunk, vace_layers=(0, 2))
            run = TrainingRun(model=config, grid=grid, text=32, product=4, prefetch=0)
            predicted = step_time(run, device, "fp32").total
            measured = _measured(config, grid, accelerator)
            logger.info(
                f"D {width}, grid {grid}: predicted {predicted:.3f} s, measured {measured:.3f} s, ratio "
                f"{predicted / measured:.2f}"
            )


def _measured(config: VaceConfig, grid: tuple[int, int, int], accelerator: Accelerator) -> float:
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
    trainer = our_trainer(case, Variant("none", False), inputs, accelerator)
    clock = (
        time.process_time if accelerator.kind == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    )
    seconds = []
    for _ in range(4):
        accelerator.synchronize()
        start = clock()
        trainer.step()
        accelerator.synchronize()
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
