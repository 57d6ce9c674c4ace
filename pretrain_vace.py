"""torchrun's door to pre-training: `torchrun … pretrain_vace.py --mm-model … --mm-data …`."""

import sys

from mindspeed_mm.tasks.pretrain import main

if __name__ == "__main__":
    main(sys.argv[1:])
