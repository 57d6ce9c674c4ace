"""`--nproc N`: starts the processes of a run as the scripts do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from mindspeed_mm.config.schema import Config
from mindspeed_mm.log import one_line_errors

# Defaults, as exported by examples/vace/common.sh.
ENVIRONMENT: Mapping[str, str] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "2",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
ASCEND: Mapping[str, str] = {
    "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
    "ASCEND_GLOBAL_LOG_LEVEL": "3",
    "TASK_QUEUE_ENABLE": "2",
    "COMBINED_ENABLE": "1",
    "CPU_AFFINITY_CONF": "1",
    "HCCL_CONNECT_TIMEOUT": "1200",
    "NPU_ASD_ENABLE": "0",
    "ASCEND_LAUNCH_BLOCKING": "0",
    "ACLNN_CACHE_LIMIT": "100000",
}


class RankConfig(Config):
    """The processes of a run and the address of their rendezvous."""

    nproc: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="number of processes on this machine, one per device (default: only this one)",
    )
    nnodes: int = Field(
        default=1, ge=1, le=65536, description="number of machines; run the same command on each"
    )
    node_rank: int = Field(default=0, ge=0, le=65535, description="index of this machine, from 0")
    master_addr: str = Field(default="localhost", description="address of machine 0")
    master_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port of machine 0 (default: a free one on one machine, 6000 on several)",
    )
    log_dir: str = Field(default="logs", description="folder of the log with the output of all processes")

    @property
    def world(self) -> int:
        """The number of processes on all machines."""
        return (self.nproc or 1) * self.nnodes


@dataclass(frozen=True)
class Launch:
    """How the launcher starts a task."""

    check: str  # extra flags for the process that checks the job first
    show_check: bool = False
    rank_flags: str = ""
    # (arguments, ranks) → global batch size, for reporting the speed.
    batch: Callable[[Sequence[str], int], int] | None = None


def check_here(ranks: RankConfig) -> None:
    """Make this process check the job on behalf of all ranks."""
    os.environ["WORLD_SIZE"] = str(ranks.world)


def start_ranks(verb: str, launch: Launch, ranks: RankConfig, argv: Sequence[str]) -> None:
    """Check the job once, run it on every rank, and exit with the exit code of the run."""
    from mindspeed_mm.tools.launch import main

    ascend = ASCEND if "ASCEND_HOME_PATH" in os.environ else {}
    for name, value in {**ENVIRONMENT, **ascend}.items():
        os.environ.setdefault(name, value)
    check_here(ranks)
    port = ranks.master_port if ranks.master_port is not None else (6000 if ranks.nnodes > 1 else 0)
    options = [
        f"--nproc_per_node={ranks.nproc}",
        f"--nnodes={ranks.nnodes}",
        f"--node_rank={ranks.node_rank}",
    ]
    options += [f"--master_addr={ranks.master_addr}", f"--master_port={port}"]
    options += [f"--log_dir={ranks.log_dir}", f"--name={verb}", f"--check={launch.check}"]
    options += [f"--rank_flags={launch.rank_flags}", *(["--show_check"] if launch.show_check else [])]
    if launch.batch:
        options.append(f"--report_batch={one_line_errors(launch.batch)(argv, ranks.world)}")
    main([*options, str(Path(__file__).with_name("__main__.py")), verb, *argv])
