"""The `dataloader_param` part of a data JSON. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mindspeed_mm.config.schema import Config

_GROUPED = "samples of one latent shape always share a micro-batch"


class LoaderConfig(Config):
    """How the trainer walks through a dataset."""

    shuffle: bool = True
    pin_memory: bool = True
    prefetch_factor: int = 2
    UNUSED: ClassVar[Mapping[str, str]] = {
        "dataloader_mode": "there is one loader: a sampler with state",
        "sampler_type": "there is one loader: a sampler with state",
        "drop_last": "batches run on into the next epoch; nothing is dropped",
        "group_frame": _GROUPED,
        "group_resolution": _GROUPED,
        "group_data": _GROUPED,
        "initial_global_step_for_sampler": "the checkpoint holds the place",
        "num_workers": "--num-workers decides",
        "batch_size": "--micro-batch-size decides",
        "collate_param": "samples of one shape are stacked",
        "priority_mode": "there is one order, by (seed, epoch)",
        "use_dp_rank": "ranks take turns",
        "persistent_workers": "workers live as long as the run",
        "data_sharding": "ranks take turns",
    }
