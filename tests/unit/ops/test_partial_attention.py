"""Parts of the keys, merged by their log-sum-exp, give attention to all keys; so do their gradients."""

import pytest
import torch

from mindspeed_mm.ops import partial_attention
from mindspeed_mm.ops.attention import attend_reference
from mindspeed_mm.ops.partial_attention import attend_part, merge, part_gradients

PARTS = (5, 1, 11)  # keys of each part


@pytest.fixture(params=["fused", "formula"])
def kernels(request, monkeypatch):
    if request.param == "formula":
        monkeypatch.setattr(partial_attention, "_ROWS", 3)  # queries are cut, too
        monkeypatch.setattr(partial_attention, "attend_part", partial_attention._by_formula)
        monkeypatch.setattr(partial_attention, "part_gradients", partial_attention._gradients_by_formula)
    return partial_attention


def inputs():
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 7, 3, 16), (2, sum(PARTS), 3, 16), (2, sum(PARTS), 3, 16))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def test_merged_parts_are_the_whole(kernels):
    q, k, v = (tensor.detach() for tensor in inputs())
    answers = [
        kernels.attend_part(q, *pair) for pair in zip(k.split(PARTS, 1), v.split(PARTS, 1), strict=True)
    ]
    whole = merge(merge(answers[0], answers[1]), answers[2])
    torch.testing.assert_close(whole.out, attend_reference(q, k, v), rtol=0, atol=1e-6)


def test_gradients_of_parts_sum_to_those_of_the_whole(kernels):
    q, k, v = inputs()
    out = attend_reference(q, k, v)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    wanted = torch.autograd.grad(out, (q, k, v), above)
    q, k, v = (tensor.detach() for tensor in (q, k, v))
    whole = kernels.attend_part(q, k, v)
    found = [
        kernels.part_gradients(above, q, *pair, whole.out, whole.lse)
        for pair in zip(k.split(PARTS, 1), v.split(PARTS, 1), strict=True)
    ]
    torch.testing.assert_close(sum(part[0] for part in found), wanted[0], rtol=1e-6, atol=1e-6)
    for place in (1, 2):
        joined = torch.cat([part[place] for part in found], 1)
        torch.testing.assert_close(joined, wanted[place], rtol=1e-6, atol=1e-6)


def test_part_that_outweighs_the_others_does_not_overflow():
    q = torch.full((1, 1, 1, 8), 100.0)
    k, v = torch.cat([-q, q], 1), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 1, 8)
    parts = [attend_part(q, k[:, i : i + 1], v[:, i : i + 1]) for i in range(2)]
    whole = merge(*parts)
    assert torch.equal(whole.out, torch.full((1, 1, 1, 8), 2.0))
    gradients = part_gradients(torch.ones_like(q), q, k[:, :1], v[:, :1], whole.out, whole.lse)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
