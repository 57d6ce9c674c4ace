"""VACE: the Wan trunk, and a branch of blocks that reads vace_context and adds hints to the trunk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

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
    """How the tokens of one sample are divided over ranks."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Split all tokens along `dim`, and return this rank's part."""

    def join(self, x: Tensor, dim: int, length: int) -> Tensor:
        """Gather this and the other ranks' parts along `dim` into all `length` tokens."""


class WholeTokens:
    """The layout without context parallelism: this rank has all tokens."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Return `x` unchanged."""
        return x

    def join(self, x: Tensor, dim: int, length: int) -> Tensor:
        """Return `x` unchanged."""
        return x


class BlockInputs(NamedTuple):
    """Inputs that all blocks share."""

    time: Tensor  # [B, D], timestep embedding for the head
    steps: Tensor  # [B, 6, D] fp32, timestep modulation for the blocks
    text: Text
    rope: Rope
    scales: tuple[float, ...]  # one per branch block, applied to its hint


class VaceBlock(WanBlock):
    """A block of the VACE branch: a Wan block with a projection that outputs a hint.

    The first block also adds the trunk's tokens to its input.
    """

    def __init__(self, config: WanConfig, *, first: bool) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.before_proj = Linear(width, width) if first else None
        self.after_proj = Linear(width, width)

    def forward(  # type: ignore[override]  # a branch block has one more input than a trunk block
        self, c: Tensor, trunk: Tensor, time: Tensor, text: Text, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """Map branch tokens c and embedded trunk tokens to the next c and the hint, all [B, S, D]."""
        if self.before_proj is not None:
            c = (self.before_proj(c) + trunk).to(trunk.dtype)
        c = super().forward(c, time, text, rope)
        return c, self.after_proj(c)


class VaceTransformer(nn.Module):
    """Predicts the velocity of noisy latents, conditioned on a caption and vace_context.

    Callers may set `residual_dtype`, `tokens` (a TokenLayout), and `self_attn.attend` and `cross_attn.attend`
    of each block.
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
        """Predict the velocity.

        Args:
            latents: [B, 16, R+F, h, w].
            timestep: [B] fp32, 1000·sigma.
            prompt_embeds: [B, L, text_dim] with L ≤ text_len. With B = 1, several captions [P, L, text_dim]
                are allowed; the computation before the first cross-attention then runs only once.
            vace_context: [B, 96, R+F, h, w], or None to run the trunk alone.
            context_scale: one number, or a sequence or tensor with one number per branch block.

        Returns:
            fp32 [B, 16, R+F, h, w], or [P, 16, R+F, h, w] for P captions.

        Raises:
            DataError: the shapes do not fit the model or one another.
        """
        check_inputs(self.config, latents, timestep, prompt_embeds, vace_context)
        trunk = self.config.trunk
        grid = token_grid(latents.shape, trunk.patch_size)
        time = self.time_embedding(sinusoid(timestep, trunk.freq_dim))
        steps = self.time_projection(time).unflatten(1, (6, -1)).float()
        rows, copies = pad_prompts(prompt_embeds, trunk.text_len)
        text = Text(self.text_embedding(rows), copies)
        rope = local_rope(grid, trunk, self.tokens, latents.device)
        inputs = BlockInputs(time, steps, text, rope, hint_scales(self.config, context_scale))
        x = self._tokens(self.patch_embedding, latents)
        if vace_context is None or not self.config.vace_layers:
            x, _ = run_blocks(enumerate(self.blocks), {}, x, x, inputs)
        else:
            c = self._tokens(self.vace_patch_embedding, vace_context)
            feeders = dict(zip(self.config.vace_layers, enumerate(self.vace_blocks), strict=True))
            x, _ = run_blocks(enumerate(self.blocks), feeders, x, c, inputs)
        return unpatchify(self.head(x, time.float()), grid, trunk.patch_size, self.tokens)

    def blocks_in_order(self) -> list[nn.Module]:
        """Return all blocks in the order in which they run.

        Each branch block runs right before the trunk block to which its hint is added.
        """
        feeds = dict(zip(self.config.vace_layers, self.vace_blocks, strict=True))
        order: list[nn.Module] = []
        for index, block in enumerate(self.blocks):
            order += [feeds[index], block] if index in feeds else [block]
        return order

    def _tokens(self, embedding: nn.Module, cells: Tensor) -> Tensor:
        local: Tensor = self.tokens.split(embedding(cells), 1)
        return local.to(self.residual_dtype)


def run_blocks(
    blocks: Iterable[tuple[int, nn.Module]],
    feeders: Mapping[int, tuple[int, nn.Module]],
    x: Tensor,
    c: Tensor,
    read: BlockInputs,
) -> tuple[Tensor, Tensor]:
    """Run trunk blocks, given as (number, block), and the branch blocks that feed them.

    `feeders` maps the number of a trunk block to the number and the module of its branch block. A branch
    block runs right before its trunk block, so only one hint is in memory at a time. Returns the trunk tokens
    and the branch tokens.
    """
    start = x
    for i, block in blocks:
        if i not in feeders:
            x = block(x, read.steps, read.text, read.rope)
            continue
        n, feeder = feeders[i]
        c, hint = feeder(c, start, read.steps, read.text, read.rope)
        x = torch.add(block(x, read.steps, read.text, read.rope), hint, alpha=read.scales[n]).to(x.dtype)
        del hint  # free its memory before the next hint is computed
    return x, c


def token_grid(shape: Sequence[int], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the number of tokens along time, height and width for latents of shape [B, C, F, h, w]."""
    return shape[2] // patch[0], shape[3] // patch[1], shape[4] // patch[2]


def pad_prompts(prompt_embeds: Tensor, text_len: int) -> tuple[Tensor, int]:
    """Return the caption with at most one padding row, and how many times its last row counts."""
    padding = text_len - prompt_embeds.shape[1]
    return F.pad(prompt_embeds, (0, 0, 0, 1)) if padding else prompt_embeds, max(padding, 1)


def local_rope(
    grid: tuple[int, int, int], config: WanConfig, tokens: TokenLayout, device: torch.device
) -> Rope:
    """Return the rotary tables for this rank's tokens."""
    return Rope(*(tokens.split(table, 0) for table in rope_tables(grid, config.rope_dims, device)))


def unpatchify(
    cells: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int], tokens: TokenLayout
) -> Tensor:
    """Assemble the velocity, fp32 [B, C, F, h, w], from the head's output for this rank's tokens."""
    out = tokens.join(cells, 1, grid[0] * grid[1] * grid[2])
    names = dict(zip("fhwxyz", (*grid, *patch), strict=True))
    return rearrange(out.float(), "b (f h w) (x y z c) -> b c (f x) (h y) (w z)", **names)


