"""The stages of a pipeline, one after the other, compute what the whole model computes."""

from __future__ import annotations

import pytest
import torch

from checkpoint.config import ToMmConfig
from checkpoint.vace import hf_to_mm
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.load_model import build_on_meta
from mindspeed_mm.models.wan.pipeline import split_vace
from mindspeed_mm.models.wan.stages import even_layers, place
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.ops.stages import MicroBatch, Split
from tests.support.errors import raises
from tests.support.tiny import TINY, tiny_inputs, tiny_transformer, write_transformer

pytestmark = pytest.mark.medium


def run_stages(split: Split, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """All stages of a model in one process."""
    read = split.reader(inputs["timestep"], inputs["prompt_embeds"])
    batch = MicroBatch(**inputs, read=read)
    flow: tuple[torch.Tensor, ...] = ()
    for number in range(split.count):
        split.stages[number].feed([batch])
        out = split.stages[number](*flow)
        flow = out if isinstance(out, tuple) else (out,)
        wanted = split.output_like(number, batch)
        assert [(t.shape, t.dtype) for t in wanted] == [(t.shape, t.dtype) for t in flow]
    return flow[0]


@pytest.mark.parametrize("layers", [[2, 2], [1, 3], [3, 1], [1, 1, 1, 1]], ids=str)
def test_stages_equal_the_whole_model_bit_for_bit(layers):
    model, inputs = tiny_transformer(), tiny_inputs(batch=2)
    whole = model(**inputs)
    whole.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    staged = run_stages(split_vace(model, layers, range(len(layers))), inputs)
    assert torch.equal(staged, whole)
    staged.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("layers", [[2, 2], [1, 3], [1, 1, 2]], ids=str)
def test_stage_holds_what_the_split_files_hold(layers):
    model = build_on_meta(TINY)
    for number in range(len(layers)):
        split = split_vace(model, layers, [number])
        names = {name for name, _ in split.stages[number].named_parameters()}
        shared = {name for name, _ in split.reader.named_parameters()}
        wanted = {n for n, _ in model.named_parameters() if place(n, layers, TINY.vace_layers)[0] == number}
        assert names == wanted - shared
        assert all(name.split(".")[0] in split.shared for name in shared)


def test_branch_tokens_travel_only_to_a_branch_block():
    split = split_vace(build_on_meta(TINY), [2, 1, 1], range(3))
    batch = MicroBatch(**tiny_inputs())
    assert [len(split.output_like(number, batch)) for number in range(3)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("trained", "flags"),
    [
        ("vace_blocks.0", (True, True)),
        ("blocks.0", (True, False)),
        ("patch_embedding", (True, True)),
        ("blocks.3", (False, False)),
        ("vace_blocks.1", (False, False)),
    ],
)
def test_no_unneeded_gradient_is_sent(trained, flags):
    model = build_on_meta(TINY)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{trained}."))
    leaving = split_vace(model, [2, 2], [0]).output_like(0, MicroBatch(**tiny_inputs()))
    assert tuple(tensor.requires_grad for tensor in leaving) == flags


def test_layers_that_do_not_sum_are_rejected():
    with raises(ConfigError, 5, 4):
        split_vace(build_on_meta(TINY), [2, 3], [0])


@pytest.mark.parametrize(
    ("pp_layers", "stages"), [([1, 3], (1, 3)), ([[1, 1], [1, 1]], (1, 1, 1, 1))], ids=str
)
def test_each_stage_reads_its_share_of_split_files(tmp_path, pp_layers, stages):
    write_transformer(tmp_path / "wan", tiny_transformer(), torch.float32)
    config = ToMmConfig(
        source_path=str(tmp_path / "wan"),
        target_path=str(tmp_path / "mm"),
        dtype="source",
        target_parallel_config={"pp_layers": pp_layers},
    )
    hf_to_mm(config)
    source = open_weights(tmp_path / "mm")
    assert source.stage_layers == stages
    assert open_weights(tmp_path / "wan").stage_layers == ()
    whole = dict(tiny_transformer().named_parameters())
    for number in range(len(stages)):
        stage = split_vace(build_on_meta(TINY), stages, [number]).stages[number]
        for name, _ in stage.named_parameters():
            assert torch.equal(source.read(name), whole[name]), name


def test_stages_are_even_unless_set_otherwise():
    assert even_layers(40, 4) == [10, 10, 10, 10]
    assert even_layers(30, 4) == [8, 8, 7, 7]
