"""The command `vace`: its help fits a screen, each verb is today's command, and bad input is one line."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from checkpoint import cli as mm_convert
from checkpoint.converter import CONVERTERS
from mindspeed_mm.cli import convert, ranks
from mindspeed_mm.cli.command import Command, short_help
from mindspeed_mm.cli.main import VERBS, help_text, main
from mindspeed_mm.tasks import extract, generate, pretrain
from mindspeed_mm.tools import inspect_samples, launch
from tests.support.errors import names

ROOT = Path(__file__).resolve().parents[3]
VACE = ROOT / "examples/vace"
TRAIN = {
    "--mm-model": str(VACE / "14B/pretrain_model.json"),
    "--mm-data": str(VACE / "14B/feature_data.json"),
    "--mm-tool": str(ROOT / "mindspeed_mm/tools/tools.json"),
    "--fsdp2-config-path": str(VACE / "fsdp2_config.yaml"),
}
EXTRACT = {
    "--mm-data": str(VACE / "feature_extract/data.json"),
    "--mm-model": str(VACE / "feature_extract/model.json"),
    "--mm-tool": str(ROOT / "mindspeed_mm/tools/tools.json"),
}
INFERENCE = str(VACE / "inference/inference_wan2.1_1.3b.json")
RECIPE = ["--lr", "5e-5", "--train-iters", "10"]


def command(verb: str) -> Command:
    found: Command = import_module(f"mindspeed_mm.cli.{verb}").COMMAND
    return found


def printed(capsys: pytest.CaptureFixture[str], run: Any, argv: list[str]) -> Any:
    capsys.readouterr()
    run(argv)
    return json.loads(capsys.readouterr().out)


def words(flags: dict[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    return line


@pytest.mark.parametrize(
    "text", [help_text, *(lambda verb=verb: short_help(command(verb)) for verb in VERBS)]
)
def test_help_fits_on_a_screen(text: Any) -> None:
    lines = text().splitlines()
    assert len(lines) <= 24, len(lines)
    assert max(map(len, lines)) <= 80, max(lines, key=len)


@pytest.mark.parametrize("verb", VERBS)
def test_short_help_names_only_flags_that_exist(verb: str) -> None:
    named = {f"--{flag}" for flags in command(verb).common.values() for flag in flags}
    assert named
    assert named <= set(command(verb).parser(None).flags())


@pytest.mark.parametrize("verb", VERBS)
def test_help_all_holds_every_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([verb, "--help-all"])
    text = capsys.readouterr().out
    flags = {flag for flag in command(verb).parser(None).flags() if flag.startswith("--")}
    assert flags <= set(re.findall(r"--[\w-]+", text))
    assert ("--config" in text) == bool(command(verb).files)


def test_prepare_has_the_spelling_of_the_published_tool(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--task", "swap_anything", "--print-config"]
    assert printed(capsys, main, ["preproccess", *argv]) == printed(capsys, main, ["prepare", *argv])


def test_train_makes_the_job_of_pretrain_vace(capsys: pytest.CaptureFixture[str]) -> None:
    today = printed(capsys, pretrain.main, [*words(TRAIN), *RECIPE, "--print-config"])
    assert printed(capsys, main, ["train", *words(TRAIN), *RECIPE, "--print-config"]) == today
    by_config = ["train", "--config", *TRAIN.values(), *RECIPE, "--print_config"]
    assert printed(capsys, main, by_config) == today


def test_extract_makes_the_job_of_get_vace_feature(capsys: pytest.CaptureFixture[str]) -> None:
    today = printed(capsys, extract.main, [*words(EXTRACT), "--print-config"])
    assert printed(capsys, main, ["extract", "--config", *EXTRACT.values(), "--print-config"]) == today


def test_generate_makes_the_job_of_the_inference_script(capsys: pytest.CaptureFixture[str]) -> None:
    today = printed(capsys, generate.main, [INFERENCE, "--num_frames", "17", "--print-config"])
    more = ["--num_frames", "17", "--print-config"]
    assert printed(capsys, main, ["generate", INFERENCE, *more]) == today
    assert printed(capsys, main, ["generate", *more, "--config", INFERENCE]) == today


def test_inspect_asks_for_the_sheet_of_mm_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    data = EXTRACT["--mm-data"]
    today = printed(capsys, inspect_samples.main, ["data.txt", "--data-config", data, "--print-config"])
    assert printed(capsys, main, ["inspect", "data.txt", "--config", data, "--print-config"]) == today


@pytest.mark.parametrize(
    ("method", "flags", "today"),
    [
        ("hf_to_mm", ["--pp-layers", "[7,8]"], ["--cfg.target_parallel_config.pp_layers", "[7,8]"]),
        ("hf_to_mm", ["--set", "target_parallel_config.pp_layers=[[1],[2]]"], ["--pp_layers", "[[1],[2]]"]),
        (
            "mm_to_hf",
            ["--dtype=bf16", "--no-verify-checksums"],
            ["--cfg.dtype=bf16", "--cfg.verify_checksums=false"],
        ),
        ("dcp_to_torch", ["--dry-run"], ["--cfg.dry_run=true"]),
        (
            "merge_lora",
            ["--loras", "[a.safetensors, b]", "--strengths", "[1, 0.5]"],
            ["--cfg.loras", "[a.safetensors, b]", "--cfg.strengths", "[1, 0.5]"],
        ),
    ],
)
def test_convert_passes_the_settings_of_mm_convert(
    method: str, flags: list[str], today: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Any] = []
    methods = CONVERTERS.get("VACEConverter").methods
    schema = convert._find([method]).schema

    def catch(cfg: Any) -> None:
        """Keep the settings."""
        got.append(cfg)

    catch.__annotations__ = {"cfg": schema, "return": None}
    monkeypatch.setitem(methods, method, catch)  # type: ignore[arg-type]
    paths = {"source_path": "a", "target_path": "b"}
    mm_convert.main(
        ["VACEConverter", method, *(f"--cfg.{key}={value}" for key, value in paths.items()), *today]
    )
    main(["convert", method, "--source-path", "a", "--target_path", "b", *flags])
    assert got[0] == got[1]
    assert type(got[0]) is type(got[1]) is schema


def test_convert_reads_a_file_and_lets_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "convert.yaml"
    path.write_text("source_path: a\ntarget_path: b\ndtype: bf16\nmax_shard_gb: 2\n")
    argv = ["convert", "mm_to_hf", "--config", str(path), "--set", "max_shard_gb=3", "--set=dtype=fp32"]
    found = printed(capsys, main, [*argv, "--dtype", "source", "--print-config"])
    assert (found["source_path"], found["dtype"], found["max_shard_gb"]) == ("a", "source", 3)


def test_flags_win_over_set_and_set_over_files(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", *words(TRAIN), *RECIPE, "--print-config", "--set", "model.caption_dropout=0.25"]
    assert printed(capsys, main, argv)["model"]["caption_dropout"] == 0.25
    seeds = ["generate", INFERENCE, "--print-config", "--set", "seed=3"]
    seeds += [word for index in range(3) for word in ("--set", f"tasks[{index}].seed=3")]
    assert {video["sampling"]["seed"] for video in printed(capsys, main, seeds)["videos"]} == {3}
    flags = [*seeds, "--seed", "4"]
    assert {video["sampling"]["seed"] for video in printed(capsys, main, flags)["videos"]} == {4}


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        (["trian"], ("vace: ", "'trian'", "'train'")),
        (["train", "--lrr", "1"], ("vace train: ", "'--lrr'", "'--lr'")),
        (["train", "--nporc", "1"], ("'--nporc'", "'--nproc'")),
        (["train", "--lr", "1"], ("vace train: --mm-model",)),
        (["train", *words(TRAIN), "--config", TRAIN["--mm-data"]], ("--config and --mm-data", "data JSON")),
        (["train", "--config", TRAIN["--mm-data"], TRAIN["--mm-data"]], ("both", "data JSON")),
        (["train", "--config", INFERENCE], ("--config", "--mm-model")),
        (["train", "--config", "gone.json"], ("gone.json",)),
        (["train", *words(TRAIN), *RECIPE, "--set", "modle.task=x"], ("--set modle.task", "'model'")),
        (["train", *words(TRAIN), *RECIPE, "--nnodes", "2"], ("--nproc",)),
        (["extract", "--nproc", "0"], ("vace extract", "nproc", "1")),
        (["generate"], ("vace generate: ", "CONFIG.json")),
        (["generate", INFERENCE, "--sed", "1"], ("'--sed'", "'--seed'")),
        (["inspect", "gone.txt"], ("gone.txt",)),
        (["convert"], ("vace convert: ", "hf_to_mm")),
        (["convert", "hf_to_m"], ("'hf_to_m'", "'hf_to_mm'")),
        (["convert", "hf_to_mm", "--source-path", "a"], ("target_path", "required")),
        (["convert", "hf_to_mm", "--source-pth", "a"], ("'--source-pth'", "'--source-path'")),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, *argv)
    assert all(fact in line for fact in facts), line


def test_nproc_starts_the_launcher_as_the_script_does(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    for name in ("WORLD_SIZE", *ranks.ENVIRONMENT):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(launch, "main", lambda argv: got.append(list(argv)))
    main(
        [
            "train",
            "--nproc",
            "4",
            "--config",
            *TRAIN.values(),
            *RECIPE,
            "--global-batch-size",
            "8",
            "--log-interval",
            "5",
        ]
    )
    options = launch._parse(got[0])
    assert (options.nproc_per_node, options.nnodes, options.name, options.report_batch) == (4, 1, "train", 8)
    assert (options.check, options.rank_flags, options.show_check) == ("--dry-run --check-inputs", "", False)
    assert Path(options.script).name == "__main__.py"
    assert options.arguments[0] == "train"
    assert "--nproc" not in options.arguments
    assert options.arguments[-2:] == ["--fsdp2-config-path", TRAIN["--fsdp2-config-path"]]


def test_job_that_the_launcher_cannot_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WORLD_SIZE", *ranks.ENVIRONMENT):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(launch, "main", lambda argv: pytest.fail("started"))
    line = fails(capsys, "train", *words(TRAIN), "--nproc", "2")
    assert line.startswith("ConfigError: ")
    assert names(line, "--lr", "5e-5")


def test_environment_of_ranks_equals_the_scripts() -> None:
    text = (VACE / "common.sh").read_text()
    exported = dict(re.findall(r"export (\w+)=\$\{\1:-([^}]*)\}", text))
    assert exported == {**ranks.ENVIRONMENT, **ranks.ASCEND}
