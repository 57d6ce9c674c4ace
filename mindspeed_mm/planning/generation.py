"""Memory and time of one device in generation, by closed formulas. Does not import torch.

A run has four phases: encoding prompts, encoding conditions, denoising and decoding. `offload` determines
what the device holds in each of them. docs/guide/plan.md explains the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mindspeed_mm.generation.config import TOKEN_BYTES, VAE_PLANES, WORKSPACE, Offload, Tiled
from mindspeed_mm.geometry import WAN
from mindspeed_mm.models.wan.config import FP32_MODULES, VaceConfig
from mindspeed_mm.models.wan.flops import block_forward, tokens_of
from mindspeed_mm.models.wan.shapes import layout
from mindspeed_mm.planning.devices import Device
from mindspeed_mm.planning.fit import Change, Setting, search
from mindspeed_mm.planning.memory import LIBRARY, SLACK
from mindspeed_mm.planning.units import ROUNDED

GENERATION_TERMS = ("transformer", "text encoder", "VAE", "activations", "latents", "slack")
TEXT_PARAMETERS = 5.68e9  # of umT5-XXL's encoder
VAE_PARAMETERS = 126_892_531
VAE_WIDTH, TILE = 96, 256  # base_dim of the VAE; side of a tile in pixels
VAE_FLOPS = {
    "encode": 5.2e6,
    "decode": 8.7e6,
}  # per pixel of a frame, by FlopCounterMode
VAE_SHARE = 0.06  # fraction of the 16-bit peak in 3D convolutions; an assumption
_HOST_SHARE = 0.8  # fraction of a block's computation that hides the copy of the next block


@dataclass(frozen=True, kw_only=True)
class GenerationRun:
    """The parameters of one video that determine memory and time."""

    model: VaceConfig
    experts: int = 1
    frames: int = 81
    height: int = 480
    width: int = 832
    refs: int = 0
    steps: int = 50
    passes: float = 2.0  # passes of the model in a step, on average: 2 with guidance
    branch: bool = True  # whether the VACE branch runs
    encodes: int = 2  # clips that the VAE encodes
    product: int = 2  # bytes of a product's dtype
    quantized: bool = False  # whether the linear layers of the blocks are in 8 bits
    vae: int = 4  # bytes of the VAE's dtype
    text: float = TEXT_PARAMETERS  # parameters of the text encoder
    offload: Offload = "none"
    tiled: Tiled = "auto"
    shard: bool = False
    ranks: int = 1  # ranks that share one video
    context_parallel: int = 1
    halves: int = 1  # 2: prompt and negative prompt on two groups of ranks
    windows: int = 1  # windows of a long video, each of `frames` frames
    whole: int | None = None  # frames that are encoded and decoded at once; None: one window
    videos: int = 1
    capacity: float = math.inf  # bytes of the device

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent (R+F, h, w)."""
        return WAN.grid(self.frames, self.height, self.width, self.refs)

    @property
    def encodes_again(self) -> bool:
        """Whether conditions are encoded after the transformer is loaded: for more videos, or windows."""
        return self.videos > 1 or (self.windows > 1 and self.whole is None)

    @property
    def tokens(self) -> int:
        """Tokens of one video, or of one window."""
        return tokens_of(self.grid, self.model)

    @property
    def weights(self) -> float:
        """Bytes of one expert."""
        return sum(_bytes(name, shape, self) for name, shape in layout(self.model).items())

    @property
    def is_batched(self) -> bool:
        """Whether prompt and negative prompt go through the model in one batch, by the rule of the run."""
        activations = 2 * TOKEN_BYTES * self.tokens * self.model.trunk.hidden_size
        parameters = sum(math.prod(shape) for shape in layout(self.model).values())
        return self.experts * parameters * self.product + activations <= 0.8 * self.capacity

    @property
    def mode(self) -> Offload:
        """`offload`, or `model` if two experts do not fit side by side, by the rule of the run."""
        needed = self.experts * self.weights + WORKSPACE
        return (
            "model"
            if self.offload == "none" and self.experts == 2 and needed > self.capacity
            else self.offload
        )


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes by term at the peak, and the total at each moment."""

    terms: Mapping[str, float]
    moment: str
    moments: Mapping[str, float]
    host: float
    tiled: bool

    @property
    def total(self) -> float:
        """Bytes of one device."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class GenerationTime:
    """Seconds of one video on all its devices."""

    text: float
    encode: float
    step: float
    steps: int
    move: float  # transfers of weights between host and device outside the steps
    decode: float
    windows: int = 1  # windows; each takes all steps

    @property
    def denoising(self) -> float:
        """Seconds of all steps of all windows."""
        return self.windows * self.steps * self.step

    @property
    def total(self) -> float:
        """Seconds of one video, without reading weights from the disk."""
        return self.text + self.encode + self.denoising + self.move + self.decode


