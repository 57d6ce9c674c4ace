"""What a rank imports while it trains, imported before it starts: see ranks.py."""

import gc
from contextlib import suppress

import av  # noqa: F401
import einops._torch_specific  # noqa: F401
import pydantic.type_adapter  # noqa: F401
import torch.utils.serialization

import mindspeed_mm.distributed.pipeline_schedule  # noqa: F401
from megatron.mm.core import core

core("parallel_state")
core("optimizer_param_scheduler")
with suppress(ImportError):
    import torch.utils.tensorboard  # noqa: F401

gc.freeze()  # so that the collector of a rank skips what it inherits
