"""`vace prepare --data`: what it makes is what extraction reads.

Nothing is made twice, lost or half written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.data.config import FeatureDatasetConfig
from mindspeed_mm.data.dataset import FeatureDataset
from mindspeed_mm.data.video import open_video
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.tasks.extract import main as extract
from tests.support.extract_job import make_job
from tests.support.scenes import moving_disc, texture

pytestmark = pytest.mark.medium

RECIPE = """
seed: 5
variants: 2
tasks:
  hole: {task: inpainting_bbox, options: {bbox: ['10,10,30,30']}}
  framerefext: {options: {mode: {choice: [first, random]}, ref_num: {integers: [1, 3]}}}
  gray: {}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    frames, _ = moving_disc(9, 48, 64, 8, 2)
    rows: list[dict[str, Any]] = []
    for number in range(4):
        write_video(folder / f"clip{number}.mkv", np.roll(frames, number, 1), 16, lossless=True)
        rows.append({"video": f"clip{number}.mkv", "cap": f"a disc {number}"})
    rows[1]["src_ref_images"] = ["ref.png"]
    rows[2]["cap"] = ["one", "two"]
    Image.fromarray(frames[0]).save(folder / "ref.png")
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def prepare(data: Path, out: Path, *more: str, listing: str = "data.json") -> None:
    recipe = [] if "--task" in more else ["--recipe", str(data / "recipe.yaml")]
    main(["prepare", "--data", str(data / listing), *recipe, "--out", str(out), "--num-workers", "0", *more])


def files(out: Path) -> dict[str, bytes]:
    """All but pictures of H.264 frames.

    x264 reads memory that it never wrote, and the last bits follow from that.
    """
    found = [path for path in sorted(out.rglob("*")) if path.is_file()]
    contents = {
        str(p.relative_to(out)): p.read_bytes()
        for p in found
        if p.suffix != ".mp4" and "sheets" not in p.parts
    }
    for name, content in contents.items():
        if name.endswith("prepare.json"):
            record = json.loads(content)
            del record["files"]["src_video.mp4"]
            contents[name] = json.dumps(record).encode()
    return contents


def same(first: Path, second: Path) -> bool:
    """Equal files, and clips that look similar."""
    clips = sorted(path.relative_to(first) for path in first.rglob("*.mp4"))
    for clip in clips:
        pixels = [open_video(out / clip).read(range(9)).astype(int) for out in (first, second)]
        if abs(pixels[0] - pixels[1]).mean() > 1:
            return False
    return bool(clips) and files(first) == files(second)


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "set"
    prepare(data, out)
    return out


def test_rows_have_the_keys_of_a_data_json(prepared: Path) -> None:
    rows = json.loads((prepared / "data.json").read_text())
    assert len(rows) == 8
    assert rows[4]["cap"] == ["one", "two"]
    assert all(len(row["src_ref_images"]) == 1 for row in rows[2:4])
    for row in rows:
        clip = open_video(prepared / row["video"])
        for key in ("src_video", "src_video_mask"):
            if key in row:
                other = open_video(prepared / row[key])
                assert (other.num_frames, other.height, other.width) == (9, 48, 64)
        assert clip.num_frames == 9
        assert ("src_video_mask" in row) == ("gray" not in row["video"])
    assert {path.stem for path in (prepared / "sheets").iterdir()} == {"hole", "framerefext", "gray"}
    assert not (prepared / "failed.jsonl").exists()


def test_many_processes_make_the_same_files(data: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "two", "--num-workers", "2")
    assert same(tmp_path / "two", prepared)


