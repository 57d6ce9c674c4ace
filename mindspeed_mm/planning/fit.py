"""Find changes that make a run fit into memory, cheapest first. Does not import torch."""

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

_MAX_CHANGES = 3  # settings that are changed together
_OTHER_RESULT = ("--lora-", "--quantize", "predictor.residual_dtype")
Setting = tuple[str, Mapping[str, object]]  # as a user writes it, and the run's fields that it changes
Measure = Callable[[Mapping[str, object]], tuple[float, float]]


@dataclass(frozen=True)
class Change:
    """One or more settings that make a run fit."""

    settings: tuple[str, ...]
    cost: float  # time per sample, relative to the unchanged run
    memory: float  # bytes
    keeps_result: bool  # LoRA, 8 bits and a bf16 residual stream change the result


def smallest_changes(run: TrainingRun, device: Device, dtype: str, capacity: float) -> list[Change]:
    """Find changes that make a training run fit into `capacity` bytes."""

    def measure(fields: Mapping[str, object]) -> tuple[float, float]:
        changed = replace(run, **fields)  # type: ignore[arg-type]
        return training_memory(changed).total, step_time(changed, device, dtype).total

    return search(list(_candidates(run)), measure, capacity, _OTHER_RESULT)


def search(
    single: Sequence[Setting], measure: Measure, capacity: float, others: tuple[str, ...]
) -> list[Change]:
    """Find up to four ways to fit into `capacity` bytes with as few settings as possible.

    Changes that keep the result come first. `measure` returns bytes and seconds for changed fields. `others`
    holds prefixes of settings that change the result.
    """
    before = measure({})[1]
    found: list[Change] = []
    for count in range(1, _MAX_CHANGES + 1):
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
        if len(found) >= _MAX_CHANGES:
            break
    return sorted(found, key=lambda change: (not change.keeps_result, len(change.settings), change.cost))[:4]


def _candidates(run: TrainingRun) -> Iterator[Setting]:
    """Yield each setting that could reduce memory."""
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
    """Map the default layers of a LoRA in the trained part to `rank`."""
    branch = run.trainable == "branch"
    return {
        name.removesuffix(".weight"): rank
        for name, shape in layout(run.model).items()
        if len(shape) == 2
        and name.removesuffix(".weight").endswith(tuple(f".{layer}" for layer in ADAPTED))
        and name.startswith(("vace_blocks.",) if branch else ("blocks.", "vace_blocks."))
    }
