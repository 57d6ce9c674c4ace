"""Reads the features of the published extractor and checks the values of features.

The published `.pt` files are pickles. They are loaded with `weights_only`, so that they cannot run code.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checksum import damaged_record
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import regular_file
from mindspeed_mm.geometry import WAN

EXTRACT_AGAIN = "extract it again"
MAX_VALUE = 1e4
_NAMES = ("video", "prompt_ids", "prompt_mask", "vace_context")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_COUNTS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_values(path: Path, name: str, tensor: Tensor) -> None:
    """Raise DataError for an unexpected dtype, NaN, Inf, and values beyond MAX_VALUE.

    Normalized latents are within ±20, masks within 0 and 1, and UMT5 embeddings within a few hundred, so
    |x| > 1e4 means damage or a different kind of file. Reads the values once, without a copy.
    """
    if tensor.dtype not in _FLOATS:
        raise DataError(
            f"{name} is {_dtype(tensor)}",
            where=path,
            expected="bfloat16, float16 or float32",
            fix=EXTRACT_AGAIN,
        )
    if not tensor.numel():
        return  # the shape check reports it
    low, high = (value.item() for value in tensor.aminmax())
    if not -float("inf") < low <= high < float("inf"):  # false for NaN
        raise DataError(f"{name} has values that are NaN or infinite", where=path, fix=EXTRACT_AGAIN)
    if max(-low, high) > MAX_VALUE:
        raise DataError(
            f"{name} has values from {low:.3g} to {high:.3g}",
            where=path,
            expected=f"at most {MAX_VALUE:g} in latents and embeddings",
            fix=EXTRACT_AGAIN,
        )


def count_references(context: Tensor) -> int:
    """Count leading frames with reactive and mask channels of exactly zero, which only references have."""
    empty = context[WAN.channels :].eq(0).all(dim=0).flatten(1).all(dim=1).tolist()
    return next((index for index, zero in enumerate(empty) if not zero), len(empty))


def read_published(path: Path, *, verify: bool = True) -> FeatureRecord:
    """Read a `.pt` file of the published extractor.

    It contains `video, prompt_ids, prompt_mask, vace_context`, with or without batch axes. `verify` compares
    the records of the file with their CRC-32, if it has any. Shapes and values are not checked, except that
    prompt_mask must match prompt_ids. Raises DataError.
    """
    values = _load(path, verify)
    missing = [name for name in _NAMES if not isinstance(values, dict) or name not in values]
    if missing:
        raise DataError(
            f"{', '.join(missing)} missing", where=path, expected=f"a dict of {', '.join(_NAMES)}"
        )
    prompt = _one(path, "prompt_ids", values["prompt_ids"], 2)
    length = _prompt_length(path, _one(path, "prompt_mask", values["prompt_mask"], 1), len(prompt))
    context = _one(path, "vace_context", values["vace_context"], 4)
    return FeatureRecord(
        latents=_one(path, "video", values["video"], 4),
        vace_context=context,
        prompt_embeds=(prompt[:length].clone(),),
        num_refs=count_references(context),
        key=path.stem,
    )


def _load(path: Path, verify: bool) -> Any:
    regular_file(path, DataError)
    try:
        content = io.BytesIO(path.read_bytes())
        _check_records(path, content, verify)
        content.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about how the file was written
            return torch.load(content, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception:  # torch raises many kinds of errors for an invalid pickle
        raise DataError(
            "cannot be read as tensors: it is damaged, or contains objects other than tensors",
            where=path,
            fix=EXTRACT_AGAIN,
        ) from None


def _check_records(path: Path, content: io.BytesIO, verify: bool) -> None:
    """Check the CRCs of the zip file, which torch does not do. Raises DataError.

    Compressed records raise too, because they could unpack to more than the file's size.
    """
    if not zipfile.is_zipfile(content):
        return
    with zipfile.ZipFile(content) as file:
        if sum(record.file_size for record in file.infolist()) > content.getbuffer().nbytes:
            raise DataError("has compressed records", where=path, expected="a file that torch.save wrote")
    if verify and (damaged := damaged_record(content.getbuffer(), content)) is not None:
        raise DataError(
            f"record {damaged} does not match its checksum",
            where=path,
            fix="copy or extract the file again",
        )


def _one(path: Path, name: str, value: Any, dims: int) -> Tensor:
    """Unwrap lists and axes of length 1, and return the plain CPU tensor inside. Raises DataError."""
    for _ in range(dims):
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
    if not isinstance(value, Tensor):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{name} is {kind}", where=path, expected="a tensor")
    tensor: Tensor = value.detach()
    if problem := _unusual(tensor):
        raise DataError(
            f"{name} is {problem}",
            where=path,
            expected="a plain tensor with all its values",
            fix=EXTRACT_AGAIN,
        )
    while tensor.dim() > dims and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != dims:
        raise DataError(f"{name} has shape {list(tensor.shape)}", where=path, expected=f"{dims} axes")
    return tensor


def _unusual(tensor: Tensor) -> str:
    """Return why a tensor is not a plain CPU tensor, or '' if it is one."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return _word(tensor.layout)
    if tensor.is_quantized:
        return f"quantized ({_dtype(tensor)})"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device.type}"
    if tensor.dtype not in (*_FLOATS, *_COUNTS):
        return _dtype(tensor)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"expanded to {list(tensor.shape)}"
    return ""


def _prompt_length(path: Path, mask: Tensor, tokens: int) -> int:
    """Return the number of tokens of the caption. Raises DataError unless padding is on the right."""
    if len(mask) != tokens:
        raise DataError(
            f"prompt_mask has {len(mask)} entries, but prompt_ids has {tokens} tokens",
            where=path,
            fix=EXTRACT_AGAIN,
        )
    valid = mask.eq(1)
    length = int(valid.sum())
    if not (valid | mask.eq(0)).all() or not valid[:length].all() or length == 0:
        raise DataError(
            "prompt_mask does not mark the first tokens",
            where=path,
            expected="1 for each token, then 0 for the padding",
            fix=EXTRACT_AGAIN,
        )
    return length


def _dtype(tensor: Tensor) -> str:
    return _word(tensor.dtype)


def _word(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
