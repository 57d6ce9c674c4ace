"""Find changes that make a run fit, cheapest first. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from mindspeed_mm.models.wan.config import ADAPTED
from mindspeed_mm.models.wan.shapes import layout
from mindspeed_mm.planning.devices import Device
from mindspeed_mm.planning.memory import training_memory
from mindspeed_mm.planning.time import step_time
from mindspeed_mm.planning.units import TrainingRun

_AT_ONCE = 3  # changes
_OTHER_RESULT = ("--lora-", "--quantize", "predictor.residual_dtype")
Setting = tuple[str, Mapping[str, object]]  # as a user writes it, and the fields that it changes
Measure = Callable[[Mapping[str, object]], tuple[float, float]]


@dataclass(frozen=True)
class Change:
    """One or more settings that make a run fit."""

    settings: tuple[str, ...]
    cost: float  # time per sample, relative to the unchanged run
    memory: float  # bytes
    keeps_result: bool  # LoRA, 8 bits and a bf16 residual stream change the result


def smallest_changes(run: TrainingRun, device: Device, dtype: str, capacity: float) -> list[Change]:
    """Ways in which a training run fits `capacity` bytes."""

    def measure(fields: Mapping[str, object]) -> tuple[float, float]:
        changed = replace(run, **fields)  # type: ignore[arg-type]
        return training_memory(changed).total, step_time(changed, device, dtype).total

    return search(list(_single(run)), measure, capacity, _OTHER_RESULT)


def search(
    single: Sequence[Setting], measure: Measure, capacity: float, others: tuple[str, ...]
) -> list[Change]:
    """Up to four ways to fit `capacity` bytes, with as few settings as possible.

    Ways that keep the result come first. `measure` returns bytes and seconds with some fields changed.
    `others`: prefixes of settings that change the result.
    """
    before = measure({})[1]
    found: list[Change] = []
    for count in range(1, _AT_ONCE + 1):
        for chosen in combinations(single, count):
            names = tuple(name for name, _ in chosen)
            if len({name.split(" ")[0] for name in names}) < count or any(
                set(names) > set(one.settings) for one in found
            ):
                continue
            fields = {name: value for _, changed in chosen for name, value in changed.items()}
            memory, after = measure(fields)
            if memory <= capacity:
                keeps = not any(name.startswith(others) for name in names)
                found.append(Change(names, after / before, memory, keeps))
        if len(found) >= _AT_ONCE:
            break
    return sorted(found, key=lambda change: (not change.keeps_result, len(change.settings), change.cost))[:4]


def _single(run: TrainingRun) -> Iterator[Setting]:
    """Each single setting, with the fields that it changes."""
    blocks = [f"blocks.{number}" for number in range(run.model.trunk.num_layers)]
    blocks += [f"vace_blocks.{number}" for number in range(len(run.model.vace_layers))]
    for mode in ("selective", "full"):
        plan = dict.fromkeys(blocks, mode)
        if plan != run.recompute and set(run.recompute.values()) != {"full"}:
            yield f"recompute_modules {mode}", {"recompute": plan}
    if run.shards < run.replicas:
        yield "sharding_size auto", {"shards": run.replicas}
    if not run.reshard:
        yield "reshard_after_forward true", {"reshard": True}
    if run.batch > 1:
        pieces = run.micro_batches * run.batch
        yield "--micro-batch-size 1", {"batch": 1, "micro_batches": pieces}
    if not run.offload_inputs and run.recompute:
        yield "offload_block_inputs true", {"offload_inputs": True}
    heads = run.model.trunk.num_heads
    for size in (2, 4, 8):
        ulysses = run.ulysses or size
        fits = heads % ulysses == 0 and size % ulysses == 0 and run.replicas % size == 0
        if size > run.context_parallel and fits:
            pieces = run.micro_batches * size // run.context_parallel
            yield f"--context-parallel-size {size}", {"context_parallel": size, "micro_batches": pieces}
    if not run.offload:
        yield "offload_to_cpu true", {"offload": True}
    if run.residual == 4 and run.product == 2:
        yield "predictor.residual_dtype bf16", {"residual": 2}
    if run.quantized is None and (run.lora or run.trainable != "all"):
        yield "--quantize int8", {"quantized": frozenset()}
    if not run.lora:
        yield "--lora-rank 32", {"lora": usual_lora(run, 32)}
    if not run.lora and run.trainable == "all":
        yield "--lora-rank 32 --quantize int8", {"lora": usual_lora(run, 32), "quantized": frozenset()}


def usual_lora(run: TrainingRun, rank: int) -> dict[str, int]:
    """The layers that a LoRA of the trained part adapts by default."""
    branch = run.trainable == "branch"
    return {
        name.removesuffix(".weight"): rank
        for name, shape in layout(run.model).items()
        if len(shape) == 2
        and name.removesuffix(".weight").endswith(tuple(f".{layer}" for layer in ADAPTED))
        and name.startswith(("vace_blocks.",) if branch else ("blocks.", "vace_blocks."))
    }
