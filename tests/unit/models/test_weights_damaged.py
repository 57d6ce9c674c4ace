"""Damaged and hostile checkpoints.

One line of WeightsError, never another exception, and no code of theirs is run.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.checksums import verifying
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.containers.safetensors import read_safetensors
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.containers.torch_file import read_torch
from mindspeed_mm.models.loading import read_tensors
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.training.checkpoint_files import IndexReader
from tests.support.errors import raises

pytestmark = pytest.mark.medium

CAREFULLY = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
Reader = Callable[[Path], Any]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.trace}'",)


def write_safetensors_file(folder: Path) -> tuple[Path, Path]:
    save_file(STATE, folder / "x.safetensors")
    return folder / "x.safetensors", folder / "x.safetensors"


def write_torch_file(folder: Path) -> tuple[Path, Path]:
    torch.save({"model": STATE, "iteration": 3}, folder / "x.pt")
    return folder / "x.pt", folder / "x.pt"


def write_old_torch_file(folder: Path) -> tuple[Path, Path]:
    torch.save(STATE, folder / "x.pth", _use_new_zipfile_serialization=False)
    return folder / "x.pth", folder / "x.pth"


def write_dcp_index(folder: Path) -> tuple[Path, Path]:
    dcp.save({"model": STATE, "base": {"path": "x"}}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp", folder / "dcp/.metadata"


def write_dcp_data(folder: Path) -> tuple[Path, Path]:
    return write_dcp_index(folder)[0], folder / "dcp/__0_0.distcp"


def read_all(path: Path) -> None:
    """Everything there is to read."""
    if path.is_dir():
        found: Any = read_dcp(path)
    elif path.suffix == ".safetensors":
        found = dict(read_safetensors([path]).tensors)
    else:
        found = read_torch(path)
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, TensorFile):
            assert isinstance(value.read(), Tensor)
        elif isinstance(value, dict):
            waiting += value.values()


def error_of_reading(path: Path) -> str | None:
    """What a WeightsError said, in its one line; None when all was read."""
    try:
        read_all(path)
    except WeightsError as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    return message


WRITERS = [write_safetensors_file, write_torch_file, write_old_torch_file, write_dcp_index, write_dcp_data]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@CAREFULLY
@given(data=st.data())
def test_bytes_changed_or_cut_off_give_one_line_or_are_read(
    tmp_path: Path, write: Callable[[Path], tuple[Path, Path]], data: st.DataObject
) -> None:
    """No other exception, whatever byte is wrong. (A wrong byte among the values cannot be seen.)"""
    for left in tmp_path.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    path, victim = write(tmp_path)
    content = bytearray(victim.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1), label="length") :]
    else:
        for _ in range(data.draw(st.integers(1, 4), label="changes")):
            place = data.draw(st.integers(0, min(len(content), 2000) - 1), label="place")
            content[place] = data.draw(st.integers(0, 255), label="byte")
    victim.write_bytes(bytes(content))
    error = error_of_reading(path)
    assert error is None or str(path) in error


@pytest.mark.parametrize(
    "write", [write_safetensors_file, write_torch_file, write_dcp_data], ids=lambda w: w.__name__
)
def test_file_cut_off_anywhere_is_an_error(
    tmp_path: Path, write: Callable[[Path], tuple[Path, Path]]
) -> None:
    path, victim = write(tmp_path)
    content = victim.read_bytes()
    for length in [*range(0, len(content), max(len(content) // 40, 1)), len(content) - 1]:
        victim.write_bytes(content[:length])
        with pytest.raises(WeightsError):
            read_all(path)


header_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "BF16", [0, 8], [2]]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@CAREFULLY
@given(
    header=st.dictionaries(st.text(max_size=4), header_values, max_size=3) | header_values,
    tail=st.binary(max_size=16),
)
def test_made_up_safetensors_header_gives_one_line_or_is_read(
    tmp_path: Path, header: Any, tail: bytes
) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + tail)
    error_of_reading(path)


def test_header_with_one_name_twice_is_an_error(tmp_path: Path) -> None:
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f"{{{entry},{entry}}}".encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with raises(WeightsError, "twice"):
        open_weights(tmp_path / "x.safetensors")


def test_overlapping_values_are_an_error(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with raises(WeightsError, "overlap"):
        open_weights(tmp_path / "x.safetensors")


def assert_refused(path: Path, trace: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists(), "code from the file was run"


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "old"])
def test_pickle_with_code_in_it_is_rejected_and_not_run(tmp_path: Path, new_format: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "x.pt"
    torch.save({"model": STATE, "args": Bomb(trace)}, path, _use_new_zipfile_serialization=new_format)
    assert_refused(path, trace)


def test_bare_pickle_is_rejected_and_not_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "x.pth"
    path.write_bytes(pickle.dumps({"model": Bomb(trace)}))
    assert_refused(path, trace)


def test_tensor_without_values_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": torch.empty(3, device="meta"), "b": torch.ones(2)}, path)
    with raises(WeightsError, "meta", where=path):
        read_torch(path)
    with raises(WeightsError, "meta", where=path):
        read_tensors([path])


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("numbers", [60, 7, 10**8])
def test_pickle_that_claims_other_sizes_is_rejected(tmp_path: Path, numbers: int, verify: bool) -> None:
    """The bytes behind a record are another tensor's: its checksum says nothing of who reads them."""
    source, path = tmp_path / "source.pt", tmp_path / "x.pt"
    torch.save({"a": torch.ones(50), "b": torch.full((5000,), 2.0)}, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert data.count(b"K\x32") == 2  # of the storage, and of the tensor
                data = data.replace(b"K\x32", b"J" + numbers.to_bytes(4, "little"))
            new.writestr(entry.filename, data)
    with verifying(verify), raises(WeightsError, 4 * numbers, where=path):
        read_torch(path)


def test_zip_of_other_content_is_an_error(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("hello", "x")
    assert_refused(tmp_path / "x.pt", tmp_path / "trace")


@pytest.mark.parametrize("where", ["whole", "inside"])
def test_forged_metadata_is_rejected_and_not_run(tmp_path: Path, where: str) -> None:
    folder, index = write_dcp_index(tmp_path)
    trace = tmp_path / "trace"
    metadata: Any = pickle.loads(index.read_bytes())
    if where == "inside":
        metadata.planner_data["x"] = Bomb(trace)
    index.write_bytes(pickle.dumps(metadata if where == "inside" else Bomb(trace)))
    assert_refused(folder, trace)


class Reaches:
    """Pickled as an attribute of a class that an index may name."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (dict, "fromkeys")


def test_index_of_early_python_3_11_reads_enums_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731
    monkeypatch.setattr(dcp.metadata._MEM_FORMAT_ENCODING, "__reduce_ex__", early)
    folder, index = write_dcp_index(tmp_path)
    assert b"getattr" in index.read_bytes()
    assert torch.equal(read_dcp(folder)["model"]["a"].read(), STATE["a"])
    metadata: Any = pickle.loads(index.read_bytes())
    metadata.planner_data["x"] = Reaches()
    index.write_bytes(pickle.dumps(metadata))
    with raises(WeightsError, "builtins.dict", where=index):
        read_dcp(folder)


def words_of(*values: str) -> bytes:
    """Pickled strings, one after another on the stack."""
    return b"".join(b"X" + len(value.encode()).to_bytes(4, "little") + value.encode() for value in values)


def test_index_with_new_enum_members_is_rejected(tmp_path: Path) -> None:
    """To a true `getattr` it is a way to exec: E.__class__.__call__.__globals__.get("bltns").exec(code)."""
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w')"
    enum, get = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n", b"cbuiltins\ngetattr\n"
    way = ["__class__", "__call__", "__globals__", "get", "exec"]
    taught = b"".join(words_of(word) + enum + b"s" for word in way)
    values = b"".join(words_of(word) + enum + b"s" for word in ("bltns", code))
    state = (
        b"N}"
        + words_of("_member_map_")
        + b"}"
        + taught
        + b"s"
        + words_of("_value2member_map_")
        + b"}"
        + values
        + b"s\x86"
    )
    step = enum
    for word in way[:4]:
        step = get + step + words_of(word) + b"\x86R"
    step = get + step + words_of("bltns") + b"\x85R" + words_of("exec") + b"\x86R" + words_of(code) + b"\x85R"
    metadata = b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}"
    for field in ("state_dict_metadata", "planner_data", "storage_data"):
        metadata += words_of(field) + b"}s"
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + enum + state + b"b0" + step + b"0" + metadata + b"b.")
    for read in (read_dcp, lambda folder: IndexReader(folder).read_metadata()):
        with raises(WeightsError, "safely", where=tmp_path / ".metadata"):
            read(tmp_path)
    assert not trace.exists()


def test_training_resumes_without_torch_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write_dcp_index(tmp_path)
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("it was unpickled with all that it carries"))
    state = {"model": {name: torch.zeros_like(value) for name, value in STATE.items()}}
    dcp.load(state, storage_reader=IndexReader(folder), no_dist=True)
    assert all(torch.equal(state["model"][name], value) for name, value in STATE.items())


def test_code_in_a_dcp_entry_is_rejected_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    dcp.save({"model": STATE, "base": {"path": Bomb(trace)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_refused(tmp_path / "dcp", trace)


def test_metadata_that_points_outside_its_folder_is_rejected(tmp_path: Path) -> None:
    folder, index = write_dcp_index(tmp_path)
    metadata: Any = pickle.loads(index.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../dcp/__0_0.distcp"
    index.write_bytes(pickle.dumps(metadata))
    with raises(WeightsError, repr("../dcp/__0_0.distcp"), where=index):
        open_weights(folder)


@pytest.mark.parametrize("change", [-1, 1, 4096])
def test_distcp_of_another_size_than_its_index_is_named(tmp_path: Path, change: int) -> None:
    """Files of another iteration, where no checksums.json tells."""
    folder, data = write_dcp_data(tmp_path)
    size = data.stat().st_size
    os.truncate(data, size + change)
    for read in (read_dcp, lambda path: IndexReader(path).read_metadata()):
        with raises(WeightsError, size, size + change, where=data):
            read(folder)


def test_save_that_was_not_finished_is_an_error(tmp_path: Path) -> None:
    folder, index = write_dcp_index(tmp_path)
    index.unlink()
    with raises(WeightsError, ".metadata"):
        open_weights(folder)


def test_missing_distcp_file_is_named(tmp_path: Path) -> None:
    folder, _ = write_dcp_data(tmp_path)
    (folder / "__0_0.distcp").unlink()
    with raises(WeightsError, "__0_0.distcp"):
        open_weights(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../../x"}}', "{" * 99999]
)
def test_damaged_index_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    assert_refused(tmp_path, tmp_path / "trace")


@CAREFULLY
@given(names=st.lists(st.text(max_size=12), max_size=5, unique=True))
def test_made_up_names_give_one_line(tmp_path: Path, names: list[str]) -> None:
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", tmp_path / "trace")


def test_huge_block_number_is_a_foreign_name(tmp_path: Path) -> None:
    torch.save({f"blocks.{'9' * 5000}.ffn.0.weight": torch.ones(1)}, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", tmp_path / "trace")


@CAREFULLY
@given(number=st.integers(min_value=5, max_value=10**300), dims=st.integers(0, 6))
def test_absurd_block_numbers_and_shapes_give_one_line(tmp_path: Path, number: int, dims: int) -> None:
    names = [
        "patch_embedding.weight",
        f"blocks.{number}.ffn.0.weight",
        "blocks.0.ffn.0.weight",
        "head.head.weight",
    ]
    torch.save({name: torch.ones([1] * dims) for name in names}, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", tmp_path / "trace")
