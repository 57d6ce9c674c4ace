"""Writes a target to a hidden folder, reads it back, and moves it into place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.config import ConvertConfig, DcpToTorchConfig, ExtractLoraConfig, LoraToConfig
from checkpoint.layout import check_space, replace_entries, replace_file, staging, writing
from checkpoint.target import Target
from megatron.mm.layout import RELEASE, write_tracker
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import format_json, write_text
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.containers.checksums import verifying
from mindspeed_mm.models.containers.safetensors import write_safetensors
from mindspeed_mm.models.containers.tensors import HEAD_BYTES, TensorFile
from mindspeed_mm.models.containers.torch_file import write_torch
from mindspeed_mm.models.finite import FiniteWeights
from mindspeed_mm.models.source import WeightsSource, differences
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.processes import deferred
from mindspeed_mm.progress import Progress, size_text

logger = get_logger(__name__)
Written = Callable[[int], object]
AnyConfig = ConvertConfig | DcpToTorchConfig | LoraToConfig | ExtractLoraConfig


def write_and_replace(
    target: Target,
    tensors: Sequence[TensorFile],
    check: Callable[[Path, Written], None],
    cfg: AnyConfig,
    method: str,
) -> None:
    """Write `target`, which contains `tensors`, call `check` on the result, and move it into place.

    Raises WeightsError, also for weights with NaN or Inf (after all weights have been read) unless
    `cfg.allow_nonfinite` is set. With `cfg.dry_run`, only checks the free disk space.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    shown = target.path
    name = target.name or "folder"
    if cfg.dry_run:
        check_space(target.folder, total)
        logger.info(f"{shown}: {len(tensors)} tensors, {size_text(total)} would be written")
        return
    with writing(shown), staging(target.folder, name, owned=target.owned, last=target.last) as place:
        check_space(target.folder, total)
        new = place / "new"
        new.mkdir()
        with Progress(f"writing {shown}", total, "B") as progress:
            write_finite(new, target, cfg.source_path, cfg.allow_nonfinite, progress.step)
        with Progress(f"checking {shown}", total, "B") as progress:
            check(new / target.name if target.name else new, progress.step)
        with deferred():  # a signal must not interrupt the replacement
            if target.name:
                for text in target.texts:
                    replace_file(new / text, target.folder / text)
                replace_file(new / target.name, target.folder / target.name)
            else:
                replace_entries(new, place, target.folder, target.owned, last=target.last)
            if target.tracker:
                write_tracker(target.folder, RELEASE)
        if target.tracker:  # only MM folders get a job.json
            job = {"method": method, **cfg.model_dump(mode="json")}
            write_text(target.folder / "job.json", format_json(job, indent=2) + "\n")
    logger.info(f"{shown}: {len(tensors)} tensors, {size_text(total)}")


def write_finite(
    new: Path, target: Target, where: str, allow: bool, written: Written = lambda nbytes: None
) -> None:
    """Write the files like `write`, and check that all weights are finite.

    Raises WeightsError that names the weights of `where` with NaN or Inf. `allow` logs a warning instead.
    """
    finite = FiniteWeights(where)

    def checked(value: Any, name: str) -> Any:
        if isinstance(value, TensorFile):
            return replace(value, read=partial(_read_checked, value, name, finite), raw=None)
        if isinstance(value, Mapping):
            return {
                key: checked(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()
            }
        return value

    torch_files = {path: checked(state, "") for path, state in target.torch_files.items()}
    safetensors = {path: checked(state, "") for path, state in target.safetensors.items()}
    write(new, replace(target, torch_files=torch_files, safetensors=safetensors), written)
    if allow and finite.problem:
        logger.warning(f"{where}: {finite.problem}; converted anyway")
    elif finite.problem:
        finite.raise_if_nonfinite("download the source again, or allow this with --cfg.allow_nonfinite true")


def _read_checked(tensor: TensorFile, name: str, finite: FiniteWeights) -> Tensor:
    values = tensor.read()
    finite.check(name, values)
    return values


def write(new: Path, target: Target, written: Written = lambda nbytes: None) -> None:
    """Stream the files of `target` into the folder `new`.

    Raises OSError if the disk is full or cannot be written.
    """
    for name, text in target.texts.items():
        _at(new, name).write_text(text, encoding="utf-8")
    for name, state in target.torch_files.items():
        write_torch(_at(new, name), state, written=written)
    for name, tensors in target.safetensors.items():
        write_safetensors(_at(new, name), tensors, written=written, metadata=target.metadata)


def _at(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_back(
    path: Path,
    source: WeightsSource,
    bits: bool,
    seen: Written = lambda nbytes: None,
    *,
    opener: Callable[[Path], WeightsSource] = open_weights,
) -> None:
    """Raise WeightsError unless the weights at `path` are those of `source`.

    Without `bits`, compares only the first 64 KiB of each weight.
    """
    with verifying(bits):  # checksums would read the whole files
        written = opener(path)
        problems = differences(written.shapes, source.shapes)
        if problems or written.dtypes != source.dtypes:
            raise WeightsError(
                f"was not written as planned: {problems or 'dtypes differ'}",
                where=path,
                fix="report this as a bug",
            )
        for name, tensor in source.tensors.items():
            check_same(path, name, tensor, written.tensors[name], bits)
            seen(tensor.nbytes)


def check_same(path: Path, name: str, tensor: TensorFile, written: TensorFile, bits: bool) -> None:
    """Raise WeightsError unless `written`, at `path`, equals `tensor`: its first 64 KiB, or all `bits`."""
    if not _same(tensor.read(), written.read(), None if bits else HEAD_BYTES // tensor.dtype.itemsize):
        raise WeightsError(
            f"{name} reads back with different values", where=path, fix="check the disk and convert again"
        )


def _same(a: Tensor, b: Tensor, count: int | None) -> bool:
    first, second = (t.reshape(-1)[:count].contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)
