"""A transform of another package: registered, checked, applied; it changes modules and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from mindspeed_mm.config.schema import Config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.base import ModuleTransform
from mindspeed_mm.models.transforms.config import TRANSFORMS, TransformSpec, parse_transforms
from mindspeed_mm.models.transforms.plan import plan_transforms
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.training.build import fill_parameters
from tests.support.errors import raises
from tests.support.tiny import tiny_transformer, write_transformer


class DropConfig(Config):
    """Leaves out one bias."""

    type: Literal["drop_bias"] = "drop_bias"
    layer: str


@dataclass(frozen=True)
class DropBias(ModuleTransform):
    """The linear layer `config.layer` without its bias."""

    config: DropConfig

    def apply(self, model: nn.Module) -> None:
        model.get_submodule(self.config.layer).bias = None  # type: ignore[assignment]

    def change_source(self, source: WeightsSource) -> WeightsSource:
        name = f"{self.config.layer}.bias"
        return replace(source, tensors={k: v for k, v in source.tensors.items() if k != name})


def build(config: DropConfig, spec: object, trainable: str) -> DropBias:
    return DropBias(config)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRANSFORMS, "_entries", dict(TRANSFORMS._entries))
    TRANSFORMS.add("drop_bias", TransformSpec(config=DropConfig, build=f"{__name__}:build"))


@pytest.mark.usefixtures("registered")
def test_transform_of_another_package_is_applied(tmp_path: Path) -> None:
    (config,) = parse_transforms([{"type": "drop_bias", "layer": "blocks.0.ffn.0"}], "model.json:transforms")
    with raises(ConfigError, "layers", "layer"):
        parse_transforms([{"type": "drop_bias", "layers": "x"}], "model.json:transforms")
    write_transformer(tmp_path, tiny_transformer(), torch.float32)
    model, source = tiny_transformer(1), open_weights(tmp_path)
    plan = plan_transforms(MODELS.get("vace"), "branch", torch.float32, [config])
    for transform in plan:
        transform.apply(model)
        source = transform.change_source(source)
    fill_parameters(model, source, 0, plan)
    assert "blocks.0.ffn.0.bias" not in model.state_dict()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"vace_blocks", "vace_patch_embedding"}  # no adapter: `trainable` decides
