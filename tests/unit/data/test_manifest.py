"""data.txt and data.json: all forms that read, and every problem listed together with its address."""

import json
import os
from pathlib import Path

import pytest

from mindspeed_mm.data.manifest import read_manifest, scan_manifest
from mindspeed_mm.errors import DataError
from tests.support.errors import raises


@pytest.fixture
def dataset(tmp_path):
    """A function that writes rows and the files they name."""

    def write(rows, name="data.json", files=("v.mp4", "s.mp4", "m.png", "r.png")):
        for file in files:
            (tmp_path / file).touch()
        text = (
            "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows, ensure_ascii=False)
        )
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


FULL = {
    "video": "v.mp4",
    "cap": "x",
    "src_video": "s.mp4",
    "src_video_mask": "m.png",
    "src_ref_images": ["r.png", "r.png"],
}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_full_row_and_a_bare_row_are_read(dataset, tmp_path, name):
    full, bare = read_manifest(dataset([FULL, {"video": "v.mp4", "cap": ["红", "b"]}], name))
    assert (full.video, full.src_video, full.src_mask) == tuple(
        tmp_path / f for f in ("v.mp4", "s.mp4", "m.png")
    )
    assert full.src_ref_images == (tmp_path / "r.png",) * 2
    assert (bare.captions, bare.src_video, bare.src_mask, bare.src_ref_images) == (
        ("红", "b"),
        None,
        None,
        (),
    )
    assert (bare.address, bare.row) == (f"{name}[1]", 1)


def test_null_empty_text_and_absent_mean_the_same(dataset):
    rows = [
        {
            "video": "v.mp4",
            "cap": "x",
            **dict.fromkeys(("src_video", "src_video_mask", "src_ref_images"), nothing),
        }
        for nothing in (None, "")
    ]
    assert all(
        record.src_video is record.src_mask is None and not record.src_ref_images
        for record in read_manifest(dataset(rows))
    )


def test_data_txt_joins_datasets_and_rows_are_numbered_through(tmp_path, dataset):
    dataset([FULL])
    other = tmp_path / "other, with a comma"
    other.mkdir()
    (other / "w.mp4").touch()
    (tmp_path / "b.jsonl").write_text('\ufeff{"video": "w.mp4", "cap": "b"}\n\n', encoding="utf-8")
    (tmp_path / "data.txt").write_text(
        f"# two datasets\n{tmp_path},data.json\n\n{other} , {tmp_path}/b.jsonl\n"
    )
    records = read_manifest(tmp_path / "data.txt")
    assert [(record.address, record.row) for record in records] == [("data.json[0]", 0), ("b.jsonl[0]", 1)]
    assert records[1].video == other / "w.mp4"


def test_errors_distinguish_two_lists_of_one_name(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "data.json").write_text('[{"video": "gone.mp4", "cap": "x"}]')
    (tmp_path / "data.txt").write_text(
        f"{tmp_path}/a,{tmp_path}/a/data.json\n{tmp_path}/b,{tmp_path}/b/data.json\n"
    )
    one, two = scan_manifest(tmp_path / "data.txt").problems
    assert one.address.endswith("a/data.json[0].video")
    assert two.address.endswith("b/data.json[0].video")


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ("text", ["data.json[0]", "video", "cap"]),
        ({"cap": "x"}, ["data.json[0].video", "missing"]),
        ({**FULL, "video": 7}, ["data.json[0].video", 7]),
        ({**FULL, "video": "gone.mp4"}, ["data.json[0].video", "gone.mp4"]),
        ({**FULL, "cap": ""}, ["data.json[0].cap", "empty"]),
        ({**FULL, "cap": ["x", " "]}, ["data.json[0].cap", "empty"]),
        ({**FULL, "cap": []}, ["data.json[0].cap", "empty"]),
        ({**FULL, "cap": "\u200b\ufeff\u2060\x07"}, ["data.json[0].cap", "empty"]),
        ({**FULL, "src_ref_images": ["r.png"] * 100_000}, ["data.json[0].src_ref_images", 100_000, 256]),
        ({**FULL, "video": "v" * 300 + ".mp4"}, ["data.json[0].video", "too long"]),
        ({**FULL, "video": "v\0.mp4"}, ["data.json[0].video", "NUL"]),
        ({**FULL, "cap": {"en": "x"}}, ["data.json[0].cap", "en"]),
        ({**FULL, "src_ref_images": ["r.png", 3]}, ["data.json[0].src_ref_images", 3]),
        ({**FULL, "src_ref_images": ["r.png", "no.png"]}, ["data.json[0].src_ref_images[1]", "no.png"]),
        ({**FULL, "src_ref_images": ["../r.png"]}, ["data.json[0].src_ref_images[0]", "../r.png"]),
        ({**FULL, "src_video": "/etc/hosts"}, ["data.json[0].src_video", "/etc/hosts"]),
        ({**FULL, "src_mask": "m.png"}, ["data.json[0].src_mask", "src_video_mask"]),
        ({**FULL, "mask": "m.png"}, ["data.json[0].mask", "src_video_mask"]),
        ({**FULL, "SRC_VIDEO": "a.mp4"}, ["data.json[0].SRC_VIDEO", "src_video"]),
        ({**FULL, "caption": "x"}, ["data.json[0].caption", "cap"]),
    ],
)  # fmt: skip
def test_each_kind_of_bad_row_has_its_address_and_its_remedy(dataset, row, facts):
    with raises(DataError, *facts):
        read_manifest(dataset([row]))


