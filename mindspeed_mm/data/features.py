"""One FeatureRecord on disk: our safetensors files, and the published `.pt` files for reading.

Tensor names are those of published files: `video` are the latents, `prompt_ids` the prompt *embeddings*.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import atomic_path

SCHEMA_VERSION = "1"
NULL_PROMPT_FILE = "null_prompt.safetensors"
_LATENT, _CONTEXT = 16, 96


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """What the header of a feature file says, without its tensors."""

    shape: tuple[int, int, int]  # (R+F, h, w)
    num_refs: int
    num_captions: int
    metadata: Mapping[str, str]


def write_feature(path: Path, record: FeatureRecord, metadata: Mapping[str, str]) -> None:
    """Write `record` as bf16 safetensors, atomically. `metadata` adds to the record's own (key, num_refs, schema_version)."""
    tensors = {"video": record.latents, "vace_context": record.vace_context}
    for number, prompt in enumerate(record.prompt_embeds):
        tensors[_numbered("prompt_ids", number)] = prompt
    packed = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in tensors.items()}
    for number, prompt in enumerate(record.prompt_embeds):
        packed[_numbered("prompt_mask", number)] = torch.ones(len(prompt), dtype=torch.uint8)
    own = {"schema_version": SCHEMA_VERSION, "key": record.key, "num_refs": str(record.num_refs)}
    _save(path, packed, {**metadata, **own})


def read_feature(path: Path) -> FeatureRecord:
    """Read one feature file, ours or a published `.pt`. Tensors keep the dtype they are stored in.

    Raises DataError when the file is missing, damaged, or holds something else.
    """
    return _read_published(path) if path.suffix == ".pt" else _read_safetensors(path)


def read_prompts(path: Path) -> tuple[Tensor, ...]:
    """The prompt embeddings of one of our files, each [L, text_dim]; the latents are not read. Raises DataError."""
    return _prompts(_load(path, ("prompt_ids",), part="prompt_ids"))


def read_info(path: Path) -> FeatureInfo:
    """The shape and metadata of a feature file; of a safetensors file only the header is read."""
    if path.suffix == ".pt":
        record = _read_published(path)
        return FeatureInfo(
            shape=_grid(record.latents), num_refs=record.num_refs, num_captions=len(record.prompt_embeds), metadata={}
        )
    header = read_header(path)
    metadata = header.pop("__metadata__", {})
    if "video" not in header:
        raise DataError(f"{path}: no feature file: it holds {', '.join(sorted(header)) or 'nothing'}, not 'video'")
    shape = header["video"]["shape"]
    captions = sum(name.split(".")[0] == "prompt_ids" for name in header)
    return FeatureInfo(
        shape=(shape[1], shape[2], shape[3]),
        num_refs=int(metadata.get("num_refs", 0)),
        num_captions=captions,
        metadata=metadata,
    )


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises DataError when the file is missing, or shorter than the header says."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, struct.error, MemoryError) as error:
        raise DataError(f"{path}: not a safetensors file: {error}") from None
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise DataError(f"{path}: {size} bytes, its header promises {8 + length + end}; extract it again")
    return header


def is_complete(path: Path) -> bool:
    """Whether the file is there and as long as its header says."""
    try:
        read_header(path)
    except DataError:
        return False
    return True


def write_null_prompt(path: Path, embeds: Tensor, fingerprint: str) -> None:
    """Store the embedding [L, text_dim] of the empty caption, for caption dropout in training."""
    packed = {"prompt_ids": embeds.detach().to("cpu", torch.bfloat16).contiguous()}
    _save(path, packed, {"schema_version": SCHEMA_VERSION, "text_encoder": fingerprint})


def read_null_prompt(path: Path) -> Tensor:
    """The embedding [L, text_dim] of the empty caption. Raises DataError."""
    return _load(path, ("prompt_ids",))["prompt_ids"]


