"""The check before extraction.

Bad clips of every kind in one list, a hanging one included, and the table of what is good.
"""

import json
import logging
import os
import re

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data import content as content_module
from mindspeed_mm.data.check import check_dataset, check_manifest
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.manifest import scan_manifest
from mindspeed_mm.data.transforms import load_sample
from mindspeed_mm.errors import DataError
from tests.support.clips import turn, write_clip, write_streamable, write_variable
from tests.support.errors import absent, names, raises

CONFIG = VideoConfig(num_frames=9, max_hxw=96 * 128)


def dataset(folder, rows):
    path = folder / "data.json"
    path.write_text(json.dumps([{"cap": "x", **row} for row in rows]))
    return path


@pytest.fixture
def mixed(tmp_path):
    """Eleven rows, five of them good."""
    write_clip(tmp_path / "good.mp4", 12)
    write_clip(tmp_path / "short.mp4", 6)
    write_clip(tmp_path / "still.mp4", 1, height=144, width=256)
    write_clip(tmp_path / "cinema.mp4", 20, fps=24)
    turn(tmp_path / "still.mp4", tmp_path / "phone.mp4", 90)
    write_variable(tmp_path / "vary.mp4", [0, 30, 200, 240, 300, 620, 640])
    whole = write_streamable(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "text.mp4").write_text("not a video")
    Image.new("L", (64, 48), 255).save(tmp_path / "mask.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "ref.png")
    return dataset(
        tmp_path,
        [
            {"video": "good.mp4", "src_video": "cinema.mp4", "src_ref_images": ["ref.png", "ref.png"]},
            {"video": "cinema.mp4", "src_video_mask": "mask.png"},
            {"video": "phone.mp4"},
            {"video": "vary.mp4"},
            {"video": "short.mp4"},
            {"video": "cut.mp4"},
            {"video": "noise.mp4", "src_ref_images": ["text.mp4"]},
            {"video": "text.mp4"},
            {"video": "gone.mp4"},
            {"video": "good.mp4", "src_video": "short.mp4"},
            {"video": "good.mp4", "cap": ""},
        ],
    )


def test_every_image_of_a_mask_folder_is_looked_at(tmp_path):
    write_clip(tmp_path / "a.mp4", 5, height=48, width=64)
    for name, bad in (("good", None), ("torn", 3), ("unequal", 4)):
        (tmp_path / name).mkdir()
        for number in range(5):
            path = tmp_path / name / f"{number}.png"
            Image.effect_noise((32, 48) if (name, number) == ("unequal", bad) else (64, 48), 90).save(path)
            if (name, number) == ("torn", bad):
                path.write_bytes(path.read_bytes()[:400])
    rows = [{"video": "a.mp4", "src_video_mask": name} for name in ("good", "torn", "unequal")]
    with pytest.raises(DataError) as error:
        check_dataset(dataset(tmp_path, rows), CONFIG, workers=1)
    said = str(error.value)
    assert said.startswith("2 of 3 ")
    assert re.search(r"\[1\]\.src_video_mask: .*3\.png: ", said)
    assert re.search(r"\[2\]\.src_video_mask: .*4\.png: .*32x48.*64x48", said)


def test_every_kind_of_bad_clip_is_found_and_the_rest_is_counted(mixed, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="mindspeed_mm")
    monkeypatch.setattr(logging.getLogger("mindspeed_mm"), "propagate", True)
    report = check_dataset(mixed, CONFIG, skip_bad_samples=6, report_path=tmp_path / "bad.json", workers=2)
    assert [record.row for record in report.records] == [0, 1, 2, 3, 4]
    problems = [str(problem) for problem in report.problems]
    for place, fact in (
        ("[5].video", "cut off"),
        ("[6].video", "video"),
        ("[6].src_ref_images[0]", "image"),
        ("[7].video", "text"),
        ("[8].video", re.escape(absent(mixed.parent / "gone.mp4"))),
        ("[9].src_video", r"\b6 frames.*\b12\b"),
        ("[10].cap", "empty"),
    ):
        assert any(f"data.json{place}: " in problem and re.search(fact, problem) for problem in problems), (
            place
        )
    assert len(problems) == 7
    written = json.loads((tmp_path / "bad.json").read_text())
    assert written["usable"] == 5
    assert [row["row"] for row in written["skipped"]] == [5, 6, 6, 7, 8, 9, 10]
    table = report.summary()
    for line in (
        "5 of 11, 6 bad",
        "24 fps: 1",
        "256x144",
        "still mask of the video itself: 1",
        "2 references: 1",
        "9 (trim): 3",
    ):
        assert line in table.replace("144x256", "256x144"), line
    assert names(table, "variable")
    assert table.splitlines()[0] in caplog.messages


def test_one_bad_row_more_than_allowed_stops_with_the_list(mixed):
    with raises(DataError, "6 of 11") as caught:
        check_dataset(mixed, CONFIG, workers=0)
    advice = caught.value.fix
    assert advice
    assert "--skip-one" not in advice
    with raises(DataError, "6 of 11", "data.json[5].video") as caught:
        check_dataset(mixed, CONFIG, skip_bad_samples=5, or_else="use --skip-one", workers=0)
    assert caught.value.fix == f"{advice}, or use --skip-one"


def test_loading_gives_what_the_check_reports(mixed):
    report = check_manifest(scan_manifest(mixed), CONFIG, workers=0)
    for record, fact in zip(report.records, report.facts[:5], strict=True):
        sample = load_sample(record, CONFIG)
        assert (fact.frames, *fact.size) == tuple(sample.video.shape[1:])
        assert fact.policy == sample.frame_policy


def test_pipe_in_place_of_a_clip_costs_its_row(tmp_path):
    write_clip(tmp_path / "good.mp4", 9)
    os.mkfifo(tmp_path / "hangs.mp4")
    path = dataset(tmp_path, [{"video": "good.mp4"}, {"video": "hangs.mp4"}, {"video": "good.mp4"}])
    report = check_manifest(scan_manifest(path), CONFIG, workers=0)
    assert [record.row for record in report.records] == [0, 2]
    assert str(report.problems[0]).startswith("data.json[1].video: ")
    assert "FIFO" in report.problems[0].message


def test_dataset_without_a_good_row_is_rejected(tmp_path):
    path = dataset(tmp_path, [{"video": "gone.mp4"}])
    with raises(DataError, "1 of 1"):
        check_dataset(path, CONFIG, skip_bad_samples=9, workers=0)


def test_rejected_short_clips_are_problems_of_the_check(tmp_path):
    write_clip(tmp_path / "short.mp4", 6)
    config = CONFIG.model_copy(update={"short_clip": "reject"})
    report = check_manifest(scan_manifest(dataset(tmp_path, [{"video": "short.mp4"}])), config, workers=0)
    said = set(re.findall(r"\w+", report.problems[0].message))
    assert {"6", "16", "num_frames", "9"} <= said


def test_second_check_opens_only_what_is_new_or_was_bad(mixed, tmp_path, monkeypatch):
    first = check_manifest(scan_manifest(mixed), CONFIG, workers=0, memory=tmp_path / "state")
    opened = []
    for name in ("probe", "probe_picture"):
        once = getattr(content_module, name)
        monkeypatch.setattr(
            content_module, name, lambda path, once=once: (opened.append(path.name), once(path))[1]
        )
    again = check_manifest(scan_manifest(mixed), CONFIG, workers=0, memory=tmp_path / "state")
    assert sorted(set(opened)) == ["cut.mp4", "noise.mp4", "text.mp4"]
    assert (again.facts, again.problems, again.summary()) == (first.facts, first.problems, first.summary())
    opened.clear()
    os.utime(tmp_path / "ref.png", (1, 1))
    write_clip(tmp_path / "cinema.mp4", 16, fps=24)
    longer = VideoConfig(num_frames=17, max_hxw=96 * 128)  # other settings are no reason to open a file
    changed = check_manifest(scan_manifest(mixed), longer, workers=0, memory=tmp_path / "state")
    assert (
        {"ref.png", "cinema.mp4"}
        <= set(opened)
        <= {"ref.png", "cinema.mp4", "cut.mp4", "noise.mp4", "text.mp4"}
    )
    assert changed.facts[1].frames == 9  # 16 frames of a 24th second are 11 at 16 fps


def test_file_cached_as_clip_is_checked_as_picture(tmp_path):
    write_clip(tmp_path / "good.mp4", 12)
    write_clip(tmp_path / "reference.mp4", 12)
    path = dataset(tmp_path, [{"video": "reference.mp4"}])
    check_manifest(scan_manifest(path), CONFIG, workers=0, memory=tmp_path / "state")
    path = dataset(tmp_path, [{"video": "good.mp4", "src_ref_images": ["reference.mp4"]}])
    report = check_manifest(scan_manifest(path), CONFIG, workers=0, memory=tmp_path / "state")
    assert str(report.problems[0]).startswith("data.json[0].src_ref_images[0]: ")
    assert "reference.mp4" in report.problems[0].message
    assert "image" in report.problems[0].message


def test_cache_may_be_torn_or_unwritable(mixed, tmp_path):
    (tmp_path / "file").write_text("in the way")
    first = check_manifest(scan_manifest(mixed), CONFIG, workers=0, memory=tmp_path / "file" / "state")
    check_manifest(scan_manifest(mixed), CONFIG, workers=0, memory=tmp_path / "state")
    (kept,) = (tmp_path / "state").iterdir()
    kept.write_bytes(
        kept.read_bytes()[:-30] + b'\n["clip"]\n[1, 2, 3, 4]\n["clip", "x", "y", {"num_frames": 3}]\nnull\n'
    )
    again = check_manifest(scan_manifest(mixed), CONFIG, workers=0, memory=tmp_path / "state")
    assert again.facts == first.facts
