"""Converts a sharded checkpoint of torch.distributed.checkpoint to one torch file.

The file has the same content as that of torch's dcp_to_torch, but tensors are streamed, and no code in
the checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.config import DcpToTorchConfig
from checkpoint.convert import log_conversion
from checkpoint.target import Target
from checkpoint.write import Written, check_same, write_and_replace
from megatron.mm.layout import (
    RELEASE,
    WEIGHTS_FILE,
    is_complete,
    iteration_name,
    latest_folder,
    rank_name,
    read_tracker,
)
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.checksums import verifying
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.containers.dcp_index import INDEX
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.containers.torch_file import read_torch


def gather(cfg: DcpToTorchConfig) -> None:
    """Write the whole state dict of a checkpoint. Peak memory is that of the largest tensor.

    On failure, raises WeightsError and leaves the target unchanged.
    """
    folder = _checkpoint(Path(cfg.source_path))
    state = read_dcp(folder)
    target = _target(Path(cfg.target_path), state)
    tensors = dict(_tensors(state))

    def check(path: Path, seen: Written) -> None:
        file = path if path.is_file() else path / next(iter(target.torch_files))
        with verifying(False):
            written = dict(_tensors(read_torch(file)))
            if written.keys() != tensors.keys():
                raise WeightsError("was not written as planned", where=file, fix="report this as a bug")
            for name, tensor in tensors.items():
                check_same(file, ".".join(map(str, name)), tensor, written[name], bits=False)
                seen(tensor.nbytes)

    rows = [("source", f"{folder}: a DCP folder")]
    log_conversion("dcp_to_torch", rows, target, tensors.values(), cfg)
    write_and_replace(target, list(tensors.values()), check, cfg, "dcp_to_torch")


def _checkpoint(path: Path) -> Path:
    """Return `path` if it is an iteration folder, else the folder named by the tracker file in `path`."""
    folder = path if is_complete(path) else latest_folder(path)
    if folder is None or not (folder / INDEX).is_file():
        raise WeightsError(
            f"contains no {INDEX}",
            where=f"{folder or path}",
            fix="use an iter_ folder of a training run whose save finished",
        )
    return folder


def _target(path: Path, state: Mapping[str, Any]) -> Target:
    if path.suffix in (".pt", ".pth"):
        if path.is_dir():
            raise WeightsError("is a folder", where=path, fix="remove it, or use another target_path")
        return Target(path.parent, path.name, {path.name: state}, {}, {})
    if path.is_file():
        raise WeightsError(
            "is a file, but a target_path without .pt or .pth names a folder",
            where=path,
            fix="choose another target_path",
        )
    if isinstance(read_tracker(path), int):
        raise WeightsError("is the folder of a training run", where=path, fix="choose another target_path")
    file = f"{iteration_name(RELEASE)}/{rank_name(None)}/{WEIGHTS_FILE}"
    return Target(path, "", {file: state}, {}, {}, owned=(RELEASE,), last=RELEASE, tracker=True)


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], TensorFile]]:
    if isinstance(value, TensorFile):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, (*path, key))
