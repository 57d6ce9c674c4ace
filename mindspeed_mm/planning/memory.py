"""Memory of one device in training, computed from the shapes of the model without torch or a device.

The peak is found by walking the backward pass block by block. Estimates for the allocator's slack and the
buffers of the communication library are added to the tensors. docs/guide/plan.md explains the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_mm.planning.pipeline import PipelineWalk
from mindspeed_mm.planning.stages import pipeline_ranks
from mindspeed_mm.planning.units import TrainingRun
from mindspeed_mm.planning.walk import Walk

SLACK = 0.06  # fraction of all tensors: memory that the allocator reserves but no tensor uses
LIBRARY = 1.0e9  # bytes of the context and the communication library on an accelerator


@dataclass(frozen=True)
class Memory:
    """Memory of one device at the peak of a step, in bytes by term."""

    terms: Mapping[str, float]
    moment: str
    host: float = 0.0
    rank: int | None = None  # rank of a pipeline

    @property
    def total(self) -> float:
        """Bytes of one device."""
        return sum(self.terms.values())

    @property
    def tensors(self) -> float:
        """Bytes of all tensors, without the slack."""
        return self.total - self.terms["slack"]


def training_memory(run: TrainingRun) -> Memory:
    """Compute the peak of a step with optimizer moments, that is, after the first one.

    With pipeline stages, returns the rank that needs the most memory.
    """
    of_ranks = memory_of_ranks(run)
    return max(of_ranks, key=lambda memory: memory.total)


def memory_of_ranks(run: TrainingRun) -> list[Memory]:
    """Compute the peak of each rank of a pipeline. Without stages, the list has one entry."""
    ranks = pipeline_ranks(run)
    if not ranks:
        return [_memory(run, Walk(run), None)]
    return [_memory(run, PipelineWalk(run, rank), rank.rank) for rank in ranks]


def _memory(run: TrainingRun, walk: Walk, rank: int | None) -> Memory:
    moment, terms = max(walk.moments(), key=lambda found: sum(found[1].values()))
    moved = {"masters", "gradients", "moments", "weights"} if run.offload else set()
    host = sum(terms[name] for name in moved)
    kept = terms["block inputs"] if run.offload_inputs else 0.0
    terms = {name: 0.0 if name in moved else size for name, size in terms.items()}
    if kept:
        on_device = walk.residual  # the input that returns from the host
        host += max(kept - on_device, 0.0)
        terms["block inputs"] = min(kept, on_device)
    if not run.on_cpu:
        terms["slack"] = SLACK * sum(terms.values()) + LIBRARY
    return Memory(terms, moment, host, rank)
