"""`python -m tests.fuzz 2000 [SEED [ENTRY…]]`: many cases at once, of all commands or of some.

Prints every fault, as a line for regressions.json, and a count.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.cases import draw
from tests.fuzz.runner import Servers


def main() -> None:
    """Run the cases."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        servers = Servers(Path(folder), int(os.environ.get("FUZZ_SERVERS", "2")))
        try:
            verdicts = servers.run(draw(Path(folder) / "world", count, seed, only=sys.argv[3:]))
        finally:
            servers.close()
    for verdict in verdicts:
        if verdict.fault:
            sys.stdout.write(f"{verdict.case}  [{verdict.kind}] {verdict.fault}\n    {verdict.said}\n")
    kinds = Counter(verdict.kind for verdict in verdicts)
    faults = Counter(verdict.kind for verdict in verdicts if verdict.fault)
    slow = max(verdicts, key=lambda verdict: verdict.seconds)
    sys.stdout.write(
        f"{len(verdicts)} cases: {dict(kinds)}; faults: {dict(faults)}; slowest {slow.seconds} s: "
        f"{slow.case}\n"
    )


if __name__ == "__main__":
    main()
