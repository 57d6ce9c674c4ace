"""Reads YAML with the scalars of JSON.

Dates and `1:30` stay strings; duplicate keys and aliases that expand without limit are errors.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import yaml

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import MAX_DEPTH, ErrorType, PathLike, display_path, plain_problem, read_text

_MAX_NODES = 1_000_000  # maximum number of nodes after aliases are expanded
_MAX_BYTES = 256 << 10  # parses within seconds; the files that we ship have about 1 KB


def read_yaml(path: PathLike, error: ErrorType = ConfigError) -> Any:
    """Read a YAML file with JSON's types: a date and `1:30` are strings, `1e-4` is a number.

    Raises `error`.
    """
    text, where = read_text(path, error, max_bytes=_MAX_BYTES), display_path(path)
    try:
        loader = _yaml_loader()(text)
        try:
            node = loader.get_single_node()
            if node is not None and _yaml_nodes(node, {}, 0) > _MAX_NODES:
                raise error(
                    f"its aliases expand to more than {_MAX_NODES} values", where=where, fix="write them out"
                )
            values = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(problem, "problem", None) or getattr(problem, "reason", None) or problem
        raise error(f"not valid YAML: {reason}", where=f"{where}{line}") from None
    except RecursionError:
        raise error(f"not valid YAML: nested more than {MAX_DEPTH} deep", where=where) from None
    # PyYAML raises these for unusual tags.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        reason = "a number has too many digits" if "digits" in str(problem) else str(problem)[:80]
        raise error(f"not valid YAML: a value does not fit its type ({reason})", where=where) from None
    if reason := plain_problem(values):
        raise error(reason, where=where)
    return values


@functools.cache
def _yaml_loader() -> Any:
    """Return a safe loader with the scalars of JSON that rejects duplicate keys."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.MarkedYAMLError(
                            problem=f"key {key.value!r} occurs twice; keep one", problem_mark=key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    unwanted = {f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "int", "float")}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in unwanted]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
    )
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    )
    return Loader


def _yaml_nodes(node: Any, known: dict[int, int], depth: int) -> int:
    """Count the values in a node after aliases are expanded; infinite if it contains itself."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if id(node) not in known:
        known[id(node)] = _MAX_NODES + 1  # the node contains itself
        children = node.value if isinstance(node.value, list) else []
        flat = [inner for child in children for inner in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_yaml_nodes(child, known, depth + 1) for child in flat)
    return known[id(node)]
