"""A run prints a summary of a dozen lines, each note once; job.json and --print-config have the whole job."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mindspeed_mm.log import once, setup_logging
from mindspeed_mm.tasks.generate import main as generate
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.pretrain import main as train
from mindspeed_mm.tasks.summary import generation_table, training_table

ROOT = Path(__file__).resolve().parents[3]
VACE = ROOT / "examples/vace"


def training_flags(size: str, *more: str) -> list[str]:
    model = "pretrain_model_high.json" if "A14B" in size else "pretrain_model.json"
    files = [f"--mm-model={VACE / size / model}", f"--mm-data={VACE / size / 'feature_data.json'}", "--bf16"]
    return [
        *files,
        f"--fsdp2-config-path={VACE / 'fsdp2_config.yaml'}",
        "--lr=5e-5",
        "--train-iters=20",
        *more,
    ]


def test_training_table_names_what_decides_the_run() -> None:
    flags = training_flags(
        "14B", "--micro-batch-size=1", "--global-batch-size=16", "--save=out", "--save-interval=5"
    )
    table = dict(training_table(PretrainJob.from_argv(flags, ranks=8)))
    assert len(table) <= 12
    assert "14B" in table["model"]
    assert table["batch"] == "16 = 1 x 8 ranks x 2 micro-batches"
    assert "8 ranks" in table["parallelism"]
    assert table["output"] == "out, every 5 iterations"


def test_dry_run_prints_a_table_and_print_config_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    train(training_flags("1.3B", "--dry-run"))
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 20
    assert "model       Wan2.1-VACE-1.3B" in shown
    assert "estimate    about" in shown
    assert "81 frames of 480x832" in shown
    train(training_flags("1.3B", "--print-config"))
    assert json.loads(capsys.readouterr().out)["training"]["optimizer"]["lr"] == 5e-5


def test_generation_table_names_videos_and_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(VACE / "tiny/inference.json"), "--prompt=a ball"]
    job = GenerateJob.from_argv(argv)
    table = generation_table(job)
    assert len(table) <= 12
    assert dict(table)["videos"].startswith(f"{len(job.videos)}: {job.videos[0].name}")
    generate([*argv, "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) < 18
    assert [line for line in printed if line.startswith("videos ")]
    generate([*argv, "--print-config"])
    assert json.loads(capsys.readouterr().out)["videos"][0]["name"] == job.videos[0].name


def test_warning_and_a_note_are_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    logger = logging.getLogger("mindspeed_mm.test")
    for number in (1, 2):
        logger.warning("config.json disagrees")
        logger.info("a folder of weights", extra=once())
        logger.info("same line")
        logger.warning(f"row {number}")
    shown = capsys.readouterr().out.splitlines()
    assert [shown.count(text) for text in ("config.json disagrees", "a folder of weights", "same line")] == [
        1,
        1,
        2,
    ]
    assert {"row 1", "row 2"} <= set(shown)
