"""Every command in a page is understood by the program that it names.

Blocks run in bash, with recorders in place of the programs.

What takes no minutes runs for real elsewhere: the guide (tests/examples/test_guide.py), convert.md, serve.md,
the quickstart.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from checkpoint import cli as mm_convert
from checkpoint.converter import CONVERTERS
from mindspeed_mm.cli.command import prepare
from mindspeed_mm.cli.main import VERBS
from mindspeed_mm.config.flags import FlagParser
from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.tasks.jobs import extract, generate, pretrain
from mindspeed_mm.tools import inspect_samples
from tests.house.test_advice import FLAG, OTHERS, REFUSED, UNUSED, parsers
from tests.house.test_packaging import FENCE, ROOT, documents, setup_arguments

pytestmark = pytest.mark.medium

PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
OF_OTHER_PROGRAMS = {"--no-deps", "--python-version", "--only-binary"}  # pip
MADE_UP = {"--key", "--x", "--y"}
ASSIGNMENT = re.compile(r"^((?:[A-Z][A-Z0-9_]*=\S* )+)(?:bash|python|vace|mm-\w+) ", re.MULTILINE)
PROGRAMS = (
    "vace",
    "mm-convert",
    "mm-inspect",
    "bash",
    "python",
    "python3",
    "pip",
    "curl",
    "torchrun",
    "git",
    "pip-audit",
)
OF_THE_SHELL = ("cd", "source", "cat")
RECORDER = "".join(f"{name}() {{ printf '%s\\0' {name} \"$@\" END >&3; }}\n" for name in PROGRAMS)
RECORDER += "".join(f"{name}() {{ :; }}\n" for name in OF_THE_SHELL)
RECORDER += 'mkdir() { command -p mkdir "$@"; }\nSAVE_PATH=save\nPATH=/nowhere\n'
PAGES = [path for path in documents() if FENCE.search(path.read_text(encoding="utf-8"))]


def commands(text: str, folder: Path) -> list[list[str]]:
    """The words of each program that a page's shell blocks start."""
    found: list[list[str]] = []
    for block in FENCE.findall(text):
        with (folder / "words").open("w+b") as words:
            script = f"exec 3>>{folder / 'words'}\n{RECORDER}{block}"
            done = subprocess.run(["bash", "-eu", "-c", script], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stderr}"
            said = words.read().decode().split("\0END\0")
        found += [line.split("\0") for line in said if line]
    return found


def script_parser(path: str) -> Callable[[], FlagParser] | None:
    """Whose flags follow a script's name."""
    name = Path(path).name
    if name.startswith("pretrain"):
        return pretrain.job_parser
    known: dict[str, Callable[[], FlagParser]] = {
        "feature_extraction.sh": extract.job_parser,
        "generate.sh": generate.job_parser,
    }
    return known.get(name)


def check_vace(words: list[str]) -> None:
    if words and words[0] in VERBS:
        prepare(import_module(f"mindspeed_mm.cli.{words[0]}").COMMAND, words[1:])
    else:
        assert not words or words[0] == "--help", words


def check_mm_convert(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] not in CONVERTERS and words[0] != "--help":
        return  # of an outside package: docs/extend
    (folder / "settings.yaml").write_text("cfg: {source_path: a, target_path: b}\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        mm_convert.main([*words, *(["--print_config"] if words[0] in CONVERTERS else [])])
    assert ended.value.code in (0, None), words
    monkeypatch.chdir(ROOT)


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert find_spec(words[1].partition(".")[0] if words[1].startswith("torch.") else words[1]), words
        return
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    if words[0].endswith("Wan-VACE-Inference.py"):
        check_vace(["generate", *words[1:]])  # the same flags, and spelt with underscores too
        return
    flags = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in source and f'"{flag[2:]}"' not in source]
    assert not unknown, words


