"""Attention: the fused kernel is the formula, and padding rows may be counted instead of computed."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.ops.attention import attend, attend_padded, attend_reference


def heads(seed, tokens, dtype=torch.float32):
    return (
        torch.randn(2, tokens, 3, 16, generator=torch.Generator().manual_seed(seed))
        .to(dtype)
        .requires_grad_()
    )


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_fused_kernel_matches_the_formula_with_its_gradients(dtype, atol):
    q, k, v = heads(0, 11, dtype), heads(1, 7, dtype), heads(2, 7, dtype)
    results = []
    for function in (attend, attend_reference):
        out = function(q, k, v)
        assert out.shape == q.shape
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(
            fused, plain, atol=10 * atol, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5
        )


def test_formula_is_softmax_of_scaled_products():
    q, k, v = (heads(seed, 5).double() for seed in range(3))
    weights = torch.softmax((q[0, :, 1] @ k[0, :, 1].T) / 4, dim=-1)
    torch.testing.assert_close(
        attend_reference(q, k, v)[0, :, 1].double(), weights @ v[0, :, 1], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("copies", [1, 2, 500])
@pytest.mark.parametrize("own", [True, False])
def test_repeated_row_counts_every_time(copies, own):
    q, k, v = heads(0, 9), heads(1, 4), heads(2, 4)
    rows = [torch.cat((x, x[:, -1:].repeat(1, copies - 1, 1, 1)), dim=1) for x in (k, v)]
    assert rows[0].shape[1] == 3 + copies
    found = attend_padded(q, k, v, copies, attend if own else attend_reference)
    expected = attend_reference(q, *rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_padding_weight_is_not_rounded():
    q, k, v = (heads(seed, 4, torch.bfloat16) for seed in range(3))
    rows = [torch.cat((x, x[:, -1:].repeat(1, 399, 1, 1)), dim=1).float() for x in (k, v)]
    expected = attend_reference(q.float(), *rows)
    torch.testing.assert_close(attend_padded(q, k, v, 400).float(), expected, atol=5e-3, rtol=1e-2)
