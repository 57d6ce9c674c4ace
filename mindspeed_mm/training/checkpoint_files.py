"""How torch.distributed.checkpoint reads and writes our folders.

No pickle of a file is run, and checksums go with the pieces.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mindspeed_mm.checksum import crc32
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.checksums import Checksums, FileSums, crc_of, write_checksums
from mindspeed_mm.models.containers.dcp import load_piece
from mindspeed_mm.models.containers.dcp_index import INDEX, read_index_and_checksums


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors. torch's own planner unpickles other entries with all that they carry."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        """Raises WeightsError."""
        raise WeightsError(
            "got pickled bytes, which are never run", where=read_item.storage_index.fqn, expected="a tensor"
        )


class IndexReader(FileSystemReader):
    """Reads the index without running it, and verifies each piece that is loaded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._index: Metadata | None = None
        self._checksums: Checksums | None = None

    def read_metadata(self) -> Metadata:
        """The index, read once. Raises WeightsError on damage or forgery."""
        if self._index is None:
            self._index, self._checksums = read_index_and_checksums(self._folder)
            if self._index.storage_meta is not None:
                self._index.storage_meta.load_id = self.load_id
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what `plan` names into the planner's tensors. Raises WeightsError on damage."""
        index = self.read_metadata()
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                raise WeightsError("got pickled bytes", where=f"{self._folder}: {name}", expected="a tensor")
            place = index.storage_data[item.storage_index]
            found = load_piece(self._folder, place, name, self._checksums)
            target = planner.resolve_tensor(item).detach()
            piece = (
                narrow_tensor_by_index(found, item.storage_offsets, item.lengths)
                if _holds(found, item)
                else None
            )
            if piece is None or target.size() != piece.size():
                raise WeightsError(
                    f"{name} differs from the index",
                    where=self._folder / place.relative_path,
                    fix="copy it again",
                )
            target.copy_(piece)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class ChecksumWriter(FileSystemWriter):
    """Writes checksums.json beside the index: the size of each file and the CRC-32 of each piece in it."""

    def __init__(self, folder: Path, iteration: int) -> None:
        super().__init__(folder)
        self._folder, self._iteration = folder, iteration

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces.

        Their checksums travel with the results to the rank that writes the index.
        """
        results = super().write_data(plan, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(_with_checksums(self._folder, results))
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write index and checksums, on one rank."""
        plain: list[list[WriteResult]] = []
        files: dict[str, dict[int, int]] = {}
        for found in results:
            plain.append([replace(result, storage_data=result.storage_data[0]) for result in found])
            for place, crc in (result.storage_data for result in found):
                files.setdefault(place.relative_path, {})[place.offset] = crc
        super().finish(metadata, plain)
        sums = {
            name: FileSums((self._folder / name).stat().st_size, pieces) for name, pieces in files.items()
        }
        index = (self._folder / INDEX).read_bytes()
        sums[INDEX] = FileSums(len(index), {0: crc32(index)})
        write_checksums(self._folder, self._iteration, sums)


def _with_checksums(folder: Path, results: list[WriteResult]) -> list[WriteResult]:
    files: dict[str, list[WriteResult]] = {}
    for result in results:
        files.setdefault(result.storage_data.relative_path, []).append(result)
    found = []
    for name, pieces in files.items():
        with open(folder / name, "rb") as file:
            for result in pieces:
                place = result.storage_data
                found.append(replace(result, storage_data=(place, crc_of(file, place.offset, place.length))))
    return found


def _holds(found: object, item: ReadItem) -> bool:
    """Whether a stored value is a tensor of which `item` names a part."""
    return (
        isinstance(found, Tensor)
        and found.layout == torch.strided
        and found.dim() == len(item.lengths)
        and all(
            start >= 0 and start + length <= size
            for start, length, size in zip(item.storage_offsets, item.lengths, found.shape, strict=True)
        )
    )


def reason_of(error: BaseException) -> str:
    """The innermost cause: DCP wraps what went wrong on each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        if isinstance(inner, WeightsError):
            return str(inner)
        return f"rank {rank}: {reason_of(inner)}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
