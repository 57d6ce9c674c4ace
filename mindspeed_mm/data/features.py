"""Reads and writes FeatureRecords as safetensors files; extraction writes them in the background.

Tensors have the names of published files: `video` contains the latents, `prompt_ids` the prompt *embeddings*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_mm.data.packed import read_header, read_packed, without_checksums, write_packed
from mindspeed_mm.data.published import EXTRACT_AGAIN, check_values, count_references, read_published
from mindspeed_mm.data.sample import FeatureRecord, SampleRecord
from mindspeed_mm.errors import DataError, MindSpeedMMError
from mindspeed_mm.geometry import WAN

SCHEMA_VERSION = "1"
NULL_PROMPT_FILE = "null_prompt.safetensors"
_DTYPES = ("BF16", "F16", "F32", "F64")
_MAX_DIGITS = 9  # maximum number of digits of num_refs


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """Facts from the header of a feature file, without its tensors."""

    shape: tuple[int, int, int]  # (R+F, h, w)
    num_refs: int
    num_captions: int
    metadata: Mapping[str, str]
    prompts: tuple[tuple[int, int], ...]  # shape (L, text_dim) for each caption


def write_feature(path: Path, record: FeatureRecord, metadata: Mapping[str, str]) -> None:
    """Write `record` atomically as a bf16 safetensors file.

    `metadata` is added to the metadata of the record (key, num_refs, schema_version).
    """
    tensors = {"video": record.latents, "vace_context": record.vace_context}
    for number, prompt in enumerate(record.prompt_embeds):
        tensors[_numbered("prompt_ids", number)] = prompt
    packed = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in tensors.items()}
    for number, prompt in enumerate(record.prompt_embeds):
        packed[_numbered("prompt_mask", number)] = torch.ones(len(prompt), dtype=torch.uint8)
    own = {"schema_version": SCHEMA_VERSION, "key": record.key, "num_refs": str(record.num_refs)}
    write_packed(path, packed, {**metadata, **own})


@dataclass(frozen=True)
class Finished:
    """A row whose feature is on disk."""

    record: SampleRecord
    key: str
    shape: tuple[int, int, int]
    num_refs: int
    fresh: bool  # encoded in this run


class FeatureWriter:
    """Context manager that writes features in a background thread.

    At most `max_pending` features are queued or being written.
    """

    def __init__(self, max_pending: int = 2) -> None:
        self._max_pending = max_pending
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._queue: list[tuple[Path, Future[None], Finished]] = []

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def write(self, path: Path, feature: FeatureRecord, metadata: Mapping[str, str], done: Finished) -> None:
        """Queue one file. Blocks while the queue is full."""
        while sum(not future.done() for _, future, _ in self._queue) >= self._max_pending:
            next(future for _, future, _ in self._queue if not future.done()).result()
        self._queue.append((path, self._pool.submit(_write, path, feature, metadata), done))

    def is_pending(self, path: Path) -> bool:
        """Return whether the file is queued or being written."""
        return any(path == other for other, _, _ in self._queue)

    def wait_for(self, path: Path) -> None:
        """Block until the file is written, if it is queued."""
        for other, future, _ in self._queue:
            if other == path:
                future.result()

    def finished(self, *, wait: bool = False) -> list[Finished]:
        """Return rows whose files are on disk, in queue order, each row once.

        `wait` blocks until all queued files are written. Raises MindSpeedMMError if a write failed.
        """
        ready: list[Finished] = []
        while self._queue and (wait or self._queue[0][1].done()):
            _, future, done = self._queue.pop(0)
            future.result()
            ready.append(done)
        return ready


def _write(path: Path, feature: FeatureRecord, metadata: Mapping[str, str]) -> None:
    try:
        write_feature(path, feature, metadata)
    except OSError as error:
        raise MindSpeedMMError(
            f"cannot be written: {error}",
            where=path,
            fix="free disk space and run the command again; finished clips are kept",
        ) from None


def read_feature(path: Path, *, verify: bool = True) -> FeatureRecord:
    """Read one feature file: a safetensors file or a published `.pt`. Tensors keep their stored dtype.

    `verify` compares the tensors with the checksums in the file. Raises DataError if the file is missing,
    damaged or not a feature, or has values that cannot be latents or embeddings: NaN, infinite, or beyond
    `published.MAX_VALUE`.
    """
    record = read_published(path, verify=verify) if path.suffix == ".pt" else _read_safetensors(path, verify)
    prompts = {_numbered("prompt_ids", i): prompt for i, prompt in enumerate(record.prompt_embeds)}
    tensors = {"video": record.latents, "vace_context": record.vace_context, **prompts}
    for name, tensor in tensors.items():
        check_values(path, name, tensor)
    _check_shapes(path, {name: tensor.shape for name, tensor in tensors.items()})
    if record.num_refs >= record.latents.shape[1]:
        raise DataError(
            f"all {record.num_refs} frames of vace_context are references", where=path, fix=EXTRACT_AGAIN
        )
    return record


def read_prompts(path: Path) -> tuple[Tensor, ...]:
    """Read the prompt embeddings of a safetensors file, each [L, text_dim], without the latents.

    Raises DataError.
    """
    read_header(path)
    prompts = _prompts(path, read_packed(path, ("prompt_ids",), prefix="prompt_ids"))
    for number, prompt in enumerate(prompts):
        check_values(path, _numbered("prompt_ids", number), prompt)
    return prompts


def read_info(path: Path, *, verify: bool = True) -> FeatureInfo:
    """Read the shapes and metadata of a feature file.

    For a safetensors file, only the header is read, unless it lacks num_refs. Raises DataError if a tensor is
    missing, or has a dtype or shape that no feature has.
    """
    if path.suffix == ".pt":
        record = read_feature(path, verify=verify)
        return FeatureInfo(
            shape=(record.latents.shape[1], record.latents.shape[2], record.latents.shape[3]),
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
            f"{', '.join(missing)} missing; file contains {', '.join(sorted(header)) or 'nothing'}",
            where=path,
            expected="a feature file",
        )
    prompts = _prompt_names(path, header)
    for name in ("video", "vace_context", *prompts):
        if header[name].get("dtype") not in _DTYPES:
            raise DataError(
                f"{name} is {header[name].get('dtype')!s:.20}",
                where=path,
                expected="BF16, F16 or F32",
                fix=EXTRACT_AGAIN,
            )
    shapes = {name: tuple(header[name]["shape"]) for name in ("video", "vace_context", *prompts)}
    _check_shapes(path, shapes)
    frames, height, width = shapes["video"][1:]
    written = metadata.get("num_refs")
    if written is None:
        num_refs = count_references(
            read_packed(path, ("vace_context",), prefix="vace_context", verify=verify)["vace_context"]
        )
    else:
        num_refs = _num_refs(path, written, frames)
    return FeatureInfo(
        shape=(frames, height, width),
        num_refs=num_refs,
        num_captions=len(prompts),
        metadata=without_checksums(metadata),
        prompts=tuple((shapes[name][0], shapes[name][1]) for name in prompts),
    )


def is_complete(path: Path) -> bool:
    """Return whether the file exists and has the length that its header implies."""
    try:
        read_header(path)
    except DataError:
        return False
    return True


def write_null_prompt(path: Path, embeds: Tensor, fingerprint: str) -> None:
    """Write the embedding [L, text_dim] of the empty caption, for caption dropout in training."""
    packed = {"prompt_ids": embeds.detach().to("cpu", torch.bfloat16).contiguous()}
    write_packed(path, packed, {"schema_version": SCHEMA_VERSION, "text_encoder": fingerprint})


def read_null_prompt(path: Path, *, verify: bool = True) -> Tensor:
    """Read the embedding [L, text_dim] of the empty caption.

    Raises DataError for the same values as `read_feature`.
    """
    read_header(path, verify=verify)
    embeds = read_packed(path, ("prompt_ids",), verify=verify)["prompt_ids"]
    if embeds.dim() != 2 or embeds.numel() == 0:
        raise DataError(
            f"prompt_ids has shape {list(embeds.shape)}",
            where=path,
            expected="[L, text_dim] with at least one token",
            fix=EXTRACT_AGAIN,
        )
    check_values(path, "prompt_ids", embeds)
    return embeds


def _numbered(name: str, number: int) -> str:
    return name if number == 0 else f"{name}.{number}"


def _read_safetensors(path: Path, verify: bool) -> FeatureRecord:
    metadata = read_header(path, verify=verify).get("__metadata__", {})
    tensors = read_packed(path, ("video", "vace_context", "prompt_ids"), verify=verify)
    latents, context = tensors["video"], tensors["vace_context"]
    prompts = _prompts(path, tensors)
    written = metadata.get("num_refs")
    if written is None:
        num_refs = count_references(context) if context.dim() == 4 else 0
    else:
        num_refs = _num_refs(path, written, latents.shape[1] if latents.dim() == 4 else 0)
    return FeatureRecord(
        latents=latents,
        vace_context=context,
        prompt_embeds=prompts,
        num_refs=num_refs,
        key=metadata.get("key", path.stem),
    )


def _prompts(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return the prompt embeddings in the order of the captions."""
    return tuple(tensors[name] for name in _prompt_names(path, tensors))


