"""One conversion.

Open the source, lay out the target, stream every weight into it, read it back, move it into place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.config import ConvertConfig, DcpToTorchConfig, ExtractLoraConfig, LoraToConfig
from checkpoint.layout import check_space, replace_entries, replace_file, staging, writing
from checkpoint.stages import mm_files
from megatron.mm.layout import RELEASE, read_tracker, write_tracker
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import format_json, write_text
from mindspeed_mm.log import get_logger, log_table
from mindspeed_mm.models.containers.checksums import verifying
from mindspeed_mm.models.containers.safetensors import write_safetensors
from mindspeed_mm.models.containers.tensors import HEAD_BYTES, TensorFile
from mindspeed_mm.models.containers.torch_file import write_torch
from mindspeed_mm.models.finite import FiniteWeights
from mindspeed_mm.models.source import WeightsSource, differences
from mindspeed_mm.models.wan.config import BRANCH
from mindspeed_mm.models.wan.sizes import diffusers_json, infer_config, official_json
from mindspeed_mm.models.wan.stages import Layers
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.weights import open_part, open_weights
from mindspeed_mm.processes import deferred
from mindspeed_mm.progress import Progress, size_text

logger = get_logger(__name__)
STEM = "diffusion_pytorch_model"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
METHOD_OF = {
    "official": "hf_to_mm",
    "diffusers": "hf_diffusers_to_mm",
    "mm": "mm_to_hf, mm_to_hf_diffusers or resplit",
}
Written = Callable[[int], object]
AnyConfig = ConvertConfig | DcpToTorchConfig | LoraToConfig | ExtractLoraConfig


@dataclass(frozen=True)
class Target:
    """Files to write, by their path under `folder`, and what they take the place of."""

    folder: Path
    name: str  # of the file; "" when the target is a folder
    torch_files: Mapping[str, Mapping[str, Any]]  # path → state dict with TensorFiles
    safetensors: Mapping[str, Mapping[str, TensorFile]]  # path → name → tensor
    texts: Mapping[str, str]  # path → small text file
    owned: tuple[str, ...] = ()  # patterns of what a former conversion left in the folder
    last: str = ""  # the entry that completes it
    tracker: bool = False
    metadata: Mapping[str, str] | None = None  # of the headers of safetensors


def open_source(
    cfg: ConvertConfig, *, dialects: Sequence[str], method: str, base_path: str | None = None
) -> WeightsSource:
    """The weights to convert, in `cfg.dtype`.

    Raises WeightsError when they are in another dialect than the method reads.
    """
    source = open_weights(cfg.source_path, base_path=base_path, original="mm" not in dialects)
    if source.dialect not in dialects:
        raise WeightsError(
            f"has {source.dialect} names, but {method} reads {dialects[0]} names",
            where=source.path,
            fix=f"use {METHOD_OF[source.dialect]}",
        )
    return cast(source, cfg.dtype)


def cast(source: WeightsSource, name: str) -> WeightsSource:
    """The same weights as `bf16` or `fp32`, one by one when they are read.

    `source` leaves them as they are.
    """
    if name not in DTYPES:
        return source
    dtype = DTYPES[name]
    tensors = {
        key: TensorFile(tensor.shape, dtype, partial(_read_as, tensor, dtype))
        for key, tensor in source.tensors.items()
    }
    return replace(source, tensors=tensors)


def mm_target(source: WeightsSource, cfg: ConvertConfig, pp_layers: Layers) -> Target:
    """An MM folder: tracker, `release/mp_rank_00[_ppp]/model_optim_rng.pt`, and the sizes beside them."""
    folder = Path(cfg.target_path)
    if folder.suffix in (".pt", ".pth", ".safetensors") or folder.is_file():
        raise WeightsError(
            "got a file name",
            where=folder,
            expected="a folder, as an MM checkpoint is one",
            fix="give a folder as target_path",
        )
    if isinstance(read_tracker(folder), int):
        raise WeightsError("is the folder of a training run", where=folder, fix="choose another target_path")
    return Target(
        folder=folder,
        name="",
        torch_files=mm_files(source, pp_layers),
        safetensors={},
        texts=_sizes(source, f"{RELEASE}/config.json"),
        owned=(RELEASE,),
        last=RELEASE,
        tracker=True,
    )


def hf_target(source: WeightsSource, cfg: ConvertConfig, dialect: str, max_shard_gb: float) -> Target:
    """One .pt, .pth or .safetensors file, or a folder of shards with index and config.json, by the name."""
    path = Path(cfg.target_path)
    names = KEY_MAPS[dialect]
    tensors = {names.to_theirs(name): tensor for name, tensor in source.tensors.items()}
    if path.suffix in (".pt", ".pth", ".safetensors"):
        if path.is_dir():
            raise WeightsError("is a folder", where=path, fix="remove it, or give target_path another name")
        is_torch = path.suffix != ".safetensors"
        return Target(
            folder=path.parent,
            name=path.name,
            torch_files={path.name: tensors} if is_torch else {},
            safetensors={} if is_torch else {path.name: by_alignment(tensors)},
            texts=_sidecar(path, source),
        )
    if path.is_file():
        raise WeightsError(
            "is a file, but a target_path without .pt, .pth or .safetensors names a folder",
            where=path,
            fix="choose another target_path",
        )
    if source.base is not None and path.resolve() in (
        source.base.path.resolve(),
        source.base.path.resolve().parent,
    ):
        raise WeightsError(
            f"would overwrite the base of {source.path}", where=path, fix="choose another target_path"
        )
    files = _shards(tensors, int(max_shard_gb * 1e9))
    is_diffusers = dialect == "diffusers"  # which cannot load a folder without it
    texts = (
        {"config.json": json_text(diffusers_json(source.config))}
        if is_diffusers
        else _sizes(source, "config.json")
    )
    last = f"{STEM}.safetensors"
    if len(files) > 1:
        last = f"{STEM}.safetensors.index.json"
        texts[last] = json_text(_index(files))
    owned = (
        f"{STEM}.safetensors",
        f"{STEM}-?????-of-?????.safetensors",
        f"{STEM}.safetensors.index.json",
        "config.json",
    )
    return Target(path, "", {}, files, texts, owned=owned, last=last)


def convert(
    source: WeightsSource,
    target: Target,
    cfg: ConvertConfig,
    method: str,
    rows: Sequence[tuple[str, str]] = (),
) -> None:
    """Write, read back, move into place. Memory: the largest tensor.

    Raises WeightsError and leaves the target as it was.

    `rows` of the table that say where `source` came from, where it is made of several.
    """
    shown = rows or [("source", source.description)]
    log_conversion(method, shown, target, source.tensors.values(), cfg)

    def check(path: Path, seen: Written) -> None:
        read_back(path, source, cfg.verify == "bits", seen)

    put(target, list(source.tensors.values()), check, cfg, method)


def log_conversion(
    method: str,
    sources: Sequence[tuple[str, str]],
    target: Target,
    tensors: Collection[TensorFile],
    cfg: AnyConfig,
) -> None:
    """The table of a conversion, before it writes."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    files = [*target.torch_files, *target.safetensors]
    bits = getattr(cfg, "verify", "heads") == "bits"
    checks = "every bit is read back" if bits else "names, shapes and 64 KiB of each weight are read back"
    log_table(
        [
            ("method", method),
            *sources,
            ("weights", f"{len(tensors)} tensors, {size_text(nbytes)}, {', '.join(dtypes)}"),
            ("checksums", "verified" if cfg.verify_checksums else "not verified"),
            ("output", f"{_shown(target)}, {len(files)} {'file' if len(files) == 1 else 'files'} of weights"),
            ("check", checks),
        ]
    )


