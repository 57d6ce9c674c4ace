"""Load the VAE and the text encoder from memory-mapped files into modules on the meta device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import read_json_object
from mindspeed_mm.models.all_in_one import Part, select_part
from mindspeed_mm.models.containers.rounded import FP8, expand
from mindspeed_mm.models.containers.safetensors import read_safetensors
from mindspeed_mm.models.containers.tensors import FLOATS, HEAD_BYTES, TensorFile, raw_bytes
from mindspeed_mm.models.containers.torch_file import read_torch
from mindspeed_mm.models.dialects import truncate_list
from mindspeed_mm.models.find import shard_names
from mindspeed_mm.models.finite import FiniteWeights

NUMBERS = (*FLOATS, *FP8)
NOT_BUILT = (
    ArithmeticError,
    AssertionError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)  # errors of building a module with unsuitable sizes
_WRAPPERS = ("model_state", "state_dict")  # keys under which some .pth files nest the weights


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises WeightsError if the file is damaged."""
    return read_json_object(path, WeightsError)


def read_tensors(paths: Iterable[Path], part: Part = "vae") -> dict[str, TensorFile]:
    """Open the tensors in the .safetensors, .pth, .pt or .bin files of one model.

    Of a file with several models, only those of `part` are returned. Scaled 8-bit weights become bf16.

    Raises WeightsError if a file is missing or damaged, contains anything but tensors, or repeats a name of
    another file.
    """
    state: dict[str, TensorFile] = {}
    for path in paths:
        found = read_safetensors([path]).tensors if path.suffix == ".safetensors" else _read_torch(path)
        found = expand(select_part(found, part, path), path, plain=False)
        wrong = [
            f"{name} {str(w.dtype).removeprefix('torch.')}"
            for name, w in found.items()
            if w.dtype not in NUMBERS
        ]
        if wrong:
            raise WeightsError(
                f"has weights that are not floating-point numbers: {truncate_list(wrong)}", where=path
            )
        if twice := state.keys() & found.keys():
            raise WeightsError(f"{min(twice)} is also in another file", where=path, fix="keep one of them")
        state |= {name: _expanded_once(tensor) for name, tensor in found.items()}
    return state


def shard_paths(
    folder: Path, stems: tuple[str, ...] = ("diffusion_pytorch_model", "model", "pytorch_model")
) -> list[Path]:
    """List the weight files of a diffusers or transformers folder: those in its index, or a single file."""
    for stem in stems:
        for suffix in (".safetensors", ".bin"):
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return [folder / name for name in shard_names(index)]
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
    return []


def assign_weights(
    module: nn.Module, state: Mapping[str, TensorFile], source: Path, dtype: torch.dtype
) -> None:
    """Load `state` into `module`, which is on the meta device. Names and shapes must match exactly.

    Weights stay memory-mapped unless their dtype changes. Raises WeightsError that names missing, unknown,
    misshaped and damaged weights, and those that contain NaN or Inf.
    """
    wanted = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in state.items()}
    complaints = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "misshaped": sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]),
    }
    if any(complaints.values()):
        said = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:10])}" for what, names in complaints.items() if names
        )
        raise WeightsError(f"does not fit {type(module).__name__}: {said}", where=source)
    finite, weights = FiniteWeights(source), dict[int, Tensor]()
    for name, tensor in state.items():
        if id(tensor) not in weights:  # a tensor with two names is read once
            weights[id(tensor)] = finite.read(name, tensor, dtype)
    finite.raise_if_nonfinite()
    module.load_state_dict({name: weights[id(tensor)] for name, tensor in state.items()}, assign=True)


def refuse_conflicts(
    said: Mapping[str, Any],
    sizes: Mapping[str, Any],
    config: Path,
    weights: Path,
    arithmetic: Mapping[str, Any],
) -> None:
    """Raise WeightsError if the JSON next to the weights contradicts their `sizes` or `arithmetic`."""
    odd = [
        f"{name} is {said[name]!r:.40}, but {value!r:.40} in the weights"
        for name, value in sizes.items()
        if said.get(name) is not None and said[name] != value
    ]
    if odd:
        raise WeightsError(
            f"contradicts {weights}: {'; '.join(odd)}",
            where=config,
            fix="correct it, or remove it if it belongs to another model",
        )
    for name, value in arithmetic.items():
        if said.get(name) is not None and said[name] != value:
            raise WeightsError(
                f"got {said[name]!r:.40}",
                where=f"{config}:{name}",
                expected=f"{value!r}, as in every published model",
                fix="use the weights of the published model",
            )


def fingerprint(state: Mapping[str, Tensor | TensorFile], extra: object = None) -> str:
    """Hash the names, shapes, dtypes and first 64 KiB of all tensors, and `extra`, a JSON value."""
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for name in sorted(state):
        weight = state[name]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if isinstance(weight, TensorFile):
            digest.update(weight.head_bytes())
        else:
            head = weight.detach().flatten()[: HEAD_BYTES // weight.element_size()]
            digest.update(raw_bytes(head.contiguous()))
    return digest.hexdigest()[:32]


def _expanded_once(tensor: TensorFile) -> TensorFile:
    """Read a computed tensor now, so that loading and the fingerprint do not compute it twice."""
    if tensor.raw is not None:
        return tensor
    values = tensor.read()
    return replace(tensor, read=lambda: values)


def _read_torch(path: Path) -> Mapping[str, TensorFile]:
    found: Any = read_torch(path)
    for key in _WRAPPERS:
        if isinstance(found.get(key), dict):
            found = found[key]
    if other := [name for name, weight in found.items() if not isinstance(weight, TensorFile)]:
        raise WeightsError(
            f"got a value that is not a tensor: {other[0]!r}", where=path, expected="a flat dict of tensors"
        )
    return cast(Mapping[str, TensorFile], found)
