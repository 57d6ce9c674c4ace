"""Who speaks: rank 0 in general, every rank for warnings, the last one when asked to."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

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
    ("name", "value"),
    [
        ("WORLD_SIZE", "abc"),
        ("WORLD_SIZE", "0"),
        ("RANK", ""),
        ("RANK", "-1"),
        ("LOCAL_RANK", "x"),
        ("RANK", "9" * 5000),
    ],
)
def test_invalid_launch_number_is_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(number, raising=False)
    monkeypatch.setenv(name, value)

    @log.one_line_errors
    def start() -> tuple[int, int, int]:
        return rank(), log.local_rank(), world_size()

    with pytest.raises(SystemExit):
        start()
    said = capsys.readouterr().err
    assert f"LaunchError: {name}: " in said
    assert repr(value)[:40] in said
    assert said.count("\n") == 1
    assert len(said) < 300


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(("local_rank", "printed"), [("0", True), ("1", False)])
def test_error_under_torchrun_is_printed_by_first_local_rank(
    tmp_path: Path,
    local_rank: str,
    printed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "error.json"
    launch = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": local_rank, "TORCHELASTIC_ERROR_FILE": str(file)}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)

    @log.one_line_errors
    def bad() -> None:
        raise ConfigError("a typo")

    with pytest.raises(SystemExit):
        bad()
    assert capsys.readouterr().err == ("[rank 3] ConfigError: a typo\n" if printed else "")
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(file))
    report = ChildFailedError("train.py", {3: failure}).format_msg()  # torchrun's own
    assert "ConfigError: a typo" in report
    assert abs(failure.timestamp - time.time()) < 60


@pytest.mark.usefixtures("_restored")
def test_closed_pipe_ends_the_output_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        setup_logging()
        get_logger("a").info("read")
        assert os.read(reader, 5) == b"read\n"
        os.close(reader)
        get_logger("a").info("read by nobody")
        get_logger("a").info("and this")
    assert capfd.readouterr().err == ""
