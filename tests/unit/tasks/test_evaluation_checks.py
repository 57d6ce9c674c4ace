"""What evaluation in training needs is checked before a device is touched, each with one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from tests.support.errors import raises

VACE = Path(__file__).resolve().parents[3] / "examples/vace"
HELD_OUT = {"data_path": "held_out/data.jsonl"}
PROMPTS = {**HELD_OUT, "prompts": "inference.json"}


def job_of(
    *flags: str, validation: dict[str, str] | None = None, model: str = "14B/pretrain_model.json"
) -> PretrainJob:
    words = [f"--mm-model={VACE / model}", f"--mm-data={VACE / '14B/feature_data.json'}"]
    words += ["--lr=1e-5", "--train-iters=10", *flags]
    if validation is not None:
        words.append(f"--set=data.dataset_param.validation={json.dumps(validation)}")
    return PretrainJob.from_argv(words)


@pytest.mark.parametrize(
    ("flags", "validation", "where", "facts"),
    [
        (["--save-best"], None, "--save-best", ("dataset_param.validation",)),
        (["--save-best", "--eval-iters=0"], HELD_OUT, "--save-best", ("--eval-iters",)),
        (["--eval-videos"], None, "--eval-videos", ("dataset_param.validation.prompts",)),
        (["--eval-videos"], HELD_OUT, "--eval-videos", ("dataset_param.validation.prompts",)),
    ],
)
def test_evaluation_of_nothing_is_rejected(flags, validation, where, facts):  # type: ignore[no-untyped-def]
    with raises(ConfigError, *facts, where=where):
        job_of(*flags, validation=validation)


@pytest.mark.parametrize(
    ("flags", "validation"), [(["--save-best"], HELD_OUT), (["--eval-videos"], PROMPTS), ([], PROMPTS)]
)
def test_evaluation_into_no_folder_is_rejected(flags, validation, tmp_path):  # type: ignore[no-untyped-def]
    with raises(ConfigError, "--save"):
        job_of(*flags, validation=validation).check_outputs()
    job_of(*flags, f"--save={tmp_path / 'save'}", validation=validation).check_outputs()


@pytest.mark.parametrize("name", ["high", "low"])
def test_one_of_two_experts_makes_no_videos(name: str) -> None:
    model = f"A14B_wan2.2/pretrain_model_{name}.json"
    with raises(
        ConfigError,
        f"{name}-noise",
        where=f"{VACE / '14B/feature_data.json'}:dataset_param.validation.prompts",
    ):
        job_of(validation=PROMPTS, model=model)
    job_of(validation=HELD_OUT, model=model)


def test_raw_prompts_longer_than_the_model_takes_are_rejected(tmp_path: Path) -> None:
    values = json.loads((VACE / "feature_extract/data.json").read_text())
    values["dataset_param"]["tokenizer_config"]["model_max_length"] = 600
    data = tmp_path / "data.json"
    data.write_text(json.dumps(values))
    model = json.loads((VACE / "1.3B/pretrain_model.json").read_text())
    encoders = json.loads((VACE / "feature_extract/model.json").read_text())
    model |= {key: encoders[key] for key in ("ae", "text_encoder")}
    (tmp_path / "model.json").write_text(json.dumps(model))
    words = [f"--mm-model={tmp_path / 'model.json'}", f"--mm-data={data}", "--lr=1e-5", "--train-iters=10"]
    address = f"{data}:dataset_param.tokenizer_config.model_max_length"
    with raises(ConfigError, 600, "predictor.text_len 512", where=address):
        PretrainJob.from_argv(words)
    PretrainJob.from_argv([*words, "--set=data.dataset_param.tokenizer_config.model_max_length=512"])
