"""Metrics of one training iteration."""

from __future__ import annotations

from dataclasses import dataclass, field

READERS = "readers"  # key of `StepReport.costs`: work of other processes, in parallel with the iteration


@dataclass(frozen=True)
class StepReport:
    """Metrics of one iteration. Seconds and memory are this rank's; the rest is the same on every rank."""

    iteration: int
    consumed_samples: int
    loss: float
    grad_norm: float
    lr: float  # learning rate of the next iteration, as in Megatron's log
    stepped: bool  # False if the update was skipped because loss or gradient was not finite
    seconds: float
    phases: dict[str, float]  # seconds of data, forward, backward, communication, optimizer
    tokens: float  # in the global batch
    model_tflop: float  # for the global batch
    hardware_tflop: float
    peak_memory: int  # bytes
    # Unweighted, for each task and each quarter of the timesteps.
    losses: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)  # seconds spent on making samples from raw clips


def rates(report: StepReport, devices: int, peak_tflops: float | None) -> dict[str, float]:
    """Return tokens/s of the run, TFLOP/s per device, and MFU and HFU if the peak is known."""
    found = {
        "tokens_per_second": report.tokens / report.seconds,
        "tflops": report.model_tflop / report.seconds / devices,
    }
    if peak_tflops:
        found["mfu"] = found["tflops"] / peak_tflops
        found["hfu"] = report.hardware_tflop / report.seconds / devices / peak_tflops
    return found
