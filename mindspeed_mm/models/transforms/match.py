"""Patterns for module names (suffixes at a dot, `*` for any text), and the layers that transforms select.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.transforms.config import LoraConfig, QuantizeConfig
from mindspeed_mm.registry import did_you_mean

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec


def is_trainable(name: str, trainable: str, branch: Collection[str]) -> bool:
    """Return whether `trainable: branch | trunk | all` trains the weight `name`, by its first component."""
    in_branch = name.split(".")[0] in branch
    return trainable == "all" or in_branch == (trainable == "branch")


def matching(patterns: Sequence[str], names: Iterable[str], where: str) -> list[str]:
    """Return the names that end in one of `patterns` at a dot, in order. `*` matches any text.

    `q` matches `blocks.0.self_attn.q` but not `norm_q`. Raises ConfigError for a pattern that matches
    nothing.
    """
    known = list(names)
    hits = {pattern: {name for name in known if ends_in(name, pattern)} for pattern in patterns}
    for pattern, found in hits.items():
        if not found:
            endings = sorted({part for name in known for part in (name, name.rpartition(".")[2])})
            raise ConfigError(f"{pattern!r} matches no module{did_you_mean(pattern, endings)}", where=where)
    return [name for name in known if any(name in found for found in hits.values())]


def ends_in(name: str, pattern: str) -> bool:
    """Return whether `name` matches `pattern`, or ends in it at a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def is_saved(name: str, saved: Iterable[str]) -> bool:
    """Return whether the weight `name` is in a module that matches a pattern in `saved`."""
    module = name.rpartition(".")[0]
    parents = [module[:end] for end, mark in enumerate(module) if mark == "."] + [module]
    return any(ends_in(parent, one) for parent in parents for one in saved)


def lora_targets(
    config: LoraConfig,
    spec: ModelSpec,
    trainable: str,
    modules: Sequence[str],
    linears: Mapping[str, Sequence[int]],
    where: str,
) -> list[str]:
    """Return the layers that get this LoRA. `linears` maps the model's linear layers to (out, in).

    Raises ConfigError for a pattern that matches no layer, a part without layers, a rank above a layer's
    full rank, or a layer that also trains in full.
    """
    if not (config.match or spec.adapted):
        raise ConfigError("missing; this model has no default layers", where=f"{where}.match")
    for pattern in config.match:
        others = [name for name in modules if ends_in(name, pattern)]
        if others and not any(ends_in(name, pattern) for name in linears):
            raise ConfigError(
                f"{pattern!r} matches no linear layer, only {others[0]}",
                where=f"{where}.match",
                fix="list linear layers such as self_attn.q; modules_to_save trains other modules in full",
            )
    part = config.on or ("both" if trainable == "all" or not spec.branch else trainable)
    found = matching(config.match or spec.adapted, linears, f"{where}.match")
    found = [name for name in found if part == "both" or is_trainable(name, part, spec.branch)]
    if not found:
        raise ConfigError(f"the model has no matching layer in the {part}", where=f"{where}.on")
    narrow = min(found, key=lambda name: min(linears[name]))
    if config.rank > min(linears[narrow]):
        raise ConfigError(
            f"got {config.rank}",
            where=f"{where}.rank",
            expected=f"at most {min(linears[narrow])}, the full rank of {narrow}",
        )
    for saved in matching(config.modules_to_save, modules, f"{where}.modules_to_save"):
        for name in found:
            if name == saved or name.startswith(f"{saved}."):
                raise ConfigError(
                    f"{saved} is trained in full, but its layer {name} gets a LoRA",
                    where=f"{where}.modules_to_save",
                    fix="narrow match, or remove it",
                )
    return found


def quantize_targets(
    config: QuantizeConfig,
    spec: ModelSpec,
    linears: Iterable[str],
    is_trained: Callable[[str], bool],
    where: str,
) -> list[str]:
    """Return the layers to quantize to 8 bits. `is_trained` takes a weight's name.

    Without `match`, layers that train are skipped. Raises ConfigError for a pattern that matches none of the
    blocks' linear layers or one that trains, and if no layer is left.
    """
    usual = [name for name in linears if any(ends_in(name, ending) for ending in spec.adapted)]
    found = matching(config.match, usual, f"{where}.match") if config.match else usual
    frozen = [name for name in found if not is_trained(f"{name}.weight")]
    if config.match and len(frozen) < len(found):
        name = next(name for name in found if name not in frozen)
        raise ConfigError(
            f"{name} trains, and 8-bit weights cannot", where=f"{where}.match", fix="list only frozen layers"
        )
    if not frozen:
        raise ConfigError(
            "the model has no frozen linear layer in its blocks",
            where=where,
            fix="remove it, or train a LoRA, or a part: predictor.trainable branch or trunk",
        )
    return frozen
