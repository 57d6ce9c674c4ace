"""Fill a training state from one checkpoint folder.

The index bounds what is allocated, and every value is checked before use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.config.schema import Config
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.distributed.pipeline import whole_shapes
from mindspeed_mm.distributed.rng import rng_state, set_rng_state
from mindspeed_mm.distributed.shards import local
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import display_path, parse_json
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.containers.tensors import kind_of
from mindspeed_mm.models.finite import FiniteWeights
from mindspeed_mm.models.keymap import KeyMap
from mindspeed_mm.models.lora.fused import same_fused
from mindspeed_mm.models.lora.saved import DOWN, ENTRY, UP, read_scales, theirs_of
from mindspeed_mm.models.transforms.lora import lora_scales
from mindspeed_mm.models.transforms.quantize import describe_quantized
from mindspeed_mm.models.wan.sizes import read_hints, setting_conflicts
from mindspeed_mm.training.checkpoint_files import IndexReader, TensorPlanner, reason_of
from mindspeed_mm.training.config import CheckpointConfig
from mindspeed_mm.training.state import Skips, TrainState, load_optimizer_state, unpack

logger = get_logger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # of a parameter's shape
_PACKED_BYTES = 1 << 20  # most bytes of a packed value or a generator's state
_LARGEST = 1 << 53  # largest count
_CONSUMED = "sampler.consumed_samples"
QUANTIZED = "quantized"  # entry: how the frozen weights were rounded, which are not saved


@dataclass(frozen=True)
class BaseReference:
    """Where the weights are that a trainable-only checkpoint leaves out.

    Goes into the checkpoint as a plain dict.
    """

    path: str
    fingerprint: str
    dialect: str
    loras: str = ""  # what was added to them before training, as `write_fused` writes it

    def entry(self) -> dict[str, str]:
        """As a checkpoint holds it."""
        return {key: value for key, value in asdict(self).items() if value}


def mm_names(model: nn.Module, key_map: KeyMap) -> dict[nn.Parameter, str]:
    """Parameter → its MM name, in the model's order."""
    return {parameter: theirs_of(key_map, name) for name, parameter in model.named_parameters()}


def load_checkpoint(
    folder: Path,
    state: TrainState,
    config: CheckpointConfig,
    accelerator: Accelerator,
    key_map: KeyMap,
    base: BaseReference | None,
) -> None:
    """Fill `state` from one DCP folder, on any number of ranks.

    Raises WeightsError naming what does not fit.
    """
    saved = read_dcp(folder)
    found_base = saved.get("base")
    _check_base(folder, found_base, base, config.finetune)
    _check_config(folder, saved.get("config"), state.model)
    _check_lora(folder, saved.get(ENTRY), state.model)
    _check_quantized(folder, saved.get(QUANTIZED), state.model, config.finetune)
    reader = IndexReader(folder)
    names = mm_names(state.model, key_map)
    values = _Values(folder, reader.read_metadata())
    every = {theirs_of(key_map, name) for name in whole_shapes(state.model)}
    _check_weights(values, names, every, partial=isinstance(found_base, Mapping))
    content = raise_on_all_ranks(lambda: _places(values, names, config, accelerator))
    try:
        load(content, storage_reader=reader, planner=TensorPlanner())
    except CheckpointException as error:
        raise WeightsError(reason_of(error)) from None
    if not config.finetune:
        raise_on_all_ranks(lambda: _fill(state, content, values, names, accelerator))


