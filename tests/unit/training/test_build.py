"""From a model JSON to weights: what trains, in which dtype, and from which slices."""

import torch

from mindspeed_mm.distributed.config import Fsdp2Config
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.models.load_model import build_on_meta
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.match import is_trainable
from mindspeed_mm.models.transforms.plan import plan_transforms
from mindspeed_mm.models.wan.config import BRANCH
from mindspeed_mm.training.build import check_dtypes, fill_parameters, initial_weight
from tests.distributed.jobs import FromModule, predictor
from tests.support.errors import raises
from tests.support.tiny import TINY, tiny_transformer

VACE = MODELS.get("vace")


def freeze(model):
    for transform in plan_transforms(VACE, "branch", torch.bfloat16):
        transform.apply(model)


def test_every_weight_belongs_to_trunk_or_branch():
    names = [name for name, _ in build_on_meta(TINY).named_parameters()]
    branch = {name for name in names if is_trainable(name, "branch", BRANCH)}
    assert branch == {name for name in names if name.startswith("vace_")}
    assert {name for name in names if is_trainable(name, "trunk", BRANCH)} == set(names) - branch
    assert all(is_trainable(name, "all", BRANCH) for name in names)


def test_frozen_parts_are_bf16_but_time_path_and_head():
    model = build_on_meta(TINY)
    freeze(model)
    for name, parameter in model.named_parameters():
        fp32 = name.startswith(("vace_", "time_embedding", "time_projection", "head"))
        assert parameter.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        assert parameter.requires_grad == name.startswith("vace_"), name


def test_model_without_branch_cannot_train_one():
    trunk_only = TINY.model_copy(update={"vace_layers": ()})
    with raises(ConfigError, "branch", "predictor.trainable"):
        freeze(build_on_meta(trunk_only))


def test_two_files_that_disagree_on_the_dtype_are_rejected():
    with raises(ConfigError, "predictor.dtype", "bf16", "fsdp2_config.yaml:param_dtype", "fp32"):
        check_dtypes(predictor(dtype="bf16"), Fsdp2Config(param_dtype="fp32"))


def test_missing_left_over_and_misshaped_weights_are_all_named():
    source = FromModule(tiny_transformer(0))
    source.shapes.pop("blocks.1.ffn.0.weight")
    source.shapes["blocks.9.ffn.0.weight"] = torch.Size([1])
    source.shapes["head.head.bias"] = torch.Size([7])
    with raises(WeightsError, "blocks.1.ffn.0.weight", "blocks.9", "head.head.bias", "[7]"):
        fill_parameters(tiny_transformer(1), source, seed=0)


def test_random_weights_depend_only_on_name_and_seed():
    shape = torch.Size([8, 4])
    first = initial_weight("blocks.0.ffn.0.weight", shape, 1)
    assert torch.equal(first, initial_weight("blocks.0.ffn.0.weight", shape, 1))
    assert not torch.equal(first, initial_weight("blocks.0.ffn.0.weight", shape, 2))
    assert not torch.equal(first, initial_weight("blocks.1.ffn.0.weight", shape, 1))
    assert not initial_weight("vace_blocks.0.after_proj.weight", shape, 1).any(), (
        "the branch starts by adding nothing"
    )
