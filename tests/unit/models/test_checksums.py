"""Damage that no reader notices by itself: flipped bits, zeros, files of another iteration."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers import checksums
from mindspeed_mm.models.containers.checksums import FILE, VARIABLE, verifying
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.containers.safetensors import read_safetensors, write_safetensors
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.containers.torch_file import read_torch, write_torch
from mindspeed_mm.models.loading import assign_weights, read_tensors
from mindspeed_mm.training.checkpoint_files import ChecksumWriter, IndexReader, TensorPlanner
from tests.support.errors import raises

Change = Callable[[bytearray, int], None]


def flip(content: bytearray, place: int) -> None:
    content[place] ^= 1


def zero(content: bytearray, place: int) -> None:
    content[place : place + 64] = bytes(64)


def state_of(iteration: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(iteration)
    draw = torch.randn(2, 40, 40, generator=generator)
    return {"model": {"w": draw[0]}, "optimizer": {"w": draw[1]}, "iteration": torch.tensor(iteration)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 70 and 80, with checksums."""
    folder = tmp_path_factory.mktemp("run")
    for number in (70, 80):
        writer = ChecksumWriter(folder / f"iter_{number:07d}", number)
        dcp.save(state_of(number), storage_writer=writer, no_dist=True)
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run/iter_0000080"


def damage(path: Path, values: Tensor, change: Change) -> None:
    content = bytearray(path.read_bytes())
    change(content, content.index(values.numpy().tobytes()) + 2000)
    path.write_bytes(content)


def read(folder: Path) -> dict[str, Tensor]:
    state = read_dcp(folder)
    return {name: state[name]["w"].read() for name in ("model", "optimizer")}


def resume(folder: Path) -> None:
    state = {name: {"w": torch.zeros(40, 40)} for name in ("model", "optimizer")}
    dcp.load(state, storage_reader=IndexReader(folder), planner=TensorPlanner(), no_dist=True)


@pytest.mark.parametrize("change", [flip, zero])
@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("with_file", [True, False], ids=["checksums.json", "zip"])
def test_damage_in_a_distcp_is_found(copied: Path, change: Change, part: str, with_file: bool) -> None:
    assert torch.equal(read(copied)["model"], state_of(80)["model"]["w"])
    damage(copied / "__0_0.distcp", state_of(80)[part]["w"], change)
    if not with_file:  # as in checkpoints of earlier versions
        (copied / FILE).unlink()
    with raises(WeightsError, "__0_0.distcp", f"{part}.w") as caught:
        read(copied)
    assert "\n" not in str(caught.value)
    with pytest.raises(BaseException, match=r"__0_0\.distcp"):
        resume(copied)
    with verifying(False):
        assert not torch.equal(read(copied)[part], state_of(80)[part]["w"])


def test_distcp_of_another_iteration_is_named(copied: Path) -> None:
    shutil.copy(copied.parent / "iter_0000070/__0_0.distcp", copied)
    with raises(WeightsError, "__0_0.distcp", 70, 80):
        read_dcp(copied)
    (copied / FILE).unlink()
    with raises(WeightsError, "iter_0000080", 70, 80):
        read_dcp(copied)


