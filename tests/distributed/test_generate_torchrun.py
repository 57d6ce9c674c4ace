"""Generation on several processes: twice through `torchrun … Wan-VACE-Inference.py`, else the ranks alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.generation.stored import read_latents
from mindspeed_mm.tasks.generate import main
from tests.support.errors import meant
from tests.support.ranks import run_ranks
from tests.support.tiny import write_official

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/vace/inference/Wan-VACE-Inference.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    write_official(folder / "tiny", dtype=torch.float32)
    values = {
        "model": {"transformer": "tiny", "vae": "tiny", "text_encoder": "tiny"},
        **{"prompt": "a red ball", "height": 32, "width": 48, "num_frames": 5, "steps": 2, "dtype": "fp32"},
        "output_path": str(folder / "alone"),
    }
    path = folder / "inference.json"
    path.write_text(json.dumps(values))
    return path


def torchrun(*arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(SCRIPT),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINDSPEED_MM_DEVICE": "cpu"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def ranks(config, out, *flags):
    """What torchrun starts, without torchrun: ranks that have imported everything already."""
    printed = config.parent / "printed" / out.name
    return run_ranks("mindspeed_mm.tasks.generate", [config, *flags, "--output-path", out], printed)


@pytest.fixture(scope="module")
def alone(config):
    main([str(config)])
    return read_latents(config.parent / "alone" / "video1" / "latents.safetensors")[0]


@pytest.mark.slow
def test_torchrun_makes_the_video_of_one_process(config, alone):
    out = config.parent / "torchrun"
    ran = torchrun(config, "--cfg-parallel", "on", "--output-path", out)
    assert ran.returncode == 0, ran.stderr
    latents = read_latents(out / "video1" / "latents.safetensors")[0]
    torch.testing.assert_close(latents, alone, atol=1e-4, rtol=0)
    assert len(re.findall(r"^\[1/1\] video1", ran.stdout, re.MULTILINE)) == 1  # said by one process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tokens", ["--cfg-parallel", "off", "--context-parallel-size", "2"]),
        ("guidance", ["--cfg-parallel", "on"]),
        ("weights", ["--cfg-parallel", "off", "--shard-weights"]),
    ],
)
def test_two_processes_make_the_video_of_one(config, alone, name, flags):
    out = config.parent / name
    ran = ranks(config, out, *flags)
    assert ran.returncodes == [0, 0], ran.stderr
    together = read_latents(out / "video1" / "latents.safetensors")[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert sorted(path.name for path in out.iterdir()) == [
        "job.json",
        "video1",
        "video1.json",
        "video1.mp4",
        "video1.png",
    ]
    assert len(re.findall(r"^\[1/1\] video1", ran.stdout, re.MULTILINE)) == 1  # said by one process


@pytest.mark.slow
def test_processes_that_do_not_share_make_a_video_each(config, alone):
    """Two processes generate three tasks.

    The first process generates two, and the files equal the files of one process.
    """
    out, prompts = config.parent / "each", config.parent / "prompts.jsonl"
    names = ("video1", "other", "third")
    tasks = [
        {"name": name, "prompt": f"a red ball{' bounces' * number}"} for number, name in enumerate(names)
    ]
    prompts.write_text("\n".join(map(json.dumps, tasks)))
    flags = ["--prompts-file", prompts]
    ran = ranks(config, out, *flags, "--data-parallel")
    assert ran.returncodes == [0, 0], ran.stderr
    assert sorted(re.findall(r"^(\[\d/3\]) (\w+)", ran.stdout, re.MULTILINE)) == [
        (f"[{number}/3]", name) for number, name in enumerate(names, start=1)
    ]
    main([str(config), *map(str, flags), "--output-path", str(config.parent / "one")])
    for name in names:
        found, expected = (
            read_latents(folder / name / "latents.safetensors")[0] for folder in (out, config.parent / "one")
        )
        assert torch.equal(found, expected)
        assert (out / f"{name}.mp4").read_bytes() == (config.parent / "one" / f"{name}.mp4").read_bytes()
    assert torch.equal(read_latents(out / "video1" / "latents.safetensors")[0], alone)
    seconds = {name: json.loads((out / f"{name}.json").read_text())["seconds"] for name in names}
    assert [name for name in names if "load" in seconds[name]] == [
        "video1",
        "other",
    ]  # each process loads once


@pytest.mark.slow
def test_videos_that_were_finished_stay_when_a_process_fails(config):
    """The second process makes the second and fourth video, and cannot write the latents of the latter."""
    out, prompts = config.parent / "stopped", config.parent / "four.jsonl"
    names = ("one", "two", "three", "four")
    prompts.write_text("\n".join(json.dumps({"name": name, "prompt": name}) for name in names))
    obstacle = threading.Thread(target=_obstruct, args=(out,))
    obstacle.start()
    ran = ranks(config, out, "--prompts-file", prompts, "--data-parallel")
    obstacle.join()
    assert ran.returncodes == [1, 1], ran.stderr
    assert re.search(r"^\[rank 1\] .*Error: .*stopped/four", ran.stderr, re.MULTILINE)
    assert "mindspeed_mm/" not in ran.stderr  # no traceback of ours
    left = {path.name for path in out.iterdir()}
    assert {"two", "two.json", "two.mp4", "two.png", "four"} <= left
    assert not {"four.json", "four.mp4", "four.png"} & left
    assert not [name for name in left if "tmp" in name]


def _obstruct(out):
    """Put a folder in the way of the last video's latents once the checks are over."""
    until = time.monotonic() + 60
    while not ((out / "job.json").exists() or (out / "two").exists()):
        if time.monotonic() > until:
            return
        time.sleep(0.002)
    (out / "four" / "latents.safetensors").mkdir(parents=True)


