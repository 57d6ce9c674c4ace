"""Module patterns of fsdp2_config.yaml.

`blocks.{*}`, `vace_blocks.{0-3,7}`, `head`; published prefixes are aliases. Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig, Recompute
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import did_you_mean

_PREFIX = re.compile(r"^(predictor\.)?(wan_dit\.|vace_dit\.)?")
_BRACES = re.compile(r"\{([^{}]*)\}")


def absent_units(units: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return unit patterns that match nothing in this model, such as `vace_blocks.{*}` without a branch."""
    known = list(names)
    return [unit for unit in units if not _hits(unit, known, "units")]


def match(pattern: str, names: Iterable[str], where: str, *, absent: Iterable[str] = ()) -> list[str]:
    """Return the names that `pattern` matches, in order. Raises ConfigError if there are none.

    A pattern inside a unit of `absent` may match nothing, so that one file works for models with and without
    that part.
    """
    known = list(names)
    found = _hits(pattern, known, where)
    shape = _BRACES.sub("{*}", _PREFIX.sub("", pattern))
    if not found and not any(f"{shape}.".startswith(f"{unit}.") for unit in absent):
        kinds = sorted({re.sub(r"\.\d+(?=\.|$)", ".{*}", name) for name in known if name})
        nearest = "" if shape in kinds else did_you_mean(shape, kinds)  # else an index is too high
        raise ConfigError(
            f"pattern {pattern!r} matches no module{nearest}", where=where, expected=f"one of {_parts(known)}"
        )
    return found


def check_patterns(config: Fsdp2Config, units: Iterable[str], names: Iterable[str]) -> None:
    """Raise ConfigError for a pattern of fsdp2_config.yaml that matches none of a model's modules."""
    known = list(names)
    absent = absent_units(units, known)
    for key in ("sub_modules_to_wrap", "recompute_modules", "ignored_modules"):
        for pattern in getattr(config, key) or ():
            match(pattern, known, f"fsdp2_config.yaml:{key}", absent=absent)


def recompute_plan(
    names: Sequence[str], units: Sequence[str], fsdp: Fsdp2Config, parallel: ParallelConfig
) -> dict[str, Recompute]:
    """Map module names to full or selective recomputation.

    The YAML selects modules; the flags choose the mode, or select all blocks. A later pattern overrides an
    earlier one. Raises ConfigError for a pattern that matches nothing.
    """
    patterns = fsdp.recompute_modules
    how: Recompute = parallel.recompute_granularity or "full"
    if isinstance(patterns, Mapping):
        chosen = [(pattern, mode) for pattern, mode in patterns.items()]
    elif patterns:
        chosen = [(pattern, how) for pattern in patterns]
    else:
        chosen = [(pattern, how) for pattern in units] if parallel.recompute_granularity else []
    limit = parallel.recompute_num_layers if parallel.recompute_method == "block" else None
    absent = absent_units(units, names)
    plan: dict[str, Recompute] = {}
    for pattern, mode in chosen:
        for name in match(pattern, names, "fsdp2_config.yaml:recompute_modules", absent=absent)[:limit]:
            plan[name] = mode
    return {name: mode for name, mode in plan.items() if mode != "none"}


def _parts(known: Iterable[str]) -> str:
    """Format the children of the root with the indices of lists: `blocks.{0-29}, head`."""
    last: dict[str, int] = {}
    for name in known:
        child, _, rest = name.partition(".")
        index = rest.split(".")[0]
        last[child] = max(last.get(child, -1), int(index) if index.isdigit() else -1)
    return ", ".join(child if end < 0 else f"{child}.{{0-{end}}}" for child, end in last.items())


def _hits(pattern: str, known: list[str], where: str) -> list[str]:
    wanted = _PREFIX.sub("", pattern)
    expression = re.sub(r"\\\{[^{}]*\\\}", r"(\\d+)", re.escape(wanted))
    sets = [_indices(group, pattern, where) for group in _BRACES.findall(wanted)]
    return [
        name
        for name in known
        if (hit := re.fullmatch(expression, name))
        and all(
            chosen is None or int(index) in chosen for index, chosen in zip(hit.groups(), sets, strict=True)
        )
    ]


def _indices(text: str, pattern: str, where: str) -> set[int] | None:
    """Parse indices: `0-3,7` → {0, 1, 2, 3, 7}; `*` → None, which means every index."""
    if text.strip() == "*":
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part)
        if not bounds:
            raise ConfigError(
                f"got {{{text}}}",
                where=f"{where}: pattern {pattern!r}",
                expected="*, an index up to 9999, or a list such as 0-3,7",
            )
        chosen.update(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return chosen
