"""A checkpoint whose index is an attack.

It changes a class of torch, and hides an entry that torch would unpickle and run.
"""

from __future__ import annotations

import io
import itertools
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from checkpoint.cli import main
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers import dcp_index
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.containers.dcp_index import read_index
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.training.checkpoint_files import IndexReader, TensorPlanner
from tests.support.errors import raises
from tests.unit.models.test_weights_damaged import Bomb, words_of

pytestmark = pytest.mark.medium

STATE = {"model": {"a": torch.arange(6.0)}, "iteration": torch.tensor(7)}
CLASS = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"


def always_equal() -> bytes:
    """BUILD with a slot state on the class itself.

    `MetadataIndex.__eq__ = str`, which is true of anything.
    """
    return CLASS + b"N}" + words_of("__eq__") + b"cbuiltins\nstr\n" + b"s\x86b0"


def pickled_with_new_names(index: Metadata, names: dict[MetadataIndex, str]) -> bytes:
    """The index, whose keys get other names after they were hashed under their first ones."""
    buffer = io.BytesIO()
    pickler: Any = pickle._Pickler(buffer, 2)  # type: ignore[attr-defined]
    pickler.dump(index)
    keys = {name: b"h" + bytes([pickler.memo[id(key)][0]]) for key, name in names.items()}
    return (
        buffer.getvalue()[:-1]
        + b"".join(key + b"}" + words_of("fqn", n) + b"sb0" for n, key in keys.items())
        + b"."
    )


@pytest.fixture
def forged(tmp_path: Path) -> tuple[Path, Path]:
    return forge(tmp_path)


def forge(tmp_path: Path) -> tuple[Path, Path]:
    """The folder, and the file that appears when its code runs."""
    folder, trace = tmp_path / "run/iter_0000007", tmp_path / "trace"
    dcp.save(STATE, checkpoint_id=folder, no_dist=True)
    index: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    storage = index.storage_data
    place = type(next(iter(storage.values())))
    blob, harmless = tmp_path / "blob", tmp_path / "harmless"
    torch.save({"x": Bomb(trace)}, blob)
    torch.save(torch.tensor(7), harmless)
    for path in (blob, harmless):
        (folder / f"{path.name}.distcp").write_bytes(path.read_bytes())
    evil, other = MetadataIndex("iteration"), MetadataIndex("other")
    rest = {key: value for key, value in storage.items() if key.fqn != "iteration"}
    places = {
        key: place(f"{path.name}.distcp", 0, path.stat().st_size)
        for key, path in ((evil, blob), (other, harmless))
    }
    index.storage_data = {**places, **rest}
    index.state_dict_metadata["iteration"] = BytesStorageMetadata()
    content = pickled_with_new_names(index, {evil: "other", other: "iteration"})
    (folder / ".metadata").write_bytes(content[:2] + always_equal() + content[2:])
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("7\n")
    return folder, trace


def test_forged_index_runs_nothing_and_changes_no_class(forged: tuple[Path, Path], tmp_path: Path) -> None:
    folder, trace = forged
    before = {kind: dict(vars(kind)) for kind in (MetadataIndex, Metadata, TensorStorageMetadata)}
    state = {"model": {"a": torch.zeros(6)}, "iteration": torch.tensor(0)}

    def load() -> None:
        dcp.load(state, storage_reader=IndexReader(folder), planner=TensorPlanner(), no_dist=True)

    for read in (lambda: read_index(folder), lambda: read_dcp(folder), lambda: open_weights(folder)):
        with raises(WeightsError, "iter_0000007/.metadata") as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(BaseException, match=r"iter_0000007/\.metadata: .*\bbuiltins\.str\b"):
        load()
    for method in ("mm_to_hf", "resplit", "dcp_to_torch"):
        with pytest.raises(SystemExit) as stopped:
            main(
                [
                    "VACEConverter",
                    method,
                    "--cfg.source_path",
                    str(folder),
                    "--cfg.target_path",
                    str(tmp_path / "out"),
                ]
            )
        assert stopped.value.code == 1
    assert not trace.exists(), "code from the checkpoint ran"
    assert {kind: dict(vars(kind)) for kind in before} == before
    assert MetadataIndex("a") != MetadataIndex("b")


