"""Extracts a LoRA from two checkpoints: a low-rank approximation of each linear layer's difference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.config import ExtractLoraConfig
from checkpoint.lora import write_adapter
from mindspeed_mm.accelerator import DTYPES
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import format_json, write_text
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.lora.adapter import Adapter, Pair
from mindspeed_mm.models.source import WeightsSource, differences
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.progress import Progress

logger = get_logger(__name__)
_EXACT = 1024  # matrices whose smaller side is at most this get an exact SVD
_MORE = 16  # oversampling of the randomized SVD
_WORST = 5  # number of layers that are logged


@dataclass(frozen=True)
class LayerError:
    """Norms of a layer's difference and of the part lost to the low rank."""

    name: str
    rank: int
    size: float  # Frobenius norm of the difference
    lost: float  # Frobenius norm of the residual

    @property
    def error(self) -> float:
        """The relative error, from 0 to 1."""
        return self.lost / self.size if self.size else 0.0


def extract(cfg: ExtractLoraConfig) -> None:
    """Write the LoRA, and report its error.

    Raises WeightsError if the checkpoints are equal or of different models.
    """
    base = open_weights(cfg.base_path)
    tuned = open_weights(cfg.source_path, base_path=None)
    logger.info(f"{tuned.description}; minus {base.description}")
    _check(base, tuned)
    adapter, errors = difference(base, tuned, cfg)
    total = LayerError(
        "all",
        cfg.rank,
        math.hypot(*(layer.size for layer in errors)),
        math.hypot(*(layer.lost for layer in errors)),
    )
    for layer in sorted(errors, key=lambda layer: -layer.error)[:_WORST]:
        logger.info(f"{layer.name}: rank {layer.rank} loses {layer.error:.2%} of the difference")
    more = f"; {len(adapter.diffs)} other weights are kept whole" if adapter.diffs else ""
    logger.info(
        f"{len(errors)} layers: rank {cfg.rank} loses {total.error:.2%} of the difference in all{more}"
    )
    write_adapter(adapter, cfg)
    if cfg.report is not None and not cfg.dry_run:
        rows = {
            layer.name: {"rank": layer.rank, "norm": layer.size, "error": layer.error} for layer in errors
        }
        write_text(Path(cfg.report), format_json({"total": total.error, "layers": rows}, indent=2) + "\n")


def difference(
    base: WeightsSource, tuned: WeightsSource, cfg: ExtractLoraConfig
) -> tuple[Adapter, list[LayerError]]:
    """Approximate `tuned` minus `base` by a LoRA in `cfg.dtype`, and return the error of each layer."""
    dtype = DTYPES[cfg.dtype]
    pairs: dict[str, Pair] = {}
    diffs: dict[str, TensorFile] = {}
    errors: list[LayerError] = []
    with Progress("comparing", sum(tensor.nbytes for tensor in base.tensors.values()), "B") as progress:
        for name, tensor in base.tensors.items():
            in_part = cfg.on == "both" or name.startswith("vace_") == (cfg.on == "branch")
            delta = tuned.read(name).float() - tensor.read().float() if in_part else torch.zeros(())
            progress.step(tensor.nbytes)
            if not bool(torch.isfinite(delta).all()):
                raise WeightsError(f"the difference of {name} contains NaN or Inf", where=tuned.path)
            if not bool(delta.any()):
                continue
            if delta.ndim != 2 or min(delta.shape) <= 2:
                diffs[name] = _held(delta.to(dtype))
                continue
            up, down = low_rank(delta, cfg.rank)
            up, down = up.to(dtype), down.to(dtype)
            lost = torch.linalg.norm(delta - up.float() @ down.float()).item()
            errors.append(LayerError(name, len(down), torch.linalg.norm(delta).item(), lost))
            pairs[name] = Pair(_held(down), _held(up))
    if not pairs and not diffs:
        raise WeightsError(
            f"is equal to {base.path} ({cfg.on})", where=tuned.path, fix="choose another checkpoint"
        )
    return Adapter(tuned.path, "extracted", pairs, diffs), errors


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor [out, in] into up [out, r] and down [r, in], whose product is the best rank-r approximation.

    Each factor is scaled by √σ. Large matrices use a randomized SVD.
    """
    rank = min(rank, *delta.shape)
    if min(delta.shape) <= _EXACT:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, q=min(rank + _MORE, *delta.shape), niter=4)
    root = s[:rank].clamp(min=0).sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T.contiguous()


def _check(base: WeightsSource, tuned: WeightsSource) -> None:
    if problems := differences(tuned.shapes, base.shapes):
        raise WeightsError(f"is not of the same model as {base.path}: {problems}", where=tuned.path)


def _held(tensor: Tensor) -> TensorFile:
    values = tensor.contiguous()
    return TensorFile(values.shape, values.dtype, partial(torch.clone, values))