def _prompt_names(path: Path, names: Mapping[str, object]) -> list[str]:
    """Return prompt_ids, prompt_ids.1, …, one per caption. Raises DataError for any other name."""
    found = [name for name in names if name.split(".")[0] == "prompt_ids"]
    expected = [_numbered("prompt_ids", number) for number in range(len(found))]
    if odd := sorted(set(found) - set(expected)):
        raise DataError(
            f"contains {odd[0]:.40}",
            where=path,
            expected=f"prompts named {', '.join(expected[:3])}",
            fix=EXTRACT_AGAIN,
        )
    return expected


def _num_refs(path: Path, written: str, frames: int) -> int:
    """Parse R from the metadata. Raises DataError unless it is a number below `frames` (0 = unknown)."""
    digits = written.isascii() and written.isdigit() and len(written) <= _MAX_DIGITS
    if not digits or (frames and int(written) >= frames):
        raise DataError(
            f"num_refs is {written!r:.40}, but the file has {frames} latent frames, references included",
            where=path,
            fix=EXTRACT_AGAIN,
        )
    return int(written)


def _check_shapes(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise DataError for shapes that no feature has."""
    latents = shapes["video"]
    if len(latents) != 4 or latents[0] != WAN.channels or not all(latents):
        raise _wrong_shape(path, "video", latents, "[16, R+F, h, w]")
    if tuple(shapes["vace_context"]) != (WAN.context_channels, *latents[1:]):
        raise _wrong_shape(
            path, "vace_context", shapes["vace_context"], f"[96, {', '.join(map(str, latents[1:]))}]"
        )
    width = None
    for name in shapes:
        if name.split(".")[0] != "prompt_ids":
            continue
        if len(shapes[name]) != 2 or not all(shapes[name]):
            raise _wrong_shape(path, name, shapes[name], "[L, text_dim] with at least one token")
        if width not in (None, shapes[name][1]):
            raise _wrong_shape(path, name, shapes[name], f"[L, {width}], as wide as prompt_ids")
        width = shapes[name][1]


def _wrong_shape(path: Path, name: str, shape: Sequence[int], expected: str) -> DataError:
    return DataError(f"{name} has shape {list(shape)}", where=path, expected=expected, fix=EXTRACT_AGAIN)
