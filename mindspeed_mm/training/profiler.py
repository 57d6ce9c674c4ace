"""Records traces of a few iterations, as set in tools.json or with --profile.

Uses torch's profiler, or that of torch_npu on an NPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.log import get_logger
from mindspeed_mm.training.config import ProfileConfig
from mindspeed_mm.training.tools_config import MemoryProfile, ToolsConfig

logger = get_logger(__name__)


def build_observer(
    tools: ToolsConfig, flags: ProfileConfig, device: torch.device, rank: int
) -> Callable[[int], None]:
    """Return a function to call with each finished iteration. It does nothing on ranks that do not record."""
    watchers = [_trace(tools, flags, device, rank), _memory(tools.memory_profile, device, rank)]
    active = [watcher for watcher in watchers if watcher is not None]

    def observe(iteration: int) -> None:
        for watcher in active:
            watcher(iteration)

    observe(0)
    return observe


def _trace(
    tools: ToolsConfig, flags: ProfileConfig, device: torch.device, rank: int
) -> Callable[[int], None] | None:
    by_file, by_flag = tools.profile.enable, flags.profile
    ranks = tools.profile.ranks if by_file and not by_flag else flags.profile_ranks
    if not (by_file or by_flag) or (rank not in ranks and -1 not in ranks):
        return None
    param = tools.profile.static_param
    start, end = (
        (flags.profile_step_start, flags.profile_step_end) if by_flag else (param.start_step, param.end_step)
    )
    recorder = _recorder(tools, device, rank)

    first = max(start - 1, 0)  # number of finished iterations when recording starts
    last = max(end - 1, first + 1)

    def watch(done: int) -> None:
        if done == first:
            recorder.start()
        elif done == last:
            recorder.stop()
            logger.warning(
                f"trace of iterations {first + 1} to {last} on rank {rank} is in {param.save_path}"
            )

    return watch


def _recorder(tools: ToolsConfig, device: torch.device, rank: int) -> Any:
    """Return the device's profiler, which writes to save_path when it stops."""
    param = tools.profile.static_param
    folder = Path(param.save_path)
    common: dict[str, Any] = {
        "with_stack": param.with_stack,
        "profile_memory": param.with_memory,
        "record_shapes": param.record_shapes,
    }
    if device.type == "npu":
        npu = import_module("torch_npu.profiler")
        extra = npu._ExperimentalConfig(
            profiler_level=getattr(npu.ProfilerLevel, param.level.capitalize()),
            aic_metrics=getattr(npu.AiCMetrics, param.aic_metrics_type),
            data_simplification=param.data_simplification,
        )
        activities = [npu.ProfilerActivity.NPU, *([npu.ProfilerActivity.CPU] if param.with_cpu else [])]
        handler = npu.tensorboard_trace_handler(str(folder))
        return npu.profile(activities=activities, on_trace_ready=handler, experimental_config=extra, **common)
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] if param.with_cpu or device.type == "cpu" else []
    if device.type == "cuda":
        activities.append(kinds.CUDA)
    handler = torch.profiler.tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}")
    return torch.profiler.profile(activities=activities, on_trace_ready=handler, **common)


def _memory(config: MemoryProfile, device: torch.device, rank: int) -> Callable[[int], None] | None:
    if not config.enable or rank not in config.dump_ranks:
        return None
    if device.type == "cpu":
        logger.warning("memory_profile: a cpu has no allocator to record; nothing is written")
        return None
    memory = torch.get_device_module(device).memory

    def watch(done: int) -> None:
        if done == config.start_step:
            limits = {"max_entries": config.max_entries} if config.max_entries else {}
            memory._record_memory_history(stacks=config.stacks, **limits)
        elif done == config.end_step:
            folder = Path(config.save_path)
            folder.mkdir(parents=True, exist_ok=True)
            memory._dump_snapshot(str(folder / f"memory_rank{rank}.pickle"))
            memory._record_memory_history(enabled=None)
            logger.warning(f"memory snapshot of iterations {config.start_step} to {done} is in {folder}")

    return watch
