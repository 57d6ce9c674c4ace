"""MindSpeed-MM's name of pretrain_vace.py, so that its scripts run.

`torchrun … pretrain_sora.py --mm-model … --mm-data …`.
"""

import sys

from mindspeed_mm.tasks.pretrain import main

if __name__ == "__main__":
    main(sys.argv[1:])
