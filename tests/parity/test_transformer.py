"""The transformer computes what diffusers' WanVACETransformer3DModel computes.

Forward and backward, on the same weights.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanVACETransformer3DModel

from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.wan.vace import VaceTransformer
from tests.support.tiny import TINY, tiny_inputs, tiny_transformer

WIDE = VaceConfig(  # head width 24, hints for the last block too
    trunk=TINY.trunk.model_copy(update={"hidden_size": 96, "num_layers": 3}), vace_layers=(0, 1, 2)
)
SCALES = {TINY: (0.0, 0.4, (1.0, 0.3)), WIDE: (1.0, (0.5, 0.0, 2.0))}
NAMES = KEY_MAPS["diffusers"]


def oracle_of(model: VaceTransformer) -> WanVACETransformer3DModel:
    trunk = model.config.trunk
    oracle = WanVACETransformer3DModel(
        patch_size=trunk.patch_size,
        num_attention_heads=trunk.num_heads,
        attention_head_dim=trunk.head_dim,
        text_dim=trunk.text_dim,
        freq_dim=trunk.freq_dim,
        ffn_dim=trunk.ffn_dim,
        num_layers=trunk.num_layers,
        eps=trunk.eps,
        vace_layers=list(model.config.vace_layers),
        vace_in_channels=model.config.vace_in_dim,
    )
    oracle.load_state_dict({NAMES.to_theirs(name): weight for name, weight in model.state_dict().items()})
    return oracle.eval()


def run_oracle(oracle, inputs, scale, config):
    padding = config.trunk.text_len - inputs["prompt_embeds"].shape[1]
    scales = scale if isinstance(scale, tuple) else (scale,) * len(config.vace_layers)
    return oracle(
        hidden_states=inputs["latents"],
        timestep=inputs["timestep"],
        encoder_hidden_states=F.pad(inputs["prompt_embeds"], (0, 0, 0, padding)),
        control_hidden_states=inputs["vace_context"],
        control_hidden_states_scale=torch.tensor(scales),
    ).sample


class ExactSinusoid(torch.nn.Module):
    """What diffusers' Timesteps computes, in fp64."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timestep):
        half = self.dim // 2
        angles = timestep.double()[:, None] * 10000 ** -(torch.arange(half).double() / half)
        return torch.cat([angles.cos(), angles.sin()], dim=1).float()


@pytest.mark.parametrize(
    ("config", "scale"), [(config, scale) for config in SCALES for scale in SCALES[config]]
)
@pytest.mark.parametrize(("references", "height", "width"), [(0, 10, 14), (1, 6, 2), (3, 2, 18)])
def test_forward_and_gradients_match_diffusers(config, scale, references, height, width):
    model = tiny_transformer(config=config)
    oracle = oracle_of(model)
    inputs = tiny_inputs(batch=2, frames=references + 3, height=height, width=width, config=config)
    for tensor in (inputs["latents"], inputs["prompt_embeds"], inputs["vace_context"]):
        tensor.requires_grad_()
    target = torch.randn_like(inputs["latents"])

    ours = model(**inputs, context_scale=scale)
    (ours - target).square().mean().backward()
    our_inputs = {name: tensor.grad.clone() for name, tensor in inputs.items() if tensor.grad is not None}
    for tensor in inputs.values():
        tensor.grad = None
    theirs = run_oracle(oracle, inputs, scale, config)
    (theirs - target).square().mean().backward()

    assert ours.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
    their_weights = dict(oracle.named_parameters())
    largest = 0.0
    for name, weight in model.named_parameters():
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(
            grad, their_weights[NAMES.to_theirs(name)].grad, atol=5e-5, rtol=0, msg=name
        )
        largest = max(largest, grad.abs().max().item())
    assert largest > 0.01
    assert our_inputs.keys() == {"latents", "prompt_embeds", "vace_context"}
    for name, grad in our_inputs.items():
        torch.testing.assert_close(grad, inputs[name].grad, atol=5e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("config", "scale"), [(config, scale) for config in SCALES for scale in SCALES[config]]
)
@pytest.mark.parametrize("references", [0, 1, 3])
def test_remaining_difference_is_the_fp32_sinusoid(config, scale, references):
    model = tiny_transformer(seed=1, config=config)
    oracle = oracle_of(model)
    oracle.condition_embedder.timesteps_proj = ExactSinusoid(config.trunk.freq_dim)
    inputs = tiny_inputs(seed=1, batch=2, frames=references + 2, height=6, width=10, config=config)
    inputs["timestep"] = torch.tensor([999.7, 437.2])
    ours, theirs = model(**inputs, context_scale=scale), run_oracle(oracle, inputs, scale, config)
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)
    for out in (ours, theirs):
        out.square().mean().backward()
    their_weights = dict(oracle.named_parameters())
    for name, weight in model.named_parameters():
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(
            grad, their_weights[NAMES.to_theirs(name)].grad, atol=5e-6, rtol=0, msg=name
        )


@pytest.mark.parametrize("scale", [0.4, [1.0, 0.3]])
def test_scale_may_be_a_number_a_list_or_a_tensor(scale):
    model, inputs = tiny_transformer(), tiny_inputs(batch=2)
    with torch.no_grad():
        expected = model(**inputs, context_scale=scale)
        assert torch.equal(model(**inputs, context_scale=torch.tensor(scale, dtype=torch.float64)), expected)
        torch.testing.assert_close(
            run_oracle(oracle_of(model), inputs, tuple(scale) if isinstance(scale, list) else scale, TINY),
            expected,
            atol=5e-5,
            rtol=0,
        )


def test_full_caption_needs_no_padding():
    model = tiny_transformer()
    inputs = tiny_inputs(batch=2, text=TINY.trunk.text_len)
    with torch.no_grad():
        theirs = run_oracle(oracle_of(model), inputs, 1.0, TINY)
        torch.testing.assert_close(model(**inputs), theirs, atol=5e-5, rtol=0)
