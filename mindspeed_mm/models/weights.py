"""Opens the weights of a transformer in any known dialect.

`open_weights` finds the files, translates the names, and adds the frozen weights to a trainable-only
checkpoint. It rejects missing and unknown weights before any value is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import stat_path
from mindspeed_mm.log import get_logger, once
from mindspeed_mm.models.all_in_one import select_part
from mindspeed_mm.models.check_weights import check_weights, refuse_another_base
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.containers.gguf_file import read_gguf
from mindspeed_mm.models.containers.rounded import expand
from mindspeed_mm.models.containers.safetensors import read_safetensors
from mindspeed_mm.models.containers.tensors import FLOATS, TensorFile, kind_of
from mindspeed_mm.models.containers.torch_file import read_torch
from mindspeed_mm.models.dialects import detect_dialect, truncate_list
from mindspeed_mm.models.find import SHARD, Files, find_files, shards
from mindspeed_mm.models.hints import Hints, find_hints
from mindspeed_mm.models.keymap import KeyMap
from mindspeed_mm.models.lora.adapter import Adapter, Pair, merged
from mindspeed_mm.models.lora.fused import fuse_again
from mindspeed_mm.models.lora.read import CONFIG, Expert, open_lora, open_published_lora
from mindspeed_mm.models.lora.saved import ENTRY, split_lora
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.wan.config import BRANCH
from mindspeed_mm.models.wan.stages import count_layers, merge
from mindspeed_mm.models.wan.state_dict import KEY_MAPS

logger = get_logger(__name__)
PathLike = str | Path
_NESTED = (
    "model",
    "state_dict",
    "model_state",
    "model_state_dict",
    "module",
)  # keys under which a file may nest its weights


def open_weights(
    path: PathLike | Sequence[PathLike], *, base_path: PathLike | None = None, original: bool = False
) -> WeightsSource:
    """Open the weights in a folder, a file or a list of shards, in any dialect.

    `base_path` replaces the path that a trainable-only checkpoint stores for its frozen weights. With
    `original`, an MM checkpoint next to original files is ignored.

    Raises a one-line WeightsError if a key is missing, unknown, duplicate or of the wrong shape, if a file is
    damaged, and for LoRA files.
    """
    if isinstance(path, str | Path):
        return _open(_find(Path(path), original), base_path, seen=())
    paths = [Path(part) for part in path]
    if len(paths) == 1:
        return _open(_find(paths[0], original), base_path, seen=())
    if all(SHARD.fullmatch(part.name) and part.suffix == ".safetensors" for part in paths):
        return _open(shards(paths), base_path, seen=())
    return _join([_find(part, original) for part in paths], base_path)


def open_part(path: PathLike) -> WeightsSource:
    """Open weights of any dialect that may be only a part of a model. Raises WeightsError."""
    return _open(_find(Path(path)), None, seen=(), partial=True)


def open_named(path: PathLike, key_maps: Mapping[str, KeyMap]) -> WeightsSource:
    """Open the weights of any model, under the names that `key_maps` translates to.

    The layout of the model is unknown here, so missing weights are reported only when a model is filled.
    Raises WeightsError.
    """
    return _open(find_files(Path(path)), None, seen=(), key_maps=key_maps)


def open_adapter(
    path: PathLike, shapes: Mapping[str, Sequence[int]] | None = None, *, expert: Expert | None = None
) -> Adapter:
    """Open the LoRA in a training checkpoint, or in a LoRA file as `open_lora` does.

    Without `shapes`, a file is read for the published model that it fits. If a checkpoint is saved without
    its base, the weights that were trained in full are part of the adapter. Raises WeightsError.
    """
    files = _checkpoint(Path(path))
    if files is None:
        if shapes is None:
            return open_published_lora(path, expert=expert)
        return open_lora(path, shapes, expert=expert)
    where = files.paths[0].absolute()
    dialect, tensors, _, pairs, extras = _read(files, where, KEY_MAPS)
    if not pairs:
        raise WeightsError("is a checkpoint without a LoRA", where=where, fix="use one that trained a LoRA")
    base = extras.get("base")
    place = str(base["path"]) if isinstance(base, dict) and "path" in base else None
    if tensors and place is None:
        logger.info(f"{where}: a whole model; its LoRA alone is read, without modules_to_save", extra=once())
    adapter = Adapter(where, dialect, pairs, whole=tensors if place is not None else {}, base=place)
    if shapes is not None and (problems := adapter.misfits(shapes)):
        raise WeightsError(f"does not fit the model: {truncate_list(problems)}", where=where)
    return adapter


def _checkpoint(path: Path) -> Files | None:
    """Return the files of a training checkpoint, or None for anything else."""
    if (path / CONFIG).exists() or not (path.is_dir() or path.suffix in (".pt", ".pth")):
        return None
    try:
        files = _find(path)
    except WeightsError:
        return None  # the reader of LoRA files reports the problem
    if files.kind == "torch" and len(files.paths) == 1 and ENTRY not in read_torch(files.paths[0]):
        return None
    return None if files.kind in ("safetensors", "gguf") else files


def _find(path: Path, original: bool = False) -> Files:
    files = find_files(path, original=original)
    if files.note:
        logger.info(files.note, extra=once())
    return files


def _join(parts: Sequence[Files], base_path: PathLike | None) -> WeightsSource:
    """Join parts of one model that are not plain shards, such as a trunk's folder and a VACE module file."""
    sources = [_open(part, None, seen=(), partial=True) for part in parts]
    tensors: dict[str, TensorFile] = {}
    for source in sources:
        if twice := tensors.keys() & source.tensors.keys():
            raise WeightsError(
                f"{truncate_list(sorted(twice))} is also in another listed part",
                where=source.path,
                fix="keep one",
            )
        tensors |= source.tensors
    whole = next((source for source in sources if not source.has_branch), sources[0])
    hints = {name: value for source in sources for name, value in source.hints.items()}
    settings = {name: value for source in sources for name, value in source.settings.items()}
    what = " and ".join(source.what for source in sources)
    merged = replace(whole, what=what, tensors=tensors, hints=hints, settings=settings)
    merged = _complete(merged, None, base_path, (), KEY_MAPS)
    check_weights(merged)
    return merged


