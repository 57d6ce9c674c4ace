"""Safe reader for the pickled index (`.metadata`) of a torch.distributed.checkpoint folder.

Nothing in the pickle is called or imported. The pickle is parsed into a tree of plain values, every value is
checked, and PyTorch's metadata objects are built from the checked values.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import regular_file
from mindspeed_mm.models.containers.checksums import Checksums, read_checksums
from mindspeed_mm.models.containers.plain_pickle import DTYPES, METADATA, Call, Name, Parser, Problem
from mindspeed_mm.models.containers.tensors import first_line

INDEX = ".metadata"
_LARGEST = 2**62  # largest allowed size, offset or number of values
# Maximum for a tensor that is not split into a grid, because the check for overlaps is quadratic.
_MAX_ODD_CHUNKS = 256


def read_index(folder: Path) -> Metadata:
    """Read the index of a folder. Raises WeightsError if it is missing, damaged or forged."""
    return read_index_and_checksums(folder)[0]


def read_index_and_checksums(folder: Path) -> tuple[Metadata, Checksums | None]:
    """Read the index and the folder's checksums.json, if any, and verify the index against it."""
    path = folder / INDEX
    try:
        if not os.path.lexists(path):
            raise WeightsError(
                "no such file; the save did not finish", where=path, fix="use an earlier iteration"
            )
        content = regular_file(path, WeightsError).read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot be read: {error.strerror or error}", where=path) from None
    checksums = read_checksums(folder)
    if checksums is not None:
        checksums.check_file(path, content)
    try:
        index = _metadata(_parse(content))
    except Problem as problem:
        raise WeightsError(
            f"cannot be read safely: {problem}", where=path, fix="copy the checkpoint again"
        ) from None
    if checksums is None:
        _check_sizes(folder, index)
    return index, checksums


def _check_sizes(folder: Path, index: Metadata) -> None:
    """Check that each file ends where its last piece ends.

    Raises WeightsError for a file of another size, which is truncated or belongs to another save.
    """
    ends: dict[str, int] = {}
    for stored in index.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        path = folder / name
        if path.is_file() and (size := path.stat().st_size) != end:  # reading reports a missing file
            regular_file(path, WeightsError)  # raises a specific error for a Git LFS pointer
            raise WeightsError(
                f"got {size} bytes",
                where=path,
                expected=f"{end}, as {INDEX} says",
                fix="it is cut off or of another save: copy the whole iteration folder",
            )


def _parse(content: bytes) -> Any:
    try:
        return Parser(io.BytesIO(content)).load()
    except Problem:
        raise
    except KeyError as error:
        raise Problem(
            f"it contains the pickle instruction or reference {error}, which no checkpoint index needs"
        ) from None
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise Problem(f"it is not a whole pickle ({first_line(error)})") from None


def _metadata(tree: Any) -> Metadata:
    fields = _fields(tree, "Metadata", "the index")
    entries = _dict(fields.get("state_dict_metadata"), "state_dict_metadata")
    locations = _dict(fields.get("storage_data"), "storage_data")
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, value in locations.items():
        index = _index(key)
        if index in storage:
            raise Problem(f"{index.fqn} at {list(index.offset or ())} has two locations")
        storage[index] = _place(index.fqn, value)
    found = {_text(name, "a name"): _entry(name, value) for name, value in entries.items()}
    _check_complete(found, storage)
    version = fields.get("version")
    return Metadata(
        state_dict_metadata=found,
        planner_data=_paths(fields.get("planner_data"), found),
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=None if version is None else _text(version, "version"),
    )


def _entry(name: str, value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, Call) and value.name == Name(METADATA, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata", name)
    size, chunks = _size(fields.get("size"), name), fields.get("chunks")
    if not isinstance(chunks, list):
        raise Problem(f"{name}: expected a list of chunks, got {_kind(chunks)}")
    dtype = _dtype(fields.get("properties"), name)
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype), size, [_chunk(name, size, chunk) for chunk in chunks]
    )


def _chunk(name: str, size: torch.Size, value: Any) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata", name)
    offsets, sizes = _size(fields.get("offsets"), name), _size(fields.get("sizes"), name)
    if not len(offsets) == len(sizes) == len(size) or any(
        start + length > whole for start, length, whole in zip(offsets, sizes, size, strict=True)
    ):
        raise Problem(f"{name}: a chunk {list(sizes)} at {list(offsets)} does not fit into {list(size)}")
    return ChunkStorageMetadata(offsets, sizes)


def _dtype(value: Any, name: str) -> torch.dtype:
    is_made = isinstance(value, Call) and value.name == Name(METADATA, "TensorProperties") and not value.args
    state = value.state if is_made else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise Problem(f"{name}: expected the properties of a tensor, got {_kind(value)}")
    dtype, layout, *_ = state
    if not isinstance(dtype, Name) or dtype.module != "torch" or dtype.name not in DTYPES:
        raise Problem(f"{name}: expected a dtype, got {_kind(dtype)}")
    if not isinstance(layout, Call) or layout.args != ("torch.strided",):
        raise Problem(f"{name}: is not a plain (strided) tensor")
    return DTYPES[dtype.name]


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex", "a key of storage_data")
    name = _text(fields.get("fqn"), "fqn")
    offset, hint = fields.get("offset"), fields.get("index")
    if hint is not None:
        hint = _int(hint, name)
    return MetadataIndex(name, None if offset is None else _size(offset, name), hint)


