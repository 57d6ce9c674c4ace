"""VACE: the Wan trunk, and the branch of blocks that reads vace_context and adds hints to the trunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.wan.config import VaceConfig, WanConfig
from mindspeed_mm.models.wan.transformer import Head, Linear, PatchEmbedding, Rope, Text, WanBlock
from mindspeed_mm.ops.rope import rope_tables
from mindspeed_mm.ops.timestep import sinusoid


class TokenLayout(Protocol):
    """How the tokens of one sample lie on the processes that share it."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """All tokens along `dim` → this process's part."""

    def join(self, x: Tensor, dim: int, length: int) -> Tensor:
        """This process's part along `dim` → all `length` tokens."""


class WholeTokens:
    """One process has all the tokens."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """All of them."""
        return x

    def join(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All of them."""
        return x


class VaceBlock(WanBlock):
    """A Wan block of the branch, with the projection that makes its hint; the first also takes in the trunk's tokens."""

    def __init__(self, config: WanConfig, *, first: bool) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.before_proj = Linear(width, width) if first else None
        self.after_proj = Linear(width, width)

    def forward(  # type: ignore[override]  # the branch carries one tensor more than the trunk
        self, c: Tensor, trunk: Tensor, time: Tensor, text: Text, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """Branch tokens c and trunk tokens (right after patch embedding), both [B, S, D] → next c, hint [B, S, D]."""
        if self.before_proj is not None:
            c = (self.before_proj(c) + trunk).to(trunk.dtype)
        c = super().forward(c, time, text, rope)
        return c, self.after_proj(c)


class VaceTransformer(nn.Module):
    """Velocity of noisy latents, told by caption and vace_context.

    Set from outside: `residual_dtype`, `tokens` (a TokenLayout), and `self_attn.attend`, `cross_attn.attend` of each block.
    """

    def __init__(self, config: VaceConfig) -> None:
        super().__init__()
        trunk = config.trunk
        width, patch = trunk.hidden_size, trunk.patch_size
        self.config = config
        self.patch_embedding = PatchEmbedding(trunk.in_dim, width, patch)
        self.text_embedding = nn.Sequential(
            Linear(trunk.text_dim, width), nn.GELU(approximate="tanh"), Linear(width, width)
        )
        self.time_embedding = nn.Sequential(Linear(trunk.freq_dim, width), nn.SiLU(), Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.blocks = nn.ModuleList(WanBlock(trunk) for _ in range(trunk.num_layers))
        self.head = Head(trunk)
        self.vace_blocks = nn.ModuleList(
            VaceBlock(trunk, first=n == 0) for n in range(len(config.vace_layers))
        )
        if config.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(config.vace_in_dim, width, patch)
        self.residual_dtype = torch.float32
        self.tokens: TokenLayout = WholeTokens()

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        vace_context: Tensor | None,
        *,
        context_scale: float | Sequence[float] | Tensor = 1.0,
    ) -> Tensor:
        """latents [B, 16, R+F, h, w], timestep [B] fp32 (1000·sigma), prompt_embeds [B, L, text_dim] with L ≤ text_len,
        vace_context [B, 96, R+F, h, w] or None for the trunk alone → velocity fp32 [B, 16, R+F, h, w].

        `context_scale` is one number, or one for each branch block (a sequence or a tensor). One sample may be asked about P
        captions at once, prompt_embeds [P, L, text_dim] → [P, 16, R+F, h, w]: what trunk and branch do before they read the
        caption is done once. Raises DataError when the shapes do not fit.
        """
        self._check(latents, timestep, prompt_embeds, vace_context)
        patch = self.config.trunk.patch_size
        grid = (latents.shape[2] // patch[0], latents.shape[3] // patch[1], latents.shape[4] // patch[2])
        time = self.time_embedding(sinusoid(timestep, self.config.trunk.freq_dim))
        steps = self.time_projection(time).unflatten(1, (6, -1)).float()
        text = self._embed_text(prompt_embeds)
        rope = Rope(
            *(self.tokens.split(t, 0) for t in rope_tables(grid, self.config.trunk.rope_dims, latents.device))
        )
        x = self._tokens(self.patch_embedding, latents)
        x = self._run_blocks(x, vace_context, steps, text, rope, self._scales(context_scale))
        out = self.tokens.join(self.head(x, time.float()), 1, grid[0] * grid[1] * grid[2])
        names = dict(zip("fhwxyz", (*grid, *patch), strict=True))
        return rearrange(out.float(), "b (f h w) (x y z c) -> b c (f x) (h y) (w z)", **names)

    def _run_blocks(
        self,
        x: Tensor,
        vace_context: Tensor | None,
        time: Tensor,
        text: Text,
        rope: Rope,
        scales: Sequence[float],
    ) -> Tensor:
        """The trunk; each branch block runs right before the trunk block that it feeds, so one hint is alive at a time."""
        feeds = (
            dict(zip(self.config.vace_layers, range(len(scales)), strict=False))
            if vace_context is not None
            else {}
        )
        start = x
        c = self._tokens(self.vace_patch_embedding, vace_context) if feeds and vace_context is not None else x
        for i, block in enumerate(self.blocks):
            n = feeds.get(i)
            if n is None:
                x = block(x, time, text, rope)
                continue
            c, hint = self.vace_blocks[n](c, start, time, text, rope)
            x = torch.add(block(x, time, text, rope), hint, alpha=scales[n]).to(x.dtype)
            del hint  # before the next one is made
        return x

    def _tokens(self, embedding: nn.Module, cells: Tensor) -> Tensor:
        local: Tensor = self.tokens.split(embedding(cells), 1)
        return local.to(self.residual_dtype)

    def _embed_text(self, prompt_embeds: Tensor) -> Text:
        """Caption rows and, where there is padding, one row of it."""
        padding = self.config.trunk.text_len - prompt_embeds.shape[1]
        rows = F.pad(prompt_embeds, (0, 0, 0, 1)) if padding else prompt_embeds
        return Text(self.text_embedding(rows), max(padding, 1))

    def _scales(self, context_scale: float | Sequence[float] | Tensor) -> tuple[float, ...]:
        count = len(self.config.vace_layers)
        if isinstance(context_scale, Tensor):
            context_scale = context_scale.tolist()
        scales = (
            tuple(context_scale) if isinstance(context_scale, Sequence) else (float(context_scale),) * count
        )
        if len(scales) != count:
            raise DataError(
                f"context_scale has {len(scales)} numbers; give one, or one for each of {count} branch blocks"
            )
        return scales

    def _check(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, vace_context: Tensor | None
    ) -> None:
        trunk = self.config.trunk
        shape = tuple(latents.shape)
        if (
            latents.ndim != 5
            or shape[1] != trunk.in_dim
            or any(n % p for n, p in zip(shape[2:], trunk.patch_size, strict=True))
        ):
            raise DataError(
                f"latents are {list(shape)}; wanted [B, {trunk.in_dim}, F, h, w] in multiples of patch {trunk.patch_size}"
            )
        if tuple(timestep.shape) != (shape[0],):
            raise DataError(
                f"timestep is {list(timestep.shape)}; wanted one for each of the {shape[0]} samples"
            )
        text = tuple(prompt_embeds.shape)
        fits = len(text) == 3 and text[1] <= trunk.text_len and text[2] == trunk.text_dim
        if not fits or shape[0] not in (1, text[0]):
            raise DataError(
                f"prompt_embeds are {list(text)}; wanted [{shape[0]}, up to {trunk.text_len}, {trunk.text_dim}]"
            )
        if vace_context is None:
            return
        wanted = (shape[0], self.config.vace_in_dim, *shape[2:])
        if not self.config.vace_layers or tuple(vace_context.shape) != wanted:
            found = list(vace_context.shape)
            raise DataError(
                f"vace_context is {found}; wanted {list(wanted)}, the grid of the latents"
                if self.config.vace_layers
                else f"vace_context is {found}, but this model has no branch (vace_layers is empty)"
            )


def build_on_meta(config: VaceConfig) -> VaceTransformer:
    """The model without memory for its weights; a loader fills them in."""
    with torch.device("meta"):
        return VaceTransformer(config)