def check_pip(words: list[str]) -> None:
    known = ast.literal_eval(setup_arguments()["extras_require"])
    extras = [
        name for word in words for found in re.findall(r"^\.\[(.*)\]$", word) for name in found.split(",")
    ]
    assert set(extras) <= set(known), words
    assert all((ROOT / file).is_file() for flag, file in pairwise(words) if flag == "-c")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for program, *words in commands(page.read_text(encoding="utf-8"), tmp_path):
        try:
            if program == "vace":
                check_vace(words)
            elif program == "mm-convert":
                check_mm_convert(words, tmp_path, monkeypatch)
            elif program == "mm-inspect":
                inspect_samples.job_parser().parse_strict(words)
            elif program == "bash":
                assert (ROOT / words[0]).is_file(), words
                if parser := script_parser(words[0]):
                    parser().parse_strict(words[1:])
            elif program.startswith("python") and words[:2] != ["-m", "venv"]:
                check_python(words)
            elif program == "pip":
                check_pip(words)
        except MindSpeedMMError as error:
            pytest.fail(f"{program} {' '.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_before_a_command_are_read(page: Path) -> None:
    """By a script, or by the library."""
    sources = [
        *(ROOT / "examples").rglob("*.sh"),
        *(ROOT / "scripts").rglob("*.sh"),
        *(ROOT / "mindspeed_mm").rglob("*.py"),
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    shell = "\n".join(FENCE.findall(page.read_text(encoding="utf-8")))
    names = {word.partition("=")[0] for hit in ASSIGNMENT.findall(shell) for word in hit.split()}
    unread = [name for name in names - {"PYTHONPATH"} if not re.search(rf"\b{name}\b", text)]
    assert not unread


def keywords(function: str) -> set[str]:
    """The arguments of a method of VacePipeline, read without torch."""
    tree = ast.parse((ROOT / "mindspeed_mm/generation/pipeline.py").read_text(encoding="utf-8"))
    found = next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function
    )
    return {argument.arg for argument in [*found.args.args, *found.args.kwonlyargs]}


@pytest.mark.parametrize(
    "page",
    [path for path in documents() if "```python" in path.read_text("utf-8")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_python_of_a_page_names_what_exists(page: Path) -> None:
    for block in PYTHON.findall(page.read_text(encoding="utf-8")):
        if block.startswith(("# setup.py", "entry_points")):
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("mindspeed_mm", "checkpoint")
            ):
                home = ROOT.joinpath(*str(node.module).split("."))
                source = next(
                    path for path in (home.with_suffix(".py"), home / "__init__.py") if path.is_file()
                )
                known = source.read_text(encoding="utf-8")
                missing = [name.name for name in node.names if not re.search(rf"\b{name.name}\b", known)]
                assert not missing, f"{node.module}: {missing}"
            if isinstance(node, ast.Call):
                called = {"pipe": "__call__", "VacePipeline.from_pretrained": "from_pretrained"}.get(
                    ast.unparse(node.func)
                )
                unknown = {word.arg for word in node.keywords} - keywords(called) if called else set()
                assert not unknown, f"{called}: {unknown}"


@pytest.mark.parametrize("page", ["docs/coming_from.md", "docs/zh/coming_from.md"])
def test_rows_of_videox_fun_become_rows_of_ours(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"file_path": "train/1.mp4", "text": "A ball.", "type": "video", "control_file_path": "canny/1.mp4"}
    Path("metadata.json").write_text(json.dumps([row | {"width": 832, "object_file_path": ["object/1.jpg"]}]))
    block = next(
        block
        for block in PYTHON.findall((ROOT / page).read_text(encoding="utf-8"))
        if "metadata.json" in block
    )
    subprocess.run([sys.executable, "-c", block], check=True)
    (read,) = json.loads(Path("data.json").read_text())
    assert read == {
        "video": "train/1.mp4",
        "cap": "A ball.",
        "src_video": "canny/1.mp4",
        "src_ref_images": ["object/1.jpg"],
    }


def flags_in_text(page: Path) -> set[str]:
    """The flags that a page's sentences name; of another project's table, only those on our side."""
    found: set[str] = set()
    for line in re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S).splitlines():
        ours = line.rstrip(" |").rpartition("|")[2] if page.name == "coming_from.md" else line
        found |= {flag for code in CODE.findall(ours) for flag in FLAG.findall(code)}
    return found


@pytest.mark.parametrize("page", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_that_a_page_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md" or "results" in page.parts:
        pytest.skip("history keeps the names of its time")
    known = (
        set.union(*parsers().values())
        | OTHERS
        | {*UNUSED, *REFUSED}
        | OF_OTHER_PROGRAMS
        | MADE_UP
        | {*mm_convert.ALIASES}
    )
    sources = [
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
        *(ROOT / "tests/support").glob("*.py"),
    ]
    elsewhere = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    unknown = [
        flag for flag in flags_in_text(page) if flag.replace("_", "-") not in known and flag not in known
    ]
    unknown = [flag for flag in unknown if not flag.endswith("-") and f'"{flag}"' not in elsewhere]
    assert not [flag for flag in unknown if f'"{flag[2:]}"' not in elsewhere]  # of a loop over names
