"""Workflow files of a public forge.

Their scripts exist, they run what .ci/run runs, and name no other host.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.house.test_packaging import OWN_PATH, ROOT, setup_arguments

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
HOSTS = {"download.pytorch.org"}


def jobs(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    assert isinstance(found, dict)
    return found


def lines(path: Path) -> list[str]:
    """What a workflow's steps run."""
    steps = [step for job in jobs(path).values() for step in job["steps"]]
    return [line for step in steps for line in str(step.get("run", "")).splitlines()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_scripts_of_a_workflow_exist(path: Path) -> None:
    named = {hit for line in lines(path) for hit in OWN_PATH.findall(line)}
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_bounds_its_time_and_rights(path: Path) -> None:
    assert all("timeout-minutes" in job for job in jobs(path).values())
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}
    assert set(re.findall(r"https?://([\w.-]+)", path.read_text(encoding="utf-8"))) <= HOSTS


def test_workflows_run_the_suite_lint_docs_and_wheel() -> None:
    said = [line for path in WORKFLOWS for line in lines(path)]
    assert "bash .ci/run" in said
    assert "bash tests/run.sh -m fast" in said
    for part in (
        "tests/house/test_habits.py",
        "tests/house/test_docs_site.py",
        "tests/examples/test_wheel.py",
    ):
        assert any(line.startswith("bash tests/run.sh") and part in line for line in said), part


def test_fast_lane_runs_on_every_python_that_is_supported() -> None:
    matrix = jobs(ROOT / ".github/workflows/ci.yml")["fast"]["strategy"]["matrix"]["python"]
    text = (ROOT / "scripts/check_constraints.py").read_text(encoding="utf-8")
    pythons = next(line for line in text.splitlines() if line.startswith("PYTHONS = "))
    assert tuple(matrix) == ast.literal_eval(pythons.partition(" = ")[2])


def test_extras_of_a_workflow_exist() -> None:
    known = ast.literal_eval(setup_arguments()["extras_require"])
    used = {
        name
        for path in WORKFLOWS
        for line in lines(path)
        for name in re.findall(r"-e ['\"]?\.\[(\w+)\]", line)
    }
    assert used <= set(known)
