"""Memory during the backward pass of a training run, in bytes by term.

Does not import torch. docs/guide/plan.md explains the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mindspeed_mm.models.wan.config import BRANCH
from mindspeed_mm.models.wan.flops import text_rows, tokens_of
from mindspeed_mm.planning.block import BlockBytes, BlockKind, block_bytes
from mindspeed_mm.planning.units import (
    TrainingRun,
    Unit,
    all_shapes,
    is_trainable,
    local_size,
    unit_of,
    units,
)

TERMS = (
    "weights", "masters", "gradients", "moments", "gathered units", "model inputs", "block inputs",
    "inside a block", "slack",
)  # fmt: skip
Terms = dict[str, float]


class Walk:
    """Walks the backward pass of a run, and yields the memory at each moment."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.whole_tokens = tokens_of(run.grid, run.model) * run.batch
        self.tokens = -(-tokens_of(run.grid, run.model) // run.context_parallel) * run.batch
        self.units = {unit.name: unit for unit in units(run) if self.holds(unit.name)}
        self.residual = float(
            self.tokens * run.residual * run.model.trunk.hidden_size
        )  # bytes of one stream of tokens
        self.shared = run.shards > 1 or run.offload
        self.moment_bytes = self._moment_bytes()
        self.trunk_is_trainable = any(
            unit.is_trainable and not unit.name.startswith(BRANCH) for unit in units(run)
        )
        self.lora = _by_block(run.lora)
        self.blocks: dict[BlockKind, BlockBytes] = {}

    def holds(self, name: str) -> bool:
        """Return whether this rank holds a unit of the model. Without stages, it holds all."""
        return True

    def is_reached(self, name: str) -> bool:
        """Return whether gradients reach a block.

        They reach all blocks, except the first trunk block if no weight of the trunk is trainable.
        """
        return name != "blocks.0" or self.trunk_is_trainable

    def moments(self) -> Iterator[tuple[str, Terms]]:
        """Yield all moments that may be the peak, with their terms."""
        order = list(self._backward_order())
        yield from self._backward(order, self._start(order))
        yield "the optimizer's step", self._optimizer()

    def _backward(
        self, order: Sequence[str], waiting: float, *, with_head: bool = True, streams: float = 0.0
    ) -> Iterator[tuple[str, Terms]]:
        """Walk the blocks in `order`.

        `waiting` is the number of saved bytes outside these blocks. `streams` is the number of token
        gradients that wait for an earlier block.
        """
        kept = {name: self._saved_bytes(name) for name in order}
        width, residual = self.run.model.trunk.hidden_size, self.residual
        everything = sum(kept.values()) + waiting
        done: list[str] = ["head"] * with_head
        if with_head:
            yield (
                "the head's backward",
                self._terms(done, "head", everything + residual, 12.0 * self.tokens * width),
            )
        from_branch = streams > 0
        for name in order:
            everything -= kept[name]
            now = everything + residual + streams * residual
            inside = self._inside(name, self._block(name))
            yield f"backward of {name}", self._terms(done, name, now, inside)
            done.append(name)
            if self.units[name].is_trainable:
                yield f"summing the gradients of {name}", self._reduction(done, now)
            is_branch = name.startswith(BRANCH)
            if is_branch:
                streams = 1.0 + (self._trunk_continues(name))
            else:
                streams = 1.0 * (from_branch or any(past.startswith(BRANCH) for past in done))
                streams += 1.0 * (self._feeds(name) and self._goes_below(name))

    def _feeds(self, name: str) -> bool:
        return int(name.split(".")[1]) in self.run.model.vace_layers

    def _goes_below(self, name: str) -> bool:
        number = int(name.split(".")[1])
        return self.is_reached(f"blocks.{max(number - 1, 0)}")

    def _trunk_continues(self, name: str) -> bool:
        return self._goes_below(f"blocks.{self.run.model.vace_layers[int(name.split('.')[1])]}")

    def _backward_order(self) -> Iterator[str]:
        layers = self.run.model.vace_layers
        for number in reversed(range(self.run.model.trunk.num_layers)):
            if self.is_reached(f"blocks.{number}"):
                yield f"blocks.{number}"
            if number in layers:
                yield f"vace_blocks.{layers.index(number)}"

    def _kind(self, name: str) -> BlockKind:
        run, unit = self.run, self.units[name]
        return BlockKind(
            trunk=run.model.trunk,
            trained=unit.is_trainable and not run.lora,
            is_branch=name.startswith(BRANCH),
            is_first=name == "vace_blocks.0",
            product=run.product,
            residual=run.residual,
            split=run.context_parallel > 1,
            several=run.batch > 1,
            lora=self.lora.get(name, ()),
        )

    def _block(self, name: str) -> BlockBytes:
        kind = self._kind(name)
        if kind not in self.blocks:
            self.blocks[kind] = block_bytes(kind)
        return self.blocks[kind]

    def _text(self, trained: bool) -> float:
        """Return the bytes of the caption in one block: values, and keys before and after their norm."""
        run = self.run
        rows = text_rows(run.model, run.text) if run.on_cpu else run.model.trunk.text_len
        return 3.0 * rows * run.batch * run.product * run.model.trunk.hidden_size * (1 if trained else 0.7)

    def _inside(self, name: str, found: BlockBytes) -> float:
        return self.tokens * found.peak + self._text(self.units[name].is_trainable)

    def _saved_bytes(self, name: str) -> float:
        """Return the bytes saved for the backward of a block, including its input."""
        run, found = self.run, self._block(name)
        residual = self.residual
        mode = run.recompute.get(name)
        own_input = residual * (run.residual == 4 or mode is not None)
        if mode == "full":
            return own_input
        if mode == "selective":
            return own_input + self.tokens * found.selective
        recomputed = 0.0
        for part, size in found.parts.items():
            how = run.recompute.get(f"{name}.{part}")
            if how is None:
                continue
            width = run.model.trunk.hidden_size
            kept = width * 4 + (run.product * width * (part != "ffn") if how == "selective" else 0)
            recomputed += max(size - kept, 0.0)
        return (
            own_input + self.tokens * (found.saved - recomputed) + self._text(self.units[name].is_trainable)
        )

    def _start(self, order: Sequence[str]) -> float:
        """Return the bytes of the embedded tokens, which the branch and the first trunk block read."""
        run = self.run
        width = run.model.trunk.hidden_size
        count = self.tokens
        if run.context_parallel > 1 and run.product == run.residual:
            count = self.whole_tokens  # the part of each rank is a view of all tokens
        held = any(name.startswith(BRANCH) and name in run.recompute for name in order)
        return float(count * run.residual * width) * (held and "blocks.0" not in order)

    def _terms(self, done: Sequence[str], now: str, waiting: float, inside: float) -> Terms:
        run = self.run
        terms = self._state_terms()
        finished = sum(self.units[name].trained_local for name in done if name in self.units)
        terms["gradients"] = 4.0 * finished
        if run.micro_batches > 1:
            terms["gradients"] = 4.0 * sum(unit.trained for unit in self.units.values())
        terms["gathered units"] = self._gathered(done, now)
        terms["model inputs"] = self._inputs()
        terms["block inputs"] = waiting
        terms["inside a block"] = inside
        return terms

    def _state_terms(self) -> Terms:
        terms = dict.fromkeys(TERMS, 0.0)
        for unit in self.units.values():
            terms["weights"] += unit.frozen_local
            terms["masters"] += 4.0 * unit.trained_local
        terms["moments"] = self.moment_bytes
        return terms

    def _moment_bytes(self) -> float:
        total = 0.0
        for name, shape in all_shapes(self.run).items():
            if not is_trainable(self.run, name) or unit_of(name) not in self.units:
                continue
            hidden = len(shape) == 2 and not name.startswith(("text_embedding", "time_embedding", "head"))
            total += local_size(shape, self.run.shards) * (
                4 if self.run.optimizer == "muon" and hidden else 8
            )
        return total

    def _gathered(self, done: Sequence[str], now: str) -> float:
        """Return the bytes of gathered weights, of this block's gradients, and of the last reduction."""
        run = self.run
        if not self.shared and run.product == 4 and run.replicas == 1:
            return 4.0 * self.units[now].trained if now in self.units else 0.0
        sizes = [unit.bytes for unit in self.units.values() if self._is_wrapped(unit)]
        ahead = max((unit.bytes for unit in self.units.values() if unit.name != now), default=0.0)
        unit = self.units[now]
        total = unit.bytes * self._is_wrapped(unit) if run.reshard else sum(sizes)
        total += unit.expanded
        total += run.prefetch * ahead * run.reshard
        total += (
            run.product * run.model.trunk.hidden_size * run.model.trunk.ffn_dim * (unit.trained == unit.whole)
        )
        last = next((self.units[name] for name in reversed(done) if self.units[name].is_trainable), None)
        return total + last.trained * run.reduce * self._is_wrapped(last) if last is not None else total

    def _reduction(self, done: Sequence[str], waiting: float) -> Terms:
        """Return the terms while a block's gradients are reduced: they exist in both dtypes.

        The block's weights are freed, and the next weights are gathered.
        """
        run, unit = self.run, self.units[done[-1]]
        terms = self._terms(done, done[-1], waiting, 0.0)
        if self._is_wrapped(unit):
            ahead = unit.bytes * (run.prefetch if run.reshard else len(self.units) - len(done))
            terms["gathered units"] = ahead + unit.trained * (unit.width + run.reduce)
        return terms

    def _is_wrapped(self, unit: Unit) -> bool:
        return self.shared or unit.is_trainable

    def _inputs(self) -> float:
        """Return the bytes of latents, noise, target, context and rotary tables."""
        run, trunk = self.run, self.run.model.trunk
        patch = math.prod(trunk.patch_size)
        latents, context = trunk.in_dim * patch, run.model.vace_in_dim * patch * bool(run.model.vace_layers)
        rotary = 4 * trunk.head_dim * self.tokens / run.batch
        rows = text_rows(run.model, run.text) * run.batch
        return self.whole_tokens * (4.0 * 3 * latents + 4.0 * context) + rotary + 4.0 * rows * trunk.text_dim

    def _optimizer(self) -> Terms:
        terms = self._state_terms()
        terms["gradients"] = 4.0 * sum(unit.trained_local for unit in self.units.values())
        if not self.run.fused:
            terms["inside a block"] = 2 * terms["gradients"]
        return terms


def _by_block(lora: Mapping[str, int]) -> dict[str, tuple[tuple[str, int], ...]]:
    """Map blocks to their LoRA layers and ranks."""
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    for layer, rank in lora.items():
        kind, number, inner = layer.split(".", 2)
        found[f"{kind}.{number}"] = (*found.get(f"{kind}.{number}", ()), (inner, rank))
    return found
