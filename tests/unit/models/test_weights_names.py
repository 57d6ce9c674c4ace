"""Names and sizes match the published files and diffusers, in both directions."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, WanVACETransformer3DModel
from diffusers.configuration_utils import register_to_config

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.load_model import build_on_meta
from mindspeed_mm.models.wan.config import PRESETS, VaceConfig
from mindspeed_mm.models.wan.config_json import check_hints, diffusers_json, official_json, read_hints
from mindspeed_mm.models.wan.shapes import layout, layout_of_shapes
from mindspeed_mm.models.wan.sizes import infer_config
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from tests.support.errors import raises
from tests.support.layouts import published_layout
from tests.support.tiny import TINY

PUBLISHED = ("Wan2.1-VACE-1.3B", "Wan2.1-VACE-14B")


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_is_the_published_files(name: str) -> None:
    assert layout(PRESETS[name]) == published_layout(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_alone_determine_the_sizes(name: str) -> None:
    shapes = published_layout(name)
    assert infer_config(shapes, {}) == PRESETS[name]
    assert layout_of_shapes(shapes) == shapes


@pytest.mark.parametrize("config", [TINY, TINY.model_copy(update={"vace_layers": ()})])
def test_layout_is_our_models(config: VaceConfig) -> None:
    model = {name: tuple(tensor.shape) for name, tensor in build_on_meta(config).state_dict().items()}
    assert layout(config) == model


@pytest.mark.parametrize("config", [TINY, PRESETS["Wan2.1-VACE-14B"]], ids=["tiny", "14B"])
def test_diffusers_names_are_diffusers(config: VaceConfig) -> None:
    with torch.device("meta"):
        model = WanVACETransformer3DModel.from_config(diffusers_json(config))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {KEY_MAPS["diffusers"].to_theirs(name): shape for name, shape in layout(config).items()} == theirs


@pytest.mark.parametrize("dialect", KEY_MAPS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_name_comes_back(name: str, dialect: str) -> None:
    names, key_map = list(layout(PRESETS[name])), KEY_MAPS[dialect]
    theirs = [key_map.to_theirs(ours) for ours in names]
    assert len(set(theirs)) == len(names)
    assert [key_map.to_ours(key) for key in theirs] == names


def test_mm_names_match_the_guide() -> None:
    to_mm = KEY_MAPS["mm"].to_theirs
    assert to_mm("blocks.3.self_attn.norm_q.weight") == "wan_dit.blocks.3.self_attn.q_norm.weight"
    assert to_mm("text_embedding.2.bias") == "wan_dit.text_embedding.linear_2.bias"
    assert to_mm("vace_blocks.1.cross_attn.o.weight") == (
        "vace_dit.vace_blocks.1.wan_dit_block.cross_attn.proj_out.weight"
    )
    assert to_mm("vace_blocks.0.before_proj.bias") == "vace_dit.vace_blocks.0.before_proj.bias"
    assert to_mm("head.modulation") == "wan_dit.head.modulation"


def test_two_proj_outs_of_diffusers_stay_apart() -> None:
    to_ours = KEY_MAPS["diffusers"].to_ours
    assert to_ours("proj_out.weight") == "head.head.weight"
    assert to_ours("vace_blocks.1.proj_out.weight") == "vace_blocks.1.after_proj.weight"
    assert to_ours("blocks.1.norm2.weight") == "blocks.1.norm3.weight"
    with pytest.raises(WeightsError):
        to_ours("vace_blocks.1.proj_in.weight")


@pytest.mark.parametrize("config", [TINY, *PRESETS.values()])
def test_config_json_comes_back_in_both_spellings(config: VaceConfig) -> None:
    for values in (official_json(config), diffusers_json(config), config.model_dump()):
        assert infer_config(layout(config), read_hints(values)) == config


def test_config_of_the_official_save_is_read() -> None:
    """VaceWanModel passes positions to a constructor that leaves five names out of its config.

    That gives dim 16, eps 40.
    """

    class WanModel(ModelMixin, ConfigMixin):  # signatures of the official wan/modules/{model,vace_model}.py
        ignore_for_config: ClassVar = ["patch_size", "cross_attn_norm", "qk_norm", "text_dim", "window_size"]

        @register_to_config
        def __init__(
            self, model_type="t2v", patch_size=(1, 2, 2), text_len=512, in_dim=16, dim=2048, ffn_dim=8192,
            freq_dim=256, text_dim=4096, out_dim=16, num_heads=16, num_layers=32, window_size=(-1, -1),
            qk_norm=True, cross_attn_norm=True, eps=1e-6,
        ):  # fmt: skip
            super().__init__()

    class VaceWanModel(WanModel):
        @register_to_config
        def __init__(
            self, vace_layers=None, vace_in_dim=None, model_type="vace", patch_size=(1, 2, 2), text_len=512,
            in_dim=16, dim=2048, ffn_dim=8192, freq_dim=256, text_dim=4096, out_dim=16, num_heads=16,
            num_layers=32, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
        ):  # fmt: skip
            super().__init__(
                "t2v", patch_size, text_len, in_dim, dim, ffn_dim, freq_dim, text_dim, out_dim, num_heads,
                num_layers, window_size, qk_norm, cross_attn_norm, eps,
            )  # fmt: skip

    official = {name: value for name, value in official_json(TINY).items() if name[0] != "_"}
    saved = json.loads(VaceWanModel(**official).to_json_string())
    assert (saved["dim"], saved["eps"]) == (TINY.trunk.in_dim, TINY.trunk.num_heads)
    assert infer_config(layout(TINY), read_hints(saved)) == TINY


CONTRADICTIONS: list[tuple[dict[str, Any], tuple[object, ...]]] = [
    ({"eps": 1}, ("eps", 1)),
    ({"eps": 40}, ("eps", 40)),
    ({"num_layers": 9}, ("num_layers", 9, TINY.trunk.num_layers)),
    ({"dim": 16}, ("dim", 16, TINY.trunk.hidden_size)),
    ({"dim": "48"}, ("dim", '"48"', TINY.trunk.hidden_size)),
    ({"num_heads": 0}, ("num_heads", 0, TINY.trunk.hidden_size)),
    ({"num_heads": 5}, ("num_heads", 5, TINY.trunk.hidden_size)),
    ({"num_heads": TINY.trunk.hidden_size}, ("num_heads", TINY.trunk.hidden_size)),
    ({"num_heads": True}, ("num_heads", "true")),
    ({"num_heads": "6"}, ("num_heads", '"6"')),
    ({"vace_layers": "x"}, ("vace_layers", '"x"', 2)),
    ({"vace_layers": [0, 1, 2]}, ("vace_layers", 3, 2)),
    ({"vace_layers": [[0], 2]}, ("vace_layers", 2)),
    ({"qk_norm": False}, ("qk_norm", "false")),
    ({"cross_attn_norm": False}, ("cross_attn_norm", "false")),
    ({"text_len": 2.5}, ("text_len", 2.5)),
]


@pytest.mark.parametrize(("changes", "facts"), CONTRADICTIONS, ids=lambda case: json.dumps(case)[:30])
def test_config_that_contradicts_the_tensors_is_rejected(
    changes: dict[str, Any], facts: tuple[object, ...]
) -> None:
    hints = read_hints({**official_json(TINY), **changes})
    with raises(WeightsError, *facts, where="config.json"):
        check_hints(layout(TINY), hints, "config.json")
    with raises(WeightsError, *facts):
        infer_config(layout(TINY), hints)


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 5}, {"in_channels": 36}, {"qk_norm": "layer_norm"}]
)
def test_diffusers_config_is_named_by_its_own_keys(changes: dict[str, Any]) -> None:
    [(key, value)] = changes.items()
    with raises(WeightsError, key, value):
        check_hints(layout(TINY), read_hints({**diffusers_json(TINY), **changes}))


@pytest.mark.parametrize("key", sorted({*official_json(TINY), *diffusers_json(TINY)}))
def test_config_without_a_key_is_accepted(key: str) -> None:
    for values in (official_json(TINY), diffusers_json(TINY)):
        for silent in ({name: value for name, value in values.items() if name != key}, {**values, key: None}):
            check_hints(layout(TINY), read_hints(silent))


def test_config_of_a_text_encoder_is_not_used() -> None:
    assert read_hints({"architectures": ["UMT5EncoderModel"], "num_heads": 64, "num_layers": 24}) == {}


def test_without_heads_a_narrow_model_is_an_error() -> None:
    with raises(WeightsError, "num_heads"):
        infer_config(layout(TINY), {})
