"""Select one model from an all-in-one checkpoint of ComfyUI: transformer, VAE and text encoder in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mindspeed_mm.log import get_logger, once
from mindspeed_mm.models.containers.tensors import TensorFile

logger = get_logger(__name__)
Part = Literal["transformer", "vae", "text encoder"]
_COMFYUI = "diffusion_model."
_PREFIXES: Mapping[Part, tuple[str, ...]] = {
    "transformer": (f"model.{_COMFYUI}",),
    "vae": ("vae.", "first_stage_model."),
    "text encoder": ("text_encoders.", "cond_stage_model."),
}
_NO_WEIGHTS = (
    "spiece_model",
    "logit_scale",
)  # a tokenizer and a scalar of CLIP


def select_part(tensors: Mapping[str, TensorFile], part: Part, where: object) -> dict[str, TensorFile]:
    """Return the tensors of one part of an all-in-one checkpoint; of any other file, return all tensors.

    Names are those in the file. Tensors of no known part count as the transformer's, so that its reader
    reports them.
    """
    owners = {name: _owner(name) for name in tensors}
    kept = dict(tensors)
    if len({owner for owner in owners.values() if owner}) > 1 and part in owners.values():
        own = (part, None) if part == "transformer" else (part,)
        kept = {name: tensor for name, tensor in tensors.items() if owners[name] in own}
        text = f"{where}: contains several models; reading the {part}, {len(kept)} of {len(tensors)} tensors"
        logger.info(text, extra=once())
    if part == "text encoder":
        kept = {name: tensor for name, tensor in kept.items() if name.rpartition(".")[2] not in _NO_WEIGHTS}
    return kept


def _owner(name: str) -> Part | None:
    return next((part for part, prefixes in _PREFIXES.items() if name.startswith(prefixes)), None)
