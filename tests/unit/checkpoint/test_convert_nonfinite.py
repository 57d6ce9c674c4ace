"""mm-convert refuses weights that contain NaN or Inf, unless a flag says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoint.config import DcpToTorchConfig, FromMmConfig, ToMmConfig
from checkpoint.vace import dcp_to_torch, hf_to_mm, mm_to_hf
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.weights import open_weights
from tests.support.errors import raises
from tests.support.tiny import tiny_transformer, write_transformer

pytestmark = pytest.mark.medium

NAME = "blocks.1.ffn.0.weight"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    model = tiny_transformer()
    with torch.no_grad():
        model.get_parameter(NAME)[3, :2] = torch.tensor([float("nan"), float("-inf")])
    write_transformer(tmp_path / "official", model, torch.bfloat16)
    return tmp_path


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr("checkpoint.write.logger.warning", said.append)
    return said


def test_weights_that_are_not_finite_are_not_converted(damaged: Path, warnings: list[str]) -> None:
    source, target = str(damaged / "official"), str(damaged / "mm")
    with raises(WeightsError, "allow_nonfinite", 1, 2, "ffn.0.weight", where=source):
        hf_to_mm(ToMmConfig(source_path=source, target_path=target))
    assert not Path(target).exists()
    assert not list(damaged.glob(".*"))
    hf_to_mm(ToMmConfig(source_path=source, target_path=target, allow_nonfinite=True))
    (line,) = warnings
    assert source in line
    assert "ffn.0.weight" in line
    weight = open_weights(target).read(NAME)
    assert weight[3, :2].float().tolist()[1] == float("-inf")
    with raises(WeightsError, "allow_nonfinite", NAME, where=target):
        mm_to_hf(FromMmConfig(source_path=target, target_path=str(damaged / "back")))


def test_sharded_checkpoint_that_is_not_finite_is_not_gathered(damaged: Path) -> None:
    folder = damaged / "iter_0000002"
    state = {
        "model": {"a": torch.ones(4)},
        "optimizer": {"state": {"a": {"exp_avg": torch.full((4,), float("nan"))}}},
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    cfg = DcpToTorchConfig(source_path=str(folder), target_path=str(damaged / "whole.pt"))
    with raises(WeightsError, "exp_avg", 4, where=folder):
        dcp_to_torch(cfg)
    dcp_to_torch(cfg.model_copy(update={"allow_nonfinite": True}))
    assert (damaged / "whole.pt").is_file()
