"""A training job is checked whole before anything runs; each mistake is one line with its address."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError, MindSpeedMMError
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.pretrain import main

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[3]
VACE = ROOT / "examples/vace"


def argv(folder: str = "14B", model: str = "pretrain_model.json", *more: str) -> list[str]:
    files = [f"--mm-model={VACE / folder / model}", f"--mm-data={VACE / folder / 'feature_data.json'}"]
    return [
        *files,
        f"--fsdp2-config-path={VACE / 'fsdp2_config.yaml'}",
        "--lr=5e-5",
        "--train-iters=10",
        *more,
    ]


def edited(tmp_path: Path, change: dict) -> str:
    """The 14B model JSON with dotted keys changed."""
    values = json.loads((VACE / "14B/pretrain_model.json").read_text())
    for address, value in change.items():
        *path, last = address.split(".")
        part = values
        for name in path:
            part = part[name]
        part[last] = value
    path = tmp_path / "pretrain_model.json"
    path.write_text(json.dumps(values))
    return f"--mm-model={path}"


@pytest.mark.parametrize(
    ("folder", "model", "layers", "places"),
    [
        ("1.3B", "pretrain_model.json", 30, 1000),
        ("14B", "pretrain_model.json", 40, 1000),
        ("A14B_wan2.2", "pretrain_model_high.json", 40, 417),
        ("A14B_wan2.2", "pretrain_model_low.json", 40, 583),
    ],
)
def test_shipped_files_make_a_job_without_a_note(folder, model, layers, places):
    job = PretrainJob.from_argv(argv(folder, model), ranks=8)
    assert job.predictor.num_layers == layers
    assert len(job.model.diffusion.places) == places
    assert job.notes == ()


def test_dry_run_of_14b_needs_no_weights_and_no_torch():
    code = (
        "import sys; from mindspeed_mm.tasks.pretrain import main; main(sys.argv[1:]); "
        "assert not {'torch', 'megatron.core'} & set(sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *argv("14B", "pretrain_model.json", "--dry-run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "40 layers of 5120" in ran.stdout


def test_a_job_comes_back_from_its_json(tmp_path):
    job = PretrainJob.from_argv(argv(), ranks=8)
    path = tmp_path / "job.json"
    path.write_text(job.to_json())
    again = PretrainJob.from_file(path)
    assert again.to_json() == job.to_json()
    assert type(again.predictor) is type(job.predictor)


def test_train_samples_become_iterations():
    more = [flag for flag in argv() if "train-iters" not in flag]
    job = PretrainJob.from_argv([*more, "--train-samples=100", "--global-batch-size=16"], ranks=8)
    assert job.training.batch.train_iters == 6


BAD_FLAGS = [
    (["--tensorboard-dir", "s3://bucket/runs"], 1, "s3://bucket/runs is an address"),
    (["--lr=abc"], 1, "argument --lr: invalid float value: 'abc'"),
    (["--lerning-rate=1"], 1, "unknown argument '--lerning-rate'"),
    (["--adam-beta1=1.5"], 1, "pretrain_vace.py:adam_beta1"),
    (["--global-batch-size=12"], 8, "--global-batch-size 12 must be a multiple"),
    (["--context-parallel-size=5"], 8, "8 rank(s) cannot be split into groups of --context-parallel-size 5"),
    (
        ["--context-parallel-size=16"],
        16,
        "does not divide the model's 40 attention heads; use one of 1, 2, 4, 5, 8",
    ),
    (["--tensor-model-parallel-size=2"], 8, "--tensor-model-parallel-size 2 is not supported"),
    (["--pipeline-model-parallel-size=4"], 8, "--pipeline-model-parallel-size 4 is not supported"),
    (["--lr-warmup-iters=10"], 1, "--lr-warmup-iters 10 must be less"),
    (["--min-lr=1"], 1, "min_lr 1 is above lr"),
    (["--train-samples=5"], 1, "say the same thing"),
    (["--mm-model=/no/such.json"], 1, "/no/such.json: no such file"),
    (["--fsdp2-config-path=/no/such.yaml"], 1, "/no/such.yaml: no such file"),
]


@pytest.mark.parametrize(("flags", "ranks", "wanted"), BAD_FLAGS)
def test_a_bad_flag_is_one_line(flags, ranks, wanted):
    with pytest.raises(ConfigError) as error:
        PretrainJob.from_argv([*argv(), *flags], ranks=ranks)
    assert wanted in str(error.value)


BAD_JSON = [
    (
        {"predictor.num_head": 40},
        "pretrain_model.json:predictor.num_head: unknown key (did you mean 'num_heads'?)",
    ),
    (
        {"predictor.vace_dit.vace_layer": [0]},
        "pretrain_model.json:predictor.vace_dit.vace_layer: unknown key",
    ),
    ({"diffusion.shfit": 3}, "pretrain_model.json:diffusion.shfit: unknown key (did you mean 'shift'?)"),
    ({"predictor.num_heads": 7}, "hidden_size 5120 over num_heads 7"),
    ({"predictor.dtype": "fp32"}, "predictor.dtype is fp32 but fsdp2 param_dtype is bf16"),
    (
        {"predictor.model_id": "vacee"},
        "pretrain_model.json:predictor.model_id: unknown model 'vacee' (did you mean 'vace'?)",
    ),
    ({"caption_dropout": 2}, "pretrain_model.json:caption_dropout"),
    ({"captoin_dropout": 0.1}, "(did you mean 'caption_dropout'?)"),
    ({"predictor": 5}, "pretrain_model.json:predictor"),
]


@pytest.mark.parametrize(("change", "wanted"), BAD_JSON)
def test_a_bad_model_json_is_one_line_with_its_address(tmp_path, change, wanted):
    with pytest.raises(ConfigError) as error:
        PretrainJob.from_argv([*argv(), edited(tmp_path, change)], ranks=1)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_where_an_object_should_stand_is_one_line(tmp_path):
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"m\.json"):
        PretrainJob.from_argv([*argv(), f"--mm-model={tmp_path / 'm.json'}"], ranks=1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("shardingsize: 8\n", "fsdp2.yaml:shardingsize: unknown key (did you mean 'sharding_size'?)"),
        ("sharding_size: 3\n", "sharding_size 3 does not divide the 8 rank(s)"),
        ("reshard_after_forward: 3\n", "reshard_after_forward 3 does not divide the 8 rank(s)"),
        ("reshard_after_forward: 0\n", "reshard_after_forward 0 must be true, false or a number of ranks"),
        (
            "sharding_size: 2\nreshard_after_forward: 4\n",
            "4 does not divide the 2 rank(s) that share the weights; use true, false or one of 1, 2",
        ),
        (
            "sub_modules_to_wrap: ['predictor.wan_dit.block.{*}']\n",
            "sub_modules_to_wrap: pattern 'predictor.wan_dit.block.{*}' matches no module (did you mean 'blocks.{*}'?); there are",
        ),
        (
            "recompute_modules: ['vace_blocks.{8}']\n",
            "recompute_modules: pattern 'vace_blocks.{8}' matches no module",
        ),
        ("recompute_modules: {'blocks.{*}.mlp': full}\n", "'blocks.{*}.mlp' matches no module"),
        (
            "ignored_modules: [heads]\n",
            "ignored_modules: pattern 'heads' matches no module (did you mean 'head'?)",
        ),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n- 2\n", "fsdp2.yaml"),
    ],
)
def test_a_bad_yaml_is_one_line_with_its_address(tmp_path, text, wanted):
    path = tmp_path / "fsdp2.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        PretrainJob.from_argv([*argv(), f"--fsdp2-config-path={path}"], ranks=8)
    assert wanted in str(error.value)


def test_a_trunk_alone_takes_the_yaml_of_a_model_with_a_branch(tmp_path):
    trunk = edited(tmp_path, {"predictor.vace_dit.vace_layers": [], "predictor.trainable": "trunk"})
    assert PretrainJob.from_argv([*argv(), trunk], ranks=1)


@pytest.mark.parametrize("value", ["true", "false", "4", "8"])
def test_weights_can_stay_cut_over_a_divisor_of_the_ranks(tmp_path, value):
    path = tmp_path / "fsdp2.yaml"
    path.write_text(f"reshard_after_forward: {value}\n")
    assert PretrainJob.from_argv([*argv(), f"--fsdp2-config-path={path}"], ranks=8)


def test_broken_json_names_line_and_column(tmp_path):
    (tmp_path / "m.json").write_text('{\n  "task": "vace",,\n}')
    with pytest.raises(ConfigError, match=r"m\.json:2:\d+: not valid JSON"):
        PretrainJob.from_argv([*argv(), f"--mm-model={tmp_path / 'm.json'}"], ranks=1)


def test_raw_clips_are_no_training_data(tmp_path):
    (tmp_path / "data.json").write_text(
        json.dumps({"dataset_param": {"dataset_type": "vace", "basic_parameters": {"data_path": "data.txt"}}})
    )
    with pytest.raises(ConfigError, match="extract their features first"):
        PretrainJob.from_argv([*argv(), f"--mm-data={tmp_path / 'data.json'}"], ranks=1)


def test_missing_inputs_are_found_before_the_launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MindSpeedMMError, match=r"data_path: \./vace_features/data\.jsonl is not there"):
        PretrainJob.from_argv(argv(), ranks=1).check_inputs()
    (tmp_path / "vace_features").mkdir()
    (tmp_path / "vace_features/data.jsonl").touch()
    with pytest.raises(MindSpeedMMError, match=r"from_pretrained: \./weights/.* is not there"):
        PretrainJob.from_argv(argv(), ranks=1).check_inputs()


def test_the_command_ends_with_one_line_and_exit_code_one(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as stop:
        main([*argv(), "--lr-decay-stile=constant"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "ConfigError: pretrain_vace.py: unknown argument '--lr-decay-stile' (did you mean '--lr-decay-style'?)\n"
    )


def test_set_replaces_keys_of_every_file():
    more = ["--set=model.predictor.num_heads=20", "--set", "data.dataloader_param.shuffle=false"]
    more += ["--set", "tools.profile.enable=true", "--set", "fsdp2.num_to_forward_prefetch=3"]
    job = PretrainJob.from_argv(argv("14B", "pretrain_model.json", *more))
    assert job.predictor.num_heads == 20
    assert job.data.dataloader_param.shuffle is False
    assert job.tools.profile.enable is True
    assert job.fsdp2.num_to_forward_prefetch == 3


def test_set_of_an_unknown_key_names_file_and_nearest_key():
    with pytest.raises(ConfigError, match=r"pretrain_model.json:predictor.num_head: .*'num_heads'"):
        PretrainJob.from_argv(argv("14B", "pretrain_model.json", "--set=model.predictor.num_head=20"))
