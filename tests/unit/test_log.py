"""Who speaks: rank 0 in general, every rank for warnings, the last one when asked to."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mindspeed_mm import log
from mindspeed_mm.errors import ConfigError
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


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "0"), ("RANK", ""), ("RANK", "-1"), ("LOCAL_RANK", "x")]
)
def test_a_launch_number_that_is_none_is_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for number in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(number, raising=False)
    monkeypatch.setenv(name, value)

    @log.one_line_errors
    def start() -> tuple[int, int, int]:
        return rank(), log.local_rank(), world_size()

    with pytest.raises(SystemExit):
        start()
    said = capsys.readouterr().err
    assert f"LaunchError: {name}={value!r} in the environment is not a whole number from " in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(("local_rank", "waits"), [("0", 0.0), ("1", 10.0)])
def test_an_error_of_all_ranks_is_said_by_a_machines_first_while_the_others_wait_to_be_ended(
    local_rank: str, waits: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)

    @log.one_line_errors
    def bad() -> None:
        raise ConfigError("a typo")

    with pytest.raises(SystemExit):
        bad()
    assert waited == [waits]
    assert capsys.readouterr().err == "[rank 3] ConfigError: a typo\n"  # where the first is fine, this one does speak