def _save(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Atomically, and with the header in sorted order: safetensors shuffles metadata, and equal features shall be equal files."""
    raw = save(tensors, dict(metadata))
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(json.loads(raw[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(memoryview(raw)[8 + length :])


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}.{number}"


def _load(path: Path, wanted: Sequence[str], part: str = "") -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(part)}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}; extract it again") from None
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} missing; it holds {', '.join(sorted(tensors))}")
    return tensors


def _read_safetensors(path: Path) -> FeatureRecord:
    metadata = read_header(path).get("__metadata__", {})
    tensors = _load(path, ("video", "vace_context", "prompt_ids"))
    return _checked(
        path,
        FeatureRecord(
            latents=tensors["video"],
            vace_context=tensors["vace_context"],
            prompt_embeds=_prompts(tensors),
            num_refs=int(metadata.get("num_refs", _count_references(tensors["vace_context"]))),
            key=metadata.get("key", path.stem),
        ),
    )


def _prompts(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """In the order of the captions."""
    names = [name for name in tensors if name.split(".")[0] == "prompt_ids"]
    names.sort(key=lambda name: int(name.partition(".")[2] or 0))
    return tuple(tensors[name] for name in names)


def _read_published(path: Path) -> FeatureRecord:
    """A `.pt` of the published extractor: `video, prompt_ids, prompt_mask, vace_context`, with or without batch axes."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds for a damaged or foreign pickle
        raise DataError(f"{path}: cannot be read as tensors: {str(error).splitlines()[0]}") from None
    names = ("video", "prompt_ids", "prompt_mask", "vace_context")
    missing = [name for name in names if not isinstance(values, dict) or name not in values]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} missing; a feature file holds {', '.join(names)}")
    latents = _one(path, "video", values["video"], 4)
    context = _one(path, "vace_context", values["vace_context"], 4)
    prompt = _one(path, "prompt_ids", values["prompt_ids"], 2)
    mask = _one(path, "prompt_mask", values["prompt_mask"], 1)
    length = int(mask.ne(0).sum())
    return _checked(
        path,
        FeatureRecord(
            latents=latents,
            vace_context=context,
            prompt_embeds=(prompt[:length].clone(),),  # padding is on the right
            num_refs=_count_references(context),
            key=path.stem,
        ),
    )


def _one(path: Path, name: str, value: Any, dims: int) -> Tensor:
    """The one tensor behind lists and axes of length 1."""
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Tensor):
        raise DataError(f"{path}: {name} is a {type(value).__name__}, a tensor is wanted")
    tensor: Tensor = value
    while tensor.dim() > dims and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != dims:
        raise DataError(f"{path}: {name} has shape {list(tensor.shape)}, {dims} axes are wanted")
    return tensor


def _count_references(context: Tensor) -> int:
    """Leading frames whose reactive and mask channels are exactly zero: only references are stored so."""
    empty = context[_LATENT:].eq(0).all(dim=0).flatten(1).all(dim=1).tolist()
    return next((index for index, zero in enumerate(empty) if not zero), len(empty))


def _grid(latents: Tensor) -> tuple[int, int, int]:
    return latents.shape[1], latents.shape[2], latents.shape[3]


def _checked(path: Path, record: FeatureRecord) -> FeatureRecord:
    latents, context = record.latents, record.vace_context
    if latents.dim() != 4 or latents.shape[0] != _LATENT:
        raise DataError(f"{path}: video has shape {list(latents.shape)}, [16, R+F, h, w] is wanted")
    if context.shape != (_CONTEXT, *latents.shape[1:]):
        raise DataError(
            f"{path}: vace_context has shape {list(context.shape)}, [96, {', '.join(map(str, latents.shape[1:]))}] is "
            "wanted; extract it again"
        )
    if any(prompt.dim() != 2 or len(prompt) == 0 for prompt in record.prompt_embeds):
        raise DataError(f"{path}: prompt_ids must be [L, text_dim] with at least one token; extract it again")
    return record
