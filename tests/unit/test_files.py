"""One reader for every text and JSON file.

Encodings, ends of lines, nesting, numbers, keys, and what is no file at all.
"""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError, DataError, WeightsError
from mindspeed_mm.files import (
    display_path,
    format_json,
    json_lines,
    parse_json,
    read_json,
    read_json_object,
    read_text,
    regular_file,
    write_json,
    write_json_lines,
    write_text,
)
from mindspeed_mm.text_encoding import decode_text, split_lines
from tests.support.errors import names, raises

AWKWARD = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven 彩色"


def failure(path: Path | str, error: type[Exception] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        read_json(path, error)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "f.json"
    path.write_bytes(data)
    return path


def test_text_with_a_byte_order_mark_reads_as_without(tmp_path: Path) -> None:
    assert read_json(written(tmp_path, b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_and_utf32_are_named(encoding: str, tmp_path: Path) -> None:
    with raises(ConfigError, encoding[:6].upper()) as caught:
        read_json(written(tmp_path, '{"a": "text"}'.encode(encoding)))
    assert caught.value.expected == "UTF-8"


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        ("一只猫在打架", "gbk", "GBK"),
        ("一隻紅色的球在雪地上滾動，鏡頭緩慢推進", "big5", "Big5"),
        ("un café noir", "cp1252", "Latin-1"),
        ("crème brûlée, «Große Übergröße» – it’s “naïve”", "cp1252", "Latin-1"),
    ],
)
def test_other_encodings_are_named_with_their_line(text: str, encoding: str, name: str) -> None:
    with raises(DataError, "data.txt:2", name):
        decode_text(b"first\n" + text.encode(encoding), "data.txt", DataError)


def test_binary_file_is_not_text(tmp_path: Path) -> None:
    assert "binary" in failure(written(tmp_path, b"PK\x03\x04" + bytes(20) + b"abcdefgh" * 20))


def test_lines_end_at_line_feeds_only() -> None:
    assert split_lines(f"{AWKWARD}\r\nb\n\nc") == [AWKWARD, "b", "", "c"]
    assert split_lines("") == []


def test_json_lines_keep_their_numbers() -> None:
    assert list(json_lines('{"a": 1}\r\n\n"b"\n', "f", DataError)) == [(1, {"a": 1}), (3, "b")]
    with raises(DataError, "JSON", where="f:3:2"):
        list(json_lines("1\n2\n{a\n", "f", DataError))


@pytest.mark.parametrize("values", [{"cap": AWKWARD}, {"cap": "\ud800 alone"}])
def test_what_is_written_reads_back(values: dict[str, str], tmp_path: Path) -> None:
    text = format_json(values)
    assert len(text.splitlines()) == 1
    assert parse_json(text, "f", lone_surrogates=True) == values
    write_json(tmp_path / "f.json", values)
    write_json_lines(tmp_path / "f.jsonl", [values, values])
    lines = read_text(tmp_path / "f.jsonl")
    assert [value for _, value in json_lines(lines, "f", DataError, lone_surrogates=True)] == [values, values]


@pytest.mark.parametrize(
    ("text", "place", "fact"),
    [
        ('{\n  "a": 1,\n}', "3:1", ""),
        ("", "1:1", ""),
        ("{'a': 1}", "1:2", ""),
        ('{"a": 1,\n "b": 2, "a": 3}', "2:10", "'a' occurs twice"),
        ('{"a":\n NaN}', "2:2", "NaN"),
        ('{"a": -Infinity}', "1:7", "Infinity"),
        ('{"a": 1e999}', "1:7", "1e999"),
        ('{"a":\n ' + "9" * 5000 + "}", "2:2", "5000 digits"),
        ("[" * 100_000 + "]" * 100_000, "1:1", "nested"),
        ("[" * 300 + "]" * 300, "1:1", "nested"),
        ('{"a": "\\ud83d"}', "1:1", "surrogate"),
    ],
)
def test_broken_json_is_one_line_with_its_place(text: str, place: str, fact: str, tmp_path: Path) -> None:
    path = written(tmp_path, text.encode())
    with raises(WeightsError, "JSON", where=f"{path}:{place}") as caught:
        read_json(path, WeightsError)
    assert fact in caught.value.problem


@pytest.mark.parametrize(
    "text", ['"\\ud83d\\ude00"', '"\\u5f69 \\\\ud800"', "[1e-4, -3, 18446744073709551616]"]
)
def test_sound_json_reads_as_the_standard_library_does(text: str) -> None:
    assert parse_json(text, "f") == json.loads(text)


def test_list_in_place_of_an_object_is_named(tmp_path: Path) -> None:
    with raises(WeightsError, "JSON object", "a list"):
        read_json_object(written(tmp_path, b"[1]"), WeightsError)


def test_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with raises(ConfigError, "got 11 bytes", "10 bytes"):
        read_text(written(tmp_path, b"x" * 11), max_bytes=10)


def test_small_text_takes_little_memory(tmp_path: Path) -> None:
    path = written(tmp_path, b"x" * 11)
    tracemalloc.start()
    try:
        read_text(path, max_bytes=4 << 30)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_special_files_are_rejected_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("sock")
        assert "FIFO" in failure("pipe")
        assert "socket" in failure("sock")
    assert "device" in failure("/dev/zero")
    assert "folder" in failure(tmp_path)


def test_impossible_and_missing_paths_are_one_line(tmp_path: Path) -> None:
    message = failure(tmp_path / "none.json")
    assert "none.json" in message
    assert "no such" in message
    assert str(Path.cwd()) in message
    assert "NUL" in failure("a\0b.json")
    assert "too long" in failure(tmp_path / ("x" * 300))
    assert len(failure("y" * 100_000)) < 500
    (tmp_path / "f").write_text("x")
    message = failure(tmp_path / "f" / "g.json")
    assert names(message, "no such", "parent", "folder")
    assert str(Path.cwd()) not in message
    (tmp_path / "loop").symlink_to("loop")
    assert "itself" in failure(tmp_path / "loop")
    assert display_path("a\nb") == "a\\nb"


def test_dangling_link_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("../blobs/0a1b")
    assert "../blobs/0a1b" in failure(tmp_path / "link.json")


def test_git_lfs_pointer_is_named_with_its_size(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 34700000000\n")
    with raises(WeightsError, "LFS pointer", "34.7 GB"):
        regular_file(path, WeightsError)


def test_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "f.txt", "old\r\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "f.txt", "\ud800")
    assert (tmp_path / "f.txt").read_bytes() == b"old\r\n"
    assert os.listdir(tmp_path) == ["f.txt"]
