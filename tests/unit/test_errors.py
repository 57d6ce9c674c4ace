"""The exception tree, and how a command ends on one of its errors."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm import errors
from mindspeed_mm.errors import (
    ConfigError,
    DataError,
    LaunchError,
    MindSpeedMMError,
    NonFiniteError,
    TrainingError,
    WeightsError,
)
from mindspeed_mm.log import get_logger, one_line_errors, setup_logging

ROOT = Path(__file__).resolve().parents[2]


def test_every_error_is_in_the_tree_and_its_picture() -> None:
    drawn = errors.__doc__ or ""
    classes = [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)
    ]
    kinds = {ConfigError, DataError, WeightsError, LaunchError, NonFiniteError, TrainingError}
    assert {MindSpeedMMError, *kinds} == set(classes)
    for item in classes:
        assert issubclass(item, MindSpeedMMError)
        assert item.__name__ in drawn


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("no frames"), "no frames"),
        (DataError("no frames", where=Path("a.mp4")), "a.mp4: no frames"),
        (DataError("no frames", where="a.mp4", fix="leave it out"), "a.mp4: no frames; leave it out"),
        (DataError("3 frames", where="a.mp4", expected="4k+1"), "a.mp4: 3 frames; expected 4k+1"),
        (
            ConfigError("got a list", where="a.json", expected="an object"),
            "a.json: expected an object, got a list",
        ),
        (ConfigError("got 3", expected="2 or 4", fix="set 4"), "expected 2 or 4, got 3; set 4"),
    ],
)
def test_error_formats_its_fields_as_one_line(error: MindSpeedMMError, line: str) -> None:
    assert str(error) == line


@pytest.mark.parametrize("field", ["problem", "where", "expected", "fix"])
def test_message_escapes_and_cuts_what_a_file_says(field: str) -> None:
    hostile = "\x1b[2J\rDone\n\u202egpj\ud800" + "x" * 200_000 + "\u2028\x9b1A end 猫\u3000"
    fields = {"problem": "bad", field: hostile}
    line = str(DataError(fields.pop("problem"), **fields))
    assert all(character.isprintable() or character == "\u3000" for character in line)
    breaks = (r"\r", r"\n") if field == "where" else (" ", " ")
    assert rf"\x1b[2J{breaks[0]}Done{breaks[1]}\u202egpj\ud800xxx" in line
    assert "\\x9b1A end 猫\u3000" in line
    assert len(line) < 2100
    line.encode()


def test_warning_is_one_line_and_a_note_keeps_its_lines(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    logger = get_logger("test")
    logger.warning("one\n iteration 5 |\x1b[1A" + "y" * 100_000)
    logger.info("a table\n\x1b[2J of two")
    lines = capfd.readouterr().out.splitlines()
    assert [line[:20] for line in lines] == ["one iteration 5 |\\x1", "a table", r"\x1b[2J of two"]
    assert len(lines[0]) <= 4000


def test_error_keeps_its_fields_between_processes() -> None:
    error = DataError("got 3", where="a.json", expected="2 or 4", fix="set 4")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is DataError
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_error_takes_an_outer_address() -> None:
    error = DataError("no frames", where="a.mp4", fix="leave it out").at("data.txt:3")
    assert type(error) is DataError
    assert error.where == "data.txt:3: a.mp4"
    assert str(error) == "data.txt:3: a.mp4: no frames; leave it out"


@pytest.mark.parametrize(
    "kind", [ConfigError, DataError, WeightsError, LaunchError, NonFiniteError, TrainingError]
)
def test_command_ends_in_one_line_and_exit_code_1(
    kind: type[MindSpeedMMError], capsys: pytest.CaptureFixture[str]
) -> None:
    @one_line_errors
    def main() -> None:
        raise kind("data.json[17]:\n  src_mask has 40 frames")

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"{kind.__name__}: data.json[17]: src_mask has 40 frames\n"


def test_rank_of_several_says_which_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")

    @one_line_errors
    def main() -> None:
        raise LaunchError("no device")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "[rank 3] LaunchError: no device\n"


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @one_line_errors
    def broken() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        broken()

    @one_line_errors
    def bad_input() -> None:
        raise ConfigError("a typo")

    monkeypatch.setenv("MINDSPEED_MM_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="a typo"):
        bad_input()


def test_ground_floor_needs_only_the_standard_library() -> None:
    source = (
        "import mindspeed_mm.errors, mindspeed_mm.registry, mindspeed_mm.log, sys; sys.stdout.write(' "
        "'.join(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    outside = {name.split(".")[0] for name in loaded.split()} & {
        "torch",
        "pydantic",
        "numpy",
        "yaml",
        "megatron",
    }
    assert not outside


def test_no_module_of_ours_raises_a_bare_exception() -> None:
    """`raise Exception(...)` and `raise RuntimeError(...)` tell a user nothing about what to change."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("mindspeed_mm", "checkpoint", "megatron")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if ast.unparse(node.exc.func) in ("Exception", "BaseException")
    ]
    assert not found


def test_system_error_about_a_path_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def command(path: Path) -> bool:
        return path.exists()

    with pytest.raises(SystemExit) as ended:
        command(Path("x" * 5000))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert line.startswith("ConfigError: xxx")
    assert line.endswith(": File name too long")
    assert len(line) < 600


def test_system_error_without_a_path_keeps_its_traceback() -> None:
    @one_line_errors
    def command() -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        command()