def _place(name: str, value: Any) -> _StorageInfo:
    where = "torch.distributed.checkpoint.filesystem"
    fields = _fields(value, "_StorageInfo", name, where)
    path = _text(fields.get("relative_path"), name)
    if Path(path).name != path or path in ("", ".", "..") or "\0" in path or "\\" in path:
        raise Problem(f"{name} is in a file outside its folder: {path!r}")
    if fields.get("transform_descriptors"):
        raise Problem(f"{path} is compressed or encrypted; save it without storage transforms")
    return _StorageInfo(path, _int(fields.get("offset"), name), _int(fields.get("length"), name))


def _paths(value: Any, entries: Mapping[str, Any]) -> dict[str, tuple[str | int, ...]] | None:
    """Return the path of each entry in the nested state dict."""
    if value is None:
        return None
    paths: dict[str, tuple[str | int, ...]] = {}
    for name, path in _dict(value, "planner_data").items():
        if not isinstance(path, tuple) or not path or any(type(part) not in (str, int) for part in path):
            raise Problem(
                f"planner_data of {_text(name, 'a name')}: expected a path of names, got {_kind(path)}"
            )
        paths[_text(name, "a name")] = path
    if unknown := [name for name in paths if name not in entries]:
        raise Problem(f"planner_data names {unknown[0]}, which is not in the checkpoint")
    return paths


def _check_complete(entries: Mapping[str, Any], storage: Mapping[MetadataIndex, _StorageInfo]) -> None:
    """Check that chunks and storage locations match one to one, and that chunks cover each tensor.

    Raises Problem.
    """
    located: dict[str, dict[tuple[int, ...] | None, _StorageInfo]] = {name: {} for name in entries}
    for index, location in storage.items():
        if index.fqn not in located:
            raise Problem(f"{index.fqn} has a location, but is not in the checkpoint")
        located[index.fqn][None if index.offset is None else tuple(index.offset)] = location
    for name, entry in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            if len(located[name]) != 1:
                raise Problem(f"{name} is stored {len(located[name])} times")
            continue
        if located[name].keys() != {tuple(chunk.offsets) for chunk in entry.chunks}:
            raise Problem(f"{name} has {len(entry.chunks)} pieces in {len(located[name])} locations")
        # Allocate memory for a size only if the file contains that many bytes.
        for chunk in entry.chunks:
            needed, stored = (
                math.prod(chunk.sizes) * entry.properties.dtype.itemsize,
                located[name][tuple(chunk.offsets)],
            )
            if needed > stored.length:
                raise Problem(
                    f"{name}: a piece {list(chunk.sizes)} takes {needed} bytes, but {stored.length} are "
                    "stored"
                )
        if not _fills(entry.size, entry.chunks):
            raise Problem(f"{name} is {list(entry.size)}, and its pieces do not fill it once")


def _fills(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> bool:
    full = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if sum(math.prod(chunk.sizes) for chunk in full) != math.prod(size):
        return False
    if _is_grid(size, full):  # the usual result of sharding
        return True
    return len(full) <= _MAX_ODD_CHUNKS and not any(
        _overlap(a, b) for i, a in enumerate(full) for b in full[:i]
    )


def _is_grid(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Return whether the chunks are exactly the cells of a grid over the tensor."""
    cells = 1
    for d, whole in enumerate(size):
        spans = sorted({(chunk.offsets[d], chunk.sizes[d]) for chunk in chunks})
        ends = [0, *(start + length for start, length in spans)]
        if any(start != end for (start, _), end in zip(spans, ends, strict=False)) or ends[-1] != (
            whole if chunks else 0
        ):
            return False
        cells *= len(spans)
    return len({tuple(chunk.offsets) for chunk in chunks}) == len(chunks) == (cells if chunks else 0)


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    return all(
        start < other + n and other < start + m
        for start, m, other, n in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )


def _fields(value: Any, name: str, where: str, module: str = METADATA) -> Mapping[str, Any]:
    """Return the state of an object of the class `name`. Raises Problem for any other value."""
    if (
        not isinstance(value, Call)
        or value.name != Name(module, name)
        or value.args
        or not _is_state(value.state)
    ):
        raise Problem(f"{where}: expected {name}, got {_kind(value)}")
    fields: Mapping[str, Any] = value.state
    return fields


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(type(key) is str for key in value)


def _size(value: Any, name: str) -> torch.Size:
    is_size = isinstance(value, Call) and value.name == Name("torch", "Size") and len(value.args) == 1
    numbers = value.args[0] if is_size else None
    if not isinstance(numbers, tuple) or len(numbers) > 16:
        raise Problem(f"{name}: expected a size, got {_kind(value)}")
    for number in numbers:
        _int(number, name)
    if math.prod(numbers) > _LARGEST:
        raise Problem(f"{name}: no tensor has the size {list(numbers)}")
    return torch.Size(numbers)


def _int(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise Problem(f"{name}: expected a whole number from 0 on, got {_kind(value)}")
    return value


def _text(value: Any, name: str) -> str:
    if type(value) is not str:
        raise Problem(f"{str(name)[:80]}: expected a string, got {_kind(value)}")
    return value


def _dict(value: Any, name: str) -> Mapping[Any, Any]:
    if type(value) is not dict:
        raise Problem(f"{name}: expected a dict, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, (Call, Name)):
        return f"{value.name.name if isinstance(value, Call) else value.name}"[:80]
    return f"{value}"[:40] if type(value) is int else type(value).__name__