@pytest.mark.slow
def test_folder_in_the_way_stops_every_process(config):
    out = config.parent / "obstructed"
    (out / "video1" / "latents.safetensors").mkdir(parents=True)
    ran = ranks(config, out)
    assert ran.returncodes == [1, 1], ran.stderr
    assert re.search(r"^\[rank 0\] ConfigError: .*obstructed/video1/latents", ran.stderr, re.MULTILINE)


@pytest.mark.slow
def test_more_processes_than_videos_say_so(config):
    ran = ranks(config, config.parent / "spare", "--data-parallel")
    assert ran.returncodes == [0, 0], ran.stderr
    assert re.search(r"\brank 1\b.*\b1 videos\b.*\b2 ranks\b", ran.stdout)
    assert (config.parent / "spare" / "video1.mp4").is_file()


BAD_INPUT = [
    (["--transformer", "VAE"], r"WeightsError: .*\bVACE transformer, got a VAE\b"),
    (["--vae", "JSON"], "WeightsError: .*inference.json: "),
    (["--stepz", "3"], f"ConfigError: .*'--stepz' {re.escape(meant('--steps'))}"),
    (["--data-parallel", "--prompts-file", "TASKS"], r"DataError: second: .*inference\.json\b.*\btext\b"),
]


def with_paths(config, flags):
    """The flags, with the files that they name."""
    tasks = [
        {"prompt": "one", "name": "first"},
        {"prompt": "two", "name": "second", "video_path": str(config)},
    ]
    (config.parent / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    paths = {
        "VAE": str(config.parent / "tiny" / "Wan2.1_VAE.pth"),
        "JSON": str(config),
        "TASKS": str(config.parent / "tasks.jsonl"),
    }
    return [paths.get(flag, flag) for flag in flags]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_no_files(config, flags, message):
    out = config.parent / "refused"
    ran = ranks(config, out, *with_paths(config, flags))
    assert ran.returncodes == [1, 1]
    assert re.search(rf"^\[rank \d\] {message}", ran.stderr, re.MULTILINE)
    assert "mindspeed_mm/" not in ran.stderr  # no traceback of ours
    assert not out.exists()


@pytest.mark.slow
def test_torchrun_reports_bad_input_in_one_line(config):
    """If all ranks fail, the first prints the error, and torchrun reports the line of the others."""
    flags, message = BAD_INPUT[3]
    out = config.parent / "refused"
    ran = torchrun(config, *with_paths(config, flags), "--output-path", out)
    assert ran.returncode == 1
    assert re.search(rf"(\[rank 0\]|traceback :) {message}", ran.stderr)
    assert len(re.findall(r"^\[rank \d+\] ", ran.stderr, re.MULTILINE)) <= 1
    assert "mindspeed_mm/" not in ran.stderr
    assert not out.exists()


def with_nan(official: Path) -> Path:
    """The transformer of a folder, with NaN in the last rows of one weight.

    They are not in every rank's part of it.
    """
    (source,) = official.glob("diffusion_pytorch_model*.safetensors")
    folder = official.parent / "nan"
    folder.mkdir(exist_ok=True)
    weights = load_file(source)
    weights["blocks.0.ffn.0.weight"][-1] = float("nan")
    save_file(weights, folder / source.name)
    shutil.copy(official / "config.json", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--shard-weights"], ["--cfg-parallel", "on"], ["--data-parallel"]])
def test_nan_in_one_ranks_weights_ends_all_ranks(config, flags):
    out = config.parent / "nan-out"
    ran = ranks(config, out, *flags, "--transformer", with_nan(config.parent / "tiny"))
    assert ran.returncodes == [1, 1]
    assert re.search(
        r"WeightsError: .*nan.*: 1 weight contains NaN\b.*: blocks\.0\.ffn\.0\.weight", ran.stderr
    )
    assert "mindspeed_mm/" not in ran.stderr  # no traceback of ours
    assert not list(out.glob("*.mp4"))
