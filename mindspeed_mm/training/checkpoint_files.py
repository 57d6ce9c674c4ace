"""Planner, reader and writer for torch.distributed.checkpoint (DCP).

Loading never executes pickled data from a file. Each stored piece has a checksum.
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
    """Loads tensors only. PyTorch's default planner would unpickle other entries without restriction."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        """Reject a pickled entry. Raises WeightsError."""
        raise WeightsError(
            "got pickled bytes, which are never run", where=read_item.storage_index.fqn, expected="a tensor"
        )


class IndexReader(FileSystemReader):
    """Reads the index without executing its pickle, and verifies each piece that it loads."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._index: Metadata | None = None
        self._checksums: Checksums | None = None

    def read_metadata(self) -> Metadata:
        """Return the index, which is read only once. Raises WeightsError if it is damaged or forged."""
        if self._index is None:
            self._index, self._checksums = read_index_and_checksums(self._folder)
            if self._index.storage_meta is not None:
                self._index.storage_meta.load_id = self.load_id
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the items of `plan` into the planner's tensors. Raises WeightsError for damaged data."""
        index = self.read_metadata()
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                raise WeightsError("got pickled bytes", where=f"{self._folder}: {name}", expected="a tensor")
            location = index.storage_data[item.storage_index]
            found = load_piece(self._folder, location, name, self._checksums)
            target = planner.resolve_tensor(item).detach()
            piece = (
                narrow_tensor_by_index(found, item.storage_offsets, item.lengths)
                if _holds(found, item)
                else None
            )
            if piece is None or target.size() != piece.size():
                raise WeightsError(
                    f"{name} differs from the index",
                    where=self._folder / location.relative_path,
                    fix="copy it again",
                )
            target.copy_(piece)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class ChecksumWriter(FileSystemWriter):
    """Writes checksums.json next to the index: the size of each file and the CRC-32 of each piece in it."""

    def __init__(self, folder: Path, iteration: int) -> None:
        super().__init__(folder)
        self._folder, self._iteration = folder, iteration

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the pieces of this rank.

        The returned results include the checksums, for the rank that writes the index.
        """
        results = super().write_data(plan, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(_with_checksums(self._folder, results))
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index and the checksums. Called on one rank only."""
        plain: list[list[WriteResult]] = []
        files: dict[str, dict[int, int]] = {}
        for found in results:
            plain.append([replace(result, storage_data=result.storage_data[0]) for result in found])
            for location, crc in (result.storage_data for result in found):
                files.setdefault(location.relative_path, {})[location.offset] = crc
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
                stored = result.storage_data
                found.append(
                    replace(result, storage_data=(stored, crc_of(file, stored.offset, stored.length)))
                )
    return found


def _holds(found: object, item: ReadItem) -> bool:
    """Return whether a stored value is a dense tensor that contains the slice of `item`."""
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
    """Return the message of the innermost cause. DCP wraps the exceptions of all ranks in one."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        if isinstance(inner, WeightsError):
            return str(inner)
        return f"rank {rank}: {reason_of(inner)}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
