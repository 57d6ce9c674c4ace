"""Tests compare facts of messages, not their words: a sentence can be reworded without a change to a test.

Counted are strings of the tests with three or more words in a row that the product's strings have, too, in
places where a message is compared: asserts, `match=`, `with raises(...)`, parameters and loops.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.house.test_habits import ROOT, tracked, trees

pytestmark = pytest.mark.medium

WORDS = 3
ALLOWED = {  # file → strings, and why they stay
    "tests/distributed/test_kills.py": (1, "the line of a stopped run, which the launcher recognizes"),
    "tests/distributed/test_training_job.py": (1, "the name of a folder"),
    "tests/examples/test_outside_package.py": (2, "the name of a folder; a prompt"),
    "tests/examples/test_pipeline_road.py": (1, "the last line of a training, promised by the README"),
    "tests/examples/test_quickstart.py": (1, "the last line of a training, promised by the README"),
    "tests/examples/test_serve.py": (2, "what the test waits for, in its own words"),
    "tests/examples/test_ui.py": (1, "the heading of the page, in the language under test"),
    "tests/examples/test_vace_command.py": (1, "the last line of a training, promised by the README"),
    "tests/house/test_advice.py": (2, "advice that the test judges"),
    "tests/unit/checkpoint/test_assemble_pipeline.py": (1, "a prompt"),
    "tests/unit/conditioning/test_extraction.py": (2, "captions"),
    "tests/unit/conditioning/test_text_conditioning.py": (1, "a prompt"),
    "tests/unit/config/test_bounds.py": (1, "what the formatter of bounds writes"),
    "tests/unit/data/test_check.py": (1, "a row of the check's table"),
    "tests/unit/evaluation/test_results.py": (1, "a verdict, one of the values of a field"),
    "tests/unit/generation/test_loras.py": (1, "the name of a case"),
    "tests/unit/generation/test_pipeline.py": (2, "prompts"),
    "tests/unit/serve/test_jobs.py": (1, "SQL"),
    "tests/unit/tasks/test_extract_task.py": (3, "captions"),
    "tests/unit/tasks/test_generate_videos.py": (1, "a prompt"),
    "tests/unit/tasks/test_summary.py": (1, "lines that the test logs itself"),
    "tests/unit/test_errors.py": (3, "the formatter's own tests"),
    "tests/unit/test_registry.py": (2, "the formatter's own tests"),
    "tests/unit/tools/test_screen.py": (8, "lines of a log that the launcher recognizes or must print"),
    "tests/unit/training/hooks/test_runner.py": (1, "the address of an error"),
    "tests/unit/training/test_trainer.py": (6, "lines of the training log that tools parse"),
    "tests/unit/ui/test_ui_forms.py": (2, "a summary of the test's own; the label of a field"),
}


def phrases(text: str) -> set[str]:
    """Every WORDS words in a row; a number, a placeholder or punctuation ends the row."""
    rows = (row.split() for row in re.findall(r"[A-Za-z']+(?: [A-Za-z']+)+", text.replace(r"\b", "\0")))
    return {" ".join(row[at : at + WORDS]) for row in rows for at in range(len(row) - WORDS + 1)}


def strings(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each string below `node`; NUL stands for the values of an f-string."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        yield node.lineno, "".join(map(str, parts))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def docstrings(tree: ast.Module) -> set[str]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, owners))
    return {text for text in found if text}


def compared(tree: ast.AST) -> Iterator[ast.AST]:
    """The places of a test where a message is compared."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.test
        elif isinstance(node, ast.keyword) and node.arg == "match":
            yield node.value
        elif isinstance(node, ast.With):
            yield from (item.context_expr for item in node.items)
        elif isinstance(node, ast.FunctionDef):
            yield from node.decorator_list
        elif isinstance(node, ast.For):
            yield node.iter
        elif isinstance(node, ast.Expr) and isinstance(getattr(node.value, "func", None), ast.Name):
            yield node.value  # a helper of the test, such as `refused(path, words)`


def quotes(tree: ast.AST, said: set[str]) -> dict[int, set[str]]:
    """Lines that quote, and the words."""
    found: dict[int, set[str]] = {}
    for place in compared(tree):
        for line, text in strings(place):
            if same := phrases(text) & said:
                found.setdefault(line, set()).update(same)
    return found


def test_scan_sees_a_quoted_sentence() -> None:
    said = phrases("the moon is green tonight")
    for code in (
        "assert 'moon is green tonight' in str(error)",
        "assert re.search(r'\\bmoon is green\\b.*', line)",
        "with raises(ConfigError, f'{name}: moon is green'): pass",
        "with pytest.raises(ValueError, match='moon is green'): pass",
        "@pytest.mark.parametrize('said', ['moon is green'])\ndef test(said): pass",
        "for words in ('moon is green',): assert words in line",
        "refused(path, 'moon is green')",
    ):
        assert quotes(ast.parse(code), said), code
    assert not quotes(ast.parse("assert 'moon is' in line, 'moon is green tonight'"), said)


def test_no_test_quotes_a_sentence_of_the_product() -> None:
    said: set[str] = set()
    for where, tree in trees():
        if not where.startswith(("benchmarks", "scripts")):
            own = docstrings(tree)
            said |= {phrase for _, text in strings(tree) if text not in own for phrase in phrases(text)}
    counted = {}
    for path in tracked(".py"):
        where = str(path.relative_to(ROOT))
        if where.startswith("tests/") and (found := quotes(ast.parse(path.read_text("utf-8")), said)):
            counted[where] = found
    more = [
        f"{where}: {len(found)} strings, {ALLOWED.get(where, (0,))[0]} allowed: {found}"
        for where, found in counted.items()
        if len(found) > ALLOWED.get(where, (0,))[0]
    ]
    assert not more, "compare facts instead (tests/support/errors.py):\n" + "\n".join(more)
    assert not [where for where in ALLOWED if not (ROOT / where).is_file()]
