"""Megatron's two log lines, character for character, because users' scripts split them at ':' and '|'."""

from __future__ import annotations

from datetime import datetime


def iteration_line(
    *,
    iteration: int,
    train_iters: int,
    consumed_samples: int,
    milliseconds: float,
    learning_rate: float,
    global_batch_size: int,
    loss: float | None,
    grad_norm: float | None,
    skipped: int,
    nans: int,
    tflops: float | None = None,
    now: datetime | None = None,
) -> str:
    """Format the line of one log interval.

    `tflops` per device adds the throughput field. A loss of None omits its field.
    """
    fields = [
        (
            f" [{(now or datetime.now()).strftime('%Y-%m-%d %H:%M:%S')}] iteration "
            f"{iteration:8d}/{train_iters:8d}"
        ),
        f"consumed samples: {consumed_samples:12d}",
        f"elapsed time per iteration (ms): {milliseconds:.1f}",
        None if tflops is None else f"throughput per GPU (TFLOP/s/GPU): {tflops:.1f}",
        f"learning rate: {learning_rate:.6E}",
        f"global batch size: {global_batch_size:5d}",
        None if loss is None else f"loss: {loss:.6E}",
        "loss scale: 1.0",
        None if grad_norm is None else f"grad norm: {grad_norm:.3f}",
        f"number of skipped iterations: {skipped:3d}",
        f"number of nan iterations: {nans:3d}",
    ]
    return " | ".join(field for field in fields if field is not None) + " |"


def memory_line(rank: int, iteration: int, allocated: int, max_allocated: int) -> str:
    """Format the memory report after the first log line. Sizes are in bytes."""
    mib = 1024 * 1024
    return (
        f"[Rank {rank}] (after {iteration} iterations) memory (MB) | "
        f"allocated: {allocated / mib:.1f} | max allocated: {max_allocated / mib:.1f}"
    )
