"""Read a torch.distributed.checkpoint folder one tensor at a time, and run nothing that its pickled index may carry."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.tensors import TensorFile, first_line

INDEX = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset", "tuple", "list", "dict", "int", "str"},
}
_PATHS = {"PosixPath", "PurePosixPath", "Path", "WindowsPath", "PureWindowsPath"}


class _PlainPath(str):
    """A stand-in for the path that an index remembers; nothing here uses it."""

    def __new__(cls, *parts: str) -> _PlainPath:
        return super().__new__(cls, "/".join(str(part) for part in parts))


def _memory_format(value: Any) -> Any:
    """A stand-in for the enum of an index, whose members a pickle could change."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as formats

    return formats(value)


def _member(kind: Any, name: str) -> Any:
    """A stand-in for `getattr`, as which early Pythons 3.11 (Debian 12 has one) pickle a member of it; it reads nothing else."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as formats

    if kind is not _memory_format or name not in formats.__members__:
        raise pickle.UnpicklingError(f"it takes {name!r} of an object, which no checkpoint index needs")
    return formats[name]


_STAND_INS = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _memory_format,
    ("builtins", "getattr"): _member,
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of an index and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in _PATHS:
            return _PlainPath
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index needs")


def read_dcp(folder: Path) -> dict[str, Any]:
    """The saved (nested) state dict, with a TensorFile in place of every tensor. Raises WeightsError on damage or forgery."""
    metadata = read_index(folder)
    try:
        paths = metadata.planner_data or {}
        chunks: dict[str, list[tuple[Any, Any]]] = {}
        for key, place in metadata.storage_data.items():
            chunks.setdefault(key.fqn, []).append((key, place))
        state: dict[str, Any] = {}
        for name, entry in metadata.state_dict_metadata.items():
            value = _value(folder, name, entry, chunks.get(name, []))
            _insert(state, paths.get(name) or _guess_path(name), value)
        return state
    except (AttributeError, TypeError, KeyError, ValueError, IndexError, RecursionError) as error:
        raise WeightsError(f"{folder / INDEX}: is damaged ({first_line(error)}); copy the checkpoint again") from None


def read_index(folder: Path) -> Any:
    """torch's `Metadata` of a folder, unpickled without running what else it carries. Raises WeightsError."""
    path = folder / INDEX
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; the save was not finished, use an earlier iteration") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise WeightsError(f"{path}: cannot be read safely: {first_line(error)}; copy the checkpoint again") from None
    if type(metadata).__name__ != "Metadata":
        raise WeightsError(f"{path}: holds a {type(metadata).__name__}; an index of a torch checkpoint is wanted")
    return metadata


def _value(folder: Path, name: str, entry: Any, chunks: list[tuple[Any, Any]]) -> Any:
    if type(entry).__name__ == "BytesStorageMetadata":
        if len(chunks) != 1:
            raise ValueError(f"{name} is stored {len(chunks)} times")
        return _load_piece(folder, chunks[0][1], name)
    shape, dtype = torch.Size(entry.size), entry.properties.dtype
    covered = sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks)
    if covered != shape.numel() or len(chunks) != len(entry.chunks):
        raise ValueError(f"{name} is {list(shape)}, its pieces hold {covered} values in {len(chunks)} places")
    sizes = {tuple(chunk.offsets): torch.Size(chunk.sizes) for chunk in entry.chunks}
    pieces = [(tuple(key.offset), sizes[tuple(key.offset)], place) for key, place in chunks]
    for _, _, place in pieces:
        _check_place(folder, place)
    return TensorFile(shape, dtype, _reader(folder, name, shape, dtype, pieces))


def _reader(
    folder: Path,
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    pieces: list[tuple[tuple[int, ...], torch.Size, Any]],
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        whole: Tensor | None = None if len(pieces) == 1 else torch.empty(shape, dtype=dtype)
        for offset, size, place in pieces:
            piece = _load_piece(folder, place, name)
            if not isinstance(piece, Tensor) or piece.shape != size or piece.dtype != dtype:
                raise WeightsError(f"{folder / place.relative_path}: {name} is not what the index says; copy it again")
            if whole is None:
                return piece
            whole[tuple(slice(start, start + n) for start, n in zip(offset, size, strict=True))] = piece
        return torch.empty(shape, dtype=dtype) if whole is None else whole

    return read


def _load_piece(folder: Path, place: Any, name: str) -> Any:
    path = _check_place(folder, place)
    try:
        with open(path, "rb") as file:
            file.seek(place.offset)
            return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds on damaged or hostile files
        raise WeightsError(f"{path}: {name} cannot be read safely ({first_line(error)}); copy it again") from None


def _check_place(folder: Path, place: Any) -> Path:
    """The file of one piece. Raises WeightsError when it is missing, cut off, outside the folder or transformed."""
    name = str(place.relative_path)
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise WeightsError(f"{folder / INDEX}: names a file outside its folder: {name!r}")
    if getattr(place, "transform_descriptors", None):
        raise WeightsError(f"{path}: is compressed or encrypted; save it without storage transforms")
    if not path.is_file():
        raise WeightsError(f"{path}: is missing; copy the whole iteration folder")
    if not 0 <= place.offset <= place.offset + place.length <= path.stat().st_size:
        raise WeightsError(f"{path}: is cut off; copy the iteration folder again")
    return path


def _insert(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    for part in parents:
        state = state.setdefault(part, {})
    state[last] = value


def _guess_path(name: str) -> tuple[str, ...]:
    """Without planner data: `model.wan_dit.…` is the entry `wan_dit.…` of `model`."""
    head, dot, rest = name.partition(".")
    return (head, rest) if dot else (name,)
