"""Splits weights into pipeline stages: the files of an MM folder, by rank and chunk, for `pp_layers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.mm.layout import WEIGHTS_FILE, iteration_name, rank_name
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.wan.stages import Layers, check_layers, flat_layers, split
from mindspeed_mm.models.wan.state_dict import KEY_MAPS


def mm_files(source: WeightsSource, pp_layers: Layers) -> dict[str, dict[str, Any]]:
    """Return the torch files of an MM folder by their path in it. An empty `pp_layers` yields one file.

    Flat stage v·pp + p is chunk v of rank p. Raises ConfigError if the sizes do not fit the model.
    """
    if not pp_layers:
        return {_path(None): {"model": _mm_names(source.tensors)}}
    layers, chunks = flat_layers(pp_layers)
    num_layers, vace_layers = source.layers
    check_layers(layers, num_layers)
    stages = split(source.tensors, layers, vace_layers)
    ranks = len(layers) // chunks
    files: dict[str, dict[str, Any]] = {}
    for rank in range(ranks):
        if chunks == 1:
            files[_path(rank)] = {"model": _mm_names(stages[rank])}
            continue
        parts = {f"model{chunk}": _mm_names(stages[chunk * ranks + rank]) for chunk in range(chunks)}
        files[_path(rank)] = {**parts, "checkpoint_version": 3.0}
    return files


def _mm_names(tensors: Mapping[str, TensorFile]) -> dict[str, TensorFile]:
    return {KEY_MAPS["mm"].to_theirs(name): tensor for name, tensor in tensors.items()}


def _path(stage: int | None) -> str:
    return f"{iteration_name('release')}/{rank_name(stage)}/{WEIGHTS_FILE}"
