"""What a training run starts from.

Its weights, read lazily, and where a checkpoint of what trains finds the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mindspeed_mm.models.source import WeightsSource, init_branch_from_trunk
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.models.weights import open_named, open_weights, with_branch_of
from mindspeed_mm.registry import resolve


@dataclass(frozen=True)
class Start:
    """The beginning of a run."""

    weights: WeightsSource | None  # None: random ones
    base: (
        WeightsSource | None
    )  # holds what does not train; None: no one place does, so checkpoints hold all weights


class Named(Protocol):
    """What a predictor's schema says about its weights."""

    @property
    def model_id(self) -> str: ...

    @property
    def from_pretrained(self) -> str | None: ...


def start_of(predictor: Named) -> Start:
    """By the model's own `ModelSpec.start`, else from `from_pretrained` in any dialect of its key maps.

    Raises WeightsError.
    """
    spec = MODELS.get(predictor.model_id)
    if spec.start:
        start: Start = resolve(spec.start)(predictor)
        return start
    if predictor.from_pretrained is None:
        return Start(None, None)
    source = open_named(predictor.from_pretrained, resolve(spec.key_maps))
    return Start(source, source)


def vace_start(predictor: PredictorConfig) -> Start:
    """VACE's: the branch may be begun from the trunk's blocks, or taken from another checkpoint."""
    if predictor.from_pretrained is None:
        return Start(None, None)
    source = base = open_weights(predictor.from_pretrained)
    source.refuse_other_settings(_sizes(predictor, branch=source.has_branch), "predictor of the model JSON")
    if predictor.vace_dit.init_from_trunk:
        source = base = init_branch_from_trunk(source, predictor.model)
    if predictor.vace_dit.vace_pretrained is None:
        return Start(source, base)
    joined = with_branch_of(source, predictor.vace_dit.vace_pretrained)
    joined.refuse_other_settings(_sizes(predictor, branch=True), "predictor of the model JSON")
    return Start(joined, open_weights(source.path) if predictor.trainable == "branch" else None)


def _sizes(predictor: PredictorConfig, *, branch: bool) -> dict[str, object]:
    """What a config.json beside the weights must repeat."""
    model = predictor.model
    trunk = model.trunk.model_dump()
    return {**trunk, "vace_layers": model.vace_layers, "vace_in_dim": model.vace_in_dim} if branch else trunk
