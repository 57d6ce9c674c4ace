"""Reads a torch.distributed.checkpoint folder tensor by tensor, without executing its pickled index."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from megatron.mm.layout import parse_iteration
from mindspeed_mm.checksum import damaged_record
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.checksums import SKIP, Checksums, verifies
from mindspeed_mm.models.containers.dcp_index import INDEX, read_index_and_checksums
from mindspeed_mm.models.containers.tensors import TensorFile, why_not_loaded

Piece = tuple[tuple[int, ...], torch.Size, _StorageInfo]  # offset in the tensor, size, location in a file


def read_dcp(folder: Path) -> dict[str, Any]:
    """Return the saved (nested) state dict, with a TensorFile in place of every tensor.

    Raises WeightsError if the folder is damaged or forged.
    """
    metadata, checksums = read_index_and_checksums(folder)
    paths = metadata.planner_data or {}
    locations: dict[str, list[tuple[tuple[int, ...], _StorageInfo]]] = {}
    for key, location in metadata.storage_data.items():
        locations.setdefault(key.fqn, []).append((tuple(key.offset or ()), location))
    state: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        value = _value(folder, name, entry, locations.get(name, []), checksums)
        try:
            _insert(state, paths.get(name) or _guess_path(name), value)
        except (TypeError, AttributeError):
            raise WeightsError(
                f"{name} is both a value and a group", where=folder / INDEX, fix="copy the checkpoint again"
            ) from None
    _check_iteration(folder, state.get("iteration"))
    return state


def _check_iteration(folder: Path, saved: Any) -> None:
    """Check that a folder named after an iteration contains that iteration. Raises WeightsError."""
    expected = parse_iteration(folder.name)
    if isinstance(expected, int) and isinstance(saved, TensorFile) and saved.shape.numel() == 1:
        if saved.dtype.is_floating_point:
            raise WeightsError(
                f"got {saved.dtype}",
                where=f"{folder}: iteration",
                expected="a whole number",
                fix="copy the folder again",
            )
        found = int(saved.read())
        if found != expected:
            raise WeightsError(
                f"got {found}",
                where=folder,
                expected=f"iteration {expected}",
                fix="copy the iteration folder again, or name it after its iteration",
            )


def _value(
    folder: Path,
    name: str,
    entry: TensorStorageMetadata | BytesStorageMetadata,
    locations: list[tuple[tuple[int, ...], _StorageInfo]],
    checksums: Checksums | None,
) -> Any:
    for _, location in locations:
        check_place(folder, location, checksums)
    if isinstance(entry, BytesStorageMetadata):
        return load_piece(folder, locations[0][1], name, checksums)
    sizes = {tuple(chunk.offsets): torch.Size(chunk.sizes) for chunk in entry.chunks}
    pieces = [(offset, sizes[offset], location) for offset, location in locations]
    shape, dtype = torch.Size(entry.size), entry.properties.dtype
    return TensorFile(shape, dtype, _reader(folder, name, shape, dtype, pieces, checksums))


def _reader(
    folder: Path,
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    pieces: list[Piece],
    checksums: Checksums | None,
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        whole: Tensor | None = None if len(pieces) == 1 else torch.empty(shape, dtype=dtype)
        for offset, size, place in pieces:
            piece = load_piece(folder, place, name, checksums)
            if not isinstance(piece, Tensor) or piece.shape != size or piece.dtype != dtype:
                raise WeightsError(
                    f"{name} differs from the index", where=folder / place.relative_path, fix="copy it again"
                )
            if whole is None:
                return piece
            whole[tuple(slice(start, start + n) for start, n in zip(offset, size, strict=True))] = piece
        return torch.empty(shape, dtype=dtype) if whole is None else whole

    return read


def load_piece(folder: Path, location: _StorageInfo, name: str, checksums: Checksums | None) -> Any:
    """Load the tensor or plain value at one storage location.

    Raises WeightsError for damaged data and for any other kind of value.
    """
    path = check_place(folder, location, checksums)
    try:
        with open(path, "rb") as file:
            file.seek(location.offset)
            content = file.read(location.length)
    except OSError as error:
        raise WeightsError(f"cannot be read: {error.strerror or error}", where=path) from None
    if checksums is not None:
        checksums.check_piece(path, location.offset, content, name)
    try:
        damaged = damaged_record(content, io.BytesIO(content)) if checksums is None and verifies() else None
        value = None if damaged else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of exceptions for damaged or hostile files
        raise WeightsError(
            f"{name} cannot be read safely: {why_not_loaded(error)}",
            where=path,
            fix="copy it again, from the same iteration",
        ) from None
    if damaged:
        raise WeightsError(
            f"{name} is damaged: its checksum is wrong", where=path, fix=f"copy the file again, {SKIP}"
        )
    return value


def check_place(folder: Path, location: _StorageInfo, checksums: Checksums | None) -> Path:
    """Return the file of one piece.

    Raises WeightsError if the file is missing, truncated or from another checkpoint.
    """
    path = folder / location.relative_path
    if not path.is_file():
        raise WeightsError("is missing", where=path, fix="copy the whole iteration folder")
    size = path.stat().st_size
    if checksums is not None:
        checksums.check_size(path, size)
    if location.offset + location.length > size:
        raise WeightsError("is cut off", where=path, fix="copy the iteration folder again")
    return path


def _insert(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    for part in parents:
        state = state.setdefault(part, {})
    state[last] = value


def _guess_path(name: str) -> tuple[str, ...]:
    """Derive an entry's path when there is no planner data: `model.wan_dit.…` is `wan_dit.…` in `model`."""
    head, dot, rest = name.partition(".")
    return (head, rest) if dot else (name,)
