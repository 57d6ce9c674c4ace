"""The registry of models. A ModelSpec holds all that the rest of the package needs to know about a model.

Code is given as "module:name" strings, and imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindspeed_mm.config.schema import Config
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.keymap import KeyMap
from mindspeed_mm.models.wan.config import ADAPTED, BRANCH, FP32_MODULES, PredictorConfig
from mindspeed_mm.registry import Registry, resolve

if TYPE_CHECKING:
    from mindspeed_mm.models.initial_weights import InitialWeights
    from mindspeed_mm.models.source import OpenedModel
    from mindspeed_mm.models.wan.flops import Flops
    from mindspeed_mm.ops.stages import Split


@dataclass(frozen=True)
class ModelSpec:
    """One trainable model, selected by `predictor.model_id` of the model JSON."""

    # schema of `predictor` in the model JSON; docs/extend/model.md lists the fields that training reads
    predictor: type[Config]
    build: str  # "module:callable", build(predictor.model) → nn.Module on the current default device
    key_maps: str  # "module:NAME", a dict dialect → KeyMap
    units: tuple[str, ...]  # patterns of modules to shard and recompute as units, such as "blocks.{*}"
    # first parts of the names of the weights that `trainable: branch` trains; () = no branch
    branch: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()  # name suffixes of the layers that get a LoRA by default
    fp32_modules: tuple[str, ...] = ()  # children of the root that stay fp32 if the rest is bf16
    # "module:callable", open(predictor) → InitialWeights; "" = read `from_pretrained` by key_maps
    initial_weights: str = ""
    # "module:callable", modules(predictor.model) → all module names, without torch; "" = unknown
    modules: str = ""
    # "module:callable", linears(predictor.model) → {name: (out, in)} of linear layers, without torch
    linears: str = ""
    # "module:callable", stages(model, layers of each stage, own stage numbers) → Split; "" = no pipeline
    stages: str = ""
    # "module:callable", cost(predictor, recompute plan[, LoRA weights by layer]) → TrainData.cost;
    # "" = no throughput in the log
    cost: str = ""
    # "module:callable", open(path or list of parts) → models.source.OpenedModel; "" = cannot generate
    open: str = ""

    def build_module(self, sizes: Any) -> Any:
        """Build the module with these sizes on the current default device."""
        return resolve(self.build)(sizes)

    def all_key_maps(self) -> Mapping[str, KeyMap]:
        """Return dialect → KeyMap."""
        found: Mapping[str, KeyMap] = resolve(self.key_maps)
        return found

    def key_map(self, dialect: str) -> KeyMap:
        """Return the table between the official names and those of `dialect`."""
        return self.all_key_maps()[dialect]

    def module_names(self, sizes: Any) -> list[str]:
        """Return all module names of a model with these sizes, without torch. Requires `modules`."""
        names: list[str] = resolve(self.modules)(sizes)
        return names

    def linear_shapes(self, sizes: Any) -> Mapping[str, tuple[int, ...]]:
        """Return name → (out, in) of the linear layers, without torch. Requires `linears`."""
        shapes: Mapping[str, tuple[int, ...]] = resolve(self.linears)(sizes)
        return shapes

    def split_stages(self, model: Any, layers: Sequence[int], stages: Sequence[int]) -> Split:
        """Return the pipeline stages numbered `stages`; stage i has `layers[i]` layers. Requires `stages`."""
        split: Split = resolve(self.stages)(model, layers, stages)
        return split

    def sample_cost(
        self, predictor: Any, plan: Mapping[str, str], lora: Mapping[str, int]
    ) -> Callable[[tuple[int, ...]], tuple[int, Flops]]:
        """Return a function from (R+F, h, w, text rows) to the tokens and FLOPs of a sample. Requires `cost`.

        `plan` is the recompute plan, and `lora` maps layers to the number of their LoRA weights.
        """
        cost: Callable[[tuple[int, ...]], tuple[int, Flops]]
        cost = resolve(self.cost)(predictor, plan, *([lora] if lora else []))
        return cost

    def open_initial_weights(self, predictor: Any) -> InitialWeights:
        """Open the weights that training starts from. Requires `initial_weights`. Raises WeightsError."""
        found: InitialWeights = resolve(self.initial_weights)(predictor)
        return found

    def open_model(self, path: Any) -> OpenedModel:
        """Open the weights in a folder, a file or a list of parts. Requires `open`. Raises WeightsError."""
        opened: OpenedModel = resolve(self.open)(path)
        return opened


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
        initial_weights="mindspeed_mm.models.initial_weights:open_vace_initial_weights",
        modules="mindspeed_mm.models.wan.shapes:modules",
        linears="mindspeed_mm.models.wan.shapes:linears",
        stages="mindspeed_mm.models.wan.pipeline:split_vace",
        cost="mindspeed_mm.models.wan.flops:vace_cost",
        open="mindspeed_mm.models.load_model:open_vace",
    ),
)


def generating_spec(model_id: str, where: str) -> ModelSpec:
    """Return the spec of a model that can generate. Raises ConfigError for any other model."""
    try:
        spec = MODELS.get(model_id)
    except ConfigError as error:
        raise error.at(where) from None
    if not spec.open:
        raise ConfigError(
            f"model {model_id!r} cannot generate: its ModelSpec has no `open`",
            where=where,
            fix="choose a model that generates, such as vace, or add `open` to the spec",
        )
    return spec
