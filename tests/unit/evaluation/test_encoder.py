"""Likeness by a model in a local folder: against the model called by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.evaluation.metrics.encoder import Encoder, encoder_metrics
from mindspeed_mm.evaluation.sample import Sample
from tests.support.errors import raises

FRAMES = np.random.default_rng(0).integers(0, 255, (3, 28, 28, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=1
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path
    )
    return tmp_path


def test_likeness_is_the_cosine_of_class_tokens(folder: Path) -> None:
    sample = Sample(name="a", output=FRAMES, references=(FRAMES[0],), prompt="x")
    (metric,) = encoder_metrics(Encoder(folder))
    model, processor = Dinov2Model.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        tokens = model(**processor(images=list(FRAMES), return_tensors="pt")).last_hidden_state[:, 0]
    cosines = torch.nn.functional.cosine_similarity(tokens[:1], tokens)
    assert metric.measure(sample) == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert metric.measure(Sample(name="a", output=FRAMES)) is None


def write_pickle(folder: Path, trace: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {trace}'\ntR.".encode())


def write_code(folder: Path, trace: Path) -> None:
    (folder / "theirs.py").write_text(f"open({str(trace)!r}, 'w')\n")
    kinds = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": kinds}))


def cut_weights(folder: Path, trace: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [write_pickle, write_code, cut_weights])
def test_folder_of_another_model_runs_nothing(
    folder: Path, damage: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = folder.parent / f"{folder.name}-trace"
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # transformers asks whether to run code
    damage(folder, trace)
    with raises(WeightsError, where=folder) as caught:
        Encoder(folder)
    assert "weights_only" not in str(caught.value)
    assert "trust_remote_code" not in str(caught.value)
    assert not trace.exists()


def test_prompt_that_the_encoder_cuts_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mindspeed_mm"), "propagate", True)
    encoder = object.__new__(Encoder)

    class Words:
        model_max_length = 4

        def __call__(self, text: str, **_: object) -> Any:
            return SimpleNamespace(input_ids=text.split())

    encoder._processor = SimpleNamespace(tokenizer=Words())
    encoder._report_cut("a red ball")
    assert not caplog.records
    encoder._report_cut("a red ball bounces high")
    assert "4 tokens" in caplog.text


def test_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with raises(WeightsError, where=tmp_path):
        Encoder(tmp_path)


def test_weights_that_are_not_finite_are_rejected(folder: Path) -> None:
    model = Dinov2Model.from_pretrained(folder)
    with torch.no_grad():
        model.layernorm.weight[:3] = torch.nan
    model.save_pretrained(folder)
    with raises(WeightsError, "layernorm.weight", "3 of 16", where=folder):
        Encoder(folder)
