"""Settings that contradict the config.json next to the weights are rejected, with both values and files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.models.initial_weights import open_vace_initial_weights
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.models.weights import open_weights
from tests.support.errors import raises
from tests.support.tiny import TINY, model_json, tiny_transformer, write_transformer


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_transformer(folder, tiny_transformer(), torch.bfloat16)
    return folder


def predictor(weights, **changes):
    return PredictorConfig(**{**model_json()["predictor"], "from_pretrained": str(weights), **changes})


def test_settings_of_the_weights_start(weights):
    assert open_vace_initial_weights(predictor(weights)).weights is not None


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"num_heads": 2}, ("num_heads", 2, TINY.trunk.num_heads)),
        ({"eps": 0.5}, ("eps", 0.5, "1e-06")),
        ({"text_len": 77}, ("text_len", 77, TINY.trunk.text_len)),
        ({"vace_dit": {"vace_layers": [0, 1], "in_dim": 96}}, ("vace_layers", "[0, 1]", "[0, 2]")),
    ],
)
def test_other_settings_are_rejected_with_both_values(weights, changes, facts):
    with raises(ConfigError, f"{weights}/config.json", *facts):
        open_vace_initial_weights(predictor(weights, **changes))


def test_config_that_contradicts_the_tensors_is_rejected(tmp_path):
    write_transformer(tmp_path, tiny_transformer(), torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_heads": 0}))
    with raises(WeightsError, "num_heads", 0, where=tmp_path / "config.json"):
        open_vace_initial_weights(predictor(tmp_path))


def test_trained_part_of_another_model_than_its_base_is_rejected(weights, tmp_path):
    state = {
        name: weight for name, weight in tiny_transformer().state_dict().items() if name.startswith("vace_")
    }
    save_file(state, tmp_path / "branch.safetensors")
    config = json.loads((weights / "config.json").read_text())
    (tmp_path / "branch.json").write_text(json.dumps({**config, "eps": 0.5}))
    with raises(WeightsError, "branch.json", "config.json", "0.5", "1e-06"):
        open_weights(tmp_path / "branch.safetensors", base_path=weights)
