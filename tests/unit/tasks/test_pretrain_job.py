"""A training job is checked whole before anything runs; each mistake is one line with its address."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError, DataError, WeightsError
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.pretrain import main
from tests.support.errors import meant, raises

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
    assert len(job.model.diffusion.indices) == places
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


def test_job_comes_back_from_its_json(tmp_path):
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
    (["--tensorboard-dir", "s3://bucket/runs"], 1, ("s3://bucket/runs",)),
    (
        ["--lr=abc"],
        1,
        (
            "--lr",
            "float",
            "abc",
        ),
    ),
    (["--lerning-rate=1"], 1, ("--lerning-rate",)),
    (["--adam-beta1=1.5"], 1, ("pretrain_vace.py:adam_beta1",)),
    (
        ["--global-batch-size=12"],
        8,
        (
            "--global-batch-size",
            12,
            8,
        ),
    ),
    (
        ["--context-parallel-size=5"],
        8,
        (
            "--context-parallel-size",
            "8 rank(s)",
            5,
        ),
    ),
    (
        ["--context-parallel-size=16"],
        16,
        (
            "--context-parallel-size",
            "40 attention heads",
            "1, 2, 4, 5, 8",
        ),
    ),
    (["--tensor-model-parallel-size=2"], 8, ("--tensor-model-parallel-size 2",)),
    (["--pipeline-model-parallel-size=3"], 8, ("--pipeline-model-parallel-size", "multiple of 3")),
    (["--lr-warmup-iters=10"], 1, ("--lr-warmup-iters 10",)),
    (
        ["--min-lr=1"],
        1,
        (
            "min_lr",
            "lr",
        ),
    ),
    (
        ["--train-samples=5"],
        1,
        (
            "--train-samples",
            "--train-iters",
        ),
    ),
    (["--mm-model=/no/such.json"], 1, ("/no/such.json",)),
    (["--fsdp2-config-path=/no/such.yaml"], 1, ("/no/such.yaml",)),
]


@pytest.mark.parametrize(("flags", "ranks", "facts"), BAD_FLAGS)
def test_bad_flag_is_one_line(flags, ranks, facts):
    with raises(ConfigError, *facts):
        PretrainJob.from_argv([*argv(), *flags], ranks=ranks)


BAD_JSON = [
    (
        {"predictor.num_head": 40},
        (
            "pretrain_model.json:predictor.num_head",
            "'num_heads'",
        ),
    ),
    (
        {"predictor.vace_dit.vace_layer": [0]},
        ("pretrain_model.json:predictor.vace_dit.vace_layer",),
    ),
    (
        {"diffusion.shfit": 3},
        (
            "pretrain_model.json:diffusion.shfit",
            "'shift'",
        ),
    ),
    (
        {"predictor.num_heads": 7},
        (
            "hidden_size 5120",
            "num_heads 7",
        ),
    ),
    (
        {"predictor.dtype": "fp32"},
        (
            "predictor.dtype",
            "fp32",
            "param_dtype",
            "bf16",
        ),
    ),
    (
        {"predictor.model_id": "vacee"},
        (
            "pretrain_model.json:predictor.model_id",
            "'vacee'",
            "'vace'",
        ),
    ),
    ({"caption_dropout": 2}, ("pretrain_model.json:caption_dropout",)),
    ({"captoin_dropout": 0.1}, ("'caption_dropout'",)),
    ({"predictor": 5}, ("pretrain_model.json:predictor",)),
]


@pytest.mark.parametrize(("change", "facts"), BAD_JSON)
def test_bad_model_json_is_one_line_with_its_address(tmp_path, change, facts):
    with raises(ConfigError, *facts):
        PretrainJob.from_argv([*argv(), edited(tmp_path, change)], ranks=1)


def test_list_instead_of_an_object_is_one_line(tmp_path):
    (tmp_path / "m.json").write_text("[]")
    with raises(ConfigError, "m.json"):
        PretrainJob.from_argv([*argv(), f"--mm-model={tmp_path / 'm.json'}"], ranks=1)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (
            "shardingsize: 8\n",
            (
                "fsdp2.yaml:shardingsize",
                "'sharding_size'",
            ),
        ),
        (
            "sharding_size: 3\n",
            (
                "sharding_size",
                3,
                "8 rank(s)",
            ),
        ),
        (
            "reshard_after_forward: 3\n",
            (
                "reshard_after_forward",
                3,
                "8 rank(s)",
            ),
        ),
        ("reshard_after_forward: 0\n", ("reshard_after_forward 0",)),
        (
            "sharding_size: 2\nreshard_after_forward: 4\n",
            (
                "reshard_after_forward",
                4,
                "2 rank(s)",
                "1, 2",
            ),
        ),
        (
            "sub_modules_to_wrap: ['predictor.wan_dit.block.{*}']\n",
            (
                "sub_modules_to_wrap",
                "'predictor.wan_dit.block.{*}'",
                "'blocks.{*}'",
            ),
        ),
        (
            "recompute_modules: ['vace_blocks.{8}']\n",
            (
                "recompute_modules",
                "'vace_blocks.{8}'",
            ),
        ),
        ("recompute_modules: {'blocks.{*}.mlp': full}\n", ("'blocks.{*}.mlp'",)),
        (
            "ignored_modules: [heads]\n",
            (
                "ignored_modules",
                "'heads'",
                "'head'",
            ),
        ),
        (
            "a: [1\n",
            (
                "fsdp2.yaml",
                "YAML",
            ),
        ),
        ("- 1\n- 2\n", ("fsdp2.yaml",)),
    ],
)
def test_bad_yaml_is_one_line_with_its_address(tmp_path, text, facts):
    path = tmp_path / "fsdp2.yaml"
    path.write_text(text)
    with raises(ConfigError, *facts):
        PretrainJob.from_argv([*argv(), f"--fsdp2-config-path={path}"], ranks=8)


def test_trunk_alone_takes_the_yaml_of_a_model_with_a_branch(tmp_path):
    trunk = edited(tmp_path, {"predictor.vace_dit.vace_layers": [], "predictor.trainable": "trunk"})
    assert PretrainJob.from_argv([*argv(), trunk], ranks=1)


@pytest.mark.parametrize("value", ["true", "false", "4", "8"])
def test_weights_can_stay_cut_over_a_divisor_of_the_ranks(tmp_path, value):
    path = tmp_path / "fsdp2.yaml"
    path.write_text(f"reshard_after_forward: {value}\n")
    assert PretrainJob.from_argv([*argv(), f"--fsdp2-config-path={path}"], ranks=8)


def test_broken_json_names_line_and_column(tmp_path):
    (tmp_path / "m.json").write_text('{\n  "task": "vace",,\n}')
    with raises(ConfigError, "m.json:2", "JSON"):
        PretrainJob.from_argv([*argv(), f"--mm-model={tmp_path / 'm.json'}"], ranks=1)


def test_raw_clips_are_not_training_data(tmp_path):
    (tmp_path / "data.json").write_text(
        json.dumps({"dataset_param": {"dataset_type": "vace", "basic_parameters": {"data_path": "data.txt"}}})
    )
    with raises(ConfigError, "vace", "dataset_type", "feature"):
        PretrainJob.from_argv([*argv(), f"--mm-data={tmp_path / 'data.json'}"], ranks=1)


def test_missing_inputs_are_found_before_the_launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(DataError, "data_path", "./vace_features/data.jsonl"):
        PretrainJob.from_argv(argv(), ranks=1).check_inputs()
    (tmp_path / "vace_features").mkdir()
    (tmp_path / "vace_features/data.jsonl").touch()
    with raises(WeightsError, "from_pretrained", "./weights"):
        PretrainJob.from_argv(argv(), ranks=1).check_inputs()


def test_command_ends_with_one_line_and_exit_code_one(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as stop:
        main([*argv(), "--lr-decay-stile=constant"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        f"ConfigError: pretrain_vace.py: unknown argument '--lr-decay-stile' {meant('--lr-decay-style')}\n"
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
    with raises(ConfigError, "pretrain_model.json:predictor.num_head", "num_heads"):
        PretrainJob.from_argv(argv("14B", "pretrain_model.json", "--set=model.predictor.num_head=20"))
