"""Pipeline ranks in the planner: their stages, share of computation, and micro-batches in flight.

Does not import torch. The order of work is that of torch's schedules, which distributed/pipeline.py uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from mindspeed_mm.models.wan.config import BRANCH
from mindspeed_mm.models.wan.flops import Trainable, block_forward, recomputed_share, text_rows, tokens_of
from mindspeed_mm.models.wan.shapes import layout
from mindspeed_mm.planning.units import TrainingRun, unit_of

EVERYWHERE = ("text_embedding", "time_embedding", "time_projection")
_FIRST = ("patch_embedding", "vace_patch_embedding")


@dataclass(frozen=True)
class Stage:
    """Consecutive trunk blocks, with the branch blocks that feed them."""

    number: int
    layers: range
    is_last: bool
    received: int  # incoming streams of tokens: trunk, and branch if a branch block follows
    sent: int

    def has(self, name: str, vace_layers: Sequence[int]) -> bool:
        """Return whether a unit of the model is in this stage."""
        kind, _, number = name.partition(".")
        if kind in _FIRST:
            return self.layers.start == 0
        if kind == "head":
            return self.is_last
        if not number:
            return False
        layer = vace_layers[int(number)] if kind in BRANCH else int(number)
        return layer in self.layers


@dataclass(frozen=True)
class PipelineRank:
    """The stages of one rank.

    `waiting` is the maximum number of micro-batches between forward and backward, for each stage.
    """

    rank: int
    stages: tuple[Stage, ...]
    waiting: tuple[int, ...]

    def holds(self, name: str, vace_layers: Sequence[int]) -> bool:
        """Return whether a unit of the model is on this rank."""
        return name in EVERYWHERE or any(stage.has(name, vace_layers) for stage in self.stages)


def pipeline_ranks(run: TrainingRun) -> list[PipelineRank]:
    """Return all ranks of one pipeline, or [] without stages."""
    stages = list(_stages(run))
    found = []
    for rank in range(run.pipeline if stages else 0):
        own = tuple(stages[rank :: run.pipeline])
        found.append(PipelineRank(rank, own, waiting(run, rank, len(own))))
    return found


def _stages(run: TrainingRun) -> Iterator[Stage]:
    last = max(run.model.vace_layers, default=-1)
    first = 0
    for number, size in enumerate(run.stages):
        layers = range(first, first + size)
        first += size
        is_last = number == len(run.stages) - 1
        received = 0 if number == 0 else 1 + (last >= layers.start)
        yield Stage(number, layers, is_last, received, 0 if is_last else 1 + (last >= layers.stop))


def waiting(run: TrainingRun, rank: int, virtual: int) -> tuple[int, ...]:
    """Count the micro-batches in flight for each stage of a rank when its first backward starts."""
    count = run.micro_batches
    if run.gpipe or count < run.pipeline:
        return (count,) * virtual
    if virtual == 1:
        return (min(count, run.pipeline - rank),)
    # as in torch's ScheduleInterleaved1F1B: forwards before the first backward, then one more
    in_round = count // max(1, count // run.pipeline)
    forwards = min((virtual - 1) * in_round + 2 * (run.pipeline - 1 - rank) + 1, count * virtual)
    found = [0] * virtual
    for number in range(forwards):
        found[number // in_round % virtual] += 1
    return tuple(found)


def block_costs(run: TrainingRun) -> dict[str, float]:
    """Return the FLOPs of each block for one sample, forward and backward: the terms of `step_flops`."""
    model, part = run.model, cast(Trainable, run.trainable)
    tokens = tokens_of(run.grid, model)
    on_tokens, on_text, attention = block_forward(model, tokens, run.text)
    block, width = on_tokens + on_text + attention, model.trunk.hidden_size
    cross = 4.0 * tokens * text_rows(model, run.text) * width
    joins = 2.0 * tokens * width * width
    trained, passed = 2 * block, on_tokens + on_text + 2 * attention
    names = [f"blocks.{number}" for number in range(model.trunk.num_layers)]
    names += [f"vace_blocks.{number}" for number in range(len(model.vace_layers))]
    found = {}
    of_lora = _adapters(run, tokens)
    inside = {name.partition(".")[0] for name in of_lora}
    for name in names:
        is_branch = name.startswith(BRANCH)
        cost = block + joins * is_branch + 3 * of_lora.get(name, 0.0)
        if run.lora:
            if not is_branch or "vace_blocks" in inside:
                is_reached = "blocks" in inside or name != "blocks.0"
                behind = cross * ("blocks" not in inside and not is_branch)
                cost += (on_tokens + 2 * attention - behind) * is_reached + joins * is_branch
        elif part == "all" or is_branch == (part == "branch"):
            cost += (trained if part != "branch" else passed + on_tokens) + 2 * joins * is_branch
        elif is_branch:
            cost += passed + joins
        elif name != "blocks.0":
            cost += on_tokens + 2 * attention - cross
        plan = {module: mode for module, mode in run.recompute.items() if f"{module}.".startswith(f"{name}.")}
        reaches = part
        if run.lora:  # blocks that no gradient reaches are not recomputed
            reaches = "all" if "blocks" in inside else "branch"
            plan = {} if inside == {"blocks"} and is_branch else plan
        cost += recomputed_share(model, plan, reaches, tokens, run.text) * block * len(names)
        found[name] = cost
    return found


def _adapters(run: TrainingRun, tokens: int) -> dict[str, float]:
    """Map blocks to the forward FLOPs of their LoRA layers."""
    shapes, found = layout(run.model), dict[str, float]()
    for name, rank in run.lora.items():
        rows = tokens
        if name.endswith(("cross_attn.k", "cross_attn.v")):
            rows = text_rows(run.model, run.text)
        block = unit_of(name)
        found[block] = found.get(block, 0.0) + 2.0 * rows * rank * sum(shapes[f"{name}.weight"])
    return found


def rank_shares(run: TrainingRun) -> list[float]:
    """Return each rank's share of the computation. The shares sum to 1; [] without stages."""
    costs, ranks = block_costs(run), pipeline_ranks(run)
    whole = sum(costs.values())
    layers = run.model.vace_layers
    return [sum(cost for name, cost in costs.items() if rank.holds(name, layers)) / whole for rank in ranks]
