"""The guide's door to feature extraction.

torchrun … mindspeed_mm/tools/feature_extraction/get_vace_feature.py --mm-data …
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # run by its path: the folder on sys.path is this one, the packages are three floors up
    sys.path[0] = str(Path(__file__).resolve().parents[3])
    from mindspeed_mm.tasks.extract import main

    main(sys.argv[1:])
