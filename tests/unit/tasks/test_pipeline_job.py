"""A job in pipeline stages or rings is checked whole before any rank starts."""

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.summary import training_table
from tests.support.errors import raises
from tests.unit.tasks.test_pretrain_job import argv, edited

pytestmark = pytest.mark.medium

PP2 = ["--pipeline-model-parallel-size=2", "--global-batch-size=8"]
LAYERS = "pretrain_model.json:predictor.pipeline_num_layers"


@pytest.mark.parametrize(
    ("layers", "facts"),
    [
        ([20, 19], ("[20, 19]", 39, 40)),
        ([10, 10, 10, 10], ("4 stages", "2")),
        ([40, 0], ("got [40, 0]",)),
        ([[20, 10], [10]], ("got [[20, 10], [10]]",)),
        (20, (20, "a list")),
    ],
)
def test_layers_that_form_no_stages_are_one_line(tmp_path, layers, facts):
    model = edited(tmp_path, {"predictor.pipeline_num_layers": layers})
    with raises(ConfigError, *facts) as caught:
        PretrainJob.from_argv([*argv(), model, *PP2], ranks=2)
    assert LAYERS in str(caught.value)


def test_more_stages_than_layers_are_one_line():
    flags = ["--pipeline-model-parallel-size=41", "--global-batch-size=41"]
    with raises(ConfigError, "41 stages", "40 layers", where="--pipeline-model-parallel-size"):
        PretrainJob.from_argv([*argv(), *flags], ranks=41)


def test_too_few_micro_batches_are_one_line():
    with raises(ConfigError, "1 micro-batch", "50 %", "--global-batch-size to 2"):
        PretrainJob.from_argv([*argv(), PP2[0], "--global-batch-size=1"], ranks=2)


def test_lora_on_8_bits_may_be_in_stages():
    job = PretrainJob.from_argv([*argv(), *PP2, "--lora-rank=4", "--quantize=int8"], ranks=2)
    assert [config.type for config in job.model.transforms] == ["lora", "quantize"]


def test_heads_limit_the_inner_groups_alone():
    sizes = ["--context-parallel-size=16", "--context-parallel-algo=hybrid_cp_algo"]
    with raises(ConfigError, "40 attention heads", where="--ulysses-degree-in-cp"):
        PretrainJob.from_argv([*argv(), *sizes, "--ulysses-degree-in-cp=16"], ranks=16)
    job = PretrainJob.from_argv([*argv(), *sizes, "--ulysses-degree-in-cp=8"], ranks=16)
    assert "context parallel 16 (rings of 2)" in "\n".join(map(str, training_table(job)))
