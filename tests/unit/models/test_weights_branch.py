"""VACE starts from a plain T2V checkpoint: at step 0 the branch changes no bit of the trunk's answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.load_model import build_on_meta, load_weights
from mindspeed_mm.models.source import init_branch_from_trunk
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.weights import open_weights
from tests.support.errors import raises
from tests.support.tiny import TINY, tiny_inputs, tiny_transformer, write_transformer

T2V = TINY.model_copy(update={"vace_layers": ()})


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    write_transformer(tmp_path / "t2v", tiny_transformer(config=T2V), torch.float32)
    return tmp_path / "t2v"


def test_plain_t2v_checkpoint_opens(trunk: Path) -> None:
    source = open_weights(trunk)
    assert not source.has_branch
    assert source.config == T2V


@pytest.mark.parametrize("config", [TINY, TINY.model_copy(update={"vace_layers": (0, 1, 3)})])
def test_step_0_equals_the_trunk_bit_for_bit(trunk: Path, config: VaceConfig) -> None:
    source = init_branch_from_trunk(open_weights(trunk), config)
    model = load_weights(build_on_meta(config), source, dtype=torch.float32).eval()
    inputs = tiny_inputs(batch=2)
    with torch.no_grad():
        vace = model(**inputs)
        plain = tiny_transformer(config=T2V)(**{**inputs, "vace_context": None})
    assert torch.equal(vace, plain)


def test_branch_is_a_copy_of_the_blocks_that_it_feeds(trunk: Path) -> None:
    source = init_branch_from_trunk(open_weights(trunk), TINY)
    weights: dict[str, Tensor] = {name: source.read(name) for name in source.shapes}
    for n, layer in enumerate(TINY.vace_layers):
        for rest in ("self_attn.q.weight", "ffn.2.bias", "norm3.weight", "modulation"):
            assert torch.equal(weights[f"vace_blocks.{n}.{rest}"], weights[f"blocks.{layer}.{rest}"])
        assert not weights[f"vace_blocks.{n}.after_proj.weight"].any()
    wide, patch = weights["vace_patch_embedding.weight"], weights["patch_embedding.weight"]
    assert torch.equal(wide[:, :16], patch)
    assert torch.equal(wide[:, 16:32], patch)
    assert not wide[:, 32:].any()
    assert not weights["vace_blocks.0.before_proj.weight"].any()
    assert torch.equal(weights["vace_patch_embedding.bias"], weights["patch_embedding.bias"])


def test_branch_and_trunk_do_not_share_memory(trunk: Path) -> None:
    source = init_branch_from_trunk(open_weights(trunk), TINY)
    model = load_weights(build_on_meta(TINY), source, dtype=torch.float32)
    before = model.blocks[0].ffn[0].weight.detach().clone()
    with torch.no_grad():
        model.vace_blocks[0].ffn[0].weight.add_(1)
    assert torch.equal(model.blocks[0].ffn[0].weight, before)


def test_fingerprint_stays_the_trunks(trunk: Path) -> None:
    source = open_weights(trunk)
    assert init_branch_from_trunk(source, TINY).fingerprint() == source.fingerprint()


def test_missing_vace_keys_are_an_error_by_default(trunk: Path) -> None:
    with raises(WeightsError, "missing", "init_from_trunk"):
        load_weights(build_on_meta(TINY), open_weights(trunk), dtype=torch.float32)


def test_branch_is_not_started_twice(tmp_path: Path) -> None:
    write_transformer(tmp_path, tiny_transformer(), torch.float32)
    with raises(WeightsError, "init_from_trunk"):
        init_branch_from_trunk(open_weights(tmp_path), TINY)


def test_another_trunk_is_an_error(trunk: Path) -> None:
    other = TINY.model_copy(update={"trunk": TINY.trunk.model_copy(update={"num_layers": 6})})
    with raises(WeightsError, "blocks.4"):
        init_branch_from_trunk(open_weights(trunk), other)
