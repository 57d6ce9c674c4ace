"""The guide with pipeline stages: convert with `pp_layers`, train with PP and VP, convert back, generate."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.cli import main as convert
from mindspeed_mm.tasks.generate import main as generate
from tests.support.runs import ended, free_port, make_run
from tests.support.tiny import TRANSFORMER_FILE, write_official

ROOT = Path(__file__).resolve().parents[2]
VACE = ROOT / "examples/vace"
SAVED = "iter_0000002"


def ran(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of the guide, as a user types it."""
    settings = {"OMP_NUM_THREADS": "1", "MINDSPEED_MM_DEVICE": "cpu", "MASTER_PORT": free_port()}
    done = ended([str(word) for word in words], cwd=cwd, env={**settings, **environment}, seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_converted_stages_train_convert_back_and_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversions and the generation run in this process: test_guide.py starts their commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "cpu")
    official = write_official(tmp_path / "Wan2.1-VACE-tiny", dtype=torch.float32)
    source, target = "--cfg.source_path", "--cfg.target_path"
    stages = ["--pp_layers", "[[1,1],[1,1]]"]
    convert(["VACEConverter", "hf_to_mm", source, str(official), target, "mm", *stages])
    files = make_run(
        tmp_path / "run", predictor={"trainable": "all", "from_pretrained": str(tmp_path / "mm")}
    )
    layout = {"NPUS_PER_NODE": "2", "PP": "2", "VP": "2", "GBS": "4", "TRAIN_ITERS": "2", "LR": "1e-3"}
    training = ran("bash", VACE / "14B/pretrain_fsdp.sh", cwd=tmp_path, **files, **layout)
    assert "2 pipeline stages of 2 chunks" in training.stdout
    assert training.stdout.strip().splitlines()[-1].startswith("Elapsed Time Per iteration: ")
    convert(["VACEConverter", "mm_to_hf", source, files["SAVE_PATH"], target, "out"])
    before, after = (load_file(folder / TRANSFORMER_FILE) for folder in (official, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(
        not torch.equal(before[name].float(), after[name].float())
        for name in ("head.head.weight", "blocks.0.ffn.0.weight")
    )

    config = {
        "model": {"transformer": "out", "vae": str(official), "text_encoder": str(official)},
        "prompt": "a red ball",
        "output_path": "videos",
        **{"height": 32, "width": 48, "num_frames": 5, "steps": 2, "dtype": "fp32"},
    }
    (tmp_path / "inference.json").write_text(json.dumps(config))
    generate(["inference.json"])
    assert (tmp_path / "videos/video1.mp4").is_file()
