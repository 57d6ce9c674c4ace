"""How processes share one video: guidance on two halves of them, tokens within a half.

Arithmetic, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mindspeed_mm.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """`context` processes share the tokens; there are `halves` such groups."""

    context: int
    halves: int  # 2: one asks about the prompt, one about the negative prompt

    @property
    def world(self) -> int:
        """All processes."""
        return self.context * self.halves


def choose_layout(
    world: int,
    num_heads: int,
    *,
    guided: bool,
    cfg_parallel: Literal["auto", "on", "off"],
    context: int | None,
) -> Layout:
    """Lay `world` processes out. Raises ConfigError naming the sizes that work.

    `auto` puts guidance on two halves when some video has guidance and the number is even: halves talk once a
    step.
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
