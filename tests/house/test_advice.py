"""What an error advises exists: the flags, commands, files and JSON keys that messages name.

Read from the source with ast.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from pydantic import BaseModel

import mindspeed_mm
from checkpoint.converter import CONVERTERS
from megatron.mm.arguments import REFUSED, UNUSED
from mindspeed_mm.cli.generate import parser as generate_parser
from mindspeed_mm.cli.main import VERBS
from mindspeed_mm.cli.ranks import RankConfig
from mindspeed_mm.config.flags import flag_name
from mindspeed_mm.config.schema import Config
from mindspeed_mm.serve import main as serve
from mindspeed_mm.tasks import evaluate, prepare
from mindspeed_mm.tasks.data_import import import_parser
from mindspeed_mm.tasks.data_split import split_parser
from mindspeed_mm.tasks.jobs import extract, pretrain
from mindspeed_mm.tasks.jobs.plan import plan_parser
from mindspeed_mm.tools import doctor, inspect_samples, project
from mindspeed_mm.ui import main as ui

ROOT = Path(__file__).resolve().parents[2]
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*(?:\.\w+)*")
PATH = re.compile(r"\b(?:examples|docs|scripts|tests)/[\w./-]*\w|\b[\w-]+\.sh\b")
COMMAND = re.compile(r"(?<![\w-])mm-[a-z]+\b")
VARIABLE = re.compile(r"\b(?:MINDSPEED_MM|NPUS_PER|MASTER|NODE|DISTRIBUTED|NUM|LOG|SAVE)_[A-Z_]*[A-Z]\b")
VERB = re.compile(r"(?:^|`|run |: |with )vace ([a-z]+)\b")
KEY = re.compile(
    r"\b(?:predictor|vace_dit|dataset_param|basic_parameters|tokenizer_config|ae|diffusion|model)(?:\.[a-z_]+)+"
)
LABELS = {
    "convert": "mm-convert",
    "inspect": "mm-inspect",
    "prepare": "vace prepare",
    "train": "pretrain_vace.py",
}  # how a text names a command
GRAMMAR = (
    *("checkpoint/cli", "mindspeed_mm/cli/", "mindspeed_mm/tools/launch"),
    *("mindspeed_mm/tools/json_reference", "mindspeed_mm/tools/flag_reference"),
)
OTHERS = {
    "--nproc-per-node",
    "--help",
    "--cfg",
    "--local-rank",
    "--local_rank",
    "--no-deps",
    "--force-reinstall",
    "--shm-size",
}  # torchrun's, jsonargparse's, pip's and docker's
OF_OTHER_MODULES = {
    "plan_generation": {"--generate"},
    "doctor": {"--json"},
    "doctor_machine": {"--num-workers"},
    "page": {"--faint", "--line"},  # colours of a style sheet
}  # flags that a module names and its own parser lacks
FOREIGN_FILES = {"set_env.sh"}  # CANN's


@cache
def parsers() -> dict[str, set[str]]:
    """Map commands to their flags."""
    found = {
        "train": pretrain.job_parser(),
        "extract": extract.job_parser(),
        "generate": generate_parser(),
        "inspect": inspect_samples.job_parser(),
        "prepare": prepare.job_parser(),
        "import": import_parser(),
        "split": split_parser(),
        "serve": serve.job_parser(),
        "ui": ui.job_parser(),
        "plan": plan_parser(),
        "eval": evaluate.job_parser(),
        "init": project.job_parser(),
        "doctor": doctor.job_parser(),
    }
    flags = {name: set(parser._option_string_actions) for name, parser in found.items()}
    flags["vace"] = {flag_name(name) for name in RankConfig.model_fields} | {"--config", "--help-all"}
    flags["convert"] = {f"--cfg.{name}" for schema in converter_schemas() for name in dotted(schema)}
    return flags


def converter_schemas() -> set[type[BaseModel]]:
    methods = [method for name in CONVERTERS for method in CONVERTERS.get(name).methods.values()]
    return {hint for method in methods for hint in get_type_hints(method).values() if hint is not type(None)}


def dotted(schema: type[BaseModel], stem: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield f"{stem}{name}"
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from dotted(part, f"{stem}{name}.")


def commands_of(path: Path) -> list[str]:
    """The commands in which a module's messages appear; all of them for what is shared."""
    name = str(path.relative_to(ROOT))
    only = {
        "checkpoint/": ["convert"],
        "megatron/mm/": ["train"],
        "mindspeed_mm/cli/": ["vace"],
        "mindspeed_mm/conditioning/extraction": ["extract"],
        "mindspeed_mm/config/overrides": ["train", "extract", "generate", "inspect"],
        "mindspeed_mm/data/check": ["extract", "inspect", "train"],
        "mindspeed_mm/data/readahead": ["extract"],
        "mindspeed_mm/distributed/": ["train"],
        "mindspeed_mm/generation/": ["generate"],
        "mindspeed_mm/training/": ["train"],
        "mindspeed_mm/tasks/assembly": ["train"],
        "mindspeed_mm/tasks/jobs/pretrain": ["train"],
        "mindspeed_mm/tasks/jobs/evaluation": ["train"],
        "mindspeed_mm/tasks/jobs/transforms": ["train"],
        "mindspeed_mm/tasks/pretrain": ["train"],
        "mindspeed_mm/tasks/training_": ["train"],
        "mindspeed_mm/tasks/raw_training": ["train"],
        "mindspeed_mm/tasks/jobs/extract": ["extract"],
        "mindspeed_mm/tasks/extract": ["extract"],
        "mindspeed_mm/tasks/jobs/check_parallel": ["train"],
        "mindspeed_mm/tasks/jobs/generate": ["generate"],
        "mindspeed_mm/tasks/jobs/mindspeed_json": ["generate"],
        "mindspeed_mm/tasks/generate": ["generate"],
        "mindspeed_mm/tools/inspect": ["inspect"],
        "mindspeed_mm/serve/client": ["generate"],
        "mindspeed_mm/serve/": ["serve"],
        "mindspeed_mm/ui/": ["ui"],
        "mindspeed_mm/tools/project": ["init"],
        "mindspeed_mm/tools/doctor_machine": ["doctor"],
        "mindspeed_mm/tools/doctor": ["doctor", "train"],
        "mindspeed_mm/planning/": ["plan"],
        "mindspeed_mm/evaluation/": ["eval"],
        "mindspeed_mm/tasks/evaluate": ["eval"],
        "mindspeed_mm/tasks/plan": ["plan"],
        "mindspeed_mm/tasks/jobs/plan": ["plan"],
        "mindspeed_mm/tasks/prepare": ["prepare"],
        "mindspeed_mm/tasks/data_import": ["import"],
        "mindspeed_mm/tasks/data_split": ["split"],
        "mindspeed_mm/conditioning/tasks": ["prepare"],
        "mindspeed_mm/conditioning/annotate": ["prepare"],
        "mindspeed_mm/conditioning/prepared": ["prepare"],
    }
    return next((found for stem, found in only.items() if name.startswith(stem)), list(parsers()))


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Return (line, text) of every string in a file except docstrings; values in braces are omitted.

    For the modules in GRAMMAR, whose strings define flags, only strings of errors are included.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    grammar = str(path.relative_to(ROOT)).startswith(GRAMMAR)
    roots = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)] if grammar else [tree]
    for node in (node for root in roots for node in ast.walk(root)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield node.lineno, node.value


def sources() -> list[Path]:
    folders = [ROOT / "mindspeed_mm", ROOT / "checkpoint", ROOT / "megatron"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@cache
def json_keys() -> set[str]:
    for module in pkgutil.walk_packages(mindspeed_mm.__path__, "mindspeed_mm."):
        if module.name.endswith("config") or ".jobs." in module.name:
            importlib.import_module(module.name)
    found: set[str] = set()
    left: list[type[BaseModel]] = [Config]
    while left:
        schema = left.pop()
        left += schema.__subclasses__()
        found |= set(schema.model_fields) | set(getattr(schema, "UNUSED", {}))
    return found


@cache
def variables() -> str:
    """The pages of variables, and the scripts that read them."""
    scripts = [*(ROOT / "examples/vace").rglob("*.sh"), *(ROOT / "docs").glob("reference/env.md")]
    return "\n".join(path.read_text(encoding="utf-8") for path in scripts)


def wrong(text: str, commands: list[str]) -> list[str]:
    """Return the names in a text that do not exist in each of `commands`, or in the one it mentions."""
    flags = set.intersection(*(parsers()[command] for command in commands))
    flags |= OTHERS.union(*(parsers()[command] for command, label in LABELS.items() if label in text))
    flags |= {flag for flag in {*UNUSED, *REFUSED} if "train" in commands}
    bad = [
        flag for flag in FLAG.findall(text) if flag not in flags and not flag.endswith("-")
    ]  # cut by a brace
    bad += [f"{path}: no such file" for path in PATH.findall(text) if not exists(path)]
    bad += [f"{name}: no such command" for name in COMMAND.findall(text) if name not in LABELS.values()]
    bad += [f"{name}: nothing reads it" for name in VARIABLE.findall(text) if name not in variables()]
    bad += [f"vace {verb}: no such verb" for verb in VERB.findall(text) if verb not in VERBS]
    keys = json_keys() | {"json"}
    bad += [
        f"{key}: no such key"
        for key in KEY.findall(text)
        if "{" not in text and key.rsplit(".")[-1] not in keys
    ]
    return bad


def exists(path: str) -> bool:
    if path in FOREIGN_FILES or (ROOT / path).exists() or (ROOT / f"{path}.sh").exists():
        return True
    return "/" not in path and any((ROOT / "examples").rglob(path))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_advice_in_messages_exists(path: Path) -> None:
    commands = commands_of(path)
    known = OF_OTHER_MODULES.get(path.stem, set())
    found = [
        f"{path.name}:{line}: {bad}"
        for line, text in texts(path)
        for bad in wrong(text, commands)
        if bad not in known
    ]
    assert not found, "\n" + "\n".join(found)


def test_advice_for_rejected_flags_exists() -> None:
    advice = [
        str(part) for entry in REFUSED.values() for part in (entry if isinstance(entry, tuple) else (entry,))
    ]
    assert not [bad for text in advice for bad in wrong(text, ["train"])]


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("give --no-such-flag", "train"),
        ("give --cfg.bse_path", "convert"),
        ("give --from-latents", "train"),
        ("see docs/gone.md", "train"),
        ("run mm-fetch", "train"),
        ("set predictor.init_from_trunks", "train"),
        ("raise MINDSPEED_MM_MAX_PIXEL_COUNT", "train"),
        ("run vace fetch", "train"),
    ],
)
def test_wrong_advice_is_found(text: str, command: str) -> None:
    assert wrong(text, [command])


def test_shared_advice_names_the_command_of_a_flag() -> None:
    shared = list(parsers())
    assert wrong("name it with --cfg.base_path", shared)
    assert not wrong("name it with --cfg.base_path (mm-convert)", shared)


def test_ascend_variables_are_explained_in_both_languages() -> None:
    pages = [ROOT / "docs/reference/env.md", ROOT / "docs/zh/reference/env.md"]
    ours, theirs = (
        set(re.findall(r"^\| `([A-Z_]+)`", p.read_text().partition("## Ascend")[2], re.M)) for p in pages
    )
    assert ours == theirs
    exported = set(
        re.findall(r"\b((?:ASCEND|HCCL|NPU|ACLNN)_[A-Z_]+)=", (ROOT / "examples/vace/common.sh").read_text())
    )
    assert exported - {"NPUS_PER_NODE", "ASCEND_ENV"} <= ours
