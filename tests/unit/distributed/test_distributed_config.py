"""fsdp2_config.yaml and the parallel flags, without torch."""

import subprocess
import sys

import pytest

from mindspeed_mm.config.schema import parse
from mindspeed_mm.distributed.config import (
    Fsdp2Config,
    ParallelConfig,
    check_context_parallel,
    check_micro_batches,
    data_parallel_size,
)
from mindspeed_mm.distributed.patterns import absent_units, match
from mindspeed_mm.errors import ConfigError
from tests.support.errors import raises

NAMES = [
    *(f"blocks.{i}" for i in range(10)),
    *(f"vace_blocks.{i}" for i in range(3)),
    "head",
    "blocks.3.self_attn",
]
PUBLISHED = """
sharding_size: auto
sub_modules_to_wrap:
  - "predictor.wan_dit.blocks.{*}"
  - "predictor.vace_dit.vace_blocks.{*}"
reshard_after_forward: True
param_dtype: "bf16"
reduce_dtype: "fp32"
cast_forward_inputs: True
output_dtype: null
offload_to_cpu: False
recompute_modules:
  - "predictor.wan_dit.blocks.{*}"
num_to_forward_prefetch: 2
num_to_backward_prefetch: 2
ignored_modules:
"""


def test_published_file_parses_and_says_what_it_does_not_use(tmp_path):
    path = tmp_path / "fsdp2_config.yaml"
    path.write_text(PUBLISHED)
    notes = []
    config = Fsdp2Config.read(path, notes)
    assert (config.sharding_size, config.num_to_forward_prefetch, config.ignored_modules) == ("auto", 2, ())
    assert any("cast_forward_inputs" in note and "937.5" not in note for note in notes)


def test_misspelt_key_is_rejected_with_its_address(tmp_path):
    path = tmp_path / "fsdp2_config.yaml"
    path.write_text("reshard_after_foward: true\n")
    with raises(ConfigError, "fsdp2_config.yaml:reshard_after_foward"):
        Fsdp2Config.read(path)


@pytest.mark.parametrize("word", ["yes", "true", "no"])
def test_switch_is_not_a_sharding_size(tmp_path, word):
    path = tmp_path / "fsdp2_config.yaml"
    path.write_text(f"sharding_size: {word}\n")
    with raises(ConfigError, "fsdp2_config.yaml:sharding_size"):
        Fsdp2Config.read(path)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("blocks.{*}", [f"blocks.{i}" for i in range(10)]),
        ("blocks.{0-3,7}", ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.7"]),
        ("predictor.wan_dit.blocks.{9}", ["blocks.9"]),
        ("predictor.vace_dit.vace_blocks.{*}", ["vace_blocks.0", "vace_blocks.1", "vace_blocks.2"]),
        ("vace_dit.vace_blocks.{1}", ["vace_blocks.1"]),
        ("head", ["head"]),
        ("blocks.{*}.self_attn", ["blocks.3.self_attn"]),
    ],
)
def test_patterns_name_modules(pattern, found):
    assert match(pattern, NAMES, "here") == found


@pytest.mark.parametrize("pattern", ["block.{*}", "blocks.{12}", "blocks", "vace_blocks.{*}.ffn"])
def test_pattern_that_matches_nothing_is_an_error(pattern):
    with raises(ConfigError, pattern, where="fsdp2_config.yaml:recompute_modules"):
        match(pattern, NAMES, "fsdp2_config.yaml:recompute_modules")


def test_error_lists_what_exists():
    names = [*NAMES, "text_embedding", "text_embedding.0", "text_embedding.2"]
    facts = ("'blocks.{12}'", "blocks.{0-9}, vace_blocks.{0-2}, head, text_embedding.{0-2}")
    with raises(ConfigError, *facts, where="fsdp2_config.yaml:recompute_modules"):
        match("blocks.{12}", names, "fsdp2_config.yaml:recompute_modules")


