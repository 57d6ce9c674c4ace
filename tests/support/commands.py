"""Lines of `mm-convert` that run in the test's process, which has imported everything already."""

from __future__ import annotations

import os
import shlex
from contextlib import redirect_stdout

from checkpoint.cli import main


def convert_here(block: str) -> bool:
    """Run a block of `mm-convert` lines in this process; False for any other block.

    A line may end in `> FILE`. Comments are left out.
    """
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    lines = [words for words in lines if words]
    if any(words[0] != "mm-convert" for words in lines):
        return False
    for words in lines:
        arguments, _, file = " ".join(map(shlex.quote, words[1:])).partition(" '>' ")
        with open(file or os.devnull, "w", encoding="utf-8") as out, redirect_stdout(out):
            code: str | int | None = 0
            try:
                main(shlex.split(arguments))
            except SystemExit as ended:  # --print_config ends so
                code = ended.code
        assert not code, words
    return True
