"""Long files are cut where scenes change."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mindspeed_mm.data.video import open_video, write_video
from mindspeed_mm.tasks import data_split
from mindspeed_mm.tasks.data_split import main as split
from tests.support.clips import write_as
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
    assert f"{path}: no time stamps: frames are spaced evenly" in capsys.readouterr().out


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
