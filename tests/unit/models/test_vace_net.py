"""The VACE transformer: sizes, order of work, dtypes, what it refuses.

Its numbers are compared in tests/parity.
"""

from __future__ import annotations

import weakref

import pytest
import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.load_model import build_on_meta
from mindspeed_mm.models.wan.config import FP32_MODULES, PRESETS
from mindspeed_mm.models.wan.shapes import modules
from tests.support.errors import raises
from tests.support.layouts import published_layout
from tests.support.tiny import TINY, tiny_inputs, tiny_transformer

pytestmark = pytest.mark.medium

PUBLISHED = {
    "Wan2.1-VACE-1.3B": "Wan2.1-VACE-1.3B",
    "Wan2.1-VACE-14B": "Wan2.1-VACE-14B",
    "Wan2.2-VACE-A14B": "Wan2.1-VACE-14B",
}
SIZES = {
    "Wan2.1-VACE-1.3B": (1264, 1_418_996_800, 734_975_232),
    "Wan2.1-VACE-14B": (1331, 14_288_491_584, 3_049_101_312),
}


def in_bf16(model):
    """The model as training and generation hold it: bf16 but for the modules that stay fp32."""
    for name, weight in model.named_parameters():
        if name.split(".")[0] not in FP32_MODULES:
            weight.data = weight.data.bfloat16()
    return model


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_names_and_shapes_of_the_files(preset):
    weights = dict(build_on_meta(PRESETS[preset]).named_parameters())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == published_layout(
        PUBLISHED[preset]
    )
    count, trunk, branch = SIZES[PUBLISHED[preset]]
    in_branch = [name.startswith("vace_") for name in weights]
    assert len(weights) == count
    assert (
        sum(w.numel() for w, branch_one in zip(weights.values(), in_branch, strict=True) if not branch_one)
        == trunk
    )
    assert (
        sum(w.numel() for w, branch_one in zip(weights.values(), in_branch, strict=True) if branch_one)
        == branch
    )


def test_module_names_are_known_without_the_model():
    assert set(modules(TINY)) == {name for name, _ in build_on_meta(TINY).named_modules() if name}


def test_branch_block_runs_before_the_block_it_feeds():
    model, order, hints, most = tiny_transformer(), [], [], [0]

    def note(name):
        def hook(module, args, output):
            if isinstance(output, tuple):
                hints.append(weakref.ref(output[1]))
            order.append(name)
            most[0] = max(most[0], sum(hint() is not None for hint in hints))

        return hook

    for part in ("blocks", "vace_blocks"):
        for i, block in enumerate(getattr(model, part)):
            block.register_forward_hook(note(f"{part}.{i}"))
    with torch.no_grad():
        model(**tiny_inputs())
    assert order == ["vace_blocks.0", "blocks.0", "blocks.1", "vace_blocks.1", "blocks.2", "blocks.3"]
    assert len(hints) == 2
    assert most == [1]


def test_zero_hints_leave_the_trunk_bit_for_bit():
    model, inputs = tiny_transformer(), tiny_inputs(batch=2)
    for block in model.vace_blocks:
        torch.nn.init.zeros_(block.after_proj.weight)
        torch.nn.init.zeros_(block.after_proj.bias)
    with torch.no_grad():
        with_branch = model(**inputs)
        inputs["vace_context"] = None
        assert torch.equal(with_branch, model(**inputs))


def test_samples_of_a_batch_do_not_see_each_other():
    model, inputs = tiny_transformer(), tiny_inputs(batch=3)
    with torch.no_grad():
        together = model(**inputs)
        for i in range(3):
            alone = model(**{name: tensor[i : i + 1] for name, tensor in inputs.items()})
            torch.testing.assert_close(together[i : i + 1], alone, atol=5e-6, rtol=0)


