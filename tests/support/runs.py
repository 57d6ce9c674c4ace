"""A folder with everything that a tiny training job names: weights, features, JSONs, YAML."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.data.features import write_feature, write_null_prompt
from mindspeed_mm.models.wan.config import VaceConfig
from tests.support.loops import Records, random_records
from tests.support.tiny import TINY, tiny_transformer, write_transformer


def predictor_json(config: VaceConfig = TINY, **changes: Any) -> dict[str, Any]:
    """`predictor` of a model JSON with these sizes."""
    branch = {
        "in_dim": config.vace_in_dim,
        "vace_layers": list(config.vace_layers),
        **changes.pop("vace_dit", {}),
    }
    return {
        "model_id": "vace",
        "dtype": "fp32",
        **config.trunk.model_dump(mode="json"),
        "vace_dit": branch,
        **changes,
    }


def write_json(path: Path, values: Any) -> Path:
    """Write and name a JSON file."""
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def write_features(folder: Path, records: Records) -> Path:
    """Write feature files and their data.jsonl. Return the list."""
    rows = []
    for record in records:
        write_feature(folder / "features" / f"{record.key}.safetensors", record, {})
        rows.append({"file": f"{record.key}.safetensors"})
    write_null_prompt(folder / "null_prompt.safetensors", torch.ones(1, TINY.trunk.text_dim), "tiny")
    listing = folder / "data.jsonl"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return listing


def make_run(
    root: Path, *, dtype: str = "fp32", clips: int = 6, predictor: dict[str, Any] | None = None
) -> dict[str, str]:
    """Write all files under `root`. Return the environment variables that the training scripts read."""
    root.mkdir(parents=True, exist_ok=True)
    write_transformer(root / "weights", tiny_transformer(), torch.float32)
    listing = write_features(root / "features of a run", random_records(clips, ((3, 4, 6), (2, 6, 4))))
    basic = {"data_path": str(listing), "data_folder": str(listing.parent)}
    data = {"dataset_param": {"dataset_type": "feature", "basic_parameters": basic, "validation": basic}}
    given = {"from_pretrained": str(root / "weights"), "dtype": dtype, **(predictor or {})}
    sizes = predictor_json(**given)
    yaml = root / "fsdp2.yaml"
    yaml.write_text(
        "sharding_size: auto\nsub_modules_to_wrap: ['blocks.{*}', 'vace_blocks.{*}']\nparam_dtype: "
        f"{dtype}\n"
    )
    return {
        "MM_DATA": str(write_json(root / "feature_data.json", data)),
        "MM_MODEL": str(write_json(root / "pretrain_model.json", {"task": "vace", "predictor": sizes})),
        "FSDP2_CONFIG": str(yaml),
        "SAVE_PATH": str(root / "save"),
        "LOG_DIR": str(root / "logs"),
        "NUM_WORKERS": "0",
    }


def train_job(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Run the job of `argv` on this rank of a process group. Return the rows of its metrics.jsonl."""
    from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
    from mindspeed_mm.tasks.pretrain import run
    from tests.support.loops import CPU

    job = PretrainJob.from_argv(argv)
    run(job, CPU)
    metrics = Path(str(job.training.checkpoint.save)) / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def arguments(environment: dict[str, str], *more: str, **flags: Any) -> list[str]:
    """The flags of a short run on `make_run`'s files; `micro_batch_size=2` becomes `--micro-batch-size 2`."""
    given = {
        "mm_data": environment["MM_DATA"],
        "mm_model": environment["MM_MODEL"],
        "fsdp2_config_path": environment["FSDP2_CONFIG"],
        "save": environment["SAVE_PATH"],
        "global_batch_size": 4,
        "train_iters": 5,
        "num_workers": 0,
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "log_interval": 1,
        **flags,
    }
    return [*(f"--{name.replace('_', '-')}={value}" for name, value in given.items()), *more]


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ended(
    command: Sequence[str], *, cwd: Path, env: dict[str, str], seconds: float = 600
) -> subprocess.CompletedProcess[str]:
    """A command run to its end.

    If it hangs, all that descend from it are killed: torchrun's ranks are in sessions of their own.
    """
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        printed, errors = process.communicate(timeout=seconds)
    except BaseException:
        for pid in family(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)


def family(pid: int) -> list[int]:
    """A process and all that descend from it, as a scheduler that ends a job would find them."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, found.splitlines())}
    members = [pid] if pid in parents else []
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members


def alive(pids: Sequence[int], seconds: float = 20.0) -> list[int]:
    """Those of the processes that still run after a while.

    Zombies do not count.
    """
    deadline = time.monotonic() + seconds
    while (found := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
