"""Datasets in the layouts of other projects: read where they are, and imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.cli.main import main as vace
from mindspeed_mm.data.manifest import read_manifest, scan_manifest
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.tasks.data_import import main as import_data
from tests.support.clips import write_clip
from tests.support.errors import meant, raises


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", 5, height=32, width=32)


@pytest.fixture
def folder(tmp_path: Path, clip: Path) -> Path:
    """Clips a.mp4 and b.mp4, their controls and masks, a reference."""
    home = tmp_path / "set"
    home.mkdir()
    for name in ("a", "b", "control", "mask"):
        shutil.copy(clip, home / f"{name}.mp4")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(home / "ref.png")
    return home


DIFFSYNTH = [
    {"video": "a.mp4", "prompt": "one", "vace_video": "control.mp4", "vace_video_mask": "mask.mp4"},
    {"video": "b.mp4", "prompt": "two", "vace_reference_image": "ref.png"},
]
VIDEOX = [
    {"file_path": "a.mp4", "text": "one", "control_file_path": "control.mp4", "type": "video"},
    {"file_path": "ref.png", "text": "two", "object_file_path": ["ref.png", "ref.png"], "type": "image"},
]


def as_csv(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [["" if row.get(key) is None else row[key] for key in columns] for row in rows]
    texts = [
        [json.dumps(cell).join(["'", "'"]) if isinstance(cell, list) else cell for cell in row]
        for row in cells
    ]
    lines = [
        ",".join(columns),
        *(",".join(f'"{cell}"' if "," in cell else cell for cell in row) for row in texts),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.json", "metadata.jsonl"])
def test_diffsynth_lists_are_read(folder: Path, name: str) -> None:
    text = {
        ".csv": as_csv(DIFFSYNTH),
        ".json": json.dumps(DIFFSYNTH),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in DIFFSYNTH),
    }
    (folder / name).write_text(text[Path(name).suffix])
    for path in (folder / name, folder):
        one, two = read_manifest(path)
        assert (one.captions, two.captions) == (("one",), ("two",))
        assert one.src_video == folder / "control.mp4"
        assert one.src_mask == folder / "mask.mp4"
        assert two.src_ref_images == (folder / "ref.png",)


def test_videox_lists_are_read_images_included(folder: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps(VIDEOX))
    found = scan_manifest(folder / "metadata.json")
    assert not found.problems
    assert found.records[0].src_video == folder / "control.mp4"
    assert found.records[1].video == folder / "ref.png"
    assert len(found.records[1].src_ref_images) == 2
    assert any("'type'" in note for note in found.notes)


def test_folders_of_clips_and_texts_are_read(folder: Path, tmp_path: Path) -> None:
    (folder / "inner").mkdir()
    for name in ("control", "mask"):
        (folder / f"{name}.mp4").unlink()
    shutil.move(folder / "b.mp4", folder / "inner" / "b.mp4")
    (folder / "a.txt").write_text("one\n")
    (folder / "inner" / "b.txt").write_text(" two ")
    listing = tmp_path / "data.txt"
    listing.write_text(f"{folder},{folder}\n")
    for path in (folder, listing):
        assert [(r.video.name, r.captions) for r in read_manifest(path)] == [
            ("a.mp4", ("one",)),
            ("b.mp4", ("two",)),
        ]
    (folder / "a.txt").unlink()
    with raises(DataError, "a.mp4", "a.txt", "1"):
        read_manifest(folder)


def test_folder_of_other_containers_is_read(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name in ("a.ts", "b.MPG", "c.flv"):
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text(name)
    assert [record.video.name for record in read_manifest(folder)] == ["a.ts", "b.MPG", "c.flv"]


def test_four_folders_are_read(folder: Path, clip: Path) -> None:
    for name in ("orig", "cropped", "mask", "prompt"):
        (folder / name).mkdir()
    for name in ("a", "b"):
        shutil.copy(clip, folder / "orig" / f"{name}.mp4")
        (folder / "prompt" / f"{name}.txt").write_text(name)
    shutil.copy(clip, folder / "cropped" / "a.mp4")
    shutil.copy(folder / "ref.png", folder / "mask" / "a.png")
    one, two = read_manifest(folder)
    assert (one.src_video, one.src_mask) == (folder / "cropped/a.mp4", folder / "mask/a.png")
    assert (two.src_video, two.src_mask) == (None, None)


def test_empty_folder_says_what_it_should_hold(tmp_path: Path) -> None:
    with raises(DataError, "no clips", ".txt", where=tmp_path):
        scan_manifest(tmp_path)


def test_import_writes_the_lists_of_the_guide(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.csv").write_text(as_csv(DIFFSYNTH))
    before = read_manifest(folder)
    vace(["data", "import", str(folder), "--out", str(tmp_path / "lists")])
    rows = json.loads((tmp_path / "lists/data.json").read_text())
    assert rows[0] == {
        "video": "a.mp4",
        "cap": "one",
        "src_video": "control.mp4",
        "src_ref_images": None,
        "src_video_mask": "mask.mp4",
    }
    after = read_manifest(tmp_path / "lists/data.txt")
    assert [(r.video.name, r.captions, len(r.src_ref_images)) for r in after] == [
        (r.video.name, r.captions, len(r.src_ref_images)) for r in before
    ]


def test_import_writes_nothing_for_a_bad_row(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*DIFFSYNTH, {"video": "gone.mp4", "prompt": "three"}]
    (folder / "metadata.json").write_text(json.dumps(rows))
    argv = ["import", str(folder), "--out", str(tmp_path / "lists")]
    with pytest.raises(SystemExit) as caught:
        import_data(argv)
    line = capsys.readouterr().err
    assert caught.value.code == 1
    assert line.count("\n") == 1
    assert "gone.mp4" in line
    assert "--skip-bad-samples 1" in line
    assert not (tmp_path / "lists").exists()
    import_data([*argv, "--skip-bad-samples=1"])
    assert len(json.loads((tmp_path / "lists/data.json").read_text())) == 2


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        import_data(["import", *argv])
    line = capsys.readouterr().err
    assert caught.value.code == 1
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize("source", ["data.json", ".", "link.json"])
def test_import_rejects_to_overwrite_its_list(
    folder: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    (folder / "data.json").write_text(json.dumps(DIFFSYNTH))
    (folder / "link.json").symlink_to("data.json")
    line = refused([str(folder / source), "--out", str(folder)], capsys)
    assert "--out" in line
    assert "data.json" in line
    assert json.loads((folder / "data.json").read_text()) == DIFFSYNTH


def test_second_import_next_to_the_clips_says_what_to_do(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(clip, tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a clip")
    argv = [str(tmp_path), "--out", str(tmp_path)]
    import_data(["import", *argv])
    (tmp_path / "data.json").write_text((tmp_path / "data.json").read_text().replace("a clip", "edited"))
    line = refused(argv, capsys)
    assert f"data_path to {tmp_path / 'data.txt'};" in line
    assert f"delete {tmp_path / 'data.json'} and {tmp_path / 'data.txt'} first" in line
    assert "edited" in (tmp_path / "data.json").read_text()
    (tmp_path / "data.json").unlink()
    (tmp_path / "data.txt").unlink()
    import_data(["import", *argv])
    assert "a clip" in (tmp_path / "data.json").read_text()


def test_import_rejects_to_overwrite_a_caption(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caption = tmp_path / "sub" / "data.txt"
    caption.parent.mkdir()
    caption.write_text("a clip")
    shutil.copy(clip, caption.with_suffix(".mp4"))
    assert str(caption) in refused([str(tmp_path), "--out", str(caption.parent)], capsys)
    assert caption.read_text() == "a clip"


def test_import_through_a_link_writes_paths_that_are_found(clip: Path, tmp_path: Path) -> None:
    home = tmp_path / "real" / "deep" / "ds"
    home.mkdir(parents=True)
    shutil.copy(clip, home / "0.mp4")
    (home / "1.mp4").symlink_to(clip)
    names = [str(home / "0.mp4"), "1.mp4", "../ds/0.mp4"]
    rows = [{"video": name, "prompt": "one"} for name in names]
    (home / "metadata.json").write_text(json.dumps(rows))
    (tmp_path / "link").symlink_to(home)
    import_data(["import", str(tmp_path / "link"), "--out", str(tmp_path / "lists")])
    written = json.loads((tmp_path / "lists/data.json").read_text())
    assert [row["video"] for row in written] == ["0.mp4", "1.mp4", "0.mp4"]
    assert len(read_manifest(tmp_path / "lists/data.txt")) == 3


@pytest.mark.parametrize("name", ["o,2b", "o\n2b"])
def test_import_rejects_an_out_that_data_txt_cannot_hold(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (folder / "metadata.csv").write_text(as_csv(DIFFSYNTH))
    assert "--out" in refused([str(folder), "--out", str(tmp_path / name)], capsys)
    assert not (tmp_path / name).exists()


def test_import_reads_back_a_source_with_a_comma(folder: Path, tmp_path: Path) -> None:
    home = folder.rename(tmp_path / "a,b")
    (home / "metadata.csv").write_text(as_csv(DIFFSYNTH))
    import_data(["import", str(home), "--out", str(tmp_path / "lists")])
    assert len(read_manifest(tmp_path / "lists/data.txt")) == 2


@pytest.mark.parametrize("name", ["data.json", "data.txt"])
def test_import_names_a_target_that_is_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (folder / "metadata.csv").write_text(as_csv(DIFFSYNTH))
    target = tmp_path / "lists" / name
    target.mkdir(parents=True)
    line = refused([str(folder), "--out", str(tmp_path / "lists")], capsys)
    assert f"--out: {target}: " in line
    assert ".tmp" not in line
    assert [path.name for path in (tmp_path / "lists").iterdir()] == [name]


def test_data_names_its_actions(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, fact in ((["data"], "import, split"), (["data", "imprt", "x"], meant("import"))):
        with pytest.raises(SystemExit):
            vace(argv)
        line = capsys.readouterr().err
        assert fact in line
        assert line.count("\n") == 1
    assert ConfigError("x").problem == "x"
