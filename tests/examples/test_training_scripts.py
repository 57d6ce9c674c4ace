"""The training scripts check before launch, accept spaces, fail loudly, and end with the guide's line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.models.containers.dcp import read_dcp
from tests.support.errors import names
from tests.support.runs import alive, ended, family, free_port, make_run

ROOT = Path(__file__).resolve().parents[2]
VACE = ROOT / "examples/vace"
SCRIPTS = [
    "1.3B/pretrain_fsdp.sh",
    "14B/pretrain_fsdp.sh",
    "A14B_wan2.2/pretrain_fsdp_high.sh",
    "A14B_wan2.2/pretrain_fsdp_low.sh",
]


def run(script: str, *flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """One script, as a user types it."""
    settings = {"OMP_NUM_THREADS": "1", "MASTER_PORT": free_port(), **environment}
    return ended(["bash", str(VACE / script), *flags], cwd=cwd, env=settings, seconds=240)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_run(tmp_path_factory.mktemp("a folder") / "with spaces")


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_of_every_size_prints_its_job(script: str) -> None:
    ran = run(script, "--dry-run")
    assert ran.returncode == 0, ran.stderr
    assert "lr 5e-05" in ran.stdout
    assert "8 ranks" in ran.stdout
    assert len(ran.stdout.splitlines()) < 20
    assert "accepted, unused" not in ran.stdout


@pytest.mark.parametrize("script", [f"{size}/pretrain_lora.sh" for size in ("1.3B", "14B", "A14B_wan2.2")])
def test_lora_script_of_every_size_prints_its_job(script: str) -> None:
    ran = run(script, "--print-config", EXPERT="low", LORA_ON="both", FUSE_LORA="few.safetensors")
    assert ran.returncode == 0, ran.stderr
    job = json.loads(ran.stdout)
    fuse, lora = job["model"]["transforms"]
    expert = "low" if script.startswith("A14B") else None
    assert (fuse["type"], fuse["path"], fuse["expert"]) == ("fuse_lora", "few.safetensors", expert)
    assert (lora["type"], lora["rank"], lora["alpha"], lora["on"]) == ("lora", 32, 32, "both")
    assert job["training"]["optimizer"]["lr"] == 1e-4
    assert "_lora" in job["training"]["checkpoint"]["save"]


def test_a14b_lora_script_asks_for_the_expert() -> None:
    ran = run("A14B_wan2.2/pretrain_lora.sh", "--dry-run")
    assert ran.returncode == 1
    assert names(ran.stderr, "EXPERT", "high", "low")


def test_lora_scripts_train_continue_and_resume(tiny: dict[str, str], tmp_path: Path) -> None:
    settings = {**tiny, "NPUS_PER_NODE": "1", "GBS": "2", "LORA_RANK": "4", "LOG_DIR": str(tmp_path / "logs")}
    first, second = str(tmp_path / "a lora"), str(tmp_path / "another")
    ran = run("14B/pretrain_lora.sh", cwd=tmp_path, TRAIN_ITERS="2", **{**settings, "SAVE_PATH": first})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"\brank 4 on the branch\b", ran.stdout)
    again = {**settings, "SAVE_PATH": first, "LOAD": first}
    ran = run("1.3B/pretrain_lora.sh", cwd=tmp_path, TRAIN_ITERS="3", **again)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " iteration        3/" in ran.stdout
    more = {**settings, "SAVE_PATH": second, "LORA_INIT_FROM": first, "EXPERT": "high"}
    ran = run("A14B_wan2.2/pretrain_lora.sh", cwd=tmp_path, TRAIN_ITERS="1", **more)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "continues from" in ran.stdout
    names = read_dcp(tmp_path / "another/iter_0000001")["model"]
    assert names
    assert all("lora_" in name for name in _flat(names))


def _flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        name
        for key, value in values.items()
        for name in (_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
    ]


def test_recipe_is_the_guides() -> None:
    job = json.loads(run("14B/pretrain_fsdp.sh", "--print-config").stdout)
    optimizer = job["training"]["optimizer"]
    recipe = {
        "lr": 5e-5,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-5,
        "clip_grad": 1.0,
    }
    assert {name: optimizer[name] for name in recipe} == recipe
    assert optimizer["lr_decay_style"] == "constant"
    assert job["training"]["batch"]["global_batch_size"] == 8


def test_a14b_script_asks_for_the_expert() -> None:
    ran = run("A14B_wan2.2/pretrain_fsdp.sh", "--dry-run")
    assert ran.returncode != 0
    assert names(ran.stderr, "EXPERT", "high", "low")
    assert '"expert": "low"' in run("A14B_wan2.2/pretrain_fsdp.sh", "--print-config", EXPERT="low").stdout


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--lerning-rate=1"], ["unknown argument '--lerning-rate'"]),
        (["--mm-model=/no/such.json"], ["/no/such.json: ", "(working directory {cwd})"]),
        ([], ["data_path: ./vace_features/data.jsonl not found"]),
    ],
)
def test_mistake_is_one_line_and_exit_code_one(tmp_path: Path, flags: list[str], facts: list[str]) -> None:
    ran = run("14B/pretrain_fsdp.sh", *flags, cwd=tmp_path, SAVE_PATH=str(tmp_path / "save"))
    assert ran.returncode == 1
    assert [fact for fact in facts if fact.format(cwd=tmp_path) not in ran.stderr] == []
    assert len(ran.stderr.strip().splitlines()) == 1
    assert ran.stdout == ""
    assert not (tmp_path / "save").exists()


def test_training_works_in_a_folder_with_spaces(tiny: dict[str, str], tmp_path: Path) -> None:
    ran = run(
        "14B/pretrain_fsdp.sh", cwd=tmp_path, NPUS_PER_NODE="1", TRAIN_ITERS="3", GBS="2", LR="1e-3", **tiny
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = ran.stdout.strip().splitlines()[-1]
    said = re.fullmatch(r"Elapsed Time Per iteration: ([0-9.]+), Average Samples per Second: ([0-9.]+)", last)
    assert said
    times = [float(ms) for ms in re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", ran.stdout)]
    assert len(times) == 3
    assert float(said[1]) == pytest.approx(sum(times) / 3, abs=0.1)
    assert float(said[2]) == pytest.approx(2000 / float(said[1]), abs=0.001)
    save = Path(tiny["SAVE_PATH"])
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    assert (save / "iter_0000003/.metadata").is_file()
    assert len((save / "metrics.jsonl").read_text().splitlines()) == 3
    assert json.loads((save / "job.json").read_text())["training"]["batch"]["train_iters"] == 3


def test_error_on_ranks_is_one_line_and_fails_the_script(tiny: dict[str, str], tmp_path: Path) -> None:
    values = json.loads(Path(tiny["MM_MODEL"]).read_text())
    values["predictor"]["ffn_dim"] = 192
    (tmp_path / "model.json").write_text(json.dumps(values))
    files = {**tiny, "MM_MODEL": str(tmp_path / "model.json"), "LOG_DIR": str(tmp_path / "logs")}
    files["SAVE_PATH"] = str(tmp_path / "save")
    ran = run("14B/pretrain_fsdp.sh", cwd=tmp_path, NPUS_PER_NODE="2", TRAIN_ITERS="3", **files)
    assert ran.returncode != 0
    errors = [line for line in ran.stdout.splitlines() if "ConfigError" in line]
    assert len(errors) == 1
    assert "ffn" in errors[0]
    assert "Traceback" not in ran.stdout
    assert "Elapsed Time" not in ran.stdout
    (log,) = (tmp_path / "logs").iterdir()
    assert log.read_text().count("ConfigError") == 2  # what every rank said


@pytest.mark.slow
def test_sigterm_to_the_script_saves_and_leaves_no_process(tiny: dict[str, str], tmp_path: Path) -> None:
    files = {**tiny, "SAVE_PATH": str(tmp_path / "save"), "LOG_DIR": str(tmp_path / "logs")}
    settings = {
        "NPUS_PER_NODE": "2",
        "TRAIN_ITERS": "100000",
        "SAVE_INTERVAL": "100000",
        "MASTER_PORT": free_port(),
    }
    script = subprocess.Popen(
        ["bash", str(VACE / "14B/pretrain_fsdp.sh")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings, **files},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert script.stdout is not None
        job, said = [], []
        for line in script.stdout:
            said.append(line)
            if " iteration        2/" in line:
                job = family(script.pid)
                script.send_signal(signal.SIGTERM)  # to the script alone, as `kill` does
        script.wait(60)
    finally:
        script.kill()
    assert len(job) > 2, "".join(said)
    assert not alive(job)
    assert script.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in "".join(said)
    number = int((tmp_path / "save/latest_checkpointed_iteration.txt").read_text())
    assert 2 <= number < 100000
    assert (tmp_path / f"save/iter_{number:07d}/.metadata").is_file()


def test_hanging_script_is_ended_with_its_sessions(tmp_path: Path) -> None:
    started = tmp_path / "started"
    command = ["bash", "-c", f"setsid bash -c 'echo $$ >{started}; exec sleep 60' & wait"]
    with pytest.raises(subprocess.TimeoutExpired):
        ended(command, cwd=tmp_path, env={}, seconds=3)
    assert not alive([int(started.read_text())])


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("NPUS_PER_NODE", "PATH[$(touch ran)]", 1),
        ("NNODES", "a[$(touch ran)]", 1),
        ("NODE_RANK", "-1", 0),
        ("TP", "0", 1),
        ("PP", "abc", 1),
        ("CP", "1+1", 1),
        ("MBS", "1.5", 1),
        ("GRAD_ACC_STEP", "99999999999999999999", 1),
        ("GBS", "a[$(touch ran)]", 0),
        ("MASTER_PORT", "x", 0),
    ],
)
def test_number_of_the_scripts_is_checked_first(tmp_path: Path, name: str, value: str, least: int) -> None:
    ran = run("14B/pretrain_fsdp.sh", "--dry-run", cwd=tmp_path, **{name: value})
    assert ran.returncode == 1
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert f"{name}='{value}'" in line
    assert names(line, f"from {least} up")
    assert not (tmp_path / "ran").exists()


def test_leading_zero_is_not_an_octal_number() -> None:
    ran = run("14B/pretrain_fsdp.sh", "--print-config", NPUS_PER_NODE="08", CP="2")
    assert ran.returncode == 0, ran.stderr
    assert '"world_size": 8' in ran.stdout


@pytest.mark.slow
def test_port_in_use_is_one_line(tiny: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        files = {**tiny, "LOG_DIR": str(tmp_path / "logs"), "SAVE_PATH": str(tmp_path / "save")}
        ran = run(
            "14B/pretrain_fsdp.sh",
            cwd=tmp_path,
            NPUS_PER_NODE="1",
            TRAIN_ITERS="1",
            MASTER_PORT=port,
            **files,
        )
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert f"MASTER_PORT={port}" in line
    assert "Elapsed" not in ran.stdout
