"""Estimates the seconds of a training step, by part. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from mindspeed_mm.models.wan.flops import Trainable, block_forward, recomputed_share, step_flops, tokens_of
from mindspeed_mm.models.wan.shapes import layout
from mindspeed_mm.planning.devices import Device
from mindspeed_mm.planning.stages import pipeline_ranks, rank_shares
from mindspeed_mm.planning.units import TrainingRun, units

_CALLS = 550  # number of operations in one block, forward and backward
HIDDEN = 0.8  # fraction of the computation that can hide gathers and reductions


@dataclass(frozen=True)
class StepTime:
    """Seconds of one iteration on each device. The parts add up to the total; `hidden` overlaps with them."""

    products: float
    attention: float
    communication: float
    data: float
    hidden: float  # communication hidden behind computation
    imbalance: float = 0.0  # pipeline stages: extra computation of the slowest rank over the mean
    bubble: float = 0.0  # the bubble: a rank waits while the pipeline fills and empties
    tokens: float = 0.0  # tokens sent from stage to stage

    @property
    def pipeline(self) -> float:
        """Seconds that pipeline stages add."""
        return self.imbalance + self.bubble + self.tokens

    @property
    def total(self) -> float:
        """Seconds of one iteration."""
        return self.products + self.attention + self.communication + self.data + self.pipeline


def step_time(run: TrainingRun, device: Device, dtype: str) -> StepTime:
    """Estimate the time of one iteration: all micro-batches, and the reduction of gradients.

    Matrix products reach the fraction `device.products` of the peak, and attention `device.attention`.
    Gathers and reductions overlap with computation. The all-to-alls of context parallelism and transfers to
    the host do not.
    """
    tokens = tokens_of(run.grid, run.model)
    part, plan = cast(Trainable, run.trainable), run.recompute
    lora = _lora_counts(run)
    if lora:  # as in vace_cost: blocks that no gradient reaches are not recomputed
        inside = {name.split(".")[0] for name in lora}
        part = "all" if "blocks" in inside else "branch"
        if inside == {"blocks"}:
            plan = {name: mode for name, mode in plan.items() if name.startswith("blocks.")}
    share = recomputed_share(run.model, plan, part, tokens, run.text)
    whole = step_flops(run.model, tokens, part, share, text=run.text, lora=lora).hardware
    on_tokens, on_text, attention = block_forward(run.model, tokens, run.text)
    fraction = attention / (on_tokens + on_text + attention)
    each = run.batch * run.micro_batches / run.context_parallel / run.pipeline
    blocks = (run.model.trunk.num_layers + len(run.model.vace_layers)) / run.pipeline
    peak = device.peak(dtype)
    products = whole * (1 - fraction) * each / (peak * device.products)
    kernels = whole * fraction * each / (peak * device.attention)
    behind, exposed = _communication(run, device, tokens)
    products += _elementwise(run, device, tokens) * each + _update(run, device)
    calls = device.call * _CALLS * blocks * run.micro_batches
    if device.waits:
        products += calls
    else:
        products = max(products, calls - kernels)
    computing = products + kernels
    imbalance, bubble, sent = _pipeline(run, device, tokens, computing)
    return StepTime(
        products=products,
        attention=kernels,
        communication=exposed + max(0.0, behind - HIDDEN * computing),
        data=0.0,
        hidden=min(behind, HIDDEN * computing),
        imbalance=imbalance,
        bubble=bubble,
        tokens=sent,
    )


def _pipeline(run: TrainingRun, device: Device, tokens: int, computing: float) -> tuple[float, float, float]:
    """Return the seconds of imbalance, bubble and sending tokens. `computing` is the mean over ranks.

    A rank waits for tokens and for their gradients once per direction, micro-batch and stage, and while the
    pipeline fills and empties.
    """
    shares = rank_shares(run)
    if not shares:
        return 0.0, 0.0, 0.0
    slowest = max(shares) * run.pipeline * computing
    virtual = len(run.stages) // run.pipeline
    bubble = slowest * (run.pipeline - 1) / (virtual * run.micro_batches)
    streams = 2 if run.model.vace_layers else 1
    stream = tokens / run.context_parallel * run.batch * run.model.trunk.hidden_size * run.residual
    times = 2 * (virtual * run.micro_batches + run.pipeline - 1)
    return slowest - computing, bubble, times * streams * stream / _rate(device, run.ranks)


def _elementwise(run: TrainingRun, device: Device, tokens: int) -> float:
    """Return the seconds of norms, gates, rotations and casts for one sample; 0 if not measured.

    A block reads and writes about 80 D + 10 c D + 2 c F bytes per token forward, and twice that backward.
    """
    if not device.elementwise:
        return 0.0
    width, c = run.model.trunk.hidden_size, run.product
    blocks = run.model.trunk.num_layers + len(run.model.vace_layers)
    twice = sum(name.count(".") == 1 for name in run.recompute)
    moved = (80 + 10 * c) * width + 2 * c * run.model.trunk.ffn_dim
    return tokens * moved * (3 * blocks + twice) / (device.elementwise * 1e9)


def _update(run: TrainingRun, device: Device) -> float:
    """Return the seconds of clipping and AdamW, which access 32 bytes per trained weight."""
    moved = 32 * sum(unit.trained_local for unit in units(run)) / run.pipeline
    return moved / (device.elementwise * 1e9) if device.elementwise else 0.0


def _lora_counts(run: TrainingRun) -> dict[str, int]:
    """Map linear layers to the number of their LoRA weights."""
    shapes = layout(run.model)
    return {name: rank * sum(shapes[f"{name}.weight"]) for name, rank in run.lora.items()}


def _communication(run: TrainingRun, device: Device, tokens: int) -> tuple[float, float]:
    """Return the seconds of communication that computation can hide, and the seconds that it cannot."""
    ranks = pipeline_ranks(run)
    layers = run.model.vace_layers
    every = units(run)
    held = [[unit for unit in every if rank.holds(unit.name, layers)] for rank in ranks] or [list(every)]
    parts = max(held, key=lambda found: sum(unit.bytes for unit in found))
    weights = sum(unit.bytes for unit in parts)
    trained = sum(unit.trained for unit in parts) * run.reduce
    shards, copies = run.shards, max(run.replicas // run.shards, 1)
    gathers = (2 if run.reshard else 1) * run.micro_batches
    inside = _rate(device, shards)
    behind = (gathers * weights + trained) * (shards - 1) / shards / inside
    behind += 2 * trained / shards * (copies - 1) / copies / _rate(device, run.replicas)
    size = run.context_parallel
    width = run.model.trunk.hidden_size
    blocks = (run.model.trunk.num_layers + len(run.model.vace_layers)) / run.pipeline
    ulysses, again = run.ulysses or size, any(mode == "full" for mode in run.recompute.values())
    stream = tokens / size * run.batch * width * run.product * blocks * run.micro_batches
    exposed = (2 + again) * 4 * stream * (ulysses - 1) / ulysses / _rate(device, ulysses)
    # keys and values, and their gradients on the way back
    exposed += (3 + again) * 2 * stream * (size // ulysses - 1) / _rate(device, size)
    if run.offload:
        local = sum(unit.frozen_local + (unit.width + 2 * 4) * unit.trained_local for unit in parts)
        exposed += gathers * local / (device.host * 1e9)
    if run.offload_inputs:
        exposed += 0.2 * 2 * blocks * tokens / size * width * run.residual * run.batch / (device.host * 1e9)
    return behind, exposed


def _rate(device: Device, ranks: int) -> float:
    """Return the bytes per second that a device sends in a group of `ranks` neighbours."""
    return 1e9 * (device.link if ranks <= device.machine else device.network)
