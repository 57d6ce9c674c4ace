"""A typo, a missing file, a wrong folder: each script exits at once with code 1 and one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from checkpoint.cli import main as convert
from tests.support.errors import absent, meant

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "vace" / "tiny"
EXTRACT = ["bash", "examples/vace/feature_extract/feature_extraction.sh"]
TRAIN = ["bash", "examples/vace/1.3B/pretrain_fsdp.sh"]
GENERATE = ["python", "examples/vace/inference/Wan-VACE-Inference.py"]
CONVERT = ["mm-convert", "VACEConverter"]


def refused(command: list[str], settings: Mapping[str, object] = {}) -> str:
    """Run a command that must be refused; return its one line of output."""
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line]
    assert len(lines) == 1, ran.stderr
    assert re.match(r"(ConfigError|DataError|WeightsError): ", lines[0])
    return lines[0]


@pytest.fixture
def edited(tmp_path: Path):
    """A function that copies a tiny file with one string replaced.

    For example, `edited("pretrain_model.json", "num_heads", "num_head")`.
    """

    def edit(name: str, old: str, new: str) -> Path:
        text = (TINY / name).read_text()
        assert old in text
        path = tmp_path / name
        path.write_text(text.replace(old, new))
        return path

    return edit


def train_settings(tmp_path: Path, **settings: object) -> dict[str, object]:
    given = {
        "NPUS_PER_NODE": 1,
        "MM_DATA": TINY / "feature_data.json",
        "MM_MODEL": TINY / "pretrain_model.json",
    }
    given["FSDP2_CONFIG"] = TINY / "fsdp2_config.yaml"
    return {**given, "SAVE_PATH": tmp_path / "save", "LOG_DIR": tmp_path / "logs", **settings}


def extract_settings(tmp_path: Path, **settings: object) -> dict[str, object]:
    given = {"NPUS_PER_NODE": 1, "MM_DATA": TINY / "data.json", "MM_MODEL": TINY / "model.json"}
    return {**given, "MM_TOOL": TINY / "tools.json", "LOG_DIR": tmp_path / "logs", **settings}


def test_training_names_a_typo_in_the_model_json(tmp_path: Path, edited) -> None:
    model = edited("pretrain_model.json", '"num_heads"', '"num_head"')
    line = refused(TRAIN, train_settings(tmp_path, MM_MODEL=model))
    assert f"pretrain_model.json:predictor.num_head: unknown key {meant('num_heads')}" in line
    assert not (tmp_path / "save").exists()
    assert not (tmp_path / "logs").exists()


def test_training_names_a_typo_in_the_data_json(tmp_path: Path, edited) -> None:
    data = edited("feature_data.json", '"data_folder"', '"data_foldr"')
    line = refused(TRAIN, train_settings(tmp_path, MM_DATA=data))
    assert "feature_data.json:dataset_param.basic_parameters.data_foldr: " in line
    assert f"unknown key {meant('data_folder')}" in line


def test_training_names_a_typo_in_the_fsdp2_yaml(tmp_path: Path) -> None:
    path = tmp_path / "fsdp2_config.yaml"
    path.write_text(
        (ROOT / "examples/vace/fsdp2_config.yaml").read_text().replace("param_dtype", "param_dtyp")
    )
    line = refused(TRAIN, train_settings(tmp_path, FSDP2_CONFIG=path))
    assert f"fsdp2_config.yaml:param_dtyp: unknown key {meant('param_dtype')}" in line


def test_training_names_a_typo_in_a_flag(tmp_path: Path) -> None:
    line = refused([*TRAIN, "--clip-gradd", "1.0"], train_settings(tmp_path))
    assert f"unknown argument '--clip-gradd' {meant('--clip-grad')}" in line


def test_training_names_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # as the script does; the message names it
    path = tmp_path / "none.json"
    assert f"{path}: {absent(path)}" in refused(TRAIN, train_settings(tmp_path, MM_MODEL=path))


def test_training_names_json_that_is_broken(tmp_path: Path, edited) -> None:
    model = edited("pretrain_model.json", '"task": "vace",', '"task": "vace"')
    assert re.search(
        r"pretrain_model\.json:3:\d+: .*\bJSON\b",
        refused(TRAIN, train_settings(tmp_path, MM_MODEL=model)),
    )


def test_training_names_features_that_are_not_there(tmp_path: Path, edited) -> None:
    data = edited("feature_data.json", "./outputs/quickstart/features", f"{tmp_path}/nowhere")
    assert f"{tmp_path}/nowhere/data.jsonl" in refused(TRAIN, train_settings(tmp_path, MM_DATA=data))


def test_training_names_weights_that_are_not_there(tmp_path: Path, edited, one_feature: Path) -> None:
    data = edited("feature_data.json", "./outputs/quickstart/features", str(one_feature))
    model = edited("pretrain_model.json", "./examples/vace/tiny/weights/t2v/", f"{tmp_path}/nowhere")
    line = refused(TRAIN, train_settings(tmp_path, MM_DATA=data, MM_MODEL=model))
    assert f"{tmp_path}/nowhere" in line


def test_training_names_a_folder_that_holds_no_weights(tmp_path: Path, edited, one_feature: Path) -> None:
    (tmp_path / "empty").mkdir()
    data = edited("feature_data.json", "./outputs/quickstart/features", str(one_feature))
    model = edited("pretrain_model.json", "./examples/vace/tiny/weights/t2v/", f"{tmp_path}/empty")
    line = refused(TRAIN, train_settings(tmp_path, MM_DATA=data, MM_MODEL=model))
    assert f"{tmp_path}/empty" in line


@pytest.fixture
def one_feature(tmp_path: Path) -> Path:
    """A feature folder that passes the checks before launch."""
    import torch

    from mindspeed_mm.data.features import write_feature
    from mindspeed_mm.data.sample import FeatureRecord

    folder = tmp_path / "features"
    (folder / "features").mkdir(parents=True)
    record = FeatureRecord(
        latents=torch.zeros(16, 1, 2, 2),
        vace_context=torch.zeros(96, 1, 2, 2),
        prompt_embeds=(torch.zeros(3, 64),),
        num_refs=0,
        key="a",
    )
    write_feature(folder / "features" / "a.safetensors", record, {})
    row = {"video": "a.mp4", "cap": "a", "file": "features/a.safetensors", "shape": [1, 2, 2], "num_refs": 0}
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    shutil.copy(folder / "features" / "a.safetensors", folder / "null_prompt.safetensors")
    return folder


def test_extraction_names_a_dataset_that_is_not_there(tmp_path: Path, edited) -> None:
    data = edited("data.json", "./examples/vace/tiny/data.txt", f"{tmp_path}/none.txt")
    assert f"{tmp_path}/none.txt" in refused(EXTRACT, extract_settings(tmp_path, MM_DATA=data))


def test_extraction_names_every_clip_that_is_not_there(tmp_path: Path, edited) -> None:
    rows = [{"video": "a.mp4", "cap": "a"}, {"video": "b.mp4", "cap": "b", "src_vido": "c.mp4"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = edited("data.json", "./examples/vace/tiny/data.txt", f"{tmp_path}/rows.json")
    line = refused(EXTRACT, extract_settings(tmp_path, MM_DATA=data))
    assert "a.mp4" in line
    assert "src_vido" in line


def test_extraction_names_a_vae_that_is_not_there(tmp_path: Path, edited) -> None:
    model = edited("model.json", "./examples/vace/tiny/weights/Wan2.1_VAE.pth", f"{tmp_path}/none.pth")
    (tmp_path / "a.mp4").touch()
    (tmp_path / "rows.json").write_text(json.dumps([{"video": "a.mp4", "cap": "a"}]))
    data = edited("data.json", "./examples/vace/tiny/data.txt", f"{tmp_path}/rows.json")
    line = refused(EXTRACT, extract_settings(tmp_path, MM_DATA=data, MM_MODEL=model))
    assert f"{tmp_path}/none.pth" in line


def test_extraction_names_a_typo_in_the_model_json(tmp_path: Path, edited) -> None:
    model = edited("model.json", '"enable_tiling"', '"enable_tilling"')
    line = refused(EXTRACT, extract_settings(tmp_path, MM_MODEL=model))
    assert f"model.json:ae.enable_tilling: unknown key {meant('enable_tiling')}" in line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"steps"', '"step"', f"step: unknown key {meant('steps')}"),
        ('"num_frames": 17', '"num_frames": 16', "num_frames: must be 4k+1"),
        ('"height": 64', '"height": 60', "multiple of 16"),
        ('"seed": 2025', '"seed": 2025, "prompt": "a", "video_path": "none.mp4"', "none.mp4"),
        ('"seed": 2025', '"seed": 2026', "prompt: missing"),
    ],
)
def test_generation_names_the_key(old: str, new: str, message: str, edited) -> None:
    assert message in refused([*GENERATE, str(edited("inference.json", old, new))])


def test_generation_names_weights_that_are_not_there(tmp_path: Path, edited) -> None:
    config = edited("inference.json", "./examples/vace/tiny/weights/vace", f"{tmp_path}/nowhere")
    assert f"{tmp_path}/nowhere" in refused([*GENERATE, str(config), "--prompt", "a red circle"])


def refused_conversion(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """As `refused` does for mm-convert, but in this process, which has imported torch already."""
    with pytest.raises(SystemExit) as ended:
        convert(["VACEConverter", *argv])
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert re.match(r"(ConfigError|DataError|WeightsError): ", line)
    return line


def test_conversion_names_a_source_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--cfg.source_path", f"{tmp_path}/none", "--cfg.target_path", f"{tmp_path}/out"]
    assert f"{tmp_path}/none" in refused_conversion(capsys, "hf_to_mm", *argv)
    assert not (tmp_path / "out").exists()


def test_conversion_names_an_unknown_method_and_flag(tmp_path: Path) -> None:
    assert "hf_to_m" in refused([*CONVERT, "hf_to_m"])
    assert "sorce_path" in refused([*CONVERT, "hf_to_mm", "--cfg.sorce_path", "a", "--cfg.target_path", "b"])


def test_conversion_names_a_folder_without_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    argv = ["--cfg.source_path", f"{tmp_path}/empty", "--cfg.target_path", f"{tmp_path}/out"]
    assert f"{tmp_path}/empty" in refused_conversion(capsys, "hf_to_mm", *argv)
