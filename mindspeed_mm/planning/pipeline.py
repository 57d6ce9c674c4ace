"""The backward pass of one rank of a pipeline. Does not import torch.

In addition to its own blocks, a rank holds the saved tensors of micro-batches between forward and backward,
and receive buffers for tokens. FSDP2 gathers inside a stage, and frees weights and gradients after the last
micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mindspeed_mm.models.wan.flops import text_rows
from mindspeed_mm.planning.stages import EVERYWHERE, PipelineRank, Stage
from mindspeed_mm.planning.units import TrainingRun
from mindspeed_mm.planning.walk import Terms, Walk


class PipelineWalk(Walk):
    """Walks the backward passes of one rank."""

    def __init__(self, run: TrainingRun, rank: PipelineRank) -> None:
        self.rank = rank
        self.now = rank.stages[-1]
        super().__init__(run)

    def holds(self, name: str) -> bool:
        """Return whether this rank holds a unit of the model."""
        return self.rank.holds(name, self.run.model.vace_layers)

    def moments(self) -> Iterator[tuple[str, Terms]]:
        """Yield the first backward of each stage, the reduction of gradients, and the optimizer step."""
        stages, waits = self.rank.stages, self.rank.waiting
        kept = [self._saved_by_stage(stage) for stage in stages]
        everything = sum(size * count for size, count in zip(kept, waits, strict=True))
        for stage, size in zip(stages, kept, strict=True):
            self.now = stage
            order = self._order(stage)
            beside = everything - size + self._beside(stage, order)
            yield from self._backward(
                order, beside, with_head=stage.is_last, streams=max(stage.sent - 1.0, 0.0)
            )
        yield "the sum of gradients over ranks", self._sum_over_ranks()
        yield "the optimizer's step", self._optimizer()

    def _order(self, stage: Stage) -> list[str]:
        return [name for name in self._backward_order() if stage.has(name, self.run.model.vace_layers)]

    def _beside(self, stage: Stage, order: Sequence[str]) -> float:
        """Return the bytes that a micro-batch keeps outside blocks: tokens to send, and embedded tokens."""
        inputs = stage.received * self.residual  # the buffers already contain them
        start = self._start(order) if stage.layers.start == 0 else 0.0
        return stage.sent * self.residual + start - inputs

    def _saved_by_stage(self, stage: Stage) -> float:
        order = self._order(stage)
        return sum(self._saved_bytes(name) for name in order) + self._beside(stage, order)

    def _buffers(self) -> float:
        """Return the bytes of receive buffers for tokens and their gradients, for all micro-batches."""
        stages, waits = self.rank.stages, self.rank.waiting
        streams = self.run.micro_batches * sum(stage.received + stage.sent for stage in stages)
        if len(stages) > 1:  # torch's runtime for several stages frees what it sent at the end of a step
            kept = sum(stage.sent * count for stage, count in zip(stages, waits, strict=True))
            streams += streams - kept
        return streams * self.residual

    def _gathered(self, done: Sequence[str], now: str) -> float:
        """Return the bytes of gathered weights, which stay until the last backward, and of gradients."""
        run = self.run
        if not self.shared and run.product == 4 and run.replicas == 1:
            return super()._gathered(done, now)
        seen = {*done, now}
        held = ahead = 0.0
        for unit in self.units.values():
            if unit.name in EVERYWHERE or not self._is_wrapped(unit):
                continue
            if unit.name in seen or not self.now.has(unit.name, run.model.vace_layers) or not run.reshard:
                held += unit.bytes
            else:
                ahead = max(ahead, unit.bytes)
        unit = self.units[now]
        product = run.product * run.model.trunk.hidden_size * run.model.trunk.ffn_dim
        return held + run.prefetch * ahead + unit.expanded + product * (unit.trained == unit.whole)

    def _reduction(self, done: Sequence[str], waiting: float) -> Terms:
        """Return the terms while new gradients of a block are added to those of earlier micro-batches."""
        unit = self.units[done[-1]]
        terms = self._terms(done, done[-1], waiting, 0.0)
        terms["gathered units"] += unit.trained * unit.width * self._is_wrapped(unit)
        return terms

    def _sum_over_ranks(self) -> Terms:
        terms = self._terms([], next(iter(self.units)), 0.0, 0.0)
        wrapped = [unit for unit in self.units.values() if self._is_wrapped(unit)]
        largest = max((unit.trained for unit in wrapped), default=0.0)
        terms["gathered units"] = sum(unit.bytes for unit in wrapped) + largest * self.run.reduce
        return terms

    def _inputs(self) -> float:
        """Return the bytes of inputs, embedded text and token buffers, for all micro-batches."""
        run, width = self.run, self.run.model.trunk.hidden_size
        rows = text_rows(run.model, run.text) * run.batch
        trained = self.units["text_embedding"].is_trainable
        text = rows * width * run.product * (3 if trained else 1)
        return run.micro_batches * (super()._inputs() + text) + self._buffers()