def generation_memory(run: GenerationRun) -> GenerationMemory:
    """Compute the memory at the peak, which is one of the four phases."""
    tiled = is_tiled(run)
    found = {name: _with_slack(terms) for name, terms in _moments(run, tiled).items()}
    moment = max(found, key=lambda name: sum(found[name].values()))
    host = run.experts * run.weights if run.mode != "none" else 0.0
    return GenerationMemory(
        found[moment], moment, {name: sum(terms.values()) for name, terms in found.items()}, host, tiled
    )


def is_tiled(run: GenerationRun) -> bool:
    """Return whether the VAE computes in tiles. As in a run, this depends on the free device memory."""
    if run.tiled != "auto":
        return run.tiled == "always"
    held = run.vae * VAE_PARAMETERS + (_resident(run) if run.mode == "none" else 0.0)
    return _vae_activations(run, False) > 0.8 * (run.capacity - held)


def activation_bytes(run: GenerationRun, passes: int) -> float:
    """Return the bytes of a forward pass: residual streams, and the larger of attention and feed-forward."""
    trunk, c = run.model.trunk, run.product
    tokens = -(-run.tokens // run.context_parallel)
    branch = (8 + c) * run.branch
    attention = passes * (28 + c / 2) + branch  # prompts share the branch's tokens until it reads the text
    feed_forward = passes * (16 + 2 * c * trunk.ffn_dim / trunk.hidden_size + branch)
    wide = trunk.hidden_size * max(attention, feed_forward)
    tables = 4 * trunk.head_dim + 4 * trunk.out_dim * math.prod(trunk.patch_size)
    return tokens * (wide + tables)


def generation_time(run: GenerationRun, device: Device, dtype: str) -> GenerationTime:
    """Estimate the time of one video.

    Products and attention reach the device's fractions of its peak, and the VAE reaches VAE_SHARE of it.
    """
    peak, half = device.peak(dtype), device.peak("bf16")
    on_tokens, on_text, attention = block_forward(run.model, run.tokens)
    blocks = run.model.trunk.num_layers + len(run.model.vace_layers) * run.branch
    each = blocks * ((on_tokens + on_text) / (peak * device.products) + attention / (peak * device.attention))
    computing = each * run.passes / run.context_parallel / (min(run.halves, 2) if run.passes > 1 else 1)
    step = computing + _exchange(run, device, blocks)
    move = 0.0
    if run.mode == "block":
        copied = run.weights * max(1.0, run.passes if not run.is_batched else 1.0) / (device.host * 1e9)
        step = max(step, copied) + (1 - _HOST_SHARE) * min(step, copied)
    elif run.mode == "model":
        turns = run.windows if run.whole is None else 1
        move = turns * run.experts * run.weights / (device.host * 1e9)
    pixels = run.height * run.width * (run.whole or run.frames * run.windows)
    encode, decode = (pixels * VAE_FLOPS[kind] / (half * VAE_SHARE) for kind in ("encode", "decode"))
    prompts = 2 if run.passes > 1 else 1
    text = 2 * run.text * run.model.trunk.text_len * prompts / (half * device.products)
    return GenerationTime(text, run.encodes * encode, step, run.steps, move, decode, run.windows)


def generation_changes(run: GenerationRun, device: Device, dtype: str, capacity: float) -> list[Change]:
    """Find changes that make a run fit into `capacity` bytes."""

    def measure(fields: Mapping[str, object]) -> tuple[float, float]:
        changed = replace(run, **fields)  # type: ignore[arg-type]
        kind = "bf16" if changed.product == 2 else dtype
        return generation_memory(changed).total, generation_time(changed, device, kind).total

    others = ("dtype", "quantize", "vae_dtype", "num_frames", "height")
    return search(list(_candidates(run)), measure, capacity, others)


def _candidates(run: GenerationRun) -> Iterator[Setting]:
    for mode in ("model", "block"):
        if run.mode != mode and run.mode != "block" and not run.shard:
            yield f"offload {mode}", {"offload": mode}
    if run.tiled != "always":
        yield "tiled always", {"tiled": "always"}
    if run.ranks > 1 and not run.shard:
        yield "shard_weights true", {"shard": True, "offload": "none"}
    if run.product == 4:
        yield "dtype bf16", {"product": 2}
    if not run.quantized:
        yield "quantize int8", {"quantized": True}
    if run.vae == 4:
        yield "vae_dtype bf16", {"vae": 2}
    for frames in (49, 33, 17):
        if frames < run.frames:
            yield f"num_frames {frames}", {"frames": frames}
    if run.height * run.width > 480 * 832:
        size = (480, 832) if run.width >= run.height else (832, 480)
        yield f"height {size[0]}, width {size[1]}", {"height": size[0], "width": size[1]}


def _moments(run: GenerationRun, tiled: bool) -> dict[str, dict[str, float]]:
    """Map each phase to its bytes by term."""
    empty = dict.fromkeys(GENERATION_TERMS, 0.0)
    vae = float(run.vae * VAE_PARAMETERS)
    frames, height, width = run.grid
    whole = run.whole or run.frames
    frames += (whole - run.frames) // WAN.stride[0]
    # noise, latents and velocities; the context
    latents = 4.0 * frames * height * width * (5 * WAN.channels + run.model.vace_in_dim)
    pixels = 4.0 * 3 * whole * run.height * run.width
    resident = _resident(run) if run.mode == "none" or run.shard else 0.0
    waiting = resident if run.encodes_again else 0.0  # otherwise, encoding finishes before weights are loaded
    passes = 2 if run.passes > 1 and run.halves == 1 and run.is_batched else 1
    coded = _vae_activations(run, tiled)
    return {
        "encoding of the prompts": {
            **empty,
            "text encoder": run.product * run.text,
            "VAE": vae,
            "activations": 2.0e8,
        },
        "encoding of the conditions": {
            **empty,
            "transformer": waiting,
            "VAE": vae,
            "activations": coded + 2 * pixels,
            "latents": latents,
        },
        "denoising": {
            **empty,
            "transformer": _denoising_weights(run),
            "VAE": vae,
            "activations": activation_bytes(run, passes) + _expanded(run),
            "latents": latents,
        },
        "decoding": {
            **empty,
            "transformer": resident,
            "VAE": vae,
            "activations": coded + (pixels if tiled else 0.0),
            "latents": latents,
        },
    }


def _resident(run: GenerationRun) -> float:
    """Return the bytes of the transformers that stay on the device."""
    return run.experts * run.weights / (run.ranks if run.shard else 1) + (
        _gathered(run) if run.shard else 0.0
    )


def _denoising_weights(run: GenerationRun) -> float:
    if run.mode == "none" or run.shard:
        return _resident(run)
    return _gathered(run) + _rest(run) if run.mode == "block" else run.weights


def _gathered(run: GenerationRun) -> float:
    """Return the bytes of two blocks: the current one and the next one."""
    return 2.0 * max(_blocks(run).values())


def _rest(run: GenerationRun) -> float:
    return run.weights - sum(_blocks(run).values())


def _blocks(run: GenerationRun) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, shape in layout(run.model).items():
        parts = name.split(".")
        if parts[0] in ("blocks", "vace_blocks"):
            key = ".".join(parts[:2])
            found[key] = found.get(key, 0.0) + _bytes(name, shape, run)
    return found


def _bytes(name: str, shape: tuple[int, ...], run: GenerationRun) -> float:
    if run.quantized and name.endswith(ROUNDED):
        return math.prod(shape) + 4.0 * shape[0]  # with a scale for each row
    return math.prod(shape) * (4.0 if name.split(".")[0] in FP32_MODULES else run.product)


def _expanded(run: GenerationRun) -> float:
    """Return the bytes of the largest 8-bit weight after dequantization."""
    return run.quantized * float(run.product * run.model.trunk.hidden_size * run.model.trunk.ffn_dim)


def _vae_activations(run: GenerationRun, tiled: bool) -> float:
    height, width = (min(TILE, run.height), min(TILE, run.width)) if tiled else (run.height, run.width)
    return float(VAE_PLANES * VAE_WIDTH * height * width * run.vae)


def _with_slack(terms: Mapping[str, float]) -> dict[str, float]:
    return {**terms, "slack": SLACK * sum(terms.values()) + LIBRARY}


def _exchange(run: GenerationRun, device: Device, blocks: int) -> float:
    """Return the seconds per step of all-to-alls, and of gathering sharded weights."""
    size, width = run.context_parallel, run.model.trunk.hidden_size
    rate = 1e9 * (device.link if run.ranks <= device.machine else device.network)
    moved = 4.0 * run.tokens / size * width * run.product * blocks * (size - 1) / size * run.passes
    gathered = run.weights * (run.ranks - 1) / run.ranks if run.shard else 0.0
    return (moved + gathered) / rate
