"""Tests that compare with classes which only newer diffusers has are left out without them, aloud."""

import gc
import os
import re
import signal
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# As tests/run.sh has it, for a pytest of one's own: sums in another order fail bounds that hold for one
# thread. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Importing the tests and what they test leaves a million objects: without this, the collector scans them
# again and again. It starts when the tests are collected.
gc.disable()

# A background job or nohup leaves these ignored, for every command that a test starts, too. Tests of signals
# need them.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

_NEEDS_WAN_VACE = [
    "examples/test_benchmarks.py",
    "parity/test_conditioning.py",
    "parity/test_generation.py",
    "parity/test_training.py",
    "parity/test_transformer.py",
    "unit/checkpoint/test_assemble_pipeline.py",
    "unit/checkpoint/test_convert_commands.py",
    "unit/models/test_weights_names.py",
]
_DIFFUSERS = find_spec("diffusers")
_HAS_WAN_VACE = (
    _DIFFUSERS is not None
    and _DIFFUSERS.origin is not None
    and (Path(_DIFFUSERS.origin).parent / "pipelines/wan/pipeline_wan_vace.py").exists()
)
collect_ignore = [] if _HAS_WAN_VACE else _NEEDS_WAN_VACE


_FAST_FOLDERS = ("house", "unit")
_LEFT_OUT = re.compile(r"^pytestmark = pytest\.mark\.(medium|slow)$", re.MULTILINE)


def pytest_report_header():
    if _HAS_WAN_VACE:
        return None
    return (
        f"diffusers {version('diffusers')} has no WanVACEPipeline: left out are {', '.join(_NEEDS_WAN_VACE)}"
    )


def pytest_ignore_collect(collection_path, config):
    """The fast lane imports no test that it leaves out: their imports alone take longer than it does."""
    if config.option.markexpr != "fast":
        return None
    if collection_path.is_dir():
        is_left_out = (
            collection_path.parent == Path(__file__).parent and collection_path.name not in _FAST_FOLDERS
        )
    else:
        is_left_out = collection_path.suffix == ".py" and _LEFT_OUT.search(collection_path.read_text("utf-8"))
    return True if is_left_out else None


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Mark the fast lane.

    Files with slow tests come first: the workers of tests/run.sh then end at about the same time.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        in_fast_folder = item.path.relative_to(Path(__file__).parent).parts[0] in _FAST_FOLDERS
        if in_fast_folder and not (item.get_closest_marker("slow") or item.get_closest_marker("medium")):
            item.add_marker("fast")
    items.sort(key=lambda item: item.path not in slow)