def test_captions_of_a_sample_share_caption_free_parts():
    model, inputs, entered = tiny_transformer(), tiny_inputs(), {}
    inputs["prompt_embeds"] = tiny_inputs(4, batch=2)["prompt_embeds"]
    inputs["prompt_embeds"][1, 3:] = 0  # a shorter caption, filled up as the model fills up itself
    captions = (inputs["prompt_embeds"][:1], inputs["prompt_embeds"][1:, :3])
    with torch.no_grad():
        alone = torch.cat([model(**{**inputs, "prompt_embeds": caption}) for caption in captions])
        for name, module in model.named_modules():
            module.register_forward_pre_hook(
                lambda _, args, name=name: entered.setdefault(name, []).append(len(args[0])) if args else None
            )
        together = model(**inputs)
    torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)
    once = ("patch_embedding", "vace_patch_embedding", "vace_blocks.0.before_proj", "time_embedding")
    for name in (*once, "vace_blocks.0.self_attn", "blocks.0.self_attn", "vace_blocks.0.cross_attn.q"):
        assert entered[name] == [1], name
    for name in ("vace_blocks.0.ffn", "vace_blocks.1.self_attn", "blocks.1.self_attn", "head"):
        assert entered[name] == [2], name


def test_with_a_frozen_trunk_backward_begins_at_the_first_hint():
    model = tiny_transformer()
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("vace_"))
    needs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: needs.append(output.requires_grad))
    model(**tiny_inputs()).square().mean().backward()
    assert needs == [False, True, True, True]
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == name.startswith("vace_"), name


# ---- precision


def test_bf16_keeps_residual_timestep_and_head_fp32():
    model, seen = in_bf16(tiny_transformer()), {}

    def note(name):
        def hook(module, args, output):
            seen.setdefault(name, (args[0].dtype, output))

        return hook

    for name, module in model.named_modules():
        if name:  # the model itself takes names, not positions
            module.register_forward_hook(note(name))
    with torch.no_grad():
        velocity = model(**tiny_inputs(batch=2))
    assert velocity.dtype == torch.float32
    assert seen["time_embedding.0"][0] == torch.float32
    assert seen["time_embedding.0"][1].dtype == torch.float32
    assert seen["time_projection.1"][1].dtype == torch.float32
    assert seen["head.head"][1].dtype == torch.float32
    assert seen["blocks.1"][0] == torch.float32
    assert seen["blocks.1"][1].dtype == torch.float32
    assert seen["vace_blocks.1"][1][0].dtype == torch.float32
    for product in (
        "blocks.0.self_attn.q",
        "blocks.0.cross_attn.k",
        "blocks.0.ffn.2",
        "vace_blocks.0.after_proj",
    ):
        assert seen[product][1].dtype == torch.bfloat16, product


def test_bf16_weights_stay_near_the_fp32_result():
    inputs = tiny_inputs(batch=2)
    with torch.no_grad():
        exact, rounded = tiny_transformer()(**inputs), in_bf16(tiny_transformer())(**inputs)
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def test_bf16_residual_is_a_switch():
    model, inputs = in_bf16(tiny_transformer()), tiny_inputs()
    model.residual_dtype = torch.bfloat16
    dtypes = []
    model.blocks[2].register_forward_hook(
        lambda module, args, output: dtypes.append((args[0].dtype, output.dtype))
    )
    with torch.no_grad():
        exact, rounded = tiny_transformer()(**inputs), model(**inputs)
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_thousand_timesteps_stay_a_thousand_under_bf16_weights():
    model = in_bf16(tiny_transformer())
    grid = torch.linspace(1, 0, 1001)[:-1]
    timestep = 1000 * 5 * grid / (1 + 4 * grid)  # the training schedule
    seen = []
    model.time_projection.register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = {
        name: tensor.expand(1000, *tensor.shape[1:])
        for name, tensor in tiny_inputs(frames=1, height=2, width=2).items()
    }
    with torch.no_grad():
        velocity = model(**{**inputs, "timestep": timestep})
    assert len(torch.unique(seen[0], dim=0)) == 1000
    assert len(torch.unique(velocity.flatten(1), dim=0)) == 1000
    assert len(torch.unique(timestep.bfloat16())) < 300  # what a cast on the way would leave


