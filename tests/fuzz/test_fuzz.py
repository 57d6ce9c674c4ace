"""Damaged inputs through the real commands.

Each ends in one line of ours, or gives the same result as the sound input.

FUZZ_CASES=5000 FUZZ_SEED=7 runs more and others; `python -m tests.fuzz 5000 7` prints every fault of such a
run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.fuzz.cases import draw, regressions
from tests.fuzz.entries import ENTRIES
from tests.fuzz.runner import Servers, Verdict

CASES = int(os.environ.get("FUZZ_CASES", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    started = Servers(tmp_path_factory.mktemp("fuzz"), 2)
    yield started
    started.close()


def faults(verdicts: list[Verdict]) -> str:
    """One line for each case that went wrong, as regressions.json keeps it."""
    return "\n".join(
        f"{verdict.case} [{verdict.kind}] {verdict.fault}" for verdict in verdicts if verdict.fault
    )


def test_sound_inputs_give_a_result(servers: Servers) -> None:
    for name in ENTRIES:
        assert servers.sound[name]["code"] == 0, servers.sound[name]["errors"]
        assert "digest" in servers.sound[name]["result"]


@pytest.mark.timeout(60 + CASES)
def test_damaged_inputs_are_rejected_or_harmless(servers: Servers) -> None:
    verdicts = servers.run(draw(servers.root / "world", CASES, SEED))
    assert not faults(verdicts), faults(verdicts)


def test_inputs_that_failed_once_are_handled(servers: Servers) -> None:
    verdicts = servers.run(regressions())
    assert not faults(verdicts), faults(verdicts)