def test_half_a_character_in_a_caption_is_rejected(dataset):
    with raises(DataError, "data.jsonl[0].cap", r"y\ud800"):
        read_manifest(dataset([{**FULL, "cap": ["x", "y\ud800"]}], "data.jsonl"))


def test_all_problems_are_listed_together_even_those_of_one_row(dataset):
    rows = [{"video": "a.mp4", "cap": "", "src_video": "b.mp4"}] + [
        {"video": f"{i}.mp4", "cap": "x"} for i in range(30)
    ]
    found = scan_manifest(dataset([*rows, FULL]))
    assert [problem.row for problem in found.problems] == [0, 0, 0, *range(1, 31)]
    assert len(found.records) == 1
    with raises(DataError, 31, 32, 13):
        read_manifest(dataset([*rows, FULL]))


def test_keys_of_other_tools_are_noted_once(dataset):
    found = scan_manifest(dataset([{**FULL, "num_frames": 81}, {**FULL, "num_frames": 49}]))
    (note,) = found.notes
    assert "'num_frames'" in note
    assert len(found.records) == 2


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("only/a/folder\n", ("data.txt:1", "'only/a/folder'", "`folder,path/to/data.json`")),
        ("# nothing\n", ("data.txt", "no rows")),
        ("/nowhere,data.json", ("data.txt:1", "/nowhere")),
    ],
)
def test_list_that_cannot_be_read_says_where(tmp_path, text, facts):
    (tmp_path / "data.txt").write_text(text)
    with raises(DataError, *facts):
        read_manifest(tmp_path / "data.txt")


@pytest.mark.parametrize(
    ("text", "fact"), [("[{]", "data.json:1:3"), ('{"a": 1}\n{', "data.json:2:2"), ("", "no rows")]
)
def test_json_errors_have_line_and_column(tmp_path, text, fact):
    (tmp_path / "data.json").write_text(text)
    with raises(DataError, fact):
        read_manifest(tmp_path / "data.json")


def test_caption_keeps_characters_that_end_lines_elsewhere(dataset):
    caption = "one\u2028two\x85three\x0cfour"
    assert read_manifest(dataset([{"video": "v.mp4", "cap": caption}]))[0].captions == (caption,)
    path = dataset([{"video": "v.mp4", "cap": "x"}], "data.jsonl")
    path.write_text(
        json.dumps({"video": "v.mp4", "cap": caption}, ensure_ascii=False) + "\r\n", encoding="utf-8"
    )
    assert read_manifest(path)[0].captions == (caption,)


@pytest.mark.parametrize("data", ["data.txt", "data.json", "data.jsonl", "data.csv"])
def test_another_encoding_is_named_in_every_list(tmp_path, data):
    (tmp_path / data).write_text("folder,data.json\n", encoding="utf-16")
    with raises(DataError, "UTF-16"):
        read_manifest(tmp_path / data)


