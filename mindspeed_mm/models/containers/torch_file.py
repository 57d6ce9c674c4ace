"""Reads and writes .pt and .pth state dicts tensor by tensor. `weights_only` prevents code execution."""

from __future__ import annotations

import errno
import functools
import io
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mindspeed_mm.checksum import crc32, stored_sizes
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import regular_file
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.containers.checksums import ZipFileChecks, fill_in_checksums, verifies
from mindspeed_mm.models.containers.tensors import (
    TensorFile,
    first_line,
    kind_of,
    mapped,
    raw_bytes,
    why_not_loaded,
)

logger = get_logger(__name__)


def read_torch(path: Path) -> dict[str, Any]:
    """Return the dict in a file, with a TensorFile in place of every tensor.

    Raises WeightsError if the file cannot be loaded safely.
    """
    state = _load(path)
    if not isinstance(state, dict):
        raise WeightsError(f"got {kind_of(state)}", where=path, expected="a dict of weights")
    records = _Records(path)
    return {key: _describe(path, value, 0, records) for key, value in state.items() if isinstance(key, str)}


def write_torch(
    path: Path, state: Mapping[str, Any], *, written: Callable[[int], object] = lambda nbytes: None
) -> None:
    """Stream a (nested) dict of TensorFiles into a new file, with one tensor in memory at a time.

    First saves a skeleton with space reserved for the values. Then writes the bytes of each tensor to its
    space, and the checksums to the zip directory, as torch.save does. If this version of torch cannot do
    that, the whole model is kept in memory, and a log line says so.

    Raises OSError if the disk is full.
    """
    if not knows_offsets():
        logger.info(f"torch {torch.__version__} cannot stream into a .pt: the whole model is held in memory")
        _save(_map_tensors(state, lambda t: _counted(t, written)), path)
        return
    with FakeTensorMode():
        skeleton = _map_tensors(state, lambda t: torch.empty(t.shape, dtype=t.dtype))
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        _save(skeleton, path)
    holes = _load(path)
    checksums: dict[int, int] = {}
    with open(path, "r+b") as file:
        for hole, tensor in _pairs(holes, state):
            storage: Any = hole.untyped_storage()
            values = raw_bytes(tensor.read().contiguous())
            file.seek(storage._checkpoint_offset)
            file.write(values)
            checksums[storage._checkpoint_offset] = crc32(values)
            written(tensor.nbytes)
        fill_in_checksums(file, checksums)
        file.flush()
        os.fsync(file.fileno())


