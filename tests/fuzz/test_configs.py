"""Any JSON value in any place of any config: the job is made, or an error of ours says why not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.tasks.jobs.extract import ExtractJob
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from tests.fuzz.world import EXTRACT, TRAIN, write_configs

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats() | st.text(max_size=20)
    | st.sampled_from([1 << 31, 1 << 63, 10**30, -(10**30), 1e308, 5e-324, "0", "1e3", "a.b", (
        "blocks.{0-99999999999}"
    )])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
JOBS: dict[str, tuple[Callable[[Sequence[str]], Any], Sequence[str]]] = {
    "pretrain_model.json": (PretrainJob.from_argv, (*TRAIN, "--train-iters=2")),
    "feature_data.json": (PretrainJob.from_argv, (*TRAIN, "--train-iters=2")),
    "fsdp2_config.yaml": (PretrainJob.from_argv, (*TRAIN, "--train-iters=2")),
    "tools.json": (PretrainJob.from_argv, (*TRAIN, "--train-iters=2")),
    "data.json": (ExtractJob.from_argv, EXTRACT),
    "model.json": (ExtractJob.from_argv, EXTRACT),
    "inference.json": (GenerateJob.from_argv, ("inference.json",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("weights/a", "models/google", "clips/control.mp4", "clips/mask.png", "clips/ref.png"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).touch()
        write_configs()
        yield root


def places(values: Any) -> list[tuple[Any, Any]]:
    """Every (container, key)."""
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    return [found for key, value in items for found in [(values, key), *places(value)]]


@pytest.mark.parametrize("name", JOBS)
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_any_value_anywhere_is_a_job_or_our_error(configs: Path, name: str, data: st.DataObject) -> None:
    sound = (configs / name).read_text()
    values = copy.deepcopy(yaml.safe_load(sound))
    owner, key = data.draw(st.sampled_from(places(values)))
    owner[key] = data.draw(VALUES)
    make, argv = JOBS[name]
    try:
        (configs / name).write_text(json.dumps(values))
        make(argv)
    except MindSpeedMMError:
        pass
    finally:
        (configs / name).write_text(sound)
