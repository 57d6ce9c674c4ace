"""What the rest of the package must know about a model, as one line of data.

Code is named, and imported when used.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_mm.config.schema import Config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.wan.config import ADAPTED, BRANCH, FP32_MODULES, PredictorConfig
from mindspeed_mm.registry import Registry


@dataclass(frozen=True)
class ModelSpec:
    """One trainable model. `predictor.model_id` of the model JSON picks it."""

    predictor: type[
        Config
    ]  # schema of the JSON's `predictor`; docs/extend/model.md says which fields training reads
    build: str  # "module:callable", called build(predictor.model) → nn.Module on the current default device
    key_maps: str  # "module:NAME", a dict dialect → KeyMap
    units: tuple[str, ...]  # module patterns that are sharded and recomputed as one, e.g. "blocks.{*}"
    branch: tuple[
        str, ...
    ] = ()  # first parts of the names of what `trainable: branch` trains; () = there is no branch
    adapted: tuple[str, ...] = ()  # endings of the names of the layers that get a LoRA by default
    fp32_modules: tuple[str, ...] = ()  # children of the root that stay fp32 when the rest is bf16
    start: str = (
        ""  # "module:callable", start(predictor) → models.start.Start; "" reads `from_pretrained` by key_maps
    )
    modules: str = (
        ""  # "module:callable", modules(predictor.model) → all module names, without torch; "" = unknown
    )
    linears: str = (
        ""  # "module:callable", linears(predictor.model) → {name: (out, in)} of linear layers, without torch
    )
    # "module:callable", stages(model, layers of each, numbers of mine) → Split; "" = no pipeline
    stages: str = ""
    # "module:callable", cost(predictor, recompute plan[, LoRA weights by layer]) → TrainData.cost; "" reports
    # no throughput
    cost: str = ""
    # "module:callable", open(path or list of parts) → models.source.OpenedModel; "" = it cannot generate
    open: str = ""


MODELS: Registry[ModelSpec] = Registry("model", "mindspeed_mm.models")
VACE = MODELS.add(
    "vace",
    ModelSpec(
        predictor=PredictorConfig,
        build="mindspeed_mm.models.wan.vace:VaceTransformer",
        key_maps="mindspeed_mm.models.wan.state_dict:KEY_MAPS",
        units=("blocks.{*}", "vace_blocks.{*}"),
        branch=BRANCH,
        adapted=ADAPTED,
        fp32_modules=FP32_MODULES,
        start="mindspeed_mm.models.start:vace_start",
        modules="mindspeed_mm.models.wan.shapes:modules",
        linears="mindspeed_mm.models.wan.shapes:linears",
        stages="mindspeed_mm.models.wan.pipeline:split_vace",
        cost="mindspeed_mm.models.wan.flops:vace_cost",
        open="mindspeed_mm.models.load_model:open_vace",
    ),
)


def generating_spec(model_id: str, where: str) -> ModelSpec:
    """The spec of a model that can generate. Raises ConfigError, which says what the spec lacks."""
    try:
        spec = MODELS.get(model_id)
    except ConfigError as error:
        raise error.at(where) from None
    if not spec.open:
        raise ConfigError(
            f"model {model_id!r} cannot generate: its ModelSpec has no `open`",
            where=where,
            fix="name a model that generates, such as vace, or add `open` to the spec",
        )
    return spec
