"""Long files are cut where scenes change."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.data.video import open_video
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.tasks import data_split
from mindspeed_mm.tasks.data_split import main as split
from tests.support.clips import write_as, write_clip
from tests.support.scenes import moving_disc, texture


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of 12, 6 and 12 frames at 8 fps; the captions say so."""
    disc, _ = moving_disc(12, 64, 96, 12, 2)
    bright = np.stack([np.roll(texture(64, 96, 5, 150, 255), k, axis=1) for k in range(6)])
    dark = np.stack([np.roll(texture(64, 96, 6, 0, 60), k, axis=0) for k in range(12)])
    path = tmp_path_factory.mktemp("film") / "film.mkv"
    write_video(path, np.concatenate([disc, bright, dark]), 8, lossless=True)
    path.with_suffix(".txt").write_text("a film")
    return path


def test_split_cuts_between_scenes(film: Path, tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    split(["split", str(film), "--out", str(tmp_path), "--min-seconds=0.5"])
    rows = [json.loads(line) for line in (tmp_path / "scenes.jsonl").read_text().splitlines()]
    assert [row["frames"] for row in rows] == [[0, 11], [12, 17], [18, 29]]
    assert [open_video(tmp_path / row["file"]).num_frames for row in rows] == [12, 6, 12]
    assert open_video(tmp_path / "film-001.mp4").fps == pytest.approx(8)
    first = open_video(tmp_path / "film-001.mp4").read([0])[0]
    assert abs(first.astype(int) - open_video(film).read([12])[0]).mean() < 4
    assert (tmp_path / "film-002.txt").read_text() == "a film"


def test_split_leaves_out_short_and_cuts_long_scenes(film: Path, tmp_path: Path, capfd) -> None:
    pytest.importorskip("scenedetect")
    split(["split", str(film), "--out", str(tmp_path), "--max-seconds=1"])
    rows = [json.loads(line) for line in (tmp_path / "scenes.jsonl").read_text().splitlines()]
    assert [row["frames"] for row in rows] == [[0, 5], [6, 11], [18, 23], [24, 29]]


def test_split_says_what_its_pieces_no_longer_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_split, "make_detector", lambda threshold: lambda number, frame: [])
    path = write_as(tmp_path / "raw.h264", "libx264", {}, 24)
    split(["split", str(path), "--out", str(tmp_path / "out"), "--dry-run"])
    assert f"{path}: {remarks_on(['untimed'])[0]}" in capsys.readouterr().out


def cut_after_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scenes, without the package that finds them."""
    monkeypatch.setattr(
        data_split, "make_detector", lambda threshold: lambda number, frame: [3] if number == 3 else []
    )


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        split(argv)
    line = capsys.readouterr().err
    assert caught.value.code == 1
    assert line.count("\n") == 1
    return line


def test_split_rejects_to_overwrite_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_after_three(monkeypatch)
    for name in ("a", "a-001"):
        write_clip(tmp_path / f"{name}.mp4", 8, height=32, width=32)
    (tmp_path / "scenes.jsonl").write_text('{"file": "a-001.mp4"}\n')  # even a piece of an earlier run
    before = (tmp_path / "a-001.mp4").read_bytes()
    sources = [str(tmp_path / f"{name}.mp4") for name in ("a", "a-001")]
    line = refused(["split", *sources, "--out", str(tmp_path), "--min-seconds=0"], capsys)
    assert "--out" in line
    assert "a-001.mp4" in line
    assert (tmp_path / "a-001.mp4").read_bytes() == before
    assert not (tmp_path / "a-000.mp4").exists()


@pytest.mark.parametrize("name", ["a-000.mp4", "a-001.mp4", "a-001.txt"])
def test_split_replaces_only_pieces_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    cut_after_three(monkeypatch)
    source = write_clip(tmp_path / "a.mp4", 8, height=32, width=32)
    source.with_suffix(".txt").write_text("a clip")
    out = tmp_path / "out"
    argv = ["split", str(source), "--out", str(out), "--min-seconds=0"]
    out.mkdir()
    (out / name).write_text("mine")
    assert name in refused(argv, capsys)
    assert [path.name for path in out.iterdir()] == [name]
    (out / name).unlink()
    split(argv)
    split(argv)
    pieces = ["a-000.mp4", "a-000.txt", "a-001.mp4", "a-001.txt"]
    assert sorted(path.name for path in out.iterdir()) == [*pieces, "scenes.jsonl"]


def test_split_lists_the_pieces_of_a_run_that_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_after_three(monkeypatch)
    source = write_clip(tmp_path / "a.mp4", 8, height=32, width=32)
    argv = ["split", str(source), "--out", str(tmp_path / "out"), "--min-seconds=0"]
    write = data_split.write_video

    def full(path: Path, *more: object) -> None:
        if path.name == "a-001.mp4":
            raise DataError("no room", where=path)
        write(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(data_split, "write_video", full)
        assert "no room" in refused(argv, capsys)
    split(argv)
    rows = (tmp_path / "out/scenes.jsonl").read_text().splitlines()
    assert [json.loads(row)["frames"] for row in rows] == [[0, 2], [3, 7]]


def test_split_without_its_package_names_the_extra(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    with pytest.raises(SystemExit) as caught:
        split(["split", str(film), "--out", str(tmp_path / "out")])
    line = capsys.readouterr().err
    assert caught.value.code == 1
    assert "scenedetect" in line
    assert "pip install" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()
