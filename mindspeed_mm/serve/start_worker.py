"""`python -m mindspeed_mm.serve.start_worker …`: starts a worker that ends when its server ends.

The worker watches the server before it imports torch. The import takes seconds, and a server that is killed
in the meantime must not leave a process behind.
"""

from __future__ import annotations

import sys

from mindspeed_mm.imports import quick_imports
from mindspeed_mm.log import one_line_errors


@one_line_errors
def main(argv: list[str]) -> None:
    """Watch the server, then import and run the worker."""
    with quick_imports():
        import torch

        from mindspeed_mm.serve.worker import main as work

    with torch.no_grad():
        work(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
