"""Converts weights.

A conversion opens the source, plans the files of the target, streams every weight into them, reads them
back, and moves them into place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.config import ConvertConfig
from checkpoint.target import Target, by_alignment
from checkpoint.write import AnyConfig, Written, read_back, write_and_replace
from mindspeed_mm.accelerator import DTYPES
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.log import log_table
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.wan.config import BRANCH
from mindspeed_mm.models.weights import open_part, open_weights
from mindspeed_mm.progress import size_text

METHOD_OF = {
    "official": "hf_to_mm",
    "diffusers": "hf_diffusers_to_mm",
    "mm": "mm_to_hf, mm_to_hf_diffusers or resplit",
}


def open_source(
    cfg: ConvertConfig, *, dialects: Sequence[str], method: str, base_path: str | None = None
) -> WeightsSource:
    """Open the weights to convert, in `cfg.dtype`.

    Raises WeightsError if the method does not read their dialect.
    """
    source = open_weights(cfg.source_path, base_path=base_path, original="mm" not in dialects)
    if source.dialect not in dialects:
        raise WeightsError(
            f"has {source.dialect} names, but {method} reads {dialects[0]} names",
            where=source.path,
            fix=f"use {METHOD_OF[source.dialect]}",
        )
    return cast(source, cfg.dtype)


def cast(source: WeightsSource, name: str) -> WeightsSource:
    """Cast weights to `bf16` or `fp32`, each when it is read. The name `source` leaves them unchanged."""
    if name not in DTYPES:
        return source
    dtype = DTYPES[name]
    tensors = {
        key: TensorFile(tensor.shape, dtype, partial(_read_as, tensor, dtype))
        for key, tensor in source.tensors.items()
    }
    return replace(source, tensors=tensors)


def convert(
    source: WeightsSource,
    target: Target,
    cfg: ConvertConfig,
    method: str,
    rows: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the target, read it back, and move it into place. Peak memory is that of the largest tensor.

    On failure, raises WeightsError and leaves the target unchanged.

    `rows` are the rows of the logged table that name the origins of `source`, if there are several.
    """
    shown = rows or [("source", source.description)]
    log_conversion(method, shown, target, source.tensors.values(), cfg)

    def check(path: Path, seen: Written) -> None:
        read_back(path, source, cfg.verify == "bits", seen)

    write_and_replace(target, list(source.tensors.values()), check, cfg, method)


def log_conversion(
    method: str,
    sources: Sequence[tuple[str, str]],
    target: Target,
    tensors: Collection[TensorFile],
    cfg: AnyConfig,
) -> None:
    """Log the table of a conversion before anything is written."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    files = [*target.torch_files, *target.safetensors]
    bits = getattr(cfg, "verify", "heads") == "bits"
    checks = "every bit is read back" if bits else "names, shapes and 64 KiB of each weight are read back"
    log_table(
        [
            ("method", method),
            *sources,
            ("weights", f"{len(tensors)} tensors, {size_text(nbytes)}, {', '.join(dtypes)}"),
            ("checksums", "verified" if cfg.verify_checksums else "not verified"),
            ("output", f"{target.path}, {len(files)} {'file' if len(files) == 1 else 'files'} of weights"),
            ("check", checks),
        ]
    )


def write_module(source: WeightsSource, cfg: ConvertConfig, method: str) -> None:
    """Write only the VACE branch to one file with official names, the form that ComfyUI uses.

    ComfyUI reads no config. It assumes heads of 128 channels, and one hint every
    num_layers // num_vace_blocks trunk blocks. Raises WeightsError.
    """
    path = Path(cfg.target_path)
    if path.suffix != ".safetensors" or path.is_dir():
        raise WeightsError(f"got {path.name}", where=path, expected="a name in .safetensors as target_path")
    if not source.has_branch:
        raise WeightsError("has no VACE branch to write", where=source.path, fix="remove form module")
    trunk, layers = source.config.trunk, source.config.vace_layers
    usual = tuple(range(0, trunk.num_layers, trunk.num_layers // len(layers)))
    if trunk.hidden_size != 128 * trunk.num_heads or layers != usual:
        raise WeightsError(
            f"got {trunk.num_heads} heads of {trunk.hidden_size // trunk.num_heads} channels and hints at "
            f"{list(layers)}, which a module file cannot store",
            where=source.path,
            expected=f"heads of 128 channels and hints at {list(usual)}, as readers of module files assume",
            fix="write the whole model",
        )
    branch = {name: tensor for name, tensor in source.tensors.items() if name.split(".")[0] in BRANCH}
    source = replace(source, tensors=branch)
    target = Target(path.parent, path.name, {}, {path.name: by_alignment(branch)}, {})

    def check(written: Path, seen: Written) -> None:
        read_back(written, source, cfg.verify == "bits", seen, opener=open_part)

    log_conversion(
        method, [("source", source.description)], target, target.safetensors[path.name].values(), cfg
    )
    write_and_replace(target, list(branch.values()), check, cfg, method)


def _read_as(tensor: TensorFile, dtype: torch.dtype) -> Tensor:
    return tensor.read().to(dtype)
