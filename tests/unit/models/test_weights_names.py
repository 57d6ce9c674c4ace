"""Names and sizes are those of the published files and of diffusers, both ways."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanVACETransformer3DModel

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.wan.config import PRESETS, VaceConfig
from mindspeed_mm.models.wan.sizes import (
    contradictions,
    diffusers_json,
    infer_config,
    layout,
    layout_of_shapes,
    official_json,
    read_hints,
)
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.wan.vace import build_on_meta
from tests.layouts import published_layout
from tests.tiny import TINY

PUBLISHED = ("Wan2.1-VACE-1.3B", "Wan2.1-VACE-14B")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layout_is_the_published_files(name: str) -> None:
    assert layout(PRESETS[name]) == published_layout(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_told_by_the_published_shapes_alone(name: str) -> None:
    shapes = published_layout(name)
    assert infer_config(shapes, {}) == PRESETS[name]
    assert layout_of_shapes(shapes) == shapes


@pytest.mark.parametrize("config", [TINY, TINY.model_copy(update={"vace_layers": ()})])
def test_the_layout_is_our_models(config: VaceConfig) -> None:
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


def test_mm_names_are_those_of_the_guide() -> None:
    to_mm = KEY_MAPS["mm"].to_theirs
    assert to_mm("blocks.3.self_attn.norm_q.weight") == "wan_dit.blocks.3.self_attn.q_norm.weight"
    assert to_mm("text_embedding.2.bias") == "wan_dit.text_embedding.linear_2.bias"
    assert to_mm("vace_blocks.1.cross_attn.o.weight") == (
        "vace_dit.vace_blocks.1.wan_dit_block.cross_attn.proj_out.weight"
    )
    assert to_mm("vace_blocks.0.before_proj.bias") == "vace_dit.vace_blocks.0.before_proj.bias"
    assert to_mm("head.modulation") == "wan_dit.head.modulation"


def test_the_two_proj_outs_of_diffusers_stay_apart() -> None:
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


def test_a_garbage_config_json_is_not_used() -> None:
    """The official code's own save writes dim 16, eps 40."""
    preset = PRESETS["Wan2.1-VACE-1.3B"]
    hints = read_hints({**official_json(preset), "dim": 16, "eps": 40, "num_heads": 7})
    assert contradictions(layout(preset), hints)
    assert infer_config(layout(preset), hints) == preset


def test_without_heads_a_narrow_model_is_an_error() -> None:
    with pytest.raises(WeightsError, match="num_heads"):
        infer_config(layout(TINY), {})
