"""Print the size of the library: files, lines of code, and the median lines of files and functions.

    python scripts/code_size.py

Lines of code exclude blank lines, comments and docstrings. The lines of files and functions include them.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mindspeed_mm", "checkpoint", "megatron")
MAX_LINES = 350  # of a file: tests/house/test_habits.py
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Count the lines of code of a module."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for text in docstrings(ast.parse(source)):
        lines.difference_update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len(lines)


def docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    """Yield the docstrings of a module and of its classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node, clean=False) is not None and isinstance(first, ast.Expr):
                yield first


def function_lines(tree: ast.Module) -> Iterator[int]:
    """Yield the number of lines of each function, from `def` to its last line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def main() -> None:
    """Print the table."""
    sources = [
        path.read_text("utf-8") for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
    ]
    lengths = [len(source.splitlines()) for source in sources]
    functions = [lines for source in sources for lines in function_lines(ast.parse(source))]
    rows = {
        "files": len(sources),
        "lines": sum(lengths),
        "lines of code": sum(map(code_lines, sources)),
        "lines per file, median": round(median(lengths)),
        f"files over {MAX_LINES} lines": sum(length > MAX_LINES for length in lengths),
        "lines per function, median": round(median(functions)),
    }
    for name, value in rows.items():
        sys.stdout.write(f"{name:28}{value:>7}\n")


if __name__ == "__main__":
    main()
