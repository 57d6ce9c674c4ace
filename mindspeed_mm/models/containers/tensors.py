"""Lazily read tensors of weight files, mapped into memory.

The reader of each container format returns a dict of them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pickle
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checksum import crc32
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.checksums import RecordCheck

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEAD_BYTES = 64 * 1024  # bytes of each tensor that its fingerprint covers
_BLOCK_BYTES = 1 << 19  # so that a block stays in cache while it is verified, converted and inspected
_MAP_FAILED = ctypes.c_void_p(-1).value
Look = Callable[[Tensor], object]


@dataclass(frozen=True)
class TensorFile:
    """A tensor that has not been read yet.

    Each call of `read` returns a new CPU tensor of that shape and dtype.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)
    derived: bool = False  # computed from other weights, not stored in a file
    # Returns the mapped, unverified values and their check; None if reading does more than map the values.
    raw: Callable[[], tuple[Tensor, RecordCheck | None]] | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def read_as(self, dtype: torch.dtype, look: Look = lambda part: None) -> Tensor:
        """Read the tensor as another dtype. `look` is called with each part of it.

        Each block is verified, converted and inspected while it is in cache, so the file's bytes are read
        from memory only once. Raises WeightsError for a wrong checksum.
        """
        if self.raw is None:
            found = self.read().to(dtype)
            look(found)
            return found
        values, check = self.raw()
        found = values if values.dtype == dtype else torch.empty(self.shape, dtype=dtype)
        due = check if check is not None and check.is_due else None
        source, target, size, crc = values.view(-1), found.view(-1), values.element_size(), 0
        raw = raw_bytes(values) if due else memoryview(b"")
        step = _BLOCK_BYTES // size
        for start in range(0, len(source), step):
            if due:
                crc = crc32(raw[start * size : (start + step) * size], crc)
            part = target[start : start + step]
            if found is not values:
                part.copy_(source[start : start + step])
            look(part)
        if due:
            due.compare(crc)
        return found

    def head_bytes(self) -> memoryview:
        """Return the first 64 KiB, for a fingerprint."""
        return raw_bytes(self.read().reshape(-1)[: HEAD_BYTES // self.dtype.itemsize].contiguous())


@dataclass(frozen=True)
class Container:
    """Content of the files of one checkpoint: tensors by their raw names, and the plain values."""

    tensors: Mapping[str, TensorFile]
    extras: Mapping[str, Any] = field(default_factory=dict)


def mapped(path: Path, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Map the bytes at `offset` as a tensor, copy-on-write.

    Pages are read on first access, and writes never reach the file. Each call creates a new mapping, so two
    tensors of the same weight are independent. Raises WeightsError if the file has become too short.
    """
    if shape.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = offset - start + shape.numel() * dtype.itemsize
    try:
        window = _map_privately(path, start, length)
    except OSError as error:
        raise WeightsError(
            f"cannot be mapped: {error.strerror}",
            where=path,
            fix="check whether the file changed while it was read",
        ) from None
    return torch.frombuffer(window, dtype=dtype, count=shape.numel(), offset=offset - start).view(shape)


def _map_privately(path: Path, start: int, length: int) -> ctypes.Array[ctypes.c_char]:
    """Map `length` bytes at `start` copy-on-write. The mapping ends when the returned array is freed.

    `mmap.mmap` is not used because it keeps one file descriptor per mapping, and a model has more tensors
    than a process may have open files (often 1024). Raises OSError.
    """
    libc = _libc()
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < start + length:  # access beyond the end kills the process
            raise OSError(errno.EINVAL, "the file is shorter than its header says")
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = libc.mmap(None, length, access, mmap.MAP_PRIVATE, file.fileno(), start)
    if address == _MAP_FAILED:
        raise OSError(number := ctypes.get_errno(), os.strerror(number))
    window = (ctypes.c_char * length).from_address(address)
    unmap = weakref.finalize(window, libc.munmap, address, length)
    unmap.atexit = False  # tensors may outlive the interpreter
    return window


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    number, size, offset = ctypes.c_int, ctypes.c_size_t, ctypes.c_int64
    libc.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, offset]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, size]
    return libc


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def kind_of(value: object) -> str:
    """Describe the type of a value for messages: `a list`, `nothing`."""
    return "nothing" if value is None else f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, truncated to 200 characters."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def why_not_loaded(error: BaseException) -> str:
    """Explain why torch.load rejected a file.

    PyTorch's own messages are not used: they mention PyTorch releases, and options that turn off safety.
    """
    text = str(error)
    if any(word in text for word in ("Unsupported", "weights_only", "Weights only")):
        return "it contains more than tensors and plain values, and code from a file is never run"
    if isinstance(error, EOFError) or "Ran out of input" in text:
        return "it ends too early"
    if isinstance(error, pickle.UnpicklingError | KeyError | IndexError | TypeError | AttributeError):
        return "its contents are invalid"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if "PytorchStreamReader" in text or "enforce fail" in text:
        return "its zip archive is cut off or damaged"
    return first_line(error).rstrip(".")
