"""`python -m mindspeed_mm.serve.start_worker …`: the worker, which ends with its server from its first moment on.

Importing torch takes seconds, and a server that is killed meanwhile must not leave a process behind.
"""

from __future__ import annotations

import sys

from mindspeed_mm.log import one_line_errors


@one_line_errors
def main(argv: list[str]) -> None:
    """Watch the server, then import and run the worker."""
    import torch

    from mindspeed_mm.serve.worker import main as work

    with torch.no_grad():
        work(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
