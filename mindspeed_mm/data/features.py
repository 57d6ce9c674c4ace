"""One FeatureRecord on disk: our safetensors files, and the published `.pt` files for reading.

Tensor names are those of published files: `video` are the latents, `prompt_ids` the prompt *embeddings*.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.data.packed import read_header, read_packed, without_checksums, write_packed
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import regular_file

SCHEMA_VERSION = "1"
NULL_PROMPT_FILE = "null_prompt.safetensors"
_LATENT, _CONTEXT = 16, 96
_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """What the header of a feature file says, without its tensors."""

    shape: tuple[int, int, int]  # (R+F, h, w)
    num_refs: int
    num_captions: int
    metadata: Mapping[str, str]
    prompts: tuple[tuple[int, int], ...]  # (L, text_dim) of each caption


def write_feature(path: Path, record: FeatureRecord, metadata: Mapping[str, str]) -> None:
    """Write `record` as bf16 safetensors, atomically. `metadata` adds to the record's own (key, num_refs, schema_version)."""
    tensors = {"video": record.latents, "vace_context": record.vace_context}
    for number, prompt in enumerate(record.prompt_embeds):
        tensors[_numbered("prompt_ids", number)] = prompt
    packed = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in tensors.items()}
    for number, prompt in enumerate(record.prompt_embeds):
        packed[_numbered("prompt_mask", number)] = torch.ones(len(prompt), dtype=torch.uint8)
    own = {"schema_version": SCHEMA_VERSION, "key": record.key, "num_refs": str(record.num_refs)}
    write_packed(path, packed, {**metadata, **own})


def read_feature(path: Path, *, verify: bool = True) -> FeatureRecord:
    """Read one feature file, ours or a published `.pt`. Tensors keep the dtype they are stored in.

    `verify` compares the tensors with the checksums in the file. Raises DataError when the file is missing, damaged, or
    holds something else.
    """
    return _read_published(path) if path.suffix == ".pt" else _read_safetensors(path, verify)


def read_prompts(path: Path) -> tuple[Tensor, ...]:
    """The prompt embeddings of one of our files, each [L, text_dim]; the latents are not read. Raises DataError."""
    return _prompts(read_packed(path, ("prompt_ids",), part="prompt_ids"))


def read_info(path: Path, *, verify: bool = True) -> FeatureInfo:
    """The shapes and metadata of a feature file; of a safetensors file only the header is read.

    Raises DataError when a tensor is missing, or of another dtype or shape than a feature's.
    """
    if path.suffix == ".pt":
        record = _read_published(path)
        return FeatureInfo(
            shape=_grid(record.latents),
            num_refs=record.num_refs,
            num_captions=len(record.prompt_embeds),
            metadata={},
            prompts=tuple((len(prompt), prompt.shape[1]) for prompt in record.prompt_embeds),
        )
    header = read_header(path, verify=verify)
    metadata = header.pop("__metadata__", {})
    missing = [name for name in ("video", "vace_context", "prompt_ids") if name not in header]
    if missing:
        raise DataError(
            f"{path}: no feature file: {', '.join(missing)} missing; it holds {', '.join(sorted(header)) or 'nothing'}"
        )
    prompts = [name for name in header if name.split(".")[0] == "prompt_ids"]
    for name in ("video", "vace_context", *prompts):
        if header[name].get("dtype") not in _DTYPES:
            raise DataError(
                f"{path}: {name} is {header[name].get('dtype')}, expected BF16, F16 or F32; extract it again"
            )
    shapes = {name: tuple(header[name]["shape"]) for name in header}
    _check_shapes(path, shapes["video"], shapes["vace_context"], [shapes[name] for name in prompts])
    frames, height, width = shapes["video"][1:]
    return FeatureInfo(
        shape=(frames, height, width),
        num_refs=_num_refs(path, metadata, frames),
        num_captions=len(prompts),
        metadata=without_checksums(metadata),
        prompts=tuple((shapes[name][0], shapes[name][1]) for name in prompts),
    )


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
    write_packed(path, packed, {"schema_version": SCHEMA_VERSION, "text_encoder": fingerprint})


