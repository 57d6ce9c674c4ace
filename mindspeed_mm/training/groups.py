"""Breaks down the mean loss of an iteration by task and by quarter of the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mindspeed_mm.flow.schedule import Schedule
from mindspeed_mm.training.step import LocalWork

QUARTERS = 4


@dataclass(frozen=True)
class LossGroups:
    """The groups of reported losses: the tasks, then the four quarters of the schedule."""

    tasks: tuple[str, ...]
    ends: tuple[float, ...]  # timesteps that separate the quarters, ascending
    top: float = 1000.0  # the highest timestep

    @classmethod
    def of(cls, tasks: Sequence[str], schedule: Schedule) -> LossGroups:
        """Return the groups of one run. Every rank must pass the same tasks."""
        count = len(schedule.indices)
        inner = [schedule.indices[part * count // QUARTERS] for part in range(1, QUARTERS)]
        ends = {float(schedule.timesteps[place]) for place in inner}
        return cls(tuple(tasks), tuple(sorted(ends)), float(len(schedule.timesteps)))

    @property
    def names(self) -> list[str]:
        """Names of the groups, such as `task/gray` and `timestep/0-625`; metrics.jsonl adds `loss/`."""
        quarters = [f"{low:.0f}-{high:.0f}" for low, high in pairwise((0.0, *self.ends, self.top))]
        return [f"task/{task}" for task in self.tasks] + [f"timestep/{quarter}" for quarter in quarters]

    def totals(self, work: LocalWork) -> Tensor:
        """Return this rank's sums of unweighted losses, then their counts: [2 · groups] fp32, on device."""
        losses = torch.cat(work.sample_losses).float()
        timesteps = torch.cat(work.timesteps)
        of_task = [[task == name for task in work.tasks] for name in self.tasks]
        bounds = torch.tensor(self.ends, dtype=timesteps.dtype, device=timesteps.device)
        quarter = torch.bucketize(timesteps, bounds, right=False)
        of_quarter = quarter == torch.arange(len(self.ends) + 1, device=quarter.device)[:, None]
        member = of_quarter
        if of_task:
            member = torch.cat([torch.tensor(of_task, device=losses.device), of_quarter])
        sums = torch.where(member, losses, 0.0).sum(dim=1)
        return torch.cat([sums, member.sum(dim=1).float()])

    def means(self, totals: Sequence[float]) -> dict[str, float]:
        """Map each group that has samples to its mean loss. `totals` are summed or averaged over ranks."""
        sums, counts = totals[: len(totals) // 2], totals[len(totals) // 2 :]
        return {
            name: total / count
            for name, total, count in zip(self.names, sums, counts, strict=True)
            if count > 0
        }


@dataclass
class GroupMeans:
    """Losses of the groups since the last log line."""

    groups: LossGroups
    totals: list[float] = field(default_factory=list)

    def add(self, totals: Sequence[float]) -> None:
        """Count one iteration."""
        self.totals = (
            [a + b for a, b in zip(self.totals, totals, strict=True)] if self.totals else list(totals)
        )

    def line(self, iteration: int) -> str:
        """Format ` loss by task and timestep at iteration 20 | gray: 1.2E-01 | … |`, and reset the sums.

        Returns "" if there are no tasks.
        """
        means, self.totals = self.groups.means(self.totals) if self.totals else {}, []
        if not self.groups.tasks or not means:
            return ""
        parts = " | ".join(f"{name.partition('/')[2]}: {mean:.6E}" for name, mean in means.items())
        return f" loss by task and timestep at iteration {iteration} | {parts} |"
