"""Loads a training state from one checkpoint folder.

Allocations are limited to the sizes in the index, and every value is checked before use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.distributed.pipeline import whole_model, whole_shapes
from mindspeed_mm.distributed.rng import rng_state, set_rng_state
from mindspeed_mm.distributed.shards import local
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.finite import FiniteWeights
from mindspeed_mm.models.keymap import KeyMap
from mindspeed_mm.models.lora.saved import ENTRY, theirs_of
from mindspeed_mm.training.checkpoint_checks import (
    QUANTIZED,
    BaseReference,
    check_base,
    check_config,
    check_lora,
    check_quantized,
    check_weights,
)
from mindspeed_mm.training.checkpoint_files import IndexReader, TensorPlanner, reason_of
from mindspeed_mm.training.checkpoint_values import Values, is_count, is_number
from mindspeed_mm.training.config import CheckpointConfig
from mindspeed_mm.training.state import Skips, TrainState, load_optimizer_state

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # same shape as the parameter
_CONSUMED = "sampler.consumed_samples"


def mm_names(model: nn.Module, key_map: KeyMap) -> dict[nn.Parameter, str]:
    """Map each parameter to its MM name, in the model's order."""
    return {parameter: theirs_of(key_map, name) for name, parameter in model.named_parameters()}


def load_checkpoint(
    folder: Path,
    state: TrainState,
    config: CheckpointConfig,
    accelerator: Accelerator,
    key_map: KeyMap,
    base: BaseReference | None,
) -> None:
    """Load `state` from one DCP folder, on any number of ranks.

    Raises WeightsError that names each mismatch.
    """
    saved = read_dcp(folder)
    found_base = saved.get("base")
    check_base(folder, found_base, base, config.finetune)
    check_config(folder, saved.get("config"), state.model)
    check_lora(folder, saved.get(ENTRY), whole_model(state.model))
    check_quantized(folder, saved.get(QUANTIZED), whole_model(state.model), config.finetune)
    reader = IndexReader(folder)
    names = mm_names(state.model, key_map)
    values = Values(folder, reader.read_metadata())
    every = {theirs_of(key_map, name) for name in whole_shapes(state.model)}
    check_weights(values, names, every, partial=isinstance(found_base, Mapping))
    content = raise_on_all_ranks(lambda: _targets(values, names, config, accelerator))
    try:
        load(content, storage_reader=reader, planner=TensorPlanner())
    except CheckpointException as error:
        raise WeightsError(reason_of(error), where=folder) from None
    if not config.finetune:
        raise_on_all_ranks(lambda: _fill(state, content, values, names, accelerator))