def test_bf16_timestep_is_rejected():
    inputs = tiny_inputs()
    with raises(DataError, "float32"):
        tiny_transformer()(**{**inputs, "timestep": inputs["timestep"].bfloat16()})


# ---- seams


class Shuffled:
    """A TokenLayout that hands out the tokens in another order."""

    def __init__(self, count):
        self.order = torch.randperm(count, generator=torch.Generator().manual_seed(0))

    def split(self, x, dim):
        return x.index_select(dim, self.order)

    def join(self, x, dim, length):
        assert x.shape[dim] == length
        return x.index_select(dim, torch.argsort(self.order))


def test_layout_may_order_tokens_as_it_likes():
    model, inputs = tiny_transformer(), tiny_inputs(batch=2)
    with torch.no_grad():
        expected = model(**inputs)
        model.tokens = Shuffled(3 * 3 * 5)
        torch.testing.assert_close(model(**inputs), expected, atol=5e-6, rtol=0)


def test_attention_is_replaced_from_outside_in_every_block():
    model, inputs, shapes = tiny_transformer(), tiny_inputs(text=5), []

    def attend(q, k, v):
        shapes.append((q.shape[1], k.shape[1]))
        return q

    for block in [*model.blocks, *model.vace_blocks]:
        block.self_attn.attend = block.cross_attn.attend = attend
    with torch.no_grad():
        model(**inputs)
    assert (
        shapes == [(45, 45), (45, TINY.trunk.text_len)] * 6
    )  # a replaced one sees all caption rows, padding included


@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_compile_into_one_graph(batch):
    one_of_each = TINY.model_copy(
        update={"trunk": TINY.trunk.model_copy(update={"num_layers": 1}), "vace_layers": (0,)}
    )
    model, inputs = tiny_transformer(config=one_of_each), tiny_inputs(batch=batch)
    expected = model(**inputs)
    expected.square().mean().backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    for block in [*model.blocks, *model.vace_blocks]:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled = model(**inputs)
    compiled.square().mean().backward()
    torch.testing.assert_close(compiled, expected, atol=5e-6, rtol=0)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, grads[name], atol=1e-5, rtol=1e-3, msg=name)


# ---- what it refuses


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (
            {"vace_context": torch.zeros(1, 96, 4, 6, 10)},
            ("[1, 96, 4, 6, 10]", "[1, 96, 3, 6, 10]"),
        ),
        ({"vace_context": torch.zeros(1, 32, 3, 6, 10)}, ("[1, 96, 3, 6, 10]",)),
        ({"latents": torch.zeros(1, 16, 3, 5, 10)}, ("[1, 16, 3, 5, 10]", "(1, 2, 2)")),
        ({"latents": torch.zeros(1, 15, 3, 6, 10)}, ("[B, 16, F, h, w]",)),
        ({"timestep": torch.zeros(2)}, ("[2]", "[1]")),
        ({"timestep": torch.tensor(3.0)}, ("[]", "[1]")),
        ({"prompt_embeds": torch.zeros(1, 17, 32)}, ("[1, up to 16, 32]",)),
        ({"prompt_embeds": torch.zeros(1, 5, 33)}, ("[1, up to 16, 32]",)),
        (
            {**tiny_inputs(batch=2), "prompt_embeds": torch.zeros(3, 5, 32)},
            ("[2, up to 16, 32]",),
        ),
        ({"context_scale": (1.0,)}, ("1 numbers", 2)),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, facts):
    where = "prompt_embeds" if "prompt_embeds" in change else next(iter(change))
    with raises(DataError, *facts, where=where):
        tiny_transformer()(**{**tiny_inputs(), **change})


def test_trunk_without_a_branch_takes_no_context():
    bare = tiny_transformer(config=TINY.model_copy(update={"vace_layers": ()}))
    inputs = tiny_inputs()
    with raises(DataError, where="vace_context"):
        bare(**inputs)
    with torch.no_grad():
        assert bare(**{**inputs, "vace_context": None}).shape == inputs["latents"].shape
