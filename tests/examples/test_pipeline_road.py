"""The guide with pipeline stages: convert with `pp_layers`, train with PP and VP, convert back, generate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.runs import ended, free_port, make_run
from tests.support.tiny import TRANSFORMER_FILE, write_official

ROOT = Path(__file__).resolve().parents[2]
VACE = ROOT / "examples/vace"
SAVED = "iter_0000002"


def ran(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the guide, as a user types it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {
        "OMP_NUM_THREADS": "1",
        "MINDSPEED_MM_DEVICE": "cpu",
        "MASTER_PORT": free_port(),
        "PATH": path,
    }
    done = ended([str(word) for word in words], cwd=cwd, env={**settings, **environment}, seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_converted_stages_train_convert_back_and_generate(tmp_path: Path) -> None:
    official = write_official(tmp_path / "Wan2.1-VACE-tiny", dtype=torch.float32)
    source, target = "--cfg.source_path", "--cfg.target_path"
    convert = ("mm-convert", "VACEConverter")
    ran(*convert, "hf_to_mm", source, official, target, "mm", "--pp_layers", "[[1,1],[1,1]]", cwd=tmp_path)
    files = make_run(
        tmp_path / "run", predictor={"trainable": "all", "from_pretrained": str(tmp_path / "mm")}
    )
    layout = {"NPUS_PER_NODE": "2", "PP": "2", "VP": "2", "GBS": "4", "TRAIN_ITERS": "2", "LR": "1e-3"}
    training = ran("bash", VACE / "14B/pretrain_fsdp.sh", cwd=tmp_path, **files, **layout)
    assert "2 pipeline stages of 2 chunks" in training.stdout
    assert training.stdout.strip().splitlines()[-1].startswith("Elapsed Time Per iteration: ")
    ran(*convert, "mm_to_hf", source, files["SAVE_PATH"], target, "out", cwd=tmp_path)
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
    ran(sys.executable, VACE / "inference/Wan-VACE-Inference.py", "inference.json", cwd=tmp_path)
    assert (tmp_path / "videos/video1.mp4").is_file()
