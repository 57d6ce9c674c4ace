"""Starting weights of a training run, and the base that its trainable-only checkpoints refer to.

All weights are read lazily.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mindspeed_mm.models.source import WeightsSource, init_branch_from_trunk
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.models.weights import open_named, open_weights, replace_branch


@dataclass(frozen=True)
class InitialWeights:
    """Starting weights of a run."""

    weights: WeightsSource | None  # None: random weights
    # source of all frozen weights; None: there is no single source, so checkpoints include all weights
    base: WeightsSource | None


class Named(Protocol):
    """The fields of a predictor's schema that identify its weights."""

    @property
    def model_id(self) -> str: ...

    @property
    def from_pretrained(self) -> str | None: ...


def open_initial_weights(predictor: Named) -> InitialWeights:
    """Open the starting weights of a predictor.

    Uses the model's `ModelSpec.initial_weights` if it is set, and otherwise reads `from_pretrained` in any
    dialect of the model's key maps. Raises WeightsError.
    """
    spec = MODELS.get(predictor.model_id)
    if spec.initial_weights:
        return spec.open_initial_weights(predictor)
    if predictor.from_pretrained is None:
        return InitialWeights(None, None)
    source = open_named(predictor.from_pretrained, spec.all_key_maps())
    return InitialWeights(source, source)


def open_vace_initial_weights(predictor: PredictorConfig) -> InitialWeights:
    """Open the starting weights of VACE.

    The branch can be initialized from the trunk's blocks, or taken from another checkpoint.
    """
    if predictor.from_pretrained is None:
        return InitialWeights(None, None)
    source = base = open_weights(predictor.from_pretrained)
    source.refuse_other_settings(_sizes(predictor, branch=source.has_branch), "predictor of the model JSON")
    if predictor.vace_dit.init_from_trunk:
        source = base = init_branch_from_trunk(source, predictor.model)
    if predictor.vace_dit.vace_pretrained is None:
        return InitialWeights(source, base)
    complete = replace_branch(source, predictor.vace_dit.vace_pretrained)
    complete.refuse_other_settings(_sizes(predictor, branch=True), "predictor of the model JSON")
    return InitialWeights(complete, open_weights(source.path) if predictor.trainable == "branch" else None)


def _sizes(predictor: PredictorConfig, *, branch: bool) -> dict[str, object]:
    """Return the sizes that the config.json of the weights must agree with."""
    model = predictor.model
    trunk = model.trunk.model_dump()
    return {**trunk, "vace_layers": model.vace_layers, "vace_in_dim": model.vace_in_dim} if branch else trunk
