"""What a recomputed block keeps.

Run on a CPU, where "the host" is the device itself and a kept input is a copy.
"""

import gc
import weakref

import pytest
import torch

from mindspeed_mm.distributed.recompute import apply_recompute, compile_blocks
from tests.support.tiny import TINY, tiny_inputs, tiny_transformer

pytestmark = pytest.mark.medium

SHALLOW = TINY.model_copy(
    update={"trunk": TINY.trunk.model_copy(update={"num_layers": 2}), "vace_layers": (0,)}
)


def blocks_of(config):
    trunk = [f"blocks.{i}" for i in range(config.trunk.num_layers)]
    return trunk + [f"vace_blocks.{i}" for i in range(len(config.vace_layers))]


BLOCKS = blocks_of(TINY)


def gradients(mode, *, to_host=False, compiled=False, trainable=("vace_",), config=TINY):
    """Loss and gradients of one sample, and references to every block's input."""
    model, blocks = tiny_transformer(0, config), blocks_of(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trainable))
    if mode:
        apply_recompute(model, dict.fromkeys(blocks, mode), inputs_to_host=to_host, pin=False)
    if compiled:
        compile_blocks(model, blocks)
    seen = []
    for name in blocks:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    inputs = tiny_inputs(0)
    loss = model(**inputs).square().mean()
    gc.collect()
    alive = sum(reference() is not None for reference in seen)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found, alive


def same(one, other, tolerance=1e-6):
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("trainable", [("vace_",), ("",)], ids=["branch", "all"])
def test_offloaded_inputs_change_no_gradient(mode, trainable):
    plain = gradients(None, trainable=trainable)
    kept = gradients(mode, trainable=trainable)
    moved = gradients(mode, to_host=True, trainable=trainable)
    same(plain, kept)
    same(plain, moved)
    assert moved[2] < kept[2], "block inputs are not held where they were made"


@pytest.mark.parametrize("mode", [None, "full", "selective"])
def test_compiled_block_computes_the_same(mode, monkeypatch):
    """Traced as for any device; without the last stage, which needs a compiler."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: whole(function, backend="aot_eager"))
    same(gradients(mode, config=SHALLOW), gradients(mode, compiled=True, config=SHALLOW), 1e-5)


def test_nothing_is_recomputed_where_no_gradient_comes():
    """With everything frozen no block runs under a checkpoint, and the answer is the same."""
    model = tiny_transformer(0).requires_grad_(False)
    inputs = tiny_inputs(0)
    wanted = model(**inputs)
    apply_recompute(model, dict.fromkeys(BLOCKS, "selective"), inputs_to_host=True, pin=False)
    found = model(**inputs)
    assert not found.requires_grad
    assert torch.equal(found, wanted)
    assert len(BLOCKS) == TINY.trunk.num_layers + len(TINY.vace_layers)
