"""The guide's three inference files, unchanged, and generate.sh, on tiny weights in the official formats."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.vace.tiny.world import make_scene
from mindspeed_mm.tasks.generate import main
from tests.support.errors import meant
from tests.support.ranks import run_ranks
from tests.support.runs import ended, free_port
from tests.support.tiny import TINY, TRANSFORMER_FILE, tiny_transformer, write_official, write_transformer

ROOT = Path(__file__).resolve().parents[2]
INFERENCE = ROOT / "examples/vace/inference"
SCENE = make_scene("heldout", 3)
SIZE = {"height": 32, "width": 48, "num-frames": 9, "steps": 3}
TINY_WEIGHTS = ROOT / "examples/vace/tiny/inference.json"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a user who has downloaded all three models."""
    root = tmp_path_factory.mktemp("guide")
    here = root / "work"
    official = write_official(here / "Wan2.1-VACE-1.3B", dtype=torch.float32)
    fourteen = here / "Wan2.1-VACE-14B"
    shutil.copytree(official, fourteen, ignore=shutil.ignore_patterns(TRANSFORMER_FILE))
    _write_shards(load_file(official / TRANSFORMER_FILE), fourteen)
    two = here / "Wan2.2-VACE-Fun-A14B"
    shutil.copytree(official, two, ignore=shutil.ignore_patterns(TRANSFORMER_FILE, "config.json"))
    for seed, expert in enumerate(("high", "low")):
        write_transformer(two / f"{expert}_noise_model", tiny_transformer(seed), torch.float32)
    return here


def _write_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Seven files and their index, named as the 14B's are."""
    names = sorted(state)
    index: dict[str, str] = {}
    for number in range(7):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-00007.safetensors"
        save_file({name: state[name] for name in names[number::7]}, folder / file)
        index |= dict.fromkeys(names[number::7], file)
    (folder / f"{TRANSFORMER_FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["wan2.1_1.3b", "wan2.1_14b", "wan2.2_A14b"])
def test_file_of_the_guide_makes_its_three_videos(
    size: str, downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = [part for key, value in SIZE.items() for part in (f"--{key}", str(value))]
    argv = [str(INFERENCE / f"inference_{size}.json"), *smaller, "--output-path", str(tmp_path)]
    monkeypatch.chdir(downloads)
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "cpu")
    main(argv)  # test_guide.py starts Wan-VACE-Inference.py, which calls it
    assert {path.name for path in tmp_path.iterdir()} == {
        "job.json",
        *(f"video{number}{end}" for number in (1, 2, 3) for end in ("", ".mp4", ".png", ".json")),
    }
    shown = {
        "video1": {"src_video.mp4"},
        "video2": {"reference_0.png"},
        "video3": {"src_video.mp4", "reference_0.png"},
    }
    for name, conditions in shown.items():
        assert {path.name for path in (tmp_path / name).iterdir()} == {*conditions, "latents.safetensors"}
        with av.open(str(tmp_path / f"{name}.mp4")) as made:
            stream = made.streams.video[0]
            assert (stream.width, stream.height, stream.frames, float(stream.average_rate)) == (48, 32, 9, 16)
        said = json.loads((tmp_path / f"{name}.json").read_text())
        assert said["prompt"].startswith("一只红色皮球")
        assert said["sampling"]["seed"] == 1
        assert said["sampling"]["shift"] == (12.0 if "A14b" in size else 16.0)
        latents = load_file(tmp_path / name / "latents.safetensors")["latents"]
        assert latents.shape == (TINY.trunk.out_dim, 3 + said["num_refs"], 4, 6)
        assert bool(latents.isfinite().all())


@pytest.mark.slow
def test_inpainting_file_makes_its_video(
    downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(downloads)
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "cpu")
    smaller = [part for key, value in SIZE.items() for part in (f"--{key}", str(value))]
    main([str(INFERENCE / "inpaint_wan2.1_1.3b.json"), *smaller, "--output-path", str(tmp_path)])
    given = {path.name for path in (tmp_path / "inpaint").iterdir()}
    assert given == {"src_video.mp4", "src_mask.mp4", "latents.safetensors"}
    said = json.loads((tmp_path / "inpaint.json").read_text())
    assert not any("white nowhere" in note or "white everywhere" in note for note in said["notes"])


def generate(*arguments: object, cwd: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """generate.sh, as a user types it."""
    settings = {"NPUS_PER_NODE": str(processes), "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    argv = ["bash", str(INFERENCE / "generate.sh"), *map(str, arguments)]
    return ended(argv, cwd=cwd, env={**settings, "MINDSPEED_MM_DEVICE": "cpu"}, seconds=300)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The tiny world's inference JSON with absolute paths, in a folder with a space."""
    values = json.loads(TINY_WEIGHTS.read_text())
    weights = ROOT / "examples/vace/tiny/weights"
    values["model"] = {
        "transformer": [str(weights / "vace")],
        "vae": str(weights),
        "text_encoder": str(weights),
    }
    values |= {"output_path": "out", "prompt": SCENE.caption, "num_frames": 5, "steps": 5}
    path = tmp_path / "a folder" / "inference.json"
    path.parent.mkdir()
    path.write_text(json.dumps(values))
    return path


@pytest.mark.slow
def test_generate_sh_makes_a_video_on_two_processes(tiny: Path) -> None:
    ran = generate("inference.json", "--seed", 3, cwd=tiny.parent)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tiny.parent / "out" / "video1.mp4").exists()
    assert re.search(r"denoising 2/5 \| .* \| ETA \d:\d\d:\d\d", ran.stdout)
    assert "denoising 5/5 |" in ran.stdout
    (log,) = (tiny.parent / "logs").iterdir()
    assert f"log: logs/{log.name}" in ran.stdout


@pytest.mark.slow
def test_error_of_a_process_is_one_line(tiny: Path) -> None:
    (tiny.parent / "torn.mp4").write_bytes(b"no video at all")
    ran = generate("inference.json", "--video-path", "torn.mp4", cwd=tiny.parent)
    assert ran.returncode == 1
    assert ran.stderr == ""
    (line,) = [line for line in ran.stdout.splitlines() if "Error" in line]
    assert re.match(r"\[rank 0\] DataError: video1: .*torn\.mp4", line)
    assert "torch/distributed" not in ran.stdout
    assert not (tiny.parent / "out").exists()
    (log,) = (tiny.parent / "logs").iterdir()
    assert line in log.read_text()


@pytest.mark.slow
def test_error_of_every_process_is_one_line_of_each(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the launcher prints one: test_training_scripts.py."""
    monkeypatch.chdir(tiny.parent)
    flags = ["--cfg-parallel", "on", "--context-parallel-size", "2"]
    ran = run_ranks("mindspeed_mm.tasks.generate", [tiny, *flags], tiny.parent / "printed")
    assert ran.returncodes == [1, 1]
    lines = [line for line in (ran.stdout + ran.stderr).splitlines() if "Error" in line]
    assert len(lines) == 2
    assert all(re.match(r"\[rank \d\] ConfigError: 2 process", line) for line in lines)
    assert "torch/distributed" not in ran.stdout + ran.stderr
    assert not (tiny.parent / "out").exists()


def test_known_problems_are_reported_before_the_start(tiny: Path) -> None:
    ran = generate("inference.json", "--stepz", 3, cwd=tiny.parent)
    assert ran.returncode == 1
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert meant("--steps") in line
    assert not (tiny.parent / "logs").exists()
