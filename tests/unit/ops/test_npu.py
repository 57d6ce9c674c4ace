"""The NPU's fused ops are called as torch_npu declares them.

A stand-in binds every call to the declared signature, keeps to the documented limits, and computes the result
by the plain formula in the layout that the call asks for.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from einops import rearrange

from mindspeed_mm.ops import npu
from mindspeed_mm.ops.attention import attend, attend_padded, attend_reference
from mindspeed_mm.ops.norm import rms_norm, rms_norm_reference
from mindspeed_mm.ops.rope import apply_rope, apply_rope_reference, rope_tables
from tests.support.tiny import tiny_inputs, tiny_transformer

TABLE = json.loads((Path(__file__).parents[2] / "data" / "torch_npu_ops.json").read_text())
KINDS = {"Tensor": torch.Tensor, "int": int, "float": float, "str": str, "bool": bool}
LAYOUTS = {"BSND": "b s n k", "BNSD": "b n s k", "SBH": "s b (n k)", "BSH": "b s (n k)"}


def signature_of(schema: str) -> inspect.Signature:
    """`op(Tensor x, float scale=1., *, int? n=None) -> …` as a Python signature.

    The annotation is the kind wanted.
    """
    parameters, keyword_only = [], False
    for part in re.search(r"\((.*?)\) ->", schema)[1].split(", "):
        if part == "*":
            keyword_only = True
            continue
        kind, name, default = re.fullmatch(r"(\S+) (\w+)(?:=(.*))?", part).groups()
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if default is None else ast.literal_eval(default),
                annotation=kind,
            )
        )
    return inspect.Signature(parameters)


def bind(schema: str, args, kwargs) -> dict:
    bound = signature_of(schema).bind(*args, **kwargs)  # TypeError for a name or count that is not declared
    given = set(bound.arguments)
    bound.apply_defaults()
    for name, parameter in bound.signature.parameters.items():
        wanted = KINDS.get(parameter.annotation.rstrip("?"))
        if name in given and wanted and not isinstance(bound.arguments[name], wanted):
            raise TypeError(f"{name} must be {parameter.annotation}")
    return bound.arguments


class StandIn(types.ModuleType):
    """torch_npu with the three ops, and nothing else."""

    def __init__(self, version: str) -> None:
        super().__init__("torch_npu")
        self.table = TABLE[version]
        self.calls: list[str] = []

    def _bind(self, op, args, kwargs):
        self.calls.append(op)
        return bind(self.table[op], args, kwargs)

    def npu_fusion_attention(self, *args, **kwargs):
        call = self._bind("npu_fusion_attention", args, kwargs)
        layout, heads = LAYOUTS[call["input_layout"]], call["head_num"]
        unused = {"pse", "padding_mask", "atten_mask", "prefix", "actual_seq_qlen", "actual_seq_kvlen"}
        assert all(call[name] is None for name in unused)
        assert call["keep_prob"] == 1
        assert call["sparse_mode"] == 0
        q, k, v = (
            rearrange(call[name], f"{layout} -> b s n k", n=heads) for name in ("query", "key", "value")
        )
        assert q.dtype == k.dtype == v.dtype
        assert heads <= 256
        assert q.shape[-1] <= 768
        out = attend_reference(q * (call["scale"] * q.shape[-1] ** 0.5), k, v)
        return rearrange(out, f"b s n k -> {layout}"), None, None, None, 0, 0, 0

    def npu_rms_norm(self, *args, **kwargs):
        x, gamma, epsilon = self._bind("npu_rms_norm", args, kwargs).values()
        assert gamma.dtype == x.dtype
        return rms_norm_reference(x, gamma, epsilon), torch.rsqrt(
            x.float().square().mean(-1, keepdim=True) + epsilon
        )

    def npu_rotary_mul(self, *args, **kwargs):
        call = self._bind("npu_rotary_mul", args, kwargs)
        x, cos, sin, mode = call["self"], call["r1"], call["r2"], call["rotary_mode"]
        batch, tokens, heads, width = x.shape
        assert cos.shape == sin.shape == (1, tokens, 1, width)  # of BSND
        assert x.dtype == cos.dtype == sin.dtype
        assert batch * heads < 1000
        if mode == "half":
            one, two = x.chunk(2, dim=-1)
            return cos * x + sin * torch.cat((-two, one), dim=-1)
        assert mode == "interleave"
        return cos * x + sin * torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


@pytest.fixture(params=sorted(TABLE))
def torch_npu(request, monkeypatch):
    """A stand-in of each version, and tensors that pass for ones on an NPU."""
    module = StandIn(request.param)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(npu, "is_on_npu", lambda x: True)
    return module


def heads(seed, tokens=30, dtype=torch.float32):
    return torch.randn(2, tokens, 4, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_matches_the_formula(torch_npu, dtype):
    q, k, v = heads(0, dtype=dtype), heads(1, 7, dtype=dtype), heads(2, 7, dtype=dtype)
    torch.testing.assert_close(
        attend(q, k, v), attend_reference(q, k, v), atol=2e-2 if dtype != q.float().dtype else 1e-6, rtol=0
    )
    assert torch_npu.calls == ["npu_fusion_attention"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_its_formula(torch_npu, dtype):
    x, weight = heads(0, dtype=dtype).flatten(2), torch.rand(48)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight.to(dtype), 1e-5))
    assert torch_npu.calls == ["npu_rms_norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_matches_the_formula(torch_npu, dtype):
    cos, sin = rope_tables((2, 3, 5), (4, 4, 4), torch.device("cpu"))
    x = heads(0, dtype=dtype)
    torch.testing.assert_close(
        apply_rope(x, cos, sin), apply_rope_reference(x, cos, sin), atol=1e-6, rtol=0.01
    )
    assert torch_npu.calls == ["npu_rotary_mul"]


def test_many_heads_use_the_rotation_formula(torch_npu):
    cos, sin = rope_tables((1, 1, 2), (4, 4, 4), torch.device("cpu"))
    x = torch.randn(25, 2, 40, 12)
    assert torch.equal(apply_rope(x, cos, sin), apply_rope_reference(x, cos, sin))
    assert torch_npu.calls == []


def test_whole_model_computes_the_same_with_the_fused_ops(torch_npu, monkeypatch):
    model, inputs = tiny_transformer(), tiny_inputs(batch=2)
    fused = model(**inputs)
    fused.square().mean().backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert set(torch_npu.calls) == set(TABLE["2.13.0"])
    model.zero_grad()
    monkeypatch.setattr(npu, "is_on_npu", lambda x: False)
    plain = model(**inputs)
    plain.square().mean().backward()
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(grads[name], weight.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_padding_rows_are_given_to_the_fused_kernel(torch_npu):
    class OnNpu(torch.Tensor):
        device = types.SimpleNamespace(type="npu")

    q, k, v = (heads(seed).as_subclass(OnNpu) for seed in range(3))
    out = attend_padded(q, k, v, 5)
    rows = [torch.cat((x, x[:, -1:].repeat(1, 4, 1, 1)), dim=1).as_subclass(torch.Tensor) for x in (k, v)]
    torch.testing.assert_close(
        out.as_subclass(torch.Tensor), attend_reference(heads(0), *rows), atol=1e-6, rtol=0
    )
    assert torch_npu.calls == ["npu_fusion_attention"]


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        ("npu_fusion_attention", (4, "BSND"), {"scale_value": 0.3}),  # that is the name in the backward op
        ("npu_fusion_attention", (4, "BSND"), {"dropout": 0.0}),
        ("npu_fusion_attention", ("BSND", 4), {}),
        ("npu_fusion_attention", (4,), {}),
        ("npu_rms_norm", (), {"eps": 1e-6}),
        ("npu_rotary_mul", (), {"mode": "interleave"}),
    ],
)
def test_fake_rejects_what_torch_npu_does_not_declare(torch_npu, op, args, kwargs):
    tensors = (heads(0),) * (2 if op == "npu_rms_norm" else 3)
    with pytest.raises(TypeError):
        getattr(torch_npu, op)(*tensors, *args, **kwargs)


def test_fake_kernel_notices_wrong_scale_and_layout(torch_npu):
    q, k, v = (heads(seed, tokens=4) for seed in range(3))  # 4 tokens, 4 heads: BNSD binds too
    right = attend_reference(q, k, v)
    assert not torch.allclose(torch_npu.npu_fusion_attention(q, k, v, 4, "BSND")[0], right, atol=1e-3)
    assert not torch.allclose(
        torch_npu.npu_fusion_attention(q, k, v, 4, "BNSD", scale=12**-0.5)[0], right, atol=1e-3
    )


def test_without_an_npu_torch_npu_is_not_imported():
    assert not npu.is_on_npu(torch.ones(1))
    apply_rope(heads(0), *rope_tables((2, 3, 5), (4, 4, 4), torch.device("cpu")))
    assert "torch_npu" not in sys.modules
