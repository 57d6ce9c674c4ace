"""Megatron's checkpoint folders are found as people leave them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.mm.layout import (
    TRACKER,
    iteration_folder,
    latest_folder,
    parse_iteration,
    rank_name,
    read_tracker,
    saved_iterations,
    stage_files,
    write_tracker,
)
from mindspeed_mm.errors import WeightsError
from tests.support.errors import raises


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\ufeffrelease\r\n", "release"),
        ("\ufeff10\n", 10),
        ("release\n", "release"),
        (" release ", "release"),
        ("10", 10),
        ("0000010\r\n", 10),
    ],
)
def test_white_space_and_a_mark_in_the_tracker_do_not_count(
    tmp_path: Path, text: str, value: int | str
) -> None:
    (tmp_path / TRACKER).write_text(text, encoding="utf-8")
    assert read_tracker(tmp_path) == value


@pytest.mark.parametrize("text", ["", "ten", "-3", "1 2", "release 3", "٣", "9" * 5000])
def test_tracker_of_anything_else_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / TRACKER).write_text(text)
    with raises(WeightsError, "release", where=tmp_path / TRACKER):
        read_tracker(tmp_path)


def test_folder_of_5000_digits_is_not_an_iteration() -> None:
    assert parse_iteration("iter_" + "9" * 5000) is None
    assert parse_iteration("iter_" + "9" * 18) == int("9" * 18)


def test_binary_tracker_is_an_error(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_bytes(b"\xff\xfe\x00")
    with raises(WeightsError, "UTF-16"):
        read_tracker(tmp_path)


def test_no_tracker_is_none(tmp_path: Path) -> None:
    assert read_tracker(tmp_path) is None
    assert latest_folder(tmp_path) is None


def test_names_match_megatron() -> None:
    assert iteration_folder(Path("save"), 10) == Path("save/iter_0000010")
    assert iteration_folder(Path("save"), "release") == Path("save/release")
    assert parse_iteration("iter_0000010") == 10
    assert parse_iteration("iter_12345678") == 12345678
    assert parse_iteration("iteration_3") is None
    assert rank_name(None) == "mp_rank_00"
    assert rank_name(2) == "mp_rank_00_002"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for iteration in (7, "release", 12345678):
        write_tracker(tmp_path, iteration)
        iteration_folder(tmp_path, iteration).mkdir()
        assert read_tracker(tmp_path) == iteration
        assert latest_folder(tmp_path) == iteration_folder(tmp_path, iteration)
    assert saved_iterations(tmp_path) == [7, 12345678]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [TRACKER]


def test_tracker_that_names_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    write_tracker(tmp_path, 10)
    with raises(WeightsError, "iter_0000010"):
        latest_folder(tmp_path)


def _ranks(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "model_optim_rng.pt").touch()


def test_stages_come_in_order(tmp_path: Path) -> None:
    _ranks(tmp_path, *(rank_name(stage) for stage in (2, 0, 1)))
    assert [path.parent.name for path in stage_files(tmp_path)] == [rank_name(stage) for stage in range(3)]


@pytest.mark.parametrize(
    ("names", "fact"),
    [
        (("mp_rank_00_000", "mp_rank_00_002"), "0, 1, 2"),
        (("mp_rank_00_001",), "0, 1, 2"),
        (("mp_rank_00", "mp_rank_01"), "tensor-parallel"),
        (("mp_rank_00", "mp_rank_00_000"), "mp_rank_00_NNN"),
    ],
)
def test_incomplete_or_mixed_ranks_are_an_error(tmp_path: Path, names: tuple[str, ...], fact: str) -> None:
    _ranks(tmp_path, *names)
    with raises(WeightsError, fact):
        stage_files(tmp_path)


def test_rank_without_its_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    with raises(WeightsError, "mp_rank_00"):
        stage_files(tmp_path)
