"""Defines a metric: a name, a direction, and a function of a sample that returns None if it does not apply.

    @metric("kept_psnr", unit="dB", better="higher", summary="kept pixels of partly generated frames")
    def kept_psnr(sample: Sample) -> float | None: ...

Other packages add metrics through the entry point group mindspeed_mm.metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mindspeed_mm.evaluation.sample import Sample
from mindspeed_mm.registry import Registry

Better = Literal["higher", "lower", ""]  # "": the metric describes a video but does not rate it
Measure = Callable[[Sample], "float | None"]


@dataclass(frozen=True)
class Metric:
    """An entry of `METRICS`."""

    name: str
    unit: str
    better: Better
    summary: str
    measure: Measure


METRICS: Registry[Metric] = Registry("metric", "mindspeed_mm.metrics")


def metric(name: str, *, unit: str = "", better: Better, summary: str) -> Callable[[Measure], Measure]:
    """Register a function as the metric `name`."""

    def register(measure: Measure) -> Measure:
        METRICS.add(name, Metric(name, unit, better, summary, measure))
        return measure

    return register
