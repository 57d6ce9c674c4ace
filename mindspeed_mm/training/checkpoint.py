"""Saves and loads training checkpoints.

A checkpoint is a torch.distributed.checkpoint folder whose keys are MM names. It is written under a temporary
name and then renamed. The tracker file is updated last.

SAVE/latest_checkpointed_iteration.txt · SAVE/iter_0000010/{.metadata, __R_N.distcp, job.json}
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor

from megatron.mm.layout import (
    REPLACED,
    WRITING,
    is_half_written,
    iteration_folder,
    iteration_name,
    restore_replaced,
    saved_iterations,
    write_tracker,
)
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.config.schema import Config
from mindspeed_mm.distributed.pipeline import own_names, whole_model
from mindspeed_mm.distributed.rng import rng_state
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import format_json
from mindspeed_mm.leftovers import sweep
from mindspeed_mm.locks import is_in_use
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.containers.checksums import verifying
from mindspeed_mm.models.keymap import KeyMap
from mindspeed_mm.models.lora.saved import ENTRY, theirs_of
from mindspeed_mm.models.transforms.lora import lora_scales
from mindspeed_mm.models.transforms.quantize import describe_quantized
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.training.build import fill_parameters
from mindspeed_mm.training.checkpoint_checks import QUANTIZED, BaseReference
from mindspeed_mm.training.checkpoint_files import ChecksumWriter, reason_of
from mindspeed_mm.training.checkpoint_folder import BEST, Best, folder_to_load, read_best, write_best
from mindspeed_mm.training.checkpoint_read import load_checkpoint, mm_names
from mindspeed_mm.training.config import CheckpointConfig
from mindspeed_mm.training.state import (
    TrainState,
    group_steps,
    optimizer_state,
    pack,
)

logger = get_logger(__name__)


class Checkpointer:
    """Saves and loads the checkpoints of one run. All ranks must call each method together."""

    def __init__(
        self,
        config: CheckpointConfig,
        accelerator: Accelerator,
        key_map: KeyMap,
        *,
        base: BaseReference | None,
        job_json: str,
    ) -> None:
        self.config, self.accelerator, self.key_map = config, accelerator, key_map
        self.base, self.job_json = base, job_json
        # A separate group, because collectives of a background save must not mix with those of training.
        self.group = dist.new_group(backend="gloo") if config.async_save else None
        self.pending: Future[Any] | None = None
        self.pending_at = 0
        self.pending_best: Best | None = None

    def save(self, state: TrainState, best: Best | None = None) -> int | None:
        """Save one checkpoint, or start saving it with --async-save.

        Pass `best` if this iteration has the lowest held-out loss so far. This checkpoint is then kept, and
        the previous best is removed unless it was also saved for another reason.

        Returns the iteration whose save this call completed, if any. Raises WeightsError if the checkpoint
        cannot be written; earlier checkpoints are unchanged.
        """
        completed = self.wait()
        root = Path(self.config.save or "")
        self._on_first_rank(root, lambda: self._prepare(root, state.iteration))
        temporary, content = _temporary(root, state.iteration), self._content(state)
        if self.group is None:
            writer = ChecksumWriter(temporary, state.iteration)
            self._write(root, state.iteration, lambda: save(content, storage_writer=writer))
            self._on_first_rank(root, lambda: self._finish(root, state.iteration, best))
            return state.iteration
        staged = _detach(content) if self.accelerator.kind == "cpu" else content
        writer = ChecksumWriter(temporary, state.iteration)
        future = async_save(staged, storage_writer=writer, process_group=self.group)
        self.pending = future if isinstance(future, Future) else future.upload_completion
        self.pending_at, self.pending_best = state.iteration, best
        return completed

    def wait(self) -> int | None:
        """Finish the background save and return its iteration, or None if there is none.

        Call this method before the process ends.
        """
        if self.pending is None:
            return None
        pending, self.pending = self.pending, None
        root = Path(self.config.save or "")
        self._write(root, self.pending_at, pending.result)
        self._on_first_rank(root, lambda: self._finish(root, self.pending_at, self.pending_best))
        return self.pending_at

    def poll(self) -> int | None:
        """Publish a background save that all ranks have finished, and return its iteration.

        Call this method between iterations. It costs almost nothing when no save is pending.
        """
        return self.wait() if self.pending is not None and _all_true(self.pending.done()) else None

    def load(self, state: TrainState) -> bool:
        """Load the checkpoint of --load into `state`, and return whether there was one.

        Raises WeightsError if the checkpoint cannot be used.
        """
        if self.config.load is not None:
            root = Path(self.config.load)
            # A run that is saving to this folder renames its temporary folders itself.
            self._on_first_rank(root, lambda: None if is_in_use(root) else restore_replaced(root))
        folder = folder_to_load(self.config)
        if folder is None:
            return False
        with verifying(not self.config.no_verify_checksums):
            if (folder / ".metadata").is_file():
                load_checkpoint(folder, state, self.config, self.accelerator, self.key_map, self.base)
            else:  # `release`: converted weights without training state
                fill_parameters(state.model, open_weights(folder), seed=0)
        logger.info(f"loaded {folder} at iteration {state.iteration}")
        return True

    def _content(self, state: TrainState) -> dict[str, Any]:
        names = mm_names(state.model, self.key_map)
        own = {theirs_of(self.key_map, name) for name in own_names(state.model)}
        kept = {
            name: parameter.detach()
            for parameter, name in names.items()
            if name in own and (parameter.requires_grad or self.config.save_full_model or self.base is None)
        }
        content: dict[str, Any] = {
            "model": kept,
            "iteration": torch.tensor(state.iteration),
            "sampler": {"consumed_samples": torch.tensor(state.consumed_samples)},
        }
        if len(kept) < len(own) and self.base is not None:
            content["base"] = self.base.entry()
        if isinstance(config := getattr(state.model, "config", None), Config):
            content["config"] = config.model_dump_json()  # shapes alone do not determine the number of heads
        if scales := lora_scales(whole_model(state.model)):
            content[ENTRY] = format_json({"type": "lora", "scales": scales})
        if rounded := describe_quantized(whole_model(state.model)):
            content[QUANTIZED] = rounded
        content["skips"] = pack(asdict(state.skips))
        means = sorted((band, *mean) for band, mean in state.loss_means.items())
        content["loss_means"] = {f"rank_{dist.get_rank():05d}": pack(means)}
        if state.hooks:
            content["hooks"] = {f"rank_{dist.get_rank():05d}": pack(state.hooks)}
        if not self.config.no_save_optim:
            content["optimizer"] = {
                "state": {
                    name: moments
                    for name, moments in optimizer_state(state.optimizer, names).items()
                    if name in own
                },
                "group_steps": pack(group_steps(state.optimizer)),
            }
            content["schedule"] = pack(state.scheduler.state_dict())
        if not self.config.no_save_rng:
            content["rng"] = {f"rank_{dist.get_rank():05d}": rng_state(self.accelerator)}
        return content

    def _prepare(self, root: Path, iteration: int) -> None:
        root.mkdir(parents=True, exist_ok=True)
        restore_replaced(root)
        sweep([root], more=is_half_written)
        temporary = _temporary(root, iteration)
        temporary.mkdir()
        (temporary / "job.json").write_text(self.job_json + "\n", encoding="utf-8")

    def _write(self, root: Path, iteration: int, write: Any) -> None:
        try:
            write()
        except (CheckpointException, OSError, RuntimeError) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(_temporary(root, iteration), ignore_errors=True)
            raise WeightsError(
                f"could not be written: {reason_of(error)}; earlier checkpoints are unchanged",
                where=iteration_folder(root, iteration),
                fix="free space or choose another --save, then resume with --load",
            ) from error

    def _finish(self, root: Path, iteration: int, best: Best | None) -> None:
        target = iteration_folder(root, iteration)
        replaced = root / f"{REPLACED}{target.name}"
        if target.exists():
            # A rename cannot replace a folder. If the run is killed here, restore_replaced undoes this.
            target.rename(replaced)
        _temporary(root, iteration).rename(target)
        write_tracker(root, iteration)
        shutil.rmtree(replaced, ignore_errors=True)
        before = read_best(root)
        if best is not None:
            write_best(root, best)
            if before is not None and before.alone and before.iteration < iteration:
                shutil.rmtree(iteration_folder(root, before.iteration))
            logger.info(
                f"lowest held-out loss so far: {best.loss:.6E}; {root / BEST} names iteration {iteration}"
            )
        kept = best or before
        interval = self.config.save_retain_interval
        for old in saved_iterations(root) if interval else ():
            if interval and old % interval and old < iteration and (kept is None or old != kept.iteration):
                shutil.rmtree(iteration_folder(root, old))
        logger.info(f"saved {target}")

    def _on_first_rank(self, root: Path, work: Any) -> None:
        """Run `work` on rank 0 while the other ranks wait. Raises WeightsError on all ranks if it fails."""
        problem: list[str] = [""]
        if dist.get_rank() == 0:
            try:
                work()
            except OSError as error:
                problem = [f"cannot be written: {error.strerror or error}"]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise WeightsError(problem[0], where=root, fix="free space or choose another --save")


def _detach(value: Any) -> Any:
    """Copy the tensors in `value`, so that training cannot change them while they are written."""
    if isinstance(value, dict):
        return {key: _detach(item) for key, item in value.items()}
    return value.detach().clone() if isinstance(value, (Tensor, DTensor)) else value


def _temporary(root: Path, iteration: int) -> Path:
    return root / f"{WRITING}{iteration_name(iteration)}"


def _all_true(value: bool) -> bool:
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)  # over the default group, because the save's group is busy
    return bool(flag)