def hint_scales(config: VaceConfig, context_scale: float | Sequence[float] | Tensor) -> tuple[float, ...]:
    """Return one scale per branch block. Raises DataError if their number is wrong."""
    count = len(config.vace_layers)
    if isinstance(context_scale, Tensor):
        context_scale = context_scale.tolist()
    scales = tuple(context_scale) if isinstance(context_scale, Sequence) else (float(context_scale),) * count
    if len(scales) != count:
        raise DataError(
            f"got {len(scales)} numbers",
            where="context_scale",
            expected=f"one number, or one for each of {count} branch blocks",
        )
    return scales


def check_inputs(
    config: VaceConfig, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, vace_context: Tensor | None
) -> None:
    """Check the shapes of the inputs. Raises DataError if they do not fit the model or one another."""
    trunk = config.trunk
    shape = tuple(latents.shape)
    if (
        latents.ndim != 5
        or shape[1] != trunk.in_dim
        or any(n % p for n, p in zip(shape[2:], trunk.patch_size, strict=True))
    ):
        raise DataError(
            f"got {list(shape)}",
            where="latents",
            expected=f"[B, {trunk.in_dim}, F, h, w] in multiples of patch {trunk.patch_size}",
        )
    if tuple(timestep.shape) != (shape[0],):
        raise DataError(
            f"got {list(timestep.shape)}",
            where="timestep",
            expected=f"[{shape[0]}], one timestep per sample",
        )
    text = tuple(prompt_embeds.shape)
    fits = len(text) == 3 and text[1] <= trunk.text_len and text[2] == trunk.text_dim
    if not fits or shape[0] not in (1, text[0]):
        raise DataError(
            f"got {list(text)}",
            where="prompt_embeds",
            expected=f"[{shape[0]}, up to {trunk.text_len}, {trunk.text_dim}]",
        )
    if vace_context is None:
        return
    wanted = (shape[0], config.vace_in_dim, *shape[2:])
    if not config.vace_layers or tuple(vace_context.shape) != wanted:
        found = list(vace_context.shape)
        expected = f"{list(wanted)}, the grid of the latents"
        if not config.vace_layers:
            expected = "none, as this model has no branch (vace_layers is empty)"
        raise DataError(f"got {found}", where="vace_context", expected=expected)
