"""`mm-convert VACEConverter dcp_to_torch` against torch's own tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from checkpoint.cli import main

STATE = {
    "model": {
        "vace_dit.a.weight": torch.arange(12.0).view(3, 4),
        "vace_dit.b": torch.ones(5, dtype=torch.bfloat16),
    },
    "optimizer": {"state": {"vace_dit.b": {"exp_avg": torch.zeros(5), "step": torch.tensor(3.0)}}},
    "iteration": torch.tensor(80),
    "base": {"path": "somewhere", "fingerprint": "0123"},
    "config": "{}",
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "run/iter_0000080"
    dcp.save(STATE, checkpoint_id=folder, no_dist=True)
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("80\n")
    return folder


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else bool(a == b)


def convert(source: Path, target: Path) -> None:
    main(
        ["VACEConverter", "dcp_to_torch", "--cfg.source_path", str(source), "--cfg.target_path", str(target)]
    )


def test_dcp_to_torch_equals_torchs_own(saved: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(saved, tmp_path / "torch.pt")
    convert(saved, tmp_path / "ours.pt")
    expected, found = (torch.load(tmp_path / name, weights_only=True) for name in ("torch.pt", "ours.pt"))
    assert same(found, expected)


def test_dcp_to_torch_writes_a_release_folder(saved: Path, tmp_path: Path) -> None:
    convert(saved.parent, tmp_path / "out")
    file = tmp_path / "out/release/mp_rank_00/model_optim_rng.pt"
    assert same(torch.load(file, weights_only=True)["model"], STATE["model"])
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release\n"


def test_dcp_to_torch_rejects_other_files(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved / ".metadata").unlink()
    for source in (saved, saved.parent):
        with pytest.raises(SystemExit) as stopped:
            convert(source, tmp_path / "out")
        assert stopped.value.code == 1
        said = "".join(capsys.readouterr())
        assert ".metadata" in said
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