def _targets(
    values: Values, names: Mapping[nn.Parameter, str], config: CheckpointConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """Return a nested dict of this rank's tensors to load into, in the layout of the checkpoint."""
    content: dict[str, Any] = {
        "model": {name: p.detach() for p, name in names.items() if f"model.{name}" in values.entries}
    }
    if config.finetune:
        return content
    rank = f"rank_{dist.get_rank():05d}"
    content |= {
        "iteration": values.count("iteration"),
        "sampler": {"consumed_samples": values.count(_CONSUMED)},
    }
    if means := values.packed(f"loss_means.{rank}"):
        content["loss_means"] = {rank: means[0]}
    # A rank that is not in the checkpoint gets the hook states of rank 0.
    first = rank if f"hooks.{rank}" in values.entries else "rank_00000"
    if hooks := values.packed(f"hooks.{first}"):
        content["hooks"] = {first: hooks[0]}
    if skips := values.packed("skips"):
        content["skips"] = skips[0]
    if not config.no_load_optim:
        content |= _optimizer_targets(values, names)
    if not config.no_load_rng:
        content |= _rng_targets(values, rank, rng_state(accelerator))
    return content


def _fill(
    state: TrainState,
    content: Mapping[str, Any],
    values: Values,
    names: Mapping[nn.Parameter, str],
    accelerator: Accelerator,
) -> None:
    """Check each loaded value, and copy it to the fields of `state`."""
    state.iteration = values.read_count("iteration", content["iteration"])
    state.consumed_samples = values.read_count(_CONSUMED, content["sampler"]["consumed_samples"])
    if "skips" in content:
        state.skips = _skips(values, content["skips"])
    for rank, means in content.get("loss_means", {}).items():
        state.loss_means.update(_loss_means(values, f"loss_means.{rank}", means))
    for rank, hooks in content.get("hooks", {}).items():
        state.hooks = _hooks(values, f"hooks.{rank}", hooks)
    if "schedule" in content:
        schedule = values.unpack("schedule", content["schedule"])
        known = state.scheduler.state_dict()
        if not (
            isinstance(schedule, dict) and schedule.keys() >= known.keys() and is_count(schedule["num_steps"])
        ):
            raise values.error("schedule", f"a schedule with {', '.join(sorted(known))}", schedule)
        state.scheduler.load_state_dict(schedule)
    if "optimizer" in content:
        _load_optimizer(state, content["optimizer"], values, names)
    for generators in content.get("rng", {}).values():
        try:
            set_rng_state(accelerator, generators)
        except (RuntimeError, TypeError) as error:
            raise WeightsError(
                f"the random generator rejects its state ({error})",
                where=f"{values.folder}: rng",
                fix="add --no-load-rng",
            ) from None


def _skips(values: Values, packed: Tensor) -> Skips:
    found = values.unpack("skips", packed)
    if not (
        isinstance(found, dict)
        and found.keys() == vars(Skips()).keys()
        and all(map(is_count, found.values()))
    ):
        raise values.error("skips", f"counts {' and '.join(vars(Skips()))}", found)
    return Skips(**found)


def _loss_means(values: Values, name: str, packed: Tensor) -> dict[int, tuple[int, float]]:
    found = values.unpack(name, packed)
    rows = found if isinstance(found, list) else [found]
    for row in rows:
        if not (
            isinstance(row, list) and len(row) == 3 and all(map(is_count, row[:2])) and is_number(row[2])
        ):
            raise values.error(name, "rows of band, count and mean", row)
    return {band: (count, float(mean)) for band, count, mean in rows}


def _hooks(values: Values, name: str, packed: Tensor) -> dict[str, Any]:
    found = values.unpack(name, packed)
    if not (isinstance(found, dict) and all(isinstance(state, dict) for state in found.values())):
        raise values.error(name, "an object of states by the names of hooks", found)
    return found


def _load_optimizer(
    state: TrainState, found: Mapping[str, Any], values: Values, names: Mapping[nn.Parameter, str]
) -> None:
    steps = values.unpack("optimizer.group_steps", found["group_steps"])
    if not isinstance(steps, list) or not all(step is None or is_count(step) for step in steps):
        raise values.error("optimizer.group_steps", "a list of counts", steps)
    if None in steps or not steps:  # then each parameter has its own step counter
        for name, moments in found["state"].items():
            if "step" not in moments:
                raise values.error(f"optimizer.state.{name}", "a step", ", ".join(moments))
    finite = FiniteWeights(values.folder)
    for name, moments in found["state"].items():
        for key, moment in moments.items():
            finite.check(f"optimizer.state.{name}.{key}", local(moment))
            if key in ("step", "exp_avg_sq") and bool((local(moment) < 0).any()):
                raise values.error(f"optimizer.state.{name}.{key}", "no negative value", "one")
    finite.raise_if_nonfinite()
    load_optimizer_state(state.optimizer, found["state"], steps, names)


def _optimizer_targets(values: Values, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Allocate tensors for each parameter's moments, sharded like the parameter, and for its step counter."""
    targets: dict[str, dict[str, Tensor]] = {}
    by_name: dict[str, list[str]] = {}
    for entry_name in values.entries:
        if entry_name.startswith("optimizer.state."):
            name, _, key = entry_name.removeprefix("optimizer.state.").rpartition(".")
            by_name.setdefault(name, []).append(key)
    for parameter, name in names.items():
        for key in by_name.get(name, ()) if parameter.requires_grad else ():
            entry_name = f"optimizer.state.{name}.{key}"
            entry = values.tensor(entry_name)
            assert entry is not None
            size, dtype = entry.size, entry.properties.dtype
            if key == "step" and size.numel() == 1:
                target = torch.zeros(size, dtype=dtype)
            elif key in _MOMENTS and size == parameter.shape and dtype.is_floating_point:
                target = torch.zeros_like(parameter, dtype=dtype)
            else:
                expected = f"one of {', '.join(('step', *_MOMENTS))}, moments of {list(parameter.shape)}"
                raise WeightsError(
                    f"got {dtype} {list(size)}",
                    where=f"{values.folder}: {entry_name}",
                    expected=expected,
                    fix="add --no-load-optim to start with new moments",
                )
            targets.setdefault(name, {})[key] = target.detach()
    content: dict[str, Any] = {}
    if steps := values.packed("optimizer.group_steps"):
        content["optimizer"] = {"state": targets, "group_steps": steps[0]}
    if schedule := values.packed("schedule"):
        content["schedule"] = schedule[0]
    return content


def _rng_targets(values: Values, rank: str, current: Mapping[str, Tensor]) -> dict[str, Any]:
    """Allocate tensors for this rank's generator states.

    A rank that is not in the checkpoint keeps its own generators.
    """
    targets = {kind: tensor for kind in ("cpu", "device") for tensor in values.packed(f"rng.{rank}.{kind}")}
    for kind, target in targets.items():
        if kind in current and target.shape != current[kind].shape:
            raise WeightsError(
                f"got {target.numel()}",
                where=f"{values.folder}: rng.{rank}.{kind}",
                expected=f"{current[kind].numel()} bytes",
                fix="add --no-load-rng",
            )
    return {"rng": {rank: targets}} if "cpu" in targets else {}
