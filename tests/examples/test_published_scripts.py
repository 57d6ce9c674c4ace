"""An unmodified script in MindSpeed-MM's style, with its flags, keys and variables, trains a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.house.test_flags_published import COMMON_ARGS, DATA, MODELS, TOOLS, YAMLS
from tests.support.ranks import run_ranks
from tests.support.runs import ended, free_port, make_run, write_json
from tests.support.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = {
    "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
    "ASCEND_GLOBAL_LOG_LEVEL": "3",
    "TASK_QUEUE_ENABLE": "2",
    "COMBINED_ENABLE": "1",
    "CPU_AFFINITY_CONF": "1",
    "HCCL_CONNECT_TIMEOUT": "1200",
    "NPU_ASD_ENABLE": "0",
    "ASCEND_LAUNCH_BLOCKING": "0",
    "ACLNN_CACHE_LIMIT": "100000",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_DEVICE_MAX_CONNECTIONS": "2",
}
SCRIPT = """
torchrun --nproc_per_node 2 --nnodes 1 --node_rank 0 --master_addr localhost --master_port "$PORT" \
    pretrain_sora.py "$@" 2>&1 | tee "$LOG_FILE"
grep -o 'elapsed time per iteration (ms): [0-9.]*' "$LOG_FILE" | tail -n 1 |
    awk -F ': ' '{print "Elapsed Time", $2}'
"""


def tiny_model(name: str, weights: str) -> dict[str, Any]:
    """A published model JSON, key by key, in tiny sizes."""
    values: dict[str, Any] = json.loads(json.dumps(MODELS[name]))
    trunk = TINY.trunk.model_dump(mode="json")
    predictor, branch = values["predictor"], values["predictor"]["vace_dit"]
    for part in (predictor, branch):
        part.update({name: trunk[name] for name in trunk if name in part and name != "in_dim"})
        part.pop("pipeline_num_layers")
    predictor.update({"from_pretrained": weights, "num_layers": TINY.trunk.num_layers})
    branch["vace_layers"] = list(TINY.vace_layers)
    return values


def published_flags(folder: Path, name: str) -> list[str]:
    """The flags of a published script, with tiny sizes and with its files under `folder`."""
    run = make_run(folder / "run")
    data = json.loads(json.dumps(DATA))
    data["dataset_param"]["basic_parameters"] = json.loads(Path(run["MM_DATA"]).read_text())["dataset_param"][
        "basic_parameters"
    ]
    files = {
        "--mm-data": write_json(folder / "data.json", data),
        "--mm-model": write_json(folder / "model.json", tiny_model(name, str(folder / "run/weights"))),
        "--mm-tool": write_json(folder / "tools.json", TOOLS),
        "--fsdp2-config-path": folder / "fsdp2_config.yaml",
    }
    sharding = {**yaml.safe_load(YAMLS["patterns"]), "sharding_size": 2}
    files["--fsdp2-config-path"].write_text(yaml.safe_dump(sharding))
    flags = list(COMMON_ARGS)
    smaller = {
        "--train-iters": "2",
        "--global-batch-size": "2",
        "--num-workers": "0",
        "--save": str(folder / "save"),
    }
    for flag, value in smaller.items():
        flags[flags.index(flag) + 1] = value
    return [*flags, "--bf16", *(str(part) for item in files.items() for part in item)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_script_of_mindspeed_mm_trains_unchanged(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = published_flags(tmp_path, name)
    if name == "14B":  # the others as the ranks that torchrun starts
        (tmp_path / "pretrain.sh").write_text(SCRIPT)
        settings = {"PORT": free_port(), "LOG_FILE": str(tmp_path / "train.log"), "OMP_NUM_THREADS": "1"}
        done = ended(
            ["bash", str(tmp_path / "pretrain.sh"), *flags],
            cwd=ROOT,
            env={**VARIABLES, **settings, "MINDSPEED_MM_DEVICE": "cpu"},
            seconds=240,
        )
        printed, errors = done.stdout, done.stderr
        assert re.search(r"Elapsed Time \d+\.\d", printed), printed + errors
    else:
        for variable, value in VARIABLES.items():
            monkeypatch.setenv(variable, value)
        ran = run_ranks("mindspeed_mm.tasks.pretrain", flags, tmp_path / "printed", seconds=240)
        assert ran.returncodes == [0, 0], ran.stdout + ran.stderr
        printed, errors = ran.stdout, ran.stderr
    assert re.search(r"iteration +2/ +2 \|", printed), printed + errors
    assert (tmp_path / "save/latest_checkpointed_iteration.txt").read_text().strip() == "2"