def replace_branch(trunk: WeightsSource, path: PathLike) -> WeightsSource:
    """Combine the trunk of `trunk` with the VACE branch of the checkpoint at `path`.

    That checkpoint may contain only the branch. Raises WeightsError if it has no branch or does not fit.
    """
    other = open_weights(path, base_path=trunk.path)
    filled_in = other.base.tensors if other.base is not None else {}  # weights that the trunk's files added
    branch = {
        name: tensor
        for name, tensor in other.tensors.items()
        if name.split(".")[0] in BRANCH and tensor is not filled_in.get(name)
    }
    if not branch:
        raise WeightsError(
            "contains no VACE branch", where=path, fix="set vace_dit.vace_pretrained to weights with one"
        )
    rest = {name: tensor for name, tensor in trunk.tensors.items() if name.split(".")[0] not in BRANCH}
    what = f"{trunk.what}, branch of {other.path}"
    hints, hints_path = {**trunk.hints, **other.hints}, other.hints_from or trunk.hints_from
    settings = {**trunk.settings, **other.settings}
    tensors = {**rest, **branch}
    return replace(trunk, what=what, tensors=tensors, hints=hints, hints_from=hints_path, settings=settings)


def _open(
    files: Files,
    base_path: PathLike | None,
    seen: tuple[Path, ...],
    key_maps: Mapping[str, KeyMap] = KEY_MAPS,
    *,
    partial: bool = False,
) -> WeightsSource:
    """Open the weights of `files`.

    With `partial`, completeness is not checked, as other files add the rest.
    """
    where = files.paths[0] if len(files.paths) == 1 else files.config_dirs[0]
    dialect, tensors, stage_layers, pairs, extras = _read(files, where, key_maps)
    odd = [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if odd:
        raise WeightsError(
            f"has weights that are not float32, bfloat16 or float16: {truncate_list(odd)}", where=where
        )
    hints = find_hints(files, extras.get("config")) if key_maps is KEY_MAPS else Hints({})
    source = WeightsSource(where.absolute(), dialect, files.what, tensors, *hints, stage_layers=stage_layers)
    source = _complete(source, extras.get("base"), base_path, seen, key_maps)
    if pairs:
        source = merged(source, [(Adapter(where.absolute(), dialect, pairs), 1.0)])
    if key_maps is KEY_MAPS and not partial:
        check_weights(source)
    return source


def _read(
    files: Files, where: Path, key_maps: Mapping[str, KeyMap]
) -> tuple[str, dict[str, TensorFile], tuple[int, ...], dict[str, Pair], Mapping[str, Any]]:
    """Read the headers of `files`.

    Returns the dialect, the tensors by their official names, the number of trunk blocks of each stage, the
    matrix pairs of a LoRA, and the plain values.
    """
    extras: Mapping[str, Any] = {}
    if files.kind == "safetensors":
        stages: list[Mapping[str, Any]] = [read_safetensors(files.paths).tensors]
    elif files.kind == "gguf":
        stages = [read_gguf(files.paths[0]).tensors]
    else:
        states = [read_dcp(path) if files.kind == "dcp" else read_torch(path) for path in files.paths]
        stages, extras = _stages(states, where), states[0]
    stages = [expand(select_part(stage, "transformer", where), where) for stage in stages]
    split = [split_lora(stage, extras, where, key_maps["mm"]) for stage in stages] if extras else []
    pairs = {name: pair for _, found in split for name, pair in found.items()}
    stages = [rest for rest, _ in split] or stages
    if pairs and not any(stages):  # the files contain only a LoRA
        return "mm", {}, (), pairs, extras
    namings = [detect_dialect(stage, where, key_maps) for stage in stages]
    tensors = [
        {name: stage[raw] for name, raw in n.ours.items()} for n, stage in zip(namings, stages, strict=True)
    ]
    if len(tensors) == 1:
        return namings[0].dialect, tensors[0], (), pairs, extras
    return namings[0].dialect, merge(tensors), tuple(map(count_layers, tensors)), pairs, extras


def _stages(states: Sequence[Mapping[str, Any]], where: Path) -> list[Mapping[str, Any]]:
    """Return the weights of each flat pipeline stage.

    Chunk v of rank p is flat stage v·pp + p. Most checkpoints have a single stage.
    """
    chunks = 0
    while all(f"model{chunks}" in state for state in states):
        chunks += 1
    if chunks:
        return [_weights(state[f"model{v}"], where) for v in range(chunks) for state in states]
    return [_weights(_unwrap(state), where) for state in states]


def _unwrap(state: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((state[key] for key in _NESTED if isinstance(state.get(key), dict)), state)


def _weights(values: Any, where: Path, prefix: str = "") -> dict[str, TensorFile]:
    """Flatten nested dicts to dotted names.

    Raises WeightsError for a value that is neither a tensor nor an extra state.
    """
    found: dict[str, TensorFile] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        name = f"{prefix}{key}"
        if isinstance(value, TensorFile):
            found[name] = value
        elif isinstance(value, dict):
            found |= _weights(value, where, f"{name}.")
        elif not name.endswith("_extra_state"):
            raise WeightsError(f"{name} is {kind_of(value)}", where=where, expected="a state dict of tensors")
    return found


def _complete(
    source: WeightsSource,
    base: Any,
    base_path: PathLike | None,
    seen: tuple[Path, ...],
    key_maps: Mapping[str, KeyMap],
) -> WeightsSource:
    """Add the frozen weights that a trainable-only checkpoint leaves out.

    Raises WeightsError if they were moved or changed.
    """
    if not isinstance(base, dict) and base_path is None:
        return source
    recorded = base if isinstance(base, dict) else {}
    place = Path(base_path if base_path is not None else str(recorded.get("path")))
    hint = "set --cfg.base_path (mm-convert) or predictor.from_pretrained (training) to its base"
    try:
        stat_path(place, WeightsError)
    except WeightsError as error:
        raise WeightsError(
            f"contains only the trained weights, and its base cannot be read: {error}",
            where=source.path,
            fix=hint,
        ) from None
    if place in seen or len(seen) > 8:
        raise WeightsError(f"its base {place} refers back to it", where=source.path, fix=hint)
    whole = _open(find_files(place), None, (*seen, place), key_maps)
    fingerprint = recorded.get("fingerprint")
    if fingerprint and whole.fingerprint() != fingerprint:
        raise WeightsError(
            f"{place} is not the base it was trained on: the values differ", where=source.path, fix=hint
        )
    refuse_another_base(source, whole)
    whole = fuse_again(whole, recorded.get("loras"), source.path, open_adapter)
    hints = {**whole.hints, **source.hints}
    hints_path = source.hints_from or whole.hints_from
    tensors, settings = {**whole.tensors, **source.tensors}, {**whole.settings, **source.settings}
    return replace(source, tensors=tensors, hints=hints, hints_from=hints_path, settings=settings, base=whole)