def test_pattern_of_an_absent_part_matches_nothing():
    trunk = [name for name in NAMES if not name.startswith("vace_")]
    absent = absent_units(("blocks.{*}", "vace_blocks.{*}"), trunk)
    assert absent == ["vace_blocks.{*}"]
    assert absent_units(("blocks.{*}", "vace_blocks.{*}"), NAMES) == []
    for pattern in ("vace_blocks.{*}", "predictor.vace_dit.vace_blocks.{0-3}", "vace_blocks.{*}.ffn"):
        assert match(pattern, trunk, "here", absent=absent) == []
    for pattern in ("block.{*}", "blocks.{12}", "vace_block.{*}"):
        with raises(ConfigError, pattern, where="here"):
            match(pattern, trunk, "here", absent=absent)


def test_malformed_set_is_an_error():
    with raises(ConfigError, "{0:3}", 9999, "0-3,7"):
        match("blocks.{0:3}", NAMES, "here")


def test_tensor_parallel_is_rejected_with_advice():
    with raises(ConfigError, "--use-torch-fsdp2", "--context-parallel-size"):
        parse(ParallelConfig, {"tensor_model_parallel_size": 2}, "pretrain_vace.py")
    assert parse(ParallelConfig, {"tensor_model_parallel_size": 1}, "pretrain_vace.py")


def test_virtual_stages_need_stages():
    with raises(ConfigError, "--virtual-pipeline-model-parallel-size", "--pipeline-model-parallel-size 2"):
        parse(ParallelConfig, {"virtual_pipeline_model_parallel_size": 2}, "pretrain_vace.py")
    both = {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 4}
    assert parse(ParallelConfig, both, "pretrain_vace.py").num_stages == 8


@pytest.mark.parametrize(
    ("given", "ulysses"),
    [
        ({}, 8),
        ({"context_parallel_algo": "megatron_cp_algo"}, 1),
        ({"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 4}, 4),
    ],
)
def test_algorithm_says_how_many_ranks_divide_heads(given, ulysses):
    assert ParallelConfig(context_parallel_size=8, **given).ulysses_size == ulysses


@pytest.mark.parametrize(
    "given",
    [
        {"context_parallel_algo": "hybrid_cp_algo"},
        {"ulysses_degree_in_cp": 2},
        {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 3},
    ],
)
def test_ring_between_groups_needs_a_size_that_divides(given):
    with raises(ConfigError, "--ulysses-degree-in-cp"):
        parse(ParallelConfig, {"context_parallel_size": 4, **given}, "pretrain_vace.py")


def test_ranks_divide_into_stages_and_context():
    parallel = ParallelConfig(pipeline_model_parallel_size=2, context_parallel_size=2)
    assert data_parallel_size(parallel, 8) == 2
    with raises(ConfigError, "multiple of 4", where="--pipeline-model-parallel-size"):
        data_parallel_size(parallel, 6)


@pytest.mark.parametrize(("virtual", "share"), [(None, 75), (4, 43)])
def test_too_few_micro_batches_name_the_bubble(virtual, share):
    # Megatron-LM (arXiv 2104.04473): a rank waits (p - 1) / (v m + p - 1) of a step
    parallel = ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=virtual)
    with raises(ConfigError, f"{share} %", "--global-batch-size to 8"):
        check_micro_batches(parallel, 1, 2)
    check_micro_batches(parallel, 4, 2)


def test_recompute_method_without_its_number_is_rejected():
    with raises(ConfigError, "--recompute-num-layers"):
        parse(ParallelConfig, {"recompute_granularity": "full", "recompute_method": "block"}, "flags")


def test_sizes_are_checked_before_any_rank_starts():
    check_context_parallel(12, 4)
    with raises(ConfigError, "1, 2, 3, 4, 6, 12", "hybrid_cp_algo", where="--context-parallel-size"):
        check_context_parallel(12, 8)
    with raises(ConfigError, "1, 2, 3, 4, 6, 12", where="--ulysses-degree-in-cp"):
        check_context_parallel(12, 8, "--ulysses-degree-in-cp")
    assert data_parallel_size(ParallelConfig(context_parallel_size=2), 8) == 4
    with raises(ConfigError, "multiple of 4"):
        data_parallel_size(ParallelConfig(context_parallel_size=4), 6)


def test_reading_the_settings_leaves_torch_alone():
    code = (
        "import sys, mindspeed_mm.distributed.config, mindspeed_mm.distributed.patterns; print('torch' in "
        "sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