def test_byte_entry_in_place_of_a_tensor_is_not_loaded(tmp_path: Path) -> None:
    folder, trace = tmp_path / "iter_0000007", tmp_path / "trace"
    dcp.save({**STATE, "iteration": Bomb(trace)}, checkpoint_id=folder, no_dist=True)
    state = {"model": {"a": torch.zeros(6)}, "iteration": 0}
    with pytest.raises(BaseException, match="iteration"):
        dcp.load(state, storage_reader=IndexReader(folder), planner=TensorPlanner(), no_dist=True)
    with raises(WeightsError, "never run"):
        read_dcp(folder)
    assert not trace.exists()


def entry(index: Metadata, name: str = "model.a") -> Any:
    return index.state_dict_metadata[name]


def whole(index: Metadata, length: int) -> None:
    """One piece of `length` values, of which the file holds six."""
    size = torch.Size([length])
    entry(index).size, entry(index).chunks = size, [ChunkStorageMetadata(torch.Size([0]), size)]


FORGERIES = {
    "size": lambda index: setattr(entry(index), "size", torch.Size([7])),
    "negative": lambda index: setattr(entry(index).chunks[0], "offsets", (-1,)),
    "bool": lambda index: setattr(next(iter(index.storage_data.values())), "offset", True),
    "string": lambda index: setattr(next(iter(index.storage_data.values())), "length", "9"),
    "outside": lambda index: setattr(next(iter(index.storage_data.values())), "relative_path", "../x"),
    "chunks": lambda index: setattr(entry(index), "chunks", {}),
    "twice": lambda index: entry(index).chunks.append(entry(index).chunks[0]),
    "dtype": lambda index: setattr(entry(index).properties, "dtype", torch.complex64),
    "path": lambda index: index.planner_data.update({"model.a": ("model", 1.5)}),
    "name": lambda index: index.state_dict_metadata.update({7: entry(index)}),
    "unknown": lambda index: index.state_dict_metadata.pop("model.a"),
    "unplaced": lambda index: index.state_dict_metadata.update({"model.b": entry(index)}),
    "not stored": lambda index: whole(index, 2**40),
    "huge": lambda index: setattr(entry(index), "size", torch.Size([2**62, 2**62])),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_index_with_wrong_types_or_bounds_is_one_line(tmp_path: Path, kind: str) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(read_dcp(tmp_path)["model"]["a"].read(), STATE["model"]["a"])  # type: ignore[index]
    index: Metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    FORGERIES[kind](index)  # type: ignore[no-untyped-call]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with raises(WeightsError, ".metadata") as caught:
        read_dcp(tmp_path)
    assert "\n" not in str(caught.value)


GRIDS = {
    "rows": ([6, 4], [([0, 0], [2, 4]), ([2, 0], [4, 4])], True),
    "cells": ([4, 4], [([r, c], [2, 1]) for r in (0, 2) for c in range(4)], True),
    "odd but whole": ([2, 3], [([0, 0], [1, 2]), ([0, 2], [2, 1]), ([1, 0], [1, 2])], True),
    "scalar": ([], [([], [])], True),
    "empty": ([0, 3], [([0, 0], [0, 3])], True),
    "overlap": ([4, 4], [([0, 0], [2, 4]), ([1, 0], [2, 4])], False),
    "one cell twice": ([2, 2], [([0, 0], [1, 2]), ([0, 0], [1, 2])], False),
    "gap": ([4], [([0], [1]), ([2], [2])], False),
}


@pytest.mark.parametrize("name", GRIDS)
def test_pieces_fill_their_tensor_once(name: str) -> None:
    size, pieces, fills = GRIDS[name]
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in pieces]
    assert dcp_index._fills(size, chunks) is fills


def test_many_pieces_are_checked_in_linear_time() -> None:
    chunks = [
        ChunkStorageMetadata(torch.Size([r, c]), torch.Size([1, 1]))
        for r, c in itertools.product(range(200), range(200))
    ]
    started = time.monotonic()
    assert dcp_index._fills([200, 200], chunks)
    assert not dcp_index._fills([200, 200], [*chunks[:-1], chunks[0]])
    assert time.monotonic() - started < 10  # pair by pair takes half an hour