def _save(state: Any, path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's zip writer hides the reason of a failed write
        raise OSError(
            errno.EIO, f"torch could not write all of it ({first_line(error)}), as on a full disk"
        ) from None


@functools.cache
def knows_offsets() -> bool:
    """Return whether this version of torch reports the offsets of tensors in a .pt file (2.13 does)."""
    with io.BytesIO() as file:
        torch.save(torch.zeros(1), file)
        file.seek(0)
        with FakeTensorMode():
            storage: Any = torch.load(file, map_location="cpu", weights_only=True).untyped_storage()
    return (
        hasattr(torch.serialization, "skip_data") and getattr(storage, "_checkpoint_offset", None) is not None
    )


def _counted(tensor: TensorFile, written: Callable[[int], object]) -> Tensor:
    written(tensor.nbytes)
    return tensor.read().contiguous()


def _load(path: Path) -> Any:
    """Load a file.

    Its tensors are fake tensors with known offsets if torch reports these, and mapped tensors otherwise. For
    files older than the zip format, they are real tensors.
    """
    if path.exists() or path.is_symlink():
        regular_file(path, WeightsError)
    try:
        return _torch_load(path)
    except FileNotFoundError:
        raise WeightsError(
            "no such file; a part of the checkpoint is missing", where=path, fix="copy it, too"
        ) from None
    except Exception as error:  # torch raises many kinds of exceptions for damaged or hostile files
        raise WeightsError(_why_not(path, error), where=path) from None


def _torch_load(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error already reports what torch warns about
        if not zipfile.is_zipfile(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            logger.info(
                f"{path}: in the format of torch before 1.6, which cannot be mapped: all of it is held in "
                "memory; torch.load and torch.save it once to spare that"
            )
            return state
        if not knows_offsets():
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)


def _why_not(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "is empty; copy the file again"
    with suppress(OSError), open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            return "is a GGUF file, which only a transformer may be; use a .safetensors or .pth file"
    reason = why_not_loaded(error)
    if "code from a file" in reason:
        return f"{reason.removeprefix('it ')}; save only its state dict with torch.save, and use that file"
    return f"is damaged or not a torch file ({reason}); copy the file again"


class _Records:
    """The records of a file, as listed in its zip directory.

    They are used to check the offsets in the pickle, which are not trusted.
    """

    def __init__(self, path: Path) -> None:
        """Read the directory, and verify the small records. Raises WeightsError for a damaged directory."""
        self.path = path
        # None: the file is older than the zip format, and torch has already read all of it.
        self.sizes: dict[int, int] | None = None
        self.checks: ZipFileChecks | None = None  # None: verification is off
        if not zipfile.is_zipfile(path):
            return
        try:
            self.sizes = stored_sizes(path)
            self.checks = ZipFileChecks(path) if verifies() else None
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise WeightsError(
                f"is damaged: its zip directory cannot be read ({first_line(error)})", where=path
            ) from None
        if self.checks is not None and not knows_offsets():
            self.checks.check_all()

    def check_place(self, start: int, size: int) -> None:
        """Check that `size` bytes at `start` are exactly one record. Raises WeightsError."""
        if self.sizes is not None and size and self.sizes.get(start) != size:
            raise WeightsError(
                (
                    f"is damaged: its pickle says {size} bytes at {start}, where the file has no record of "
                    "that size"
                ),
                where=self.path,
                fix="copy the file again, or write it with torch.save",
            )


def _describe(path: Path, value: Any, depth: int, records: _Records) -> Any:
    if isinstance(value, Tensor):
        return _tensor_file(path, value, records)
    if isinstance(value, dict) and depth < 4:
        return {key: _describe(path, inner, depth + 1, records) for key, inner in value.items()}
    return value


def _tensor_file(path: Path, tensor: Tensor, records: _Records) -> TensorFile:
    tensor = tensor.detach()
    if tensor.is_meta:
        raise WeightsError(
            "contains a tensor without values (device meta)",
            where=path,
            fix="save the model after its weights are loaded",
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise WeightsError(
            f"contains a {tensor.layout} or quantized tensor", where=path, expected="plain tensors"
        )
    storage: Any = tensor.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    if offset is None:
        return TensorFile(tensor.shape, tensor.dtype, tensor.clone)
    records.check_place(offset, storage.nbytes())
    first, checks = tensor.storage_offset() * tensor.element_size(), records.checks
    start = offset + first
    shape, dtype, stride, is_contiguous = tensor.shape, tensor.dtype, tensor.stride(), tensor.is_contiguous()
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if shape.numel() else 0
    if (
        shape.numel() * dtype.itemsize > os.path.getsize(path)
        or first + extent * dtype.itemsize > storage.nbytes()
    ):
        raise WeightsError(
            "is damaged: a tensor reaches beyond its values", where=path, fix="copy the file again"
        )

    check = None if checks is None else checks.find(offset)

    def read() -> Tensor:
        flat = mapped(path, start, torch.Size([shape.numel() if is_contiguous else extent]), dtype)
        if check is not None:
            check.run(raw_bytes(flat))
        return flat.view(shape) if is_contiguous else flat.as_strided(shape, stride).contiguous()

    if not is_contiguous or shape.numel() * dtype.itemsize != storage.nbytes():
        return TensorFile(shape, dtype, read)
    return TensorFile(shape, dtype, read, raw=lambda: (mapped(path, start, shape, dtype), check))


def _map_tensors(value: Any, make: Callable[[TensorFile], Tensor]) -> Any:
    if isinstance(value, TensorFile):
        return make(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(inner, make) for key, inner in value.items()}
    return value


def _pairs(holes: Any, state: Any) -> list[tuple[Tensor, TensorFile]]:
    if isinstance(state, TensorFile):
        return [(holes, state)]
    if isinstance(state, Mapping):
        return [pair for key, inner in state.items() for pair in _pairs(holes[key], inner)]
    return []
