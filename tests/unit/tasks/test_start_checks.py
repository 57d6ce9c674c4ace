"""What training refuses before its first step.

Features, null prompts and checkpoints that cannot be of this model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.features import write_null_prompt
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.errors import DataError, WeightsError
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.pretrain import run
from mindspeed_mm.training.checkpoint import Checkpointer
from tests.support.errors import raises
from tests.support.runs import arguments, make_run

pytestmark = pytest.mark.medium


def train(environment, **flags):
    job = PretrainJob.from_argv(arguments(environment, train_iters=1, **flags), ranks=1)
    accelerator = Accelerator.detect("cpu")
    with launch(accelerator):
        run(job, accelerator)


def listing(environment):
    data = json.loads(Path(environment["MM_DATA"]).read_text())
    return Path(data["dataset_param"]["basic_parameters"]["data_path"])


def test_null_prompt_of_width_three_is_rejected(tmp_path):
    environment = make_run(tmp_path)
    write_null_prompt(listing(environment).parent / "null_prompt.safetensors", torch.ones(1, 3), "other")
    model = json.loads(Path(environment["MM_MODEL"]).read_text())
    Path(environment["MM_MODEL"]).write_text(json.dumps({**model, "caption_dropout": 0.1}))
    with raises(
        DataError, 3, "predictor.text_dim 32", where=listing(environment).parent / "null_prompt.safetensors"
    ):
        train(environment)


def test_null_prompt_longer_than_text_len_is_rejected(tmp_path):
    environment = make_run(tmp_path)
    write_null_prompt(listing(environment).parent / "null_prompt.safetensors", torch.ones(99999, 32), "t5")
    model = json.loads(Path(environment["MM_MODEL"]).read_text())
    Path(environment["MM_MODEL"]).write_text(json.dumps({**model, "caption_dropout": 0.1}))
    with raises(DataError, "99999 tokens", "predictor.text_len"):
        train(environment)


def test_listed_references_that_contradict_the_file_are_rejected(tmp_path):
    environment = make_run(tmp_path)
    rows = [json.loads(line) for line in listing(environment).read_text().splitlines()]
    rows[1]["num_refs"] = 1
    listing(environment).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with raises(DataError, "num_refs", 1, where="data.jsonl[1]"):
        train(environment)


def test_checkpoint_with_nan_is_rejected_naming_the_weight(tmp_path, monkeypatch):
    def load(self, state):
        with torch.no_grad():
            state.model.vace_blocks[0].ffn[0].weight[0, 0] = float("nan")
        return True

    monkeypatch.setattr(Checkpointer, "load", load)
    with raises(WeightsError, "vace_blocks.0.ffn.0.weight", "1 of"):
        train(make_run(tmp_path))
