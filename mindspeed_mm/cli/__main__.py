"""`python -m mindspeed_mm.cli`. The launcher runs this file by its path."""

import os
import sys

if not __package__:  # run by its path, so keep this folder from shadowing the standard library's inspect
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mindspeed_mm.cli.main import main

if __name__ == "__main__":
    main()
