"""Imports run without garbage collection; what they leave is exempt from it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from mindspeed_mm.imports import quick_imports


@pytest.fixture(autouse=True)
def _thaw() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.enable()
    yield
    gc.unfreeze()
    (gc.enable if was_enabled else gc.disable)()


def test_imports_run_without_collection() -> None:
    with quick_imports():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)


def test_failed_import_turns_collection_on_again() -> None:
    with pytest.raises(ModuleNotFoundError), quick_imports():
        import no_such_module  # noqa: F401
    assert gc.isenabled()


def test_nested_imports_keep_collection_off_until_the_end() -> None:
    with quick_imports():
        with quick_imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
