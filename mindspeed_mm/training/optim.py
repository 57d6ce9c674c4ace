"""AdamW and Muon for the trainable parameters, Megatron's weight-decay rule, and gradient clipping."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mindspeed_mm.distributed.pipeline import Pipeline, whole_model
from mindspeed_mm.distributed.shards import local
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.training.config import OptimizerConfig
from mindspeed_mm.training.muon import Muon

NO_DECAY = re.compile(r"(^|\.)(bias|modulation)$")
# Input and output layers, and low-rank updates.
NOT_HIDDEN = re.compile(r"(^|[._])((embedding|head)\.|lora_[AB]\b)")


def uses_weight_decay(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter decays, by Megatron's rule.

    Matrices and kernels decay; biases, 1-D parameters and modulation do not.
    """
    return parameter.ndim > 1 and not NO_DECAY.search(name)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether Muon updates a parameter, by Megatron's rule.

    Muon updates all matrices except those of embeddings (text, time, patches), of the last layer and of
    LoRAs.
    """
    return parameter.ndim == 2 and not NOT_HIDDEN.search(name)


def param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: with and without weight decay.

    megatron.core's schedule reads `wd_mult` of each group.

    With `optimizer: muon`, hidden matrices are in a separate group, which decays. All ranks of a pipeline
    have the same groups, so that their checkpoints agree; a group may be empty on some stages. Raises
    ConfigError if nothing is trainable.
    """
    settings: dict[str, dict[str, Any]] = {
        "hidden": {
            "weight_decay": config.weight_decay,
            "wd_mult": 1.0,
            "momentum": config.muon_momentum,
        },
        "decayed": {"weight_decay": config.weight_decay, "wd_mult": 1.0},
        "rest": {"weight_decay": 0.0, "wd_mult": 0.0},
    }
    present = {
        _group_of(name, parameter, config)
        for name, parameter in whole_model(model).named_parameters()
        if parameter.requires_grad
    }
    if not present:
        raise ConfigError(
            "leaves nothing to train: the model has no parameter with a gradient", where="predictor.trainable"
        )
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in settings if kind in present}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter, config)].append(parameter)
    return [{"params": found, **settings[kind]} for kind, found in members.items()]


def _group_of(name: str, parameter: Tensor, config: OptimizerConfig) -> str:
    if config.optimizer == "muon" and is_hidden_matrix(name, parameter):
        return "hidden"
    return "decayed" if config.weight_decay_all or uses_weight_decay(name, parameter) else "rest"


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build Muon, or the AdamW implementation of `optimizer_selection`.

    Raises ConfigError if the requested package is not installed.
    """
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    groups = param_groups(model, config)
    device = next(model.parameters()).device
    fused = config.optimizer_selection == "fused_torch_adamw" and device.type in _fused_devices()
    if config.optimizer == "muon":
        return Muon(groups, fused=fused or None, **settings)
    if config.optimizer_selection == "apex":
        adam: type[torch.optim.Optimizer] = _foreign("apex.optimizers", "FusedAdam", "apex")
        return adam(groups, adam_w_mode=True, **settings)  # type: ignore[call-arg]
    if config.optimizer_selection in ("npu", "fused_adamw"):
        adam = _foreign("torch_npu.optim", "NpuFusedAdamW", config.optimizer_selection)
        return adam(groups, **settings)
    return torch.optim.AdamW(groups, fused=fused or None, **settings)


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, pipeline: Pipeline | None = None
) -> float:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), as Megatron does.

    Returns the norm before clipping. If `max_norm` is 0, gradients are not scaled.

    The norm counts each sharded gradient (DTensor) once, over all of its ranks, and includes the gradients of
    all stages of `pipeline`. If the norm is not finite, gradients are not scaled.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(gradients) if pipeline is None else pipeline.norm(gradient_norm)
    coefficient = max_norm / (norm + 1e-6)
    if max_norm > 0 and coefficient < 1:
        for gradient in gradients:
            local(gradient).mul_(coefficient)
    return norm


def gradient_norm(gradients: list[Tensor]) -> float:
    """Return the global 2-norm of the gradients, summed in fp32."""
    total = 0.0
    for kind in (
        [g for g in gradients if isinstance(g, DTensor)],
        [g for g in gradients if not isinstance(g, DTensor)],
    ):
        if kind:
            part = torch.nn.utils.get_total_norm([g.float() for g in kind], foreach=True)
            total += float(part.full_tensor() if isinstance(part, DTensor) else part) ** 2
    return float(total**0.5)


def _fused_devices() -> list[str]:
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    return list(_get_fused_kernels_supported_devices())


def _foreign(module: str, name: str, selection: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigError(
            f"needs {module}.{name}, which cannot be imported ({error})",
            where=f"--optimizer-selection {selection}",
            fix="install it, or use fused_torch_adamw",
        ) from None