def read_null_prompt(path: Path, *, verify: bool = True) -> Tensor:
    """The embedding [L, text_dim] of the empty caption. Raises DataError."""
    embeds = read_packed(path, ("prompt_ids",), verify=verify)["prompt_ids"]
    if embeds.dim() != 2 or len(embeds) == 0 or not embeds.is_floating_point():
        raise DataError(
            f"{path}: prompt_ids is {list(embeds.shape)} {str(embeds.dtype).removeprefix('torch.')}, expected "
            "[L, text_dim] floating-point numbers; extract the features again"
        )
    return embeds


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}.{number}"


def _read_safetensors(path: Path, verify: bool) -> FeatureRecord:
    metadata = read_header(path, verify=verify).get("__metadata__", {})
    tensors = read_packed(path, ("video", "vace_context", "prompt_ids"), verify=verify)
    frames = tensors["video"].shape[1] if tensors["video"].dim() == 4 else 0
    return _checked(
        path,
        FeatureRecord(
            latents=tensors["video"],
            vace_context=tensors["vace_context"],
            prompt_embeds=_prompts(tensors),
            num_refs=_num_refs(path, metadata, frames, tensors["vace_context"]),
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
    regular_file(path, DataError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a foreign file was written with
            values = torch.load(path, map_location="cpu", weights_only=True)
        damaged = (
            zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        )  # torch does not look at the CRCs
    except Exception:  # torch raises many kinds for a damaged or foreign pickle
        raise DataError(
            f"{path}: cannot be read as tensors: it is damaged, or holds more than tensors; extract it again"
        ) from None
    if damaged is not None:
        raise DataError(
            f"{path}: {damaged} in it does not match its checksum; copy or extract the file again"
        )
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


def _num_refs(path: Path, metadata: Mapping[str, str], frames: int, context: Tensor | None = None) -> int:
    """R, as written; of a file that does not say it, counted in `context`. Raises DataError when it cannot be."""
    written = metadata.get("num_refs")
    if written is None:
        return 0 if context is None else _count_references(context)
    if not (written.isascii() and written.isdigit() and (int(written) < frames or frames == 0)):
        raise DataError(
            f"{path}: num_refs is {written!r:.40}, but it has {frames} latent frames, references included; extract it again"
        )
    return int(written)


def _checked(path: Path, record: FeatureRecord) -> FeatureRecord:
    latents, context = record.latents, record.vace_context
    named = {"video": latents, "vace_context": context, "prompt_ids": record.prompt_embeds[0]}
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise DataError(
                f"{path}: {name} is {dtype}, expected bfloat16, float16 or float32; extract it again"
            )
        if not tensor.isfinite().all():
            raise DataError(f"{path}: {name} has values that are NaN or infinite; extract it again")
    _check_shapes(path, latents.shape, context.shape, [prompt.shape for prompt in record.prompt_embeds])
    return record


def _check_shapes(
    path: Path, latents: Sequence[int], context: Sequence[int], prompts: Sequence[Sequence[int]]
) -> None:
    """Raises DataError for shapes that no feature has."""
    if len(latents) != 4 or latents[0] != _LATENT or not all(latents):
        raise DataError(
            f"{path}: video has shape {list(latents)}, expected [16, R+F, h, w]; extract it again"
        )
    if tuple(context) != (_CONTEXT, *latents[1:]):
        raise DataError(
            f"{path}: vace_context has shape {list(context)}, expected [96, {', '.join(map(str, latents[1:]))}]; "
            "extract it again"
        )
    if any(len(prompt) != 2 or prompt[0] == 0 for prompt in prompts):
        raise DataError(f"{path}: prompt_ids must be [L, text_dim] with at least one token; extract it again")
