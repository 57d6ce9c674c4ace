"""VACE in pipeline stages: consecutive trunk blocks, together with the branch blocks that feed them.

Trunk tokens x and branch tokens c are sent from stage to stage. The other inputs of blocks (text, time,
rotary tables) are computed on each rank from its own copy of three small modules, so no text is sent.
Weights keep their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.wan.stages import check_layers
from mindspeed_mm.models.wan.transformer import Text
from mindspeed_mm.models.wan.vace import (
    BlockInputs,
    VaceTransformer,
    check_inputs,
    hint_scales,
    local_rope,
    pad_prompts,
    run_blocks,
    token_grid,
    unpatchify,
)
from mindspeed_mm.ops.stages import MicroBatch, Split
from mindspeed_mm.ops.timestep import sinusoid

SHARED = ("text_embedding", "time_embedding", "time_projection")  # every rank has a copy


class VaceReader(nn.Module):
    """Text and time embeddings: the inputs of blocks other than tokens."""

    def __init__(self, model: VaceTransformer) -> None:
        super().__init__()
        self.config = model.config
        for name in SHARED:
            self.add_module(name, model.get_submodule(name))

    def forward(self, timestep: Tensor, prompt_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed timestep [B] and captions [B, L, text_dim] as time [B, D], steps [B, 6, D] and text rows."""
        trunk = self.config.trunk
        time = self.get_submodule("time_embedding")(sinusoid(timestep, trunk.freq_dim))
        steps = self.get_submodule("time_projection")(time).unflatten(1, (6, -1)).float()
        rows, _ = pad_prompts(prompt_embeds, trunk.text_len)
        return time, steps, self.get_submodule("text_embedding")(rows)


class VaceStage(nn.Module):
    """One stage. Pass micro-batches to `feed`; each call then processes the next one."""

    def __init__(self, model: VaceTransformer, layers: range) -> None:
        super().__init__()
        config, self.config = model.config, model.config
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in layers})
        self._feeders = {layer: n for n, layer in enumerate(config.vace_layers) if layer in layers}
        self.vace_blocks = nn.ModuleDict({str(n): model.vace_blocks[n] for n in self._feeders.values()})
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.trunk.num_layers
        if self.is_first:
            self.patch_embedding = model.patch_embedding
        if self.is_first and config.vace_layers:
            self.vace_patch_embedding = model.vace_patch_embedding
        if self.is_last:
            self.head = model.head
        self._sends_branch = bool(config.vace_layers) and config.vace_layers[-1] >= layers.stop
        self._tokens, self._residual = model.tokens, model.residual_dtype
        self._inputs: Iterator[MicroBatch] = iter(())

    def feed(self, inputs: Sequence[MicroBatch]) -> None:
        """Set the micro-batches that the following calls process, in order."""
        self._inputs = iter(inputs)

    def forward(self, *tokens: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map tokens [B, S, D] of the previous stage, if any, to tokens for the next stage, or the velocity.

        Branch tokens are no longer sent once no later stage has a branch block.
        """
        batch = next(self._inputs)
        inputs = self._block_inputs(batch)
        if self.is_first:
            tokens = self._embed(batch)
        feeders = {}
        if batch.vace_context is not None:  # otherwise only the trunk runs
            feeders = {layer: (n, self.vace_blocks[str(n)]) for layer, n in self._feeders.items()}
        blocks = ((int(i), block) for i, block in self.blocks.items())
        x, c = run_blocks(blocks, feeders, tokens[0], tokens[-1], inputs)
        if not self.is_last:
            both = self._sends_branch and batch.vace_context is not None
            return (x.contiguous(), c.contiguous()) if both else (x.contiguous(),)
        patch = self.config.trunk.patch_size
        cells = self.head(x, inputs.time.float())
        return unpatchify(cells, token_grid(batch.latents.shape, patch), patch, self._tokens)

    def _embed(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        check_inputs(self.config, batch.latents, batch.timestep, batch.prompt_embeds, batch.vace_context)
        pairs = [(self.patch_embedding, batch.latents)]
        if batch.vace_context is not None:
            pairs.append((self.vace_patch_embedding, batch.vace_context))
        return tuple(self._tokens.split(embedding(cells), 1).to(self._residual) for embedding, cells in pairs)

    def _block_inputs(self, batch: MicroBatch) -> BlockInputs:
        trunk = self.config.trunk
        time, steps, rows = batch.read
        copies = max(trunk.text_len - batch.prompt_embeds.shape[1], 1)
        grid = token_grid(batch.latents.shape, trunk.patch_size)
        rope = local_rope(grid, trunk, self._tokens, batch.latents.device)
        return BlockInputs(
            time, steps, Text(rows, copies), rope, hint_scales(self.config, batch.context_scale)
        )


def split_vace(model: VaceTransformer, layers: Sequence[int], mine: Sequence[int]) -> Split:
    """Split `model` into stages of `layers` trunk blocks each, and build the stages numbered in `mine`.

    `model` must be on the meta device and already frozen. Raises ConfigError if `layers` does not fit it.
    """
    config = model.config
    check_layers(layers, config.trunk.num_layers)
    bounds = [sum(layers[:number]) for number in range(len(layers) + 1)]
    stages = {i: VaceStage(model, range(bounds[i], bounds[i + 1])) for i in mine}
    grads = _gradients(model)

    def output_like(stage: int, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Return meta tensors like those that `stage` sends; for the last stage, like the velocity.

        One sample with P captions has a batch of P from the first block on.
        """
        shape = batch.latents.shape
        rows = max(shape[0], batch.prompt_embeds.shape[0])
        if stage == len(layers) - 1:
            return (torch.empty((rows, config.trunk.out_dim, *shape[2:]), device="meta").requires_grad_(),)
        grid = token_grid(shape, config.trunk.patch_size)
        count = model.tokens.split(torch.empty(grid[0] * grid[1] * grid[2], device="meta"), 0).shape[0]
        x = torch.empty((rows, count, config.trunk.hidden_size), dtype=model.residual_dtype, device="meta")
        trunk_has, branch_has = grads[bounds[stage + 1] - 1]
        has_branch = bool(config.vace_layers) and batch.vace_context is not None
        sends_branch = has_branch and config.vace_layers[-1] >= bounds[stage + 1]
        flags = (trunk_has, branch_has) if sends_branch else (trunk_has,)
        return tuple(x.clone().requires_grad_(flag) for flag in flags)

    return Split(VaceReader(model), stages, len(layers), output_like, SHARED)


def _gradients(model: VaceTransformer) -> list[tuple[bool, bool]]:
    """Return, for each trunk block, whether gradients flow through its (trunk tokens, branch tokens)."""
    config: VaceConfig = model.config
    feeders = {layer: n for n, layer in enumerate(config.vace_layers)}
    beside = any(_is_trainable(model.get_submodule(name)) for name in SHARED)
    x = _is_trainable(model.patch_embedding)
    c = bool(feeders) and (x or _is_trainable(model.vace_patch_embedding))
    found = []
    for i, block in enumerate(model.blocks):
        if i in feeders:
            c = c or beside or _is_trainable(model.vace_blocks[feeders[i]])
            x = x or c
        x = x or beside or _is_trainable(block)
        found.append((x, c))
    return found


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
