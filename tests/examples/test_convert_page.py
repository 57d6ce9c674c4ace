"""Run the blocks of docs/guide/convert.md as written and in order, on tiny weights.

The files have the names that the page uses. The Chinese version must hold the same blocks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron.mm.layout import write_tracker
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.weights import open_part, open_weights
from tests.support.commands import convert_here
from tests.support.rounded_files import write_fp8_scaled
from tests.support.tiny import TEXT_FILE, TINY, TOKENIZER_FOLDER, VAE_FILE, write_official

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "docs/guide/convert.md", ROOT / "docs/zh/guide/convert.md")
BLOCK = re.compile(r"^```(shell|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
DEEP = VaceConfig(  # as many blocks as the 1.3B, so that the page's stages fit, and heads of 128
    trunk=TINY.trunk.model_copy(update={"num_layers": 30, "hidden_size": 128, "ffn_dim": 24, "num_heads": 1}),
    vace_layers=tuple(range(0, 30, 2)),
)


def write_run(folder: Path, base: Path) -> None:
    """Write the output of a training run: the branch, and where the trunk came from."""
    source = open_weights(base)
    to_mm = KEY_MAPS["mm"].to_theirs
    branch = {to_mm(name): source.read(name) + 1 for name in source.shapes if name.startswith("vace_")}
    reference = {"path": str(source.path), "fingerprint": source.fingerprint(), "dialect": source.dialect}
    dcp.save({"model": branch, "base": reference}, checkpoint_id=folder / "iter_0005000", no_dist=True)
    write_tracker(folder, 5000)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert page")
    official = write_official(folder / "ckpt/Wan2.1-VACE-1.3B", DEEP)
    a14b = folder / "ckpt/A14B"
    for expert in ("high_noise_model", "low_noise_model"):
        (a14b / expert).mkdir(parents=True)
        for name in ("diffusion_pytorch_model.safetensors", "config.json"):
            shutil.copy(official / name, a14b / expert)
    for name in (VAE_FILE, TEXT_FILE):
        shutil.copy(official / name, a14b)
    shutil.copytree(official / TOKENIZER_FOLDER, a14b / TOKENIZER_FOLDER)
    write_run(folder / "save/vace", official)
    source = open_weights(official)
    weights = {name: source.read(name) for name in source.tensors}
    write_fp8_scaled(folder / "wan2.1_vace_14B_fp8_scaled.safetensors", weights)
    return folder


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_code_block_of_the_page_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    found = blocks(PAGES[0])
    assert len(found) >= 7
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for language, block in found:  # test_guide.py runs the console script
        if language == "python":
            exec(compile(block, PAGES[0].name, "exec"), {})
            continue
        if convert_here(block):
            continue
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    official = open_weights(home / "ckpt/Wan2.1-VACE-1.3B/diffusion_pytorch_model.safetensors")
    for merged in ("ckpt/mm/Wan2.1-VACE-1.3B", "ckpt/mm/virtual", "ckpt/mm/again", "out/Wan2.1-VACE-1.3B"):
        assert open_weights(home / merged).fingerprint() == official.fingerprint(), merged
    trained = open_weights(home / "out/transformer")
    assert trained.config == DEEP
    name = "vace_blocks.14.after_proj.weight"
    assert torch.equal(trained.read(name), official.read(name) + 1)
    assert torch.equal(trained.read("head.head.weight"), official.read("head.head.weight"))
    assert open_weights(home / "out/vace.safetensors").fingerprint() == trained.fingerprint()
    module = open_part(home / "vace_module.safetensors")
    assert all(torch.equal(module.read(n), trained.read(n)) for n in module.tensors)
    assert all(n.startswith("vace_") for n in module.tensors)
    assert open_weights(home / "ckpt/mm/14B").dtypes["blocks.0.self_attn.q.weight"] == torch.bfloat16
    assert (home / "out/pipeline/transformer_2/config.json").is_file()


def test_both_languages_have_the_same_commands() -> None:
    english, chinese = PAGES
    assert blocks(english) == blocks(chinese)
    said = [set(CODE.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))) for page in PAGES]
    assert said[0] == said[1]
