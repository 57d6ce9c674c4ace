"""Loads the pixels that condition the model.

This is separate from the stages, so that code that only inspects pixels does not load a model.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import mindspeed_mm.data.conditions as pixels
from mindspeed_mm.data.conditions import Conditions, ReadConditions
from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.request import GenerationRequest, Inputs
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.tasks import prepare_task


def load_conditions(inputs: Inputs, sampling: SamplingConfig) -> Conditions:
    """Load the pixels that condition the model.

    Raises ConfigError for contradictory inputs, and DataError for inputs that do not fit.
    """
    return pixels.to_tensors(_read(inputs, sampling))


def read_conditions(request: GenerationRequest) -> ReadConditions:
    """Load the pixels of a request, with clips from files as uint8 to save memory. Raises DataError."""
    try:
        if request.task is None:
            return _read(request.inputs, request.sampling)
        with tempfile.TemporaryDirectory() as folder:
            inputs, notes = prepare_task(request.task, request.inputs, Path(folder))
            found = _read(inputs, request.sampling)
        return replace(found, notes=(*notes, *(note.replace(f"{folder}/", "") for note in found.notes)))
    except DataError as error:
        raise (error.at(request.name) if request.name else error) from None


def _read(inputs: Inputs, sampling: SamplingConfig) -> ReadConditions:
    size, stretch = (sampling.height, sampling.width), sampling.diffsynth_references
    return pixels.load_conditions(inputs, sampling, size, stretch=stretch)