def _shown(target: Target) -> Path:
    return target.folder / target.name if target.name else target.folder


def write_module(source: WeightsSource, cfg: ConvertConfig, method: str) -> None:
    """The VACE branch alone, in one file of official names: what ComfyUI users exchange. Raises WeightsError.

    ComfyUI sees no config: it takes heads of 128 channels, and a hint every layers // blocks trunk blocks.
    """
    path = Path(cfg.target_path)
    if path.suffix != ".safetensors" or path.is_dir():
        raise WeightsError(f"got {path.name}", where=path, expected="a name in .safetensors as target_path")
    if not source.has_branch:
        raise WeightsError("has no VACE branch to write", where=source.path, fix="leave form module out")
    trunk, layers = source.config.trunk, source.config.vace_layers
    usual = tuple(range(0, trunk.num_layers, trunk.num_layers // len(layers)))
    if trunk.hidden_size != 128 * trunk.num_heads or layers != usual:
        raise WeightsError(
            f"a module file cannot say {trunk.num_heads} heads of "
            f"{trunk.hidden_size // trunk.num_heads} channels and hints at {list(layers)}: its reader takes "
            f"heads of 128 and hints at {list(usual)}",
            where=source.path,
            fix="write the whole model",
        )
    branch = {name: tensor for name, tensor in source.tensors.items() if name.split(".")[0] in BRANCH}
    source = replace(source, tensors=branch)
    target = Target(path.parent, path.name, {}, {path.name: by_alignment(branch)}, {})

    def check(written: Path, seen: Written) -> None:
        read_back(written, source, cfg.verify == "bits", seen, opener=open_part)

    log_conversion(
        method, [("source", source.description)], target, target.safetensors[path.name].values(), cfg
    )
    put(target, list(branch.values()), check, cfg, method)


def put(
    target: Target,
    tensors: Sequence[TensorFile],
    check: Callable[[Path, Written], None],
    cfg: AnyConfig,
    method: str,
) -> None:
    """Write `target`, which holds `tensors`, `check` what was written, and move it into place.

    Raises WeightsError.

    Weights with NaN or Inf are refused once all have been read, unless `cfg.allow_nonfinite`. With
    `cfg.dry_run`, only the room on the disk is checked.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    shown = _shown(target)
    name = target.name or "folder"
    if cfg.dry_run:
        check_space(target.folder, total)
        logger.info(f"{shown}: {len(tensors)} tensors, {size_text(total)} would be written")
        return
    with writing(shown), staging(target.folder, name, owned=target.owned, last=target.last) as place:
        check_space(target.folder, total)
        new = place / "new"
        new.mkdir()
        with Progress(f"writing {shown}", total, "B") as progress:
            write_finite(new, target, cfg.source_path, cfg.allow_nonfinite, progress.step)
        with Progress(f"checking {shown}", total, "B") as progress:
            check(new / target.name if target.name else new, progress.step)
        with deferred():  # a signal must not find the target in between
            if target.name:
                for text in target.texts:
                    replace_file(new / text, target.folder / text)
                replace_file(new / target.name, target.folder / target.name)
            else:
                replace_entries(new, place, target.folder, target.owned, last=target.last)
            if target.tracker:
                write_tracker(target.folder, RELEASE)
        if target.tracker:  # folders of other programs get no file of ours
            job = {"method": method, **cfg.model_dump(mode="json")}
            write_text(target.folder / "job.json", format_json(job, indent=2) + "\n")
    logger.info(f"{shown}: {len(tensors)} tensors, {size_text(total)}")


def write_finite(
    new: Path, target: Target, where: str, allow: bool, written: Written = lambda nbytes: None
) -> None:
    """Like `write`.

    Raises WeightsError that names the weights of `where` with NaN or Inf; `allow` makes it a warning.
    """
    finite = FiniteWeights(where)

    def checked(value: Any, name: str) -> Any:
        if isinstance(value, TensorFile):
            return replace(value, read=partial(_read_checked, value, name, finite), raw=None)
        if isinstance(value, Mapping):
            return {
                key: checked(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()
            }
        return value

    torch_files = {path: checked(state, "") for path, state in target.torch_files.items()}
    safetensors = {path: checked(state, "") for path, state in target.safetensors.items()}
    write(new, replace(target, torch_files=torch_files, safetensors=safetensors), written)
    if allow and finite.problem:
        logger.warning(f"{where}: {finite.problem}; converted all the same")
    elif finite.problem:
        finite.demand("fetch the source again, or convert it as it is with --cfg.allow_nonfinite true")


def _read_checked(tensor: TensorFile, name: str, finite: FiniteWeights) -> Tensor:
    values = tensor.read()
    finite.check(name, values)
    return values


def write(new: Path, target: Target, written: Written = lambda nbytes: None) -> None:
    """Stream the files of `target` into the folder `new`.

    Raises OSError when the disk is full or cannot be written.
    """
    for name, text in target.texts.items():
        _at(new, name).write_text(text, encoding="utf-8")
    for name, state in target.torch_files.items():
        write_torch(_at(new, name), state, written=written)
    for name, tensors in target.safetensors.items():
        write_safetensors(_at(new, name), tensors, written=written, metadata=target.metadata)


def _at(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_back(
    path: Path,
    source: WeightsSource,
    bits: bool,
    seen: Written = lambda nbytes: None,
    *,
    opener: Callable[[Path], WeightsSource] = open_weights,
) -> None:
    """Raises WeightsError unless `path` holds exactly the weights of `source`."""
    with verifying(bits):  # where only heads are read, checksums would read all
        written = opener(path)
        problems = differences(written.shapes, source.shapes)
        if problems or written.dtypes != source.dtypes:
            raise WeightsError(
                f"was not written as planned: {problems or 'dtypes differ'}",
                where=path,
                fix="report this as a bug",
            )
        for name, tensor in source.tensors.items():
            check_same(path, name, tensor, written.tensors[name], bits)
            seen(tensor.nbytes)


def check_same(path: Path, name: str, tensor: TensorFile, written: TensorFile, bits: bool) -> None:
    """Raises WeightsError unless the heads, or all bits, of what was written at `path` equal `tensor`."""
    if not _same(tensor.read(), written.read(), None if bits else HEAD_BYTES // tensor.dtype.itemsize):
        raise WeightsError(
            f"{name} reads back with different values", where=path, fix="check the disk and convert again"
        )


def _same(a: Tensor, b: Tensor, count: int | None) -> bool:
    first, second = (t.reshape(-1)[:count].contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def _read_as(tensor: TensorFile, dtype: torch.dtype) -> Tensor:
    return tensor.read().to(dtype)


def by_alignment(tensors: Mapping[str, TensorFile]) -> dict[str, TensorFile]:
    """Wide dtypes first, so that every tensor begins at a multiple of its item size."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def _sidecar(path: Path, source: WeightsSource) -> dict[str, str]:
    """`<file>.json` with the sizes, for a model whose weights do not show them (no published one)."""
    try:
        known = infer_config(source.shapes, {}) == source.config
    except WeightsError:
        known = False
    return {} if known else _sizes(source, path.with_suffix(".json").name)


def _sizes(source: WeightsSource, name: str) -> dict[str, str]:
    """A config.json under `name`, or nothing and a warning where the source does not say all it needs."""
    try:
        return {name: json_text(official_json(source.config))}
    except WeightsError as error:
        logger.warning(f"{error}. The weights are converted all the same, without {name}")
        return {}


def _shards(tensors: Mapping[str, TensorFile], most: int) -> dict[str, dict[str, TensorFile]]:
    """File name → its tensors, each file at most `most` bytes (or one tensor)."""
    parts: list[dict[str, TensorFile]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    if len(parts) == 1:
        return {f"{STEM}.safetensors": by_alignment(parts[0])}
    return {
        f"{STEM}-{i:05d}-of-{len(parts):05d}.safetensors": by_alignment(part)
        for i, part in enumerate(parts, 1)
    }


def _index(files: Mapping[str, Mapping[str, TensorFile]]) -> dict[str, Any]:
    size = sum(tensor.nbytes for part in files.values() for tensor in part.values())
    return {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, part in files.items() for name in part},
    }


def json_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
