"""Generate videos with VACE.

python Wan-VACE-Inference.py CONFIG.json [--key value…]; --help lists every key.
"""

import sys
from pathlib import Path

try:
    from mindspeed_mm.tasks.generate import main
except ModuleNotFoundError as error:
    if error.name != "mindspeed_mm":
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # run from a checkout that is not installed
    from mindspeed_mm.tasks.generate import main

if __name__ == "__main__":
    main()
