"""Plans the files of a conversion and their content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.config import ConvertConfig
from checkpoint.stages import mm_files
from megatron.mm.layout import RELEASE, read_tracker
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.wan.config_json import diffusers_json, official_json
from mindspeed_mm.models.wan.sizes import infer_config
from mindspeed_mm.models.wan.stages import Layers
from mindspeed_mm.models.wan.state_dict import KEY_MAPS

logger = get_logger(__name__)
STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Target:
    """The files to write, by their path under `folder`, and the existing entries that they replace."""

    folder: Path
    name: str  # file name; "" if the target is a folder
    torch_files: Mapping[str, Mapping[str, Any]]  # path → state dict with TensorFiles
    safetensors: Mapping[str, Mapping[str, TensorFile]]  # path → name → tensor
    texts: Mapping[str, str]  # path → small text file
    owned: tuple[str, ...] = ()  # patterns of the entries that the conversion replaces
    last: str = ""  # the entry that is moved last, which completes the folder
    tracker: bool = False
    metadata: Mapping[str, str] | None = None  # metadata for the headers of the safetensors files

    @property
    def path(self) -> Path:
        """The user's target_path: a file or a folder."""
        return self.folder / self.name if self.name else self.folder


def mm_target(source: WeightsSource, cfg: ConvertConfig, pp_layers: Layers) -> Target:
    """Plan an MM folder: tracker, `release/mp_rank_00[_ppp]/model_optim_rng.pt`, and a config.json."""
    folder = Path(cfg.target_path)
    if folder.suffix in (".pt", ".pth", ".safetensors") or folder.is_file():
        raise WeightsError(
            "got a file name",
            where=folder,
            expected="a folder for an MM checkpoint",
            fix="use a folder as target_path",
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
    """Plan one .pt, .pth or .safetensors file, or a folder of shards with an index and config.json.

    The suffix of the target path decides which.
    """
    path = Path(cfg.target_path)
    names = KEY_MAPS[dialect]
    tensors = {names.to_theirs(name): tensor for name, tensor in source.tensors.items()}
    if path.suffix in (".pt", ".pth", ".safetensors"):
        if path.is_dir():
            raise WeightsError("is a folder", where=path, fix="remove it, or use another target_path")
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
    is_diffusers = dialect == "diffusers"  # diffusers needs its own config.json
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


def by_alignment(tensors: Mapping[str, TensorFile]) -> dict[str, TensorFile]:
    """Sort tensors by descending item size, so that every tensor starts at a multiple of its item size."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def _sidecar(path: Path, source: WeightsSource) -> dict[str, str]:
    """Plan `<file>.json` with the sizes if they cannot be inferred from the weights.

    The sizes of all published models can be inferred.
    """
    try:
        known = infer_config(source.shapes, {}) == source.config
    except WeightsError:
        known = False
    return {} if known else _sizes(source, path.with_suffix(".json").name)


def _sizes(source: WeightsSource, name: str) -> dict[str, str]:
    """Plan a config.json under `name`. If the source lacks a value, logs a warning and returns {}."""
    try:
        return {name: json_text(official_json(source.config))}
    except WeightsError as error:
        logger.warning(f"{error}. The weights are converted anyway, without {name}")
        return {}


def _shards(tensors: Mapping[str, TensorFile], max_bytes: int) -> dict[str, dict[str, TensorFile]]:
    """Split tensors into files of at most `max_bytes` bytes or one larger tensor. Returns name → tensors."""
    parts: list[dict[str, TensorFile]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > max_bytes:
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
