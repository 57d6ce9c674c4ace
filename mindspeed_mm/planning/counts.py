"""Weak scaling: the same run on 1 to 1024 devices, with constant work per device. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mindspeed_mm.planning.devices import Device
from mindspeed_mm.planning.memory import Memory, training_memory
from mindspeed_mm.planning.time import step_time
from mindspeed_mm.planning.units import TrainingRun

COUNTS = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class AtCount:
    """Memory and speed of a run on a number of devices."""

    devices: int
    memory: Memory
    fits: bool
    samples_per_second: float


def at_counts(run: TrainingRun, device: Device, dtype: str, capacity: float) -> Sequence[AtCount]:
    """Plan the run for each power of two up to 1024 that the parallel sizes divide."""
    shards_all = run.shards == run.replicas
    found = []
    for count in COUNTS:
        replicas, rest = divmod(count, run.pipeline)
        if rest or not replicas or replicas % run.context_parallel:
            continue
        if not shards_all and replicas % run.shards:
            continue
        changed = replace(run, ranks=count, shards=replicas if shards_all else run.shards)
        memory = training_memory(changed)
        samples = run.batch * run.micro_batches * replicas / run.context_parallel
        speed = samples / step_time(changed, device, dtype).total
        found.append(AtCount(count, memory, memory.total <= capacity, speed))
    return found