def test_fifo_or_a_git_lfs_pointer_as_a_clip_is_a_bad_row(dataset, tmp_path):
    path = dataset([{"video": "pipe", "cap": "x"}, {"video": "p.mp4", "cap": "x"}, FULL])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "p.mp4").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2500000\n"
    )
    found = scan_manifest(path)
    assert [record.row for record in found.records] == [2]
    assert "FIFO" in found.problems[0].message
    assert "2.5 MB" in found.problems[1].message


def test_dataset_folder_reached_by_a_link_is_the_same_place(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "v.mp4").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "link" / "data.json").write_text(
        json.dumps([{"video": str(tmp_path / "real/v.mp4"), "cap": "x"}])
    )
    assert len(read_manifest(tmp_path / "link" / "data.json")) == 1


DIFFSYNTH = "video,prompt,vace_video,vace_video_mask,vace_reference_image\n"


def test_metadata_csv_of_diffsynth_reads_as_a_dataset(tmp_path):
    for name in ("v.mp4", "s.mp4", "m.mp4", "r.png"):
        (tmp_path / name).touch()
    rows = '\ufeffv.mp4,"a cat, and\na ""dog""",s.mp4,m.mp4,r.png\r\nv.mp4,plain\u2028text,,,\r\n'
    (tmp_path / "metadata.csv").write_text(
        "\ufeff" + DIFFSYNTH + rows.lstrip("\ufeff"), encoding="utf-8", newline=""
    )
    (tmp_path / "data.txt").write_text(f"{tmp_path},metadata.csv\n")
    for path in (tmp_path / "metadata.csv", tmp_path / "data.txt"):
        first, second = read_manifest(path)
        assert first.captions == ('a cat, and\na "dog"',)
        assert (first.src_video, first.src_mask) == (tmp_path / "s.mp4", tmp_path / "m.mp4")
        assert first.src_ref_images == (tmp_path / "r.png",)
        assert second.captions == ("plain\u2028text",)
        assert (second.src_video, second.src_ref_images, second.row) == (None, (), 1)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_table_with_our_keys_and_several_references_reads(tmp_path, delimiter):
    for name in ("v.mp4", "a.png", "b.png"):
        (tmp_path / name).touch()
    lines = [["video", "cap", "src_ref_images"], ["v.mp4", "x, y", '\'["a.png", "b.png"]\'']]
    text = "\n".join(delimiter.join(cells) for cells in lines).replace(
        '\'["a.png", "b.png"]\'', '"[""a.png"", ""b.png""]"'
    )
    (tmp_path / "t.csv").write_text(text)
    (record,) = read_manifest(tmp_path / "t.csv")
    assert record.captions == ("x, y",)
    assert record.src_ref_images == (tmp_path / "a.png", tmp_path / "b.png")


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.txt", "metadata"])
@pytest.mark.parametrize(
    "header", [DIFFSYNTH, "\ufeffcap;video\r\n", '"video"\t"prompt"\n', "video,prompt\r"]
)
def test_table_of_another_name_says_so(tmp_path, name, header):
    path = tmp_path / name
    path.write_text(header + "v.mp4,x\n", encoding="utf-8", newline="")
    with raises(DataError, name, "CSV", f"{Path(name).stem}.csv"):
        scan_manifest(path)


def test_folder_called_video_is_not_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "v.mp4").touch()
    (tmp_path / "rows.json").write_text(json.dumps([{"video": "v.mp4", "cap": "x"}]))
    (tmp_path / "data.txt").write_text("video,rows.json\n")
    assert len(read_manifest(tmp_path / "data.txt")) == 1


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (DIFFSYNTH + "v.mp4,a cat, a dog,,,,\n", "5 cells"),
        (DIFFSYNTH + 'v.mp4,"a cat\n', "t.csv:2"),
        ("video,video\nv,w\n", "column 'video'"),
        ("video,prompt,cap\nv,w,x\n", "columns"),
        ("video,cap,src_ref_images\nv,w,[\n", "t.csv:2:src_ref_images:1:2"),
        ("video,caption\nv.mp4,x\n", "t.csv[0].caption"),
        ("video,cap\n", "no rows"),
    ],
)
def test_broken_table_is_one_line_with_its_place(tmp_path, text, fact):
    (tmp_path / "t.csv").write_text(text)
    with raises(DataError, fact):
        read_manifest(tmp_path / "t.csv")
