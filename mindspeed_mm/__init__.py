"""VACE video models: convert weights, extract features, train, generate. Importing this imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindspeed_mm import errors
    from mindspeed_mm.conditioning.annotate.networks import ANNOTATORS
    from mindspeed_mm.conditioning.tasks.spec import TASKS
    from mindspeed_mm.data.registry import DATASETS
    from mindspeed_mm.evaluation.spec import METRICS
    from mindspeed_mm.generation.pipeline import VacePipeline
    from mindspeed_mm.generation.request import GenerationRequest
    from mindspeed_mm.generation.solvers.config import SOLVERS
    from mindspeed_mm.models.spec import MODELS
    from mindspeed_mm.models.transforms.config import TRANSFORMS
    from mindspeed_mm.training.hooks.config import TRAINING_HOOKS

__all__ = [
    "ANNOTATORS",
    "DATASETS",
    "METRICS",
    "MODELS",
    "SOLVERS",
    "TASKS",
    "TRAINING_HOOKS",
    "TRANSFORMS",
    "GenerationRequest",
    "VacePipeline",
    "errors",
]

_HOMES = {
    "ANNOTATORS": "mindspeed_mm.conditioning.annotate.networks",
    "DATASETS": "mindspeed_mm.data.registry",
    "GenerationRequest": "mindspeed_mm.generation.request",
    "METRICS": "mindspeed_mm.evaluation.spec",
    "MODELS": "mindspeed_mm.models.spec",
    "SOLVERS": "mindspeed_mm.generation.solvers.config",
    "TASKS": "mindspeed_mm.conditioning.tasks.spec",
    "TRAINING_HOOKS": "mindspeed_mm.training.hooks.config",
    "TRANSFORMS": "mindspeed_mm.models.transforms.config",
    "VacePipeline": "mindspeed_mm.generation.pipeline",
    "errors": "",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and knows every other name as an error

    def __getattr__(name: str) -> Any:
        """Import a public name on first use and return it."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = _HOMES[name]
        return getattr(import_module(home), name) if home else import_module(f"{__name__}.{name}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
