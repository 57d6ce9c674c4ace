"""A torch that does not tell offsets reads and writes .pt files all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_mm.models.containers import torch_file
from mindspeed_mm.models.containers.tensors import TensorFile


@pytest.mark.parametrize("offsets", [True, False])
def test_nested_dict_comes_back_bit_for_bit(
    offsets: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_file, "knows_offsets", lambda: offsets)
    values = {"a": torch.randn(3, 5), "b": torch.arange(6, dtype=torch.bfloat16)}
    files = {name: TensorFile(value.shape, value.dtype, value.clone) for name, value in values.items()}
    seen: list[int] = []

    torch_file.write_torch(tmp_path / "x.pt", {"model": files, "iteration": 3}, written=seen.append)
    found = torch_file.read_torch(tmp_path / "x.pt")

    assert found["iteration"] == 3
    assert all(torch.equal(found["model"][name].read(), value) for name, value in values.items())
    assert sum(seen) == sum(value.nbytes for value in values.values())
    plain = torch.load(tmp_path / "x.pt", weights_only=True)["model"]
    assert all(torch.equal(plain[name], value) for name, value in values.items())


def test_torch_of_the_constraints_streams() -> None:
    assert torch_file.knows_offsets()
