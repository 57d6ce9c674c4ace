"""What is installed, what the constraints pin, and that the commands of the documents exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(?:shell|bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OWN_PATH = re.compile(r"(?<![\w./-])(?:examples|tests|scripts|benchmarks|mindspeed_mm|docs)/[\w./-]+\w")


def setup_arguments() -> dict[str, ast.expr]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "setup")
    return {word.arg: word.value for word in call.keywords if word.arg}


def requirements() -> list[Requirement]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    named = next(
        n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "REQUIRES"
    )
    extras = ast.literal_eval(setup_arguments()["extras_require"])
    found = [Requirement(text) for text in [*ast.literal_eval(named.value), *extras["dev"]]]
    ours = [requirement for requirement in found if requirement.name == "mindspeed-mm-vace"]
    included = [Requirement(text) for each in ours for extra in each.extras for text in extras[extra]]
    return [requirement for requirement in [*found, *included] if requirement.name != "mindspeed-mm-vace"]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_once_and_within_its_bounds(python: str) -> None:
    chosen: dict[str, str] = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            name = canonicalize_name(pin.name)
            assert name not in chosen, f"{name} is pinned twice for Python {python}"
            chosen[name] = str(pin.specifier).removeprefix("==")
    for requirement in requirements():
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
            continue
        version = chosen.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} has no line in constraints.txt for Python {python}"
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_floors_match_the_guide() -> None:
    floors = {item.name: str(item.specifier) for item in requirements()}
    assert floors["torch"] == ">=2.7.1"
    assert floors["diffusers"] == ">=0.33.1"
    assert floors["megatron-core"] == ">=0.12.1"
    assert ast.literal_eval(setup_arguments()["python_requires"]) == ">=3.10"


def test_installed_commands_exist() -> None:
    scripts = ast.literal_eval(setup_arguments()["entry_points"])["console_scripts"]
    for script in scripts:
        module, function = script.split("=")[1].split(":")
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        assert function in names, script


def test_ci_runs_exactly_the_command_of_the_readme() -> None:
    commands = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert commands[-1] == "bash tests/run.sh"
    # the lines before it may prepare the machine, and run no part of the tests
    assert not [line for line in commands[:-1] if "tests/" in line or "pytest" in line]


def documents() -> list[Path]:
    return sorted(
        [
            *ROOT.glob("*.md"),
            *ROOT.glob("docs/**/*.md"),
            *ROOT.glob("examples/**/*.md"),
            *ROOT.glob("benchmarks/*.md"),
        ]
    )


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(path: Path) -> None:
    """Paths in shell blocks and relative links lead somewhere."""
    text = path.read_text(encoding="utf-8")
    named = {hit for block in FENCE.findall(text) for hit in OWN_PATH.findall(block) if "*" not in hit}
    links = {
        hit.split("#")[0]
        for hit in re.findall(r"\]\(([^)\s]+)\)", text)
        if not hit.startswith(("http", "#", "mailto"))
    }
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [link for link in links if link and not (path.parent / link).exists()]
    assert not missing, f"{path.relative_to(ROOT)} names {missing}"


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_readme_has_both_commands(readme: str) -> None:
    blocks = "\n".join(FENCE.findall((ROOT / readme).read_text(encoding="utf-8")))
    assert "bash examples/vace/quickstart.sh" in blocks
    assert "bash tests/run.sh" in blocks


def test_both_readmes_have_the_same_content() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    assert FENCE.findall(english) == FENCE.findall(chinese)
    for kind in (
        r"!\[[^\]]*\]\((.*?)\)",
        r"^\| \[(mindspeed_mm/[\w/.]+)\]",
        r"\d+ GiB, [\d.]+ s",
        r"(`[^`]*benchmarks/[^`]*`) \|",
    ):
        found = re.findall(kind, english, re.MULTILINE)
        assert found
        assert found == re.findall(kind, chinese, re.MULTILINE), kind
    assert english.count("\n## ") == chinese.count("\n## ")


def test_wheel_holds_no_megatron_init_and_all_our_packages(tmp_path: Path) -> None:
    """Built from a copy of the tree's names alone: what setup.py would install."""
    listed = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import setuptools, json, sys; setuptools.setup = lambda **k: "
                "sys.stdout.write(json.dumps(k['packages'])); exec(open('setup.py').read().replace('from "
                "setuptools import find_namespace_packages, find_packages, setup', 'from setuptools import "
                "find_namespace_packages, find_packages\\nsetup = setuptools.setup'))"
            ),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert listed.returncode == 0, listed.stderr
    packages = __import__("json").loads(listed.stdout)
    folders = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for top in ("mindspeed_mm", "checkpoint", "megatron/mm")
        for p in (ROOT / top).rglob("*.py")
    }
    assert set(packages) >= folders, f"not installed: {sorted(folders - set(packages))}"
    assert "megatron" not in packages
