"""Pipeline stages of models with the published layers and names, narrow so that a test can hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.cli import main
from mindspeed_mm.models.wan.config import PRESETS, VaceConfig
from mindspeed_mm.models.weights import open_weights
from tests.support.layouts import published_layout
from tests.support.tiny import TINY, tiny_transformer, write_transformer

pytestmark = pytest.mark.medium

STAGES = [
    ("Wan2.1-VACE-1.3B", [7, 8, 8, 7]),  # the guide's
    ("Wan2.1-VACE-1.3B", [[4, 4], [11, 11]]),
    ("Wan2.1-VACE-14B", [1, 4, 1, 34]),  # the second holds no branch block
    ("Wan2.1-VACE-14B", [[5, 5, 5, 5], [6, 4, 5, 5]]),
]


def narrow(name: str) -> VaceConfig:
    """The preset's layers with TINY's widths."""
    preset = PRESETS[name]
    trunk = TINY.trunk.model_copy(update={"num_layers": preset.trunk.num_layers})
    return TINY.model_copy(update={"trunk": trunk, "vace_layers": preset.vace_layers})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models in original names."""
    folder = tmp_path_factory.mktemp("narrow")
    for name in dict(STAGES):
        write_transformer(folder / name, tiny_transformer(0, narrow(name)))
    return {name: folder / name for name in dict(STAGES)}


def convert(method: str, source: Path, target: Path, *more: str) -> None:
    main(["VACEConverter", method, "--cfg.source_path", str(source), "--cfg.target_path", str(target), *more])


@pytest.mark.parametrize(("name", "stages"), STAGES)
def test_published_models_split_and_merge_to_the_same_bits(
    tmp_path: Path, originals: dict[str, Path], name: str, stages: list[Any]
) -> None:
    wanted = open_weights(originals[name])
    assert wanted.shapes.keys() == published_layout(name).keys()

    convert("hf_to_mm", originals[name], tmp_path / "split", "--pp_layers", json.dumps(stages))
    sizes = stages if isinstance(stages[0], list) else [stages]
    for rank in range(len(sizes[0])):
        file = tmp_path / f"split/release/mp_rank_00_{rank:03d}/model_optim_rng.pt"
        state = torch.load(file, weights_only=True)
        for chunk, part in enumerate(sizes):
            held = state["model" if len(sizes) == 1 else f"model{chunk}"]
            blocks = {int(key.split(".")[2]) for key in held if key.startswith("wan_dit.blocks.")}
            assert blocks == set(range(part[rank])), (rank, chunk)

    convert("resplit", tmp_path / "split", tmp_path / "merged")
    merged = open_weights(tmp_path / "merged")
    assert merged.shapes == wanted.shapes
    assert all(torch.equal(merged.read(key), wanted.read(key)) for key in wanted.tensors)