def _places(
    values: _Values, names: Mapping[nn.Parameter, str], config: CheckpointConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """What is read, as a nested dict of this rank's tensors to read into."""
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
    if skips := values.packed("skips"):
        content["skips"] = skips[0]
    if not config.no_load_optim:
        content |= _optimizer_places(values, names)
    if not config.no_load_rng:
        content |= _rng_places(values, rank, rng_state(accelerator))
    return content


def _fill(
    state: TrainState,
    content: Mapping[str, Any],
    values: _Values,
    names: Mapping[nn.Parameter, str],
    accelerator: Accelerator,
) -> None:
    """What was read → the fields of `state`, each checked."""
    state.iteration = values.read_count("iteration", content["iteration"])
    state.consumed_samples = values.read_count(_CONSUMED, content["sampler"]["consumed_samples"])
    if "skips" in content:
        state.skips = _skips(values, content["skips"])
    for rank, means in content.get("loss_means", {}).items():
        state.loss_means.update(_loss_means(values, f"loss_means.{rank}", means))
    if "schedule" in content:
        schedule = values.unpack("schedule", content["schedule"])
        known = state.scheduler.state_dict()
        if not (
            isinstance(schedule, dict)
            and schedule.keys() >= known.keys()
            and _is_count(schedule["num_steps"])
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
                f"the random generator refuses its state ({error})",
                where=f"{values.folder}: rng",
                fix="add --no-load-rng",
            ) from None


class _Values:
    """The entries of one checkpoint, and what they may be.

    Every method raises WeightsError that names the entry.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder, self.entries = folder, metadata.state_dict_metadata

    def error(self, name: str, expected: str, found: object) -> WeightsError:
        return WeightsError(
            f"got {_brief(found)}",
            where=f"{self.folder}: {name}",
            expected=expected,
            fix="load another iteration, or copy this one again",
        )

    def tensor(self, name: str) -> TensorStorageMetadata | None:
        entry = self.entries.get(name)
        if entry is not None and not isinstance(entry, TensorStorageMetadata):
            raise self.error(name, "a tensor", "a pickled value")
        return entry

    def count(self, name: str) -> Tensor:
        """A place for one whole number."""
        entry = self.tensor(name)
        if entry is None:
            raise self.error(name, "a whole number", "nothing")
        if entry.size.numel() != 1 or entry.properties.dtype.is_floating_point or len(entry.size) > 0:
            raise self.error(name, "one whole number", f"{entry.properties.dtype} {list(entry.size)}")
        return torch.zeros(entry.size, dtype=entry.properties.dtype)

    def read_count(self, name: str, value: Tensor) -> int:
        if not _is_count(number := int(value)):
            raise self.error(name, f"a number from 0 to {_LARGEST}", number)
        return number

    def packed(self, name: str) -> list[Tensor]:
        """A place for bytes; [] where the checkpoint has none."""
        entry = self.tensor(name)
        if entry is None:
            return []
        if (
            entry.properties.dtype != torch.uint8
            or len(entry.size) != 1
            or entry.size.numel() > _PACKED_BYTES
        ):
            raise self.error(
                name, f"at most {_PACKED_BYTES} bytes", f"{entry.properties.dtype} {list(entry.size)}"
            )
        return [torch.zeros(entry.size, dtype=torch.uint8)]

    def unpack(self, name: str, value: Tensor) -> Any:
        """Plain numbers and strings."""
        return unpack(value, f"{self.folder}: {name}")


def _skips(values: _Values, packed: Tensor) -> Skips:
    found = values.unpack("skips", packed)
    if not (
        isinstance(found, dict)
        and found.keys() == vars(Skips()).keys()
        and all(map(_is_count, found.values()))
    ):
        raise values.error("skips", f"counts {' and '.join(vars(Skips()))}", found)
    return Skips(**found)


def _loss_means(values: _Values, name: str, packed: Tensor) -> dict[int, tuple[int, float]]:
    found = values.unpack(name, packed)
    rows = found if isinstance(found, list) else [found]
    for row in rows:
        if not (
            isinstance(row, list) and len(row) == 3 and all(map(_is_count, row[:2])) and _is_number(row[2])
        ):
            raise values.error(name, "rows of band, count and mean", row)
    return {band: (count, float(mean)) for band, count, mean in rows}


def _load_optimizer(
    state: TrainState, found: Mapping[str, Any], values: _Values, names: Mapping[nn.Parameter, str]
) -> None:
    steps = values.unpack("optimizer.group_steps", found["group_steps"])
    if not isinstance(steps, list) or not all(step is None or _is_count(step) for step in steps):
        raise values.error("optimizer.group_steps", "a list of counts", steps)
    if None in steps or not steps:  # then each parameter counts its own
        for name, moments in found["state"].items():
            if "step" not in moments:
                raise values.error(f"optimizer.state.{name}", "a step", ", ".join(moments))
    finite = FiniteWeights(values.folder)
    for name, moments in found["state"].items():
        for key, moment in moments.items():
            finite.check(f"optimizer.state.{name}.{key}", local(moment))
            if key in ("step", "exp_avg_sq") and bool((local(moment) < 0).any()):
                raise values.error(f"optimizer.state.{name}.{key}", "no negative value", "one")
    finite.demand()
    load_optimizer_state(state.optimizer, found["state"], steps, names)


def _check_base(folder: Path, found: Any, base: BaseReference | None, finetune: bool) -> None:
    """A checkpoint of what trains goes with the weights that it was trained upon."""
    if not isinstance(found, Mapping):
        return
    path = display_path(str(found.get("path")))
    if base is None:
        raise WeightsError(
            "contains only what was trained",
            where=folder,
            fix=f"set predictor.from_pretrained to the rest: {path}",
        )
    if found.get("fingerprint") != base.fingerprint:
        problem = (
            f"was trained on {path} (fingerprint {str(found.get('fingerprint'))[:12]}), but "
            f"predictor.from_pretrained {base.path} has other weights ({base.fingerprint[:12]})"
        )
        if not finetune:
            raise WeightsError(
                problem, where=folder, fix="name the same weights, or start over with --finetune"
            )
        logger.warning(f"{folder}: {problem}")
    if not same_fused(found.get("loras"), base.loras):
        problem = "other LoRAs were fused into its base than the transforms of the model JSON fuse"
        if not finetune:
            raise WeightsError(problem, where=folder, fix="name the same, or start over with --finetune")
        logger.warning(f"{folder}: {problem}")


def _check_config(folder: Path, saved: Any, model: nn.Module) -> None:
    """The checkpoint's own settings and the job's agree; shapes do not tell the number of heads or eps."""
    config = getattr(model, "config", None)
    if saved is None or not isinstance(config, Config):
        return
    if not isinstance(saved, str):
        raise WeightsError(
            f"got {kind_of(saved)}",
            where=f"{folder}: config",
            expected="JSON",
            fix="copy the checkpoint again",
        )
    hints = read_hints(parse_json(saved, f"{folder}: config", WeightsError))
    if conflicts := setting_conflicts(read_hints(config.model_dump(mode="json")), hints):
        raise WeightsError(
            f"was trained with settings that differ from the model JSON: {'; '.join(conflicts)}",
            where=folder,
            fix="make them equal",
        )


def _check_lora(folder: Path, saved: object, model: nn.Module) -> None:
    """A checkpoint of a LoRA goes on as the same LoRA: the same layers, and on each the same scale."""
    scales = lora_scales(model)
    before = read_scales(saved, folder) if saved is not None else {}
    upon = f"name {folder} as predictor.from_pretrained and leave --load out"
    if before and not scales:
        raise WeightsError(
            f"holds a LoRA of {len(before)} layers, the job trains none",
            where=folder,
            fix=f"set --lora-rank and the rest as they were, or to train something else upon it {upon}",
        )
    if scales and not before:
        raise WeightsError(
            "holds no LoRA, and the job trains one", where=folder, fix=f"to train a LoRA upon it {upon}"
        )
    if odd := sorted(scales.keys() ^ before.keys()):
        raise WeightsError(
            (
                f"its LoRA is on {len(before)} layers and the job's on {len(scales)}; {odd[0]} is on one "
                "side "
                "only"
            ),
            where=folder,
            fix="set match and on as they were",
        )
    for name in sorted(scales):
        if not math.isclose(scales[name], before[name]):
            raise WeightsError(
                f"its LoRA has scale {before[name]:g} in {name}, the job has {scales[name]:g}",
                where=folder,
                fix="set rank, alpha and rslora as they were",
            )


def _check_quantized(folder: Path, saved: object, model: nn.Module, finetune: bool) -> None:
    """Training continues on the same rounded weights.

    They are read from the base and rounded again, to the bit.
    """
    before, now = saved or "", describe_quantized(model)
    if before == now:
        return
    problem = f"was trained upon {_held(before)}, the job has {_held(now)}"
    if not finetune:
        fix = "set quantize as it was, or start over with --finetune"
        raise WeightsError(problem, where=folder, fix=fix)
    logger.warning(f"{folder}: {problem}")


def _held(text: object) -> str:
    if not text:
        return "no weights in 8 bits"
    found = parse_json(text, QUANTIZED, WeightsError) if isinstance(text, str) else None
    if not isinstance(found, dict):
        return f"{_brief(text)}"
    return " and ".join(f"{count} layers in {form}" for form, count in found.items())


def _check_weights(
    values: _Values, names: Mapping[nn.Parameter, str], every: set[str], *, partial: bool
) -> None:
    saved = {key.removeprefix("model.") for key in values.entries if key.startswith("model.")}
    trained = {name for parameter, name in names.items() if parameter.requires_grad}
    missing, foreign = sorted(trained - saved), sorted(saved - every)
    if missing or foreign:
        text = "; ".join(
            f"{title}: {', '.join(found[:4])}{' …' if len(found) > 4 else ''}"
            for title, found in (
                ("lacks weights that train here", missing),
                ("holds weights of another model", foreign),
            )
            if found
        )
        advice = "check the model JSON's sizes and predictor.trainable"
        if partial and not foreign:
            advice = (
                "it holds what trained only: set predictor.trainable to what it was, or to train more of "
                "the model "
                f"set predictor.from_pretrained to {values.folder} and leave --load out"
            )
        raise WeightsError(text, where=values.folder, fix=advice)
    for parameter, name in names.items():
        entry = values.tensor(f"model.{name}")
        if entry is not None and not parameter.is_floating_point():
            raise WeightsError(
                f"holds {name}, which the job holds in 8 bits",
                where=values.folder,
                fix=f"name {values.folder} as predictor.from_pretrained, and leave --load out",
            )
        if entry is not None and (
            entry.size != parameter.shape or not entry.properties.dtype.is_floating_point
        ):
            raise WeightsError(
                f"got {entry.properties.dtype} {list(entry.size)}",
                where=f"{values.folder}: model.{name}",
                expected=f"a floating-point weight of {list(parameter.shape)}",
                fix="set rank as it was" if name.endswith((DOWN, UP)) else "check the model JSON's sizes",
            )


def _optimizer_places(values: _Values, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Empty tensors for each parameter's moments, sharded like the parameter, and for its counter."""
    places: dict[str, dict[str, Tensor]] = {}
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
                place = torch.zeros(size, dtype=dtype)
            elif key in _MOMENTS and size == parameter.shape and dtype.is_floating_point:
                place = torch.zeros_like(parameter, dtype=dtype)
            else:
                expected = f"one of {', '.join(('step', *_MOMENTS))}, moments of {list(parameter.shape)}"
                raise WeightsError(
                    f"got {dtype} {list(size)}",
                    where=f"{values.folder}: {entry_name}",
                    expected=expected,
                    fix="add --no-load-optim to start with new moments",
                )
            places.setdefault(name, {})[key] = place.detach()
    content: dict[str, Any] = {}
    if steps := values.packed("optimizer.group_steps"):
        content["optimizer"] = {"state": places, "group_steps": steps[0]}
    if schedule := values.packed("schedule"):
        content["schedule"] = schedule[0]
    return content


def _rng_places(values: _Values, rank: str, current: Mapping[str, Tensor]) -> dict[str, Any]:
    """This rank's generators; a rank that the checkpoint does not know keeps its own."""
    places = {kind: tensor for kind in ("cpu", "device") for tensor in values.packed(f"rng.{rank}.{kind}")}
    for kind, place in places.items():
        if kind in current and place.shape != current[kind].shape:
            raise WeightsError(
                f"got {place.numel()}",
                where=f"{values.folder}: rng.{rank}.{kind}",
                expected=f"{current[kind].numel()} bytes",
                fix="add --no-load-rng",
            )
    return {"rng": {rank: places}} if "cpu" in places else {}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
