"""Entry point of feature extraction, at the path that the guide uses.

torchrun … mindspeed_mm/tools/feature_extraction/get_vace_feature.py --mm-data …
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # run by its path, so sys.path holds this folder; the packages are three levels up
    sys.path[0] = str(Path(__file__).resolve().parents[3])
    from mindspeed_mm.tasks.extract import main

    main(sys.argv[1:])
