"""The only module that imports megatron.core.

It imports on first use and suppresses the warnings that appear on machines without CUDA.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ParamSpec

P = ParamSpec("P")


def core(module: str) -> Any:
    """Import `megatron.core.<module>` without warnings, and without transformer_engine, apex and others."""
    with warnings.catch_warnings(), _compile_on_first_call():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            return import_module(f"megatron.core.{module}")
        finally:
            logging.disable(level)


@contextmanager
def _compile_on_first_call() -> Iterator[None]:
    """Defer `@torch.compile` of functions defined in this context to their first call.

    megatron.core decorates fused functions that VACE never calls. Compiling them at import loads
    torch._dynamo and torch._inductor, which delays the start of every rank by seconds.
    """
    import torch

    compile_now = torch.compile

    def compile_later(model: Callable[P, Any] | None = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **options)

        @functools.wraps(model)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            return compiled()(*args, **kwargs)

        compiled = functools.cache(lambda: compile_now(model, **options))
        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now
