"""The only module that imports megatron.core.

It imports on first use, and suppresses the warnings that appear on machines without CUDA.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from typing import Any


def core(module: str) -> Any:
    """Import `megatron.core.<module>` without warnings and without transformer_engine, apex and others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            return import_module(f"megatron.core.{module}")
        finally:
            logging.disable(level)