def test_second_run_makes_only_what_changed(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    prepare(data, out, "--task", "gray")
    times = {path: path.stat().st_mtime_ns for path in (out / "rows").rglob("*")}
    half = out / "rows/000001-0-gray"
    (half / "prepare.json").unlink()
    prepare(data, out, "--task", "gray")
    changed = {path for path in (out / "rows").rglob("*") if path.stat().st_mtime_ns != times[path]}
    assert {path.relative_to(half).parts[:1] for path in changed if path != half} <= {
        ("prepare.json",),
        ("src_video.mp4",),
    }
    assert changed
    prepare(data, out, "--task", "gray", "--compat", "official")
    assert all(path.stat().st_mtime_ns != times[path] for path in (out / "rows").rglob("src_video.mp4"))


@pytest.fixture(scope="module")
def gray(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows, finished once; each test restores what it breaks, through the command."""
    (data / "two.json").write_text(json.dumps(json.loads((data / "data.json").read_text())[:2]))
    out = tmp_path_factory.mktemp("gray") / "set"
    prepare(data, out, "--task", "gray", listing="two.json")
    return out


def damage(row: Path, kind: str) -> None:
    record = json.loads((row / "prepare.json").read_text())
    clip = row / "src_video.mp4"
    if kind == "deleted":
        clip.unlink()
    elif kind == "cut":
        os.truncate(clip, clip.stat().st_size // 2)
    elif kind == "flipped":  # with the size and timestamp of before
        status, content = clip.stat(), bytearray(clip.read_bytes())
        content[len(content) // 2] ^= 1
        clip.write_bytes(content)
        os.utime(clip, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif kind == "no link":
        (row / record["video"]).unlink()
    elif kind.startswith("without "):
        del record[kind.removeprefix("without ")]
        (row / "prepare.json").write_text(json.dumps(record))
    else:
        (row / "prepare.json").write_text(json.dumps({**record, **json.loads(kind)}))


@pytest.mark.parametrize(
    "kind",
    [
        *("deleted", "cut", "flipped", "no link"),
        *("without video", "without notes", "without src_ref_images"),
        *('{"notes": 5}', '{"notes": [["a"]]}', '{"src_ref_images": 5}', '{"src_video": 5}'),
        *('{"video": "../../../etc/passwd"}', '{"video": "/etc/passwd"}', '{"src_ref_images": [".."]}'),
        *('{"files": 5}', '{"files": {"../../data.json": {"size": 1, "crc32": 1}}}', '{"video": ""}'),
    ],
)
def test_damaged_row_is_recreated(data: Path, gray: Path, kind: str) -> None:
    listing = (gray / "data.json").read_text()
    row, other = gray / "rows/000000-0-gray", gray / "rows/000001-0-gray/prepare.json"
    time_stamp = other.stat().st_mtime_ns
    damage(row, kind)
    prepare(data, gray, "--task", "gray", listing="two.json")
    record = json.loads((row / "prepare.json").read_text())
    clip = (row / "src_video.mp4").read_bytes()
    assert record["files"] == {"src_video.mp4": {"size": len(clip), "crc32": zlib.crc32(clip)}}
    assert record["video"] == "video.mkv"
    assert record["notes"] == []
    assert (row / "video.mkv").samefile(data / "clip0.mkv")
    assert (gray / "data.json").read_text() == listing
    assert other.stat().st_mtime_ns == time_stamp


def test_rows_without_checksums_are_kept(data: Path, gray: Path) -> None:
    row = gray / "rows/000000-0-gray"
    damage(row, "without files")
    before = (row / "prepare.json").stat().st_mtime_ns
    prepare(data, gray, "--task", "gray", listing="two.json")
    assert (row / "prepare.json").stat().st_mtime_ns == before
    damage(row, "deleted")
    prepare(data, gray, "--task", "gray", listing="two.json")
    assert (row / "src_video.mp4").is_file()


def test_failed_rows_are_listed_and_the_others_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = write_video(data / "short.mkv", texture(48, 64, 0, 0, 255)[None], 16, lossless=True)
    rows = [
        {"video": "clip0.mkv", "cap": "a"},
        {"video": "absent.mkv", "cap": "b"},
        {"video": short.name, "cap": "c"},
    ]
    (data / "some.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit) as caught:
        prepare(data, tmp_path, "--task", "flow", listing="some.json")
    assert caught.value.code == 1
    assert "2 of 3" in capsys.readouterr().err
    failed = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert [line["row"] for line in failed] == [1, 2]
    assert "1 frame" in failed[1]["problem"]
    assert failed[1]["fix"]
    assert "some.json[2]" in failed[1]["where"]
    assert len(json.loads((tmp_path / "data.json").read_text())) == 1
    rows[1:] = []
    (data / "some.json").write_text(json.dumps(rows))
    prepare(data, tmp_path, "--task", "flow", listing="some.json")
    assert not (tmp_path / "failed.jsonl").exists()


def test_rows_own_mask_matches_mode_mask(data: Path, tmp_path: Path) -> None:
    _, masks = moving_disc(9, 48, 64, 8, 2)
    write_video(data / "mask.mkv", np.repeat(masks[..., None], 3, -1), 16, lossless=True)
    rows = [{"video": "clip0.mkv", "cap": "a", "src_video_mask": "mask.mkv"}]
    (data / "masked.json").write_text(json.dumps(rows))
    prepare(data, tmp_path, "--task", "inpainting", "--mode", "mask", listing="masked.json")
    row = json.loads((tmp_path / "data.json").read_text())[0]
    assert (open_video(tmp_path / row["src_video_mask"]).read(range(9))[..., 0] == masks).all()


def test_prepare_rejects_to_overwrite_its_list(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.json").write_text((data / "data.json").read_text().replace('"clip', f'"{data}/clip'))
    before = (tmp_path / "data.json").read_text()
    for listing in (tmp_path, tmp_path / "data.json"):
        with pytest.raises(SystemExit) as caught:
            main(["prepare", "--data", str(listing), "--task", "gray", "--out", str(tmp_path)])
        assert caught.value.code == 1
        assert "--out" in capsys.readouterr().err
    assert (tmp_path / "data.json").read_text() == before


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        (["--recipe", "no.yaml"], "no.yaml"),
        ([], "--recipe"),
        (["--task", "outpainting"], "outpainting_inner"),
        (["--task", "gray", "--video", "a.mp4"], "--video"),
        (["--task", "gray", "--seed", "x"], "--seed"),
    ],
)
def test_bad_input_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], fact: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["prepare", "--data", str(data / "data.json"), "--out", str(tmp_path / "out"), *argv])
    assert caught.value.code == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert fact in line
    assert not (tmp_path / "out").exists()


def test_killed_run_resumes_where_it_was(data: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    argv = [sys.executable, "-m", "mindspeed_mm.cli", "prepare", "--data", str(data / "data.json")]
    argv += ["--recipe", str(data / "recipe.yaml"), "--out", str(out), "--num-workers", "1"]
    run = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = wait_for_rows(out / "rows", 1)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    first = next(done)
    before = first.stat().st_mtime_ns
    half = out / "rows" / f".000099-0-gray.{run.pid}-1-00000000.tmp"
    half.mkdir()
    prepare(data, out)
    assert first.stat().st_mtime_ns == before
    assert same(out, prepared)
    assert not [path for path in (out / "rows").iterdir() if path.name.startswith(".") and path != half]


def wait_for_rows(rows: Path, count: int) -> Iterator[Path]:
    for _ in range(600):
        found = sorted(rows.glob("0*/prepare.json"))
        if len(found) >= count:
            return iter(found)
        time.sleep(0.1)
    raise AssertionError("no row was made in a minute")


def test_extraction_reads_what_was_prepared(prepared: Path, tmp_path: Path) -> None:
    flags = make_job(tmp_path)
    values = json.loads((tmp_path / "data.json").read_text())
    values["dataset_param"]["basic_parameters"]["data_path"] = str(prepared / "data.json")
    (tmp_path / "data.json").write_text(json.dumps(values))
    extract(flags)
    listing = tmp_path / "out/data.jsonl"
    features = FeatureDataset(
        FeatureDatasetConfig(dataset_type="feature", basic_parameters={"data_path": str(listing)})
    )
    assert len(features) == 8
    assert {features[index].num_refs for index in range(8)} == {0, 1}