def test_lfs_pointer_of_a_distcp_is_named(copied: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 34700000000\n"
    (copied / "__0_0.distcp").write_text(pointer)
    with raises(WeightsError, "LFS pointer", "34.7 GB", where=copied / "__0_0.distcp"):
        read_dcp(copied)
    (copied / FILE).unlink()
    with raises(WeightsError, "LFS pointer", "34.7 GB", where=copied / "__0_0.distcp"):
        read_dcp(copied)


def test_folder_under_another_iterations_name_is_rejected(copied: Path) -> None:
    copied.rename(copied.with_name("iter_0000090"))
    with raises(WeightsError, 80, 90):
        read_dcp(copied.with_name("iter_0000090"))


def test_damaged_index_or_checksum_file_is_found(copied: Path) -> None:
    content = bytearray((copied / ".metadata").read_bytes())
    content[content.index(b"float32")] ^= 1
    (copied / ".metadata").write_bytes(content)
    with raises(WeightsError, where=copied / ".metadata"):
        read_dcp(copied)
    (copied / FILE).write_text("{")
    with raises(WeightsError, where=copied / FILE):
        read_dcp(copied)


def test_checkpoint_without_checksums_is_read(copied: Path) -> None:
    (copied / FILE).unlink()
    assert torch.equal(read(copied)["optimizer"], state_of(80)["optimizer"]["w"])


def tensor_files(tensors: dict[str, Tensor]) -> dict[str, TensorFile]:
    return {name: TensorFile(t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()}


def saved_by_torch(path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save({"model": tensors}, path)


def saved_by_us(path: Path, tensors: dict[str, Tensor]) -> None:
    write_torch(path, {"model": tensor_files(tensors)})


def saved_as_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_safetensors(path, tensor_files(tensors))


def tensors_in(path: Path) -> dict[str, TensorFile]:
    found = read_torch(path)["model"] if path.suffix == ".pth" else dict(read_safetensors([path]).tensors)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("change", [flip, zero])
@pytest.mark.parametrize(
    ("save", "name"),
    [(saved_by_torch, "x.pth"), (saved_by_us, "x.pth"), (saved_as_safetensors, "x.safetensors")],
    ids=["torch", "ours", "safetensors"],
)
def test_damage_in_a_file_of_weights_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    save: Callable[[Path, dict[str, Tensor]], None],
    name: str,
) -> None:
    tensors, path = {"a": torch.randn(40, 40), "b": torch.ones(3)}, tmp_path / name
    save(path, tensors)
    assert torch.equal(tensors_in(path)["a"].read(), tensors["a"])
    damage(path, tensors["a"], change)
    found = tensors_in(path)
    assert torch.equal(found["b"].read(), tensors["b"]), "what is whole is read"
    with raises(WeightsError, name, f"{VARIABLE}=0"):
        found["a"].read()
    monkeypatch.setenv(VARIABLE, "0")
    assert found["a"].read().shape == (40, 40)


def module_of(tensors: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        return nn.ParameterDict({name: nn.Parameter(torch.empty_like(t)) for name, t in tensors.items()})


def filled(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    module = module_of(tensors)
    assign_weights(module, read_tensors([path]), path, dtype)
    return module.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_filling_a_model_finds_damage_per_policy(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensors, path = {letter: torch.randn(40, 40) for letter in "abcdefgh"}, tmp_path / name
    if name == "x.pth":
        torch.save(tensors, path)
    else:
        saved_as_safetensors(path, tensors)
    found = filled(path, tensors, dtype)
    assert all(torch.equal(found[letter], tensors[letter].to(dtype)) for letter in tensors)
    damage(path, tensors["g"], zero)
    with raises(WeightsError, VARIABLE, name):
        filled(path, tensors, dtype)
    with verifying(False):
        assert not torch.equal(filled(path, tensors, dtype)["g"], tensors["g"].to(dtype))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_weight_is_verified_converted_and_seen_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A second pass over weights that no cache holds costs as much as the first."""
    whole, path = torch.randn(3 * (1 << 18) + 5), tmp_path / name
    saved_by_torch(path, {"a": whole}) if name == "x.pth" else saved_as_safetensors(path, {"a": whole})
    tensor = tensors_in(path)["a"]
    monkeypatch.setattr(checksums, "crc_of", lambda *args: pytest.fail("the file is read again"))
    parts: list[Tensor] = []
    found = tensor.read_as(torch.bfloat16, parts.append)
    assert torch.equal(found, whole.to(torch.bfloat16))
    assert torch.equal(torch.cat(parts), found)
    assert len(parts) == 7
    monkeypatch.setattr(checksums, "crc32", lambda *args: pytest.fail("verified twice"))
    assert torch.equal(tensor.read(), whole)


def test_part_of_a_record_is_read_as_another_dtype(tmp_path: Path) -> None:
    whole, path = torch.randn(40, 40), tmp_path / "x.pth"
    torch.save({"model": {"part": whole[3:7], "turned": whole.T}}, path)
    found = tensors_in(path)
    assert torch.equal(found["part"].read_as(torch.float64), whole[3:7].double())
    assert torch.equal(found["turned"].read_as(torch.float32), whole.T)
    damage(path, whole, flip)
    with raises(WeightsError, VARIABLE, "x.pth"):
        tensors_in(path)["part"].read_as(torch.float64)


def test_weights_that_are_computed_are_computed_once(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    e4m3 = torch.ones(4, 4).to(torch.float8_e4m3fn)
    save_file({"a.weight": e4m3, "a.scale_weight": torch.tensor(2.0)}, path)
    tensor = read_tensors([path])["a.weight"]
    assert tensor.read() is tensor.read()
    assert torch.equal(tensor.read_as(torch.float32), torch.full((4, 4), 2.0))


def test_what_we_write_passes_other_readers_checks(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(40, 40), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(0)}
    saved_by_us(tmp_path / "x.pth", tensors)
    assert zipfile.ZipFile(tmp_path / "x.pth").testzip() is None
    saved_as_safetensors(tmp_path / "x.safetensors", tensors)
    assert all(
        torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "x.safetensors").items()
    )


def test_torch_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        saved_by_torch(tmp_path / "x.pth", {"a": torch.randn(40, 40)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert tensors_in(tmp_path / "x.pth")["a"].read().shape == (40, 40)


def test_processes_that_share_a_file_verify_it_together(tmp_path: Path) -> None:
    tensors = {name: torch.randn(40, 40) for name in "abcd"}
    saved_by_us(tmp_path / "x.pth", tensors)
    damage(tmp_path / "x.pth", tensors["c"], flip)
    errors = 0
    for part in range(2):
        with verifying(True, part, 2):
            try:
                [tensor.read() for tensor in tensors_in(tmp_path / "x.pth").values()]
            except WeightsError:
                errors += 1
    assert errors == 1
