"""Two torchrun agents on one machine, as two nodes: they meet over loopback and train as one job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.jobs import Setup, train
from tests.support.runs import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.launch import launch
from tests.distributed.jobs import Setup, train
with launch(Accelerator.detect("cpu")):
    losses, weights = train(Setup(fsdp={"sharding_size": 1}), 2, batch=2)
    if weights:
        open(sys.argv[1], "w").write(json.dumps(losses))
"""


def test_two_nodes_train_together(world, tmp_path):
    wanted, _ = world.run(1, train, Setup(), 2, 2)[0]
    script, out = tmp_path / "node.py", tmp_path / "losses.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [*command, "--node-rank", str(rank), str(script), str(out)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert json.loads(out.read_text()) == pytest.approx(wanted, abs=1e-6)
