"""Who speaks: rank 0 in general, every rank for warnings, the last one when asked to."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mindspeed_mm.log import get_logger, on_every_rank, rank, setup_logging, world_size


@pytest.fixture
def _restored() -> Iterator[None]:
    root = logging.getLogger("mindspeed_mm")
    before = (root.handlers[:], root.level, root.propagate)
    yield
    root.handlers[:], root.level, root.propagate = before


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(("here", "said"), [("0", "info\nwarning\nlast\n"), ("2", "warning\nlast\n")])
def test_rank_0_informs_and_every_rank_warns(
    here: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", here)
    setup_logging()
    logger = get_logger("checkpoint.cli")
    logger.debug("debug")
    logger.info("info")
    logger.warning("warning")
    logger.info("last", extra=on_every_rank())
    assert capsys.readouterr().out == said


@pytest.mark.usefixtures("_restored")
def test_setting_up_twice_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    setup_logging()
    get_logger("mindspeed_mm.tasks").info("once")
    assert capsys.readouterr().out == "once\n"


def test_loggers_of_all_our_packages_share_one_root() -> None:
    assert get_logger("megatron.mm.groups").name == "mindspeed_mm.megatron.mm.groups"
    assert get_logger("mindspeed_mm.data").name == "mindspeed_mm.data"


def test_outside_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (rank(), world_size()) == (0, 1)
