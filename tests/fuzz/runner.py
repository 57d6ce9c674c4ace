"""Hands cases to the servers, and judges what comes back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from tests.fuzz.cases import Case, may_differ
from tests.fuzz.entries import ENTRIES

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 1 << 30  # a damaged file may cost so much more than a sound one
_OURS = re.compile(r"(\[rank [^\]]*\] )?(Config|Data|Weights|Launch|Training|NonFinite)Error: .")
# Words of Python and of libraries: a reason of our own is missing.
_FOREIGN = re.compile(
    r"\b(Attribute|Type|Key|Index|Value|Runtime|Recursion|UnicodeDecode|UnicodeEncode|Assertion|Overflow|OS|Memory|Name)Error\b"
    r"|Traceback|errors\.pydantic|weights_only|Weights only|NoneType|object has no|object is not"
    r"|not supported between"
    r"|<class '|<built-in|\[Errno|enforce fail|PytorchStreamReader|at 0x[0-9a-f]{6}"
)
_DECODER = re.compile(r"^\[?\S+ @ 0x|^\[\d\d:\d\d:\d\d\]|^\s*Last message repeated")  # FFmpeg's own lines
_LONGEST = 6000  # letters of a message


@dataclass(frozen=True)
class Verdict:
    """What became of a case; `fault` is empty when that is right."""

    case: Case
    kind: str  # refused, equal, differs, unfit
    fault: str
    seconds: float
    said: str = ""


class Servers:
    """Some servers, and the results of the sound files."""

    def __init__(self, root: Path, count: int) -> None:
        pairs = [(os.pipe(), os.pipe()) for _ in range(count)]
        theirs = [(cases[0], answers[1]) for cases, answers in pairs]
        self._process = subprocess.Popen(  # one process, which forks the others once it has imported all
            [sys.executable, "-m", "tests.fuzz.server", str(root), *(f"{a},{b}" for a, b in theirs)],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[number for pair in theirs for number in pair],
        )  # fmt: skip
        for descriptor in (number for pair in theirs for number in pair):
            os.close(descriptor)
        self._pipes = [
            (os.fdopen(cases[1], "w", buffering=1), os.fdopen(answers[0])) for cases, answers in pairs
        ]
        self._idle: SimpleQueue[tuple[TextIO, TextIO]] = SimpleQueue()
        for pipe in self._pipes:
            assert json.loads(pipe[1].readline() or "{}").get("ready"), "the world could not be made"
            self._idle.put(pipe)
        self.root = root
        with ThreadPoolExecutor(count) as pool:
            self.sound = dict(zip(ENTRIES, pool.map(self.ask, ENTRIES), strict=True))

    def ask(self, case: str | list[Any]) -> dict[str, Any]:
        """Run one case, or with a name the sound command."""
        pipe = self._idle.get()
        try:
            pipe[0].write(json.dumps(case) + "\n")
            answer: dict[str, Any] = json.loads(pipe[1].readline())
        finally:
            self._idle.put(pipe)
        return answer

    def run(self, cases: Iterable[Case]) -> list[Verdict]:
        """All cases, as many at a time as there are servers.

        One that took too long is tried again: the machine may be busy.
        """
        with ThreadPoolExecutor(len(self._pipes)) as pool:
            return list(pool.map(self._judged, cases))

    def _judged(self, case: Case) -> Verdict:
        values = [case.entry, case.target, case.mutator, case.seed]
        answer = self.ask(values)
        if answer["code"] < 0:
            answer = self.ask(values)
        return judge(case, answer, self.sound[case.entry])

    def close(self) -> None:
        """End the servers: nothing more comes in."""
        for pipe in self._pipes:
            pipe[0].close()
        self._process.wait()
        for pipe in self._pipes:
            pipe[1].close()


def judge(case: Case, answer: dict[str, Any], sound: dict[str, Any]) -> Verdict:
    """Our one line and exit code 1, or the result of the sound file, or what the damaged file says.

    Anything else is a fault.
    """
    code, result = answer["code"], answer["result"]
    lines = [line for line in answer["errors"].splitlines() if line.strip() and not _DECODER.match(line)]
    said = lines[-1] if lines else ""

    def verdict(kind: str, fault: str = "") -> Verdict:
        return Verdict(case, kind, fault, answer["seconds"], said[:1000])

    if "unfit" in result:
        return verdict("unfit")
    if answer["pwned"]:
        return verdict("code ran", "the file's code was executed")
    if code < 0:
        return verdict("unbounded", f"killed by signal {-code} after {answer['seconds']} s")
    if answer["peak"] > sound["peak"] + MEMORY:
        return verdict(
            "unbounded", f"{(answer['peak'] - sound['peak']) / 1e9:.1f} GB more than with sound files"
        )
    if code not in (0, 1, 2):
        return verdict("traceback", "\n".join(lines[-12:]))
    if code:
        fault = _wrong_words(lines) or (f"left behind: {answer['left'][:3]}" if answer["left"] else "")
        return verdict("refused", fault)
    if _same(result.get("digest"), sound["result"].get("digest")):
        return verdict("equal")
    return verdict("differs", "" if result["meant"] or may_differ(case) else "another result, without a word")


def _same(found: Any, expected: Any) -> bool:
    """Equal; lists of pixel means within what an encoder loses."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(
            abs(a - b) <= 4 for a, b in zip(found, expected, strict=True)
        )
    return bool(found == expected)


def _wrong_words(lines: list[str]) -> str:
    if not lines:
        return "exit code 1 without a line"
    if len(lines) > 1 or not _OURS.match(lines[0]):
        return f"{len(lines)} lines: " + " | ".join(line[:300] for line in lines[-4:])
    if len(lines[0]) > _LONGEST:
        return f"a line of {len(lines[0])} letters"
    foreign = _FOREIGN.search(lines[0])
    return f"words that are not ours ({foreign[0]})" if foreign else ""
