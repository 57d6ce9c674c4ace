"""An iteration in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

READERS = "readers"  # of `StepReport.costs`: work of other processes, beside the iteration


@dataclass(frozen=True)
class StepReport:
    """One iteration in numbers, the same on every rank (seconds and memory are this rank's)."""

    iteration: int
    consumed_samples: int
    loss: float
    grad_norm: float
    lr: float  # of the next iteration, as in Megatron's log
    stepped: bool  # False: loss or gradient was not finite, the update was skipped
    seconds: float
    phases: dict[str, float]  # seconds of data, forward, backward, communication, optimizer
    tokens: float  # of the global batch
    model_tflop: float  # of the global batch
    hardware_tflop: float
    peak_memory: int  # bytes
    losses: dict[str, float] = field(
        default_factory=dict
    )  # unweighted, of each task and quarter of timesteps
    costs: dict[str, float] = field(default_factory=dict)  # seconds of making samples of raw clips


def rates(report: StepReport, devices: int, peak_tflops: float | None) -> dict[str, float]:
    """tokens/s of the run, TFLOP/s of one device, and MFU and HFU where the peak is known."""
    found = {
        "tokens_per_second": report.tokens / report.seconds,
        "tflops": report.model_tflop / report.seconds / devices,
    }
    if peak_tflops:
        found["mfu"] = found["tflops"] / peak_tflops
        found["hfu"] = report.hardware_tflop / report.seconds / devices / peak_tflops
    return found
