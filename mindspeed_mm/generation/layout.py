"""How processes share a video: guidance is split across two halves, tokens across the processes of a half.

Pure arithmetic, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mindspeed_mm.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """`halves` groups of `context` processes. The processes of a group share the tokens."""

    context: int
    halves: int  # if 2, one half computes the prompt and the other the negative prompt

    @property
    def world(self) -> int:
        """The total number of processes."""
        return self.context * self.halves


def choose_layout(
    world: int,
    num_heads: int,
    *,
    guided: bool,
    cfg_parallel: Literal["auto", "on", "off"],
    context: int | None,
) -> Layout:
    """Choose the layout of `world` processes. Raises ConfigError with the sizes that work.

    `auto` splits guidance across two halves if any video uses guidance and `world` is even, because the
    halves communicate only once per step.
    """
    if cfg_parallel == "on" and world % 2:
        raise ConfigError(f"got {world}", where="cfg_parallel", expected="an even number of processes")
    wanted = {"on": (2,), "off": (1,), "auto": (2, 1) if guided and world % 2 == 0 else (1,)}[cfg_parallel]
    layouts = [Layout(context or world // halves, halves) for halves in wanted]
    for layout in layouts:
        if layout.world == world and num_heads % layout.context == 0:
            return layout
    fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    sizes = sorted({n * halves for n in fitting for halves in wanted})
    requested = f" with context_parallel_size {context}" if context else ""
    raise ConfigError(
        f"{world} process(es){requested} and cfg_parallel {cfg_parallel} cannot share {num_heads} attention "
        "heads",
        fix=f"start one of {', '.join(map(str, sizes))} processes (torchrun --nproc-per-node)",
    )
