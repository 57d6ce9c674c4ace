"""Weights of the VAE and the text encoder.

From files, memory-mapped, into modules built on the meta device.
"""

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
from mindspeed_mm.models.containers.rounded import FP8, expand
from mindspeed_mm.models.containers.safetensors import read_safetensors
from mindspeed_mm.models.containers.tensors import FLOATS, HEAD_BYTES, TensorFile, raw_bytes
from mindspeed_mm.models.containers.torch_file import read_torch
from mindspeed_mm.models.dialects import listed
from mindspeed_mm.models.find import shard_names
from mindspeed_mm.models.finite import FiniteWeights
from mindspeed_mm.models.parts import Part, part_of

NUMBERS = (*FLOATS, *FP8)
NOT_BUILT = (
    ArithmeticError,
    AssertionError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)  # of foreign sizes
_WRAPPERS = ("model_state", "state_dict")  # keys under which some .pth hold the weights


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises WeightsError when the file is damaged."""
    return read_json_object(path, WeightsError)


def read_tensors(paths: Iterable[Path], part: Part = "vae") -> dict[str, TensorFile]:
    """The tensors of one model, from all of its .safetensors / .pth / .pt / .bin files, to be read by `fill`.

    Of a file that holds several models, those of `part`. Scaled 8-bit weights are expanded to bf16.

    Raises WeightsError when a file is missing, damaged, holds anything but tensors, or repeats another's
    name.
    """
    state: dict[str, TensorFile] = {}
    for path in paths:
        found = read_safetensors([path]).tensors if path.suffix == ".safetensors" else _read_torch(path)
        found = expand(part_of(found, part, path), path, plain=False)
        wrong = [
            f"{name} {str(w.dtype).removeprefix('torch.')}"
            for name, w in found.items()
            if w.dtype not in NUMBERS
        ]
        if wrong:
            raise WeightsError(
                f"has weights that are not floating-point numbers: {listed(wrong)}", where=path
            )
        if twice := state.keys() & found.keys():
            raise WeightsError(f"{min(twice)} is also in another file", where=path, fix="keep one of them")
        state |= {name: _expanded_once(tensor) for name, tensor in found.items()}
    return state


def shard_paths(
    folder: Path, stems: tuple[str, ...] = ("diffusion_pytorch_model", "model", "pytorch_model")
) -> list[Path]:
    """The weight files of a diffusers or transformers folder: those its index names, or the single file."""
    for stem in stems:
        for suffix in (".safetensors", ".bin"):
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                return [folder / name for name in shard_names(index)]
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
    return []


def fill(module: nn.Module, state: Mapping[str, TensorFile], source: Path, dtype: torch.dtype) -> None:
    """Give `module`, built on the meta device, exactly the weights of `state`.

    They are verified, and copied where their dtype differs; else they stay mapped. Raises WeightsError that
    names what is missing, left over or of another shape, damaged, or holds NaN or Inf.
    """
    wanted = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in state.items()}
    complaints = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "mis-shaped": sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]),
    }
    if any(complaints.values()):
        said = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:10])}" for what, names in complaints.items() if names
        )
        raise WeightsError(f"does not fit {type(module).__name__}: {said}", where=source)
    finite, weights = FiniteWeights(source), dict[int, Tensor]()
    for name, tensor in state.items():
        if id(tensor) not in weights:  # a tensor of two names stays one
            weights[id(tensor)] = finite.read(name, tensor, dtype)
    finite.demand()
    module.load_state_dict({name: weights[id(tensor)] for name, tensor in state.items()}, assign=True)


def refuse_conflicts(
    said: Mapping[str, Any],
    sizes: Mapping[str, Any],
    config: Path,
    weights: Path,
    arithmetic: Mapping[str, Any],
) -> None:
    """Raises WeightsError if the JSON beside the weights gives other `sizes` or another `arithmetic`."""
    odd = [
        f"{name} is {said[name]!r:.40} there and {value!r:.40} in the weights"
        for name, value in sizes.items()
        if said.get(name) is not None and said[name] != value
    ]
    if odd:
        raise WeightsError(
            f"contradicts {weights}: {'; '.join(odd)}",
            where=config,
            fix="correct or remove the file of the other model",
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
    """A hash of names, shapes, dtypes and 64 KiB of each tensor, and of `extra` (anything JSON can say)."""
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
    """One that takes computing is computed now, and once: it is read for the model and for a fingerprint."""
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
        raise WeightsError(f"got {other[0]!r} in it", where=path, expected="a flat dictionary of tensors")
    return cast(Mapping[str, TensorFile], found)
