"""Output locations.

What cannot be written is one line before work begins, and a check leaves nothing behind.
"""

from __future__ import annotations

import os

import pytest

from mindspeed_mm import outputs
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.outputs import check_file, check_folder, name_problem, text_problem
from tests.support.errors import raises


@pytest.fixture
def place(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    return tmp_path


BAD = {
    "file": "a file",
    "file/save": "file",
    "dangling": "nowhere",
    "dangling/save": "nowhere",
    "loop/save": "symbolic links",
    "a\0b": "NUL",
    "a\ud800": "surrogate",
    "x" * 256: "256 bytes",
    "a/" + "猫" * 86 + "/b": "258 bytes",
    "y/" * 2040: "4080 bytes",
    "y/" * 9000: "18000 bytes",
    "/proc/save": "/proc",
    "/proc/self/a/b": "/proc/self",
}


@pytest.mark.parametrize(("path", "words"), BAD.items(), ids=range(len(BAD)))
def test_folder_that_cannot_be_made_is_named(place, monkeypatch, path, words):
    monkeypatch.chdir(place)
    before = sorted(os.listdir(place))
    with raises(ConfigError, words) as error:
        check_folder(path, "--save")
    assert error.value.where.startswith("--save")
    assert len(str(error.value)) < 400
    with pytest.raises(ConfigError):
        check_file(f"{path}/sheet.png", "--out")
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize("path", ["folder", "folder/a/b", "new", "猫" * 85, "folder/../new"])
def test_folder_that_can_be_made_passes_and_is_not_made(place, monkeypatch, path):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    check_folder(path, "--save")
    check_file(f"{path}/sheet.png", "--out")
    assert sorted(place.rglob("*")) == before


def test_read_only_folder_is_named(place, monkeypatch):
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(outputs.os, "mkdir", refuse)
    with raises(ConfigError, "--save", "folder", "Permission denied"):
        check_folder(place / "folder/new", "--save")
    check_folder(place / "folder/new", "--save", probe=False)


@pytest.mark.parametrize(
    ("path", "fact"), [("folder", "a folder"), ("/dev/null", "regular"), ("x" * 252 + ".png", 256)]
)
def test_file_that_cannot_be_written_is_named(place, monkeypatch, path, fact):
    monkeypatch.chdir(place)
    with raises(ConfigError, fact):
        check_file(path, "--out")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 251, "251 bytes"),
        ("猫" * 84, "252 bytes"),
        ("a\ud800", "surrogate"),
        ("a\nb", "control"),
        ("..", "name"),
    ],
)
def test_name_that_no_file_can_have_is_explained(name, words):
    assert words in name_problem(name, ".json")


@pytest.mark.parametrize("name", ["x" * 250, "猫" * 83, "a b", "😀", "CON"])
def test_name_that_a_file_can_have_passes(tmp_path, name):
    assert name_problem(name, ".json") == text_problem(name) == ""
    (tmp_path / f"{name}.json").touch()


def test_empty_path_is_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for check in (check_folder, check_file):
        with raises(ConfigError, where="--save"):
            check("", "--save")
    check_folder(".", "--save")
