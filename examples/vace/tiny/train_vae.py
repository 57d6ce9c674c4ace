"""Train the tiny world's VAE from scratch and write it as an official `Wan2.1_VAE.pth`.

The network is a narrower version of diffusers' AutoencoderKLWan. It trains on everything that will be
encoded later: clips, grayed clips, silhouettes, outlines and reference images. It starts on single
frames, then short clips, then whole ones. Then the encoder is frozen, the latent statistics are measured,
and the decoder alone is fine-tuned on noisy latents, because a transformer never generates exactly the
latents that an encoder gives.

Two choices cut hours to minutes. The network starts as a blur that ignores time (`start_as_a_blur`), so
whatever it learns from single frames carries over to clips. And the loss on single frames is the squared
error alone, with a high weight on colour (the differences between red, green and blue). Under an absolute
error, the first faint colour costs more on the gray that fills most of a picture than it gains on the
coloured part, and the network stays gray for hundreds of steps.

The first latent frame encodes one frame of pixels, each later one encodes four, and nothing in the
network makes equal content look equal in both. A small loss term pulls the first latent frame towards the
second, so that what a transformer learns about one also holds for the other. A reference image is encoded
as a first frame, too.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/vace/tiny/train_vae.py OUT.pth

The processes share the batch. On a CPU, use one thread per process: the layers are too narrow for more.
MINDSPEED_MM_DEVICE selects the device, as in every command.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import world
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import read_json
from mindspeed_mm.log import get_logger, setup_logging
from mindspeed_mm.models.keymap import KeyMap
from mindspeed_mm.models.wan.vae_state_dict import vae_key_map
from mindspeed_mm.training.muon import UPDATE_RMS, newton_schulz

LOGGER = get_logger("tiny.vae")


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each latent channel, over clips of all kinds."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Phase:
    """One phase of training."""

    name: str
    frames: int
    batch: int
    steps: int
    learning_rate: float
    decoder_only: bool = False
    bf16: bool = True  # autocast to bf16 where the device supports it; the weights stay fp32
    noise: float = 0.0  # maximum noise on the latents, in their standard deviations; drawn per clip
    first_frame: float = 0.0  # extra weight of the first frame's error: extension keeps that frame
    absolute: float = 1.0  # weight of the absolute error of all frames; the squared error has 2
    chroma: float = (
        1.0  # extra weight of both errors on colour: each pixel minus its mean over red, green and blue
    )


PHASES = (
    Phase("frames", frames=1, batch=12, steps=700, learning_rate=8e-3, absolute=0.0, chroma=8.0),
    Phase("short clips", frames=9, batch=4, steps=450, learning_rate=2.5e-3),
    Phase("clips", frames=17, batch=4, steps=180, learning_rate=2e-3),
    Phase(
        "denoiser",
        frames=17,
        batch=4,
        steps=330,
        learning_rate=1.5e-3,
        decoder_only=True,
        bf16=False,
        noise=0.25,
        first_frame=0.15,
    ),
)
ALIKE = 3e-3  # weight of the distance between the first two latent frames, in units of the latents' variance
PICTURES = ("plain", "plain", "plain", "inpaint", "outpaint", "extension", "silhouette", "edge", "reference")


class QuickNorm(nn.Module):
    """diffusers' WanRMS_norm with fewer passes over memory, which take much of a step on a CPU."""

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma  # the same parameter under the same name

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, …] divided by its root mean square over C, times gamma."""
        power = x.float().square().mean(dim=1, keepdim=True)
        return x * torch.rsqrt(power + 1e-12).to(x.dtype) * self.gamma


class QuickConv(WanCausalConv3d):
    """diffusers' WanCausalConv3d without the zero padding of single frames: two thirds of the products."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """Convolve x [B, C, T, H, W], preceded by the frames of `cache_x` if there are any."""
        columns, _, rows, _, before, _ = self._padding
        if cache_x is None and x.shape[2] == 1 and before == self.kernel_size[0] - 1:
            image = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (rows, columns))
            return image[:, :, None]
        return super().forward(x, cache_x)


def new_vae(seed: int) -> AutoencoderKLWan:
    """Wan's VAE with 8 base channels and one residual block per level: 0.7 M parameters."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    start_as_a_blur(vae)
    for parent in list(vae.modules()):
        for name, child in parent.named_children():
            if isinstance(child, WanRMS_norm):
                setattr(parent, name, QuickNorm(child.gamma))
            elif type(child) is WanCausalConv3d:
                child.__class__ = QuickConv  # a subclass, since diffusers' VAE looks for WanCausalConv3d
    return vae


@torch.no_grad()
def start_as_a_blur(vae: AutoencoderKLWan) -> None:
    """Initialize the VAE so that it only blurs each frame.

    Residual blocks and attention add nothing, pictures are averaged and interpolated, and no layer looks back
    in time: the last of four frames becomes the latent frame, and decodes to four copies. The posterior
    starts narrow.
    """
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 1, 1):
            module.weight.zero_()  # it halves or doubles the number of frames
            module.bias.zero_()
            channels = module.in_channels
            module.weight[:, :, -1, 0, 0] = torch.eye(channels).repeat(module.out_channels // channels, 1)
        elif isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 3, 3):
            module.weight[:, :, :-1] = 0
            module.weight[:, :, -1] *= math.sqrt(3)  # one of three taps remains: keep the variance of the sum
        elif isinstance(module, WanResample) and not isinstance(module.resample, nn.Identity):
            image = module.resample[1]
            image.bias.zero_()
            if image.stride == (2, 2):
                image.weight.zero_()
                image.weight[:, :, :2, :2] = torch.eye(image.in_channels)[..., None, None] / 4
            else:
                mixed = nn.init.orthogonal_(torch.empty(image.weight.shape[:2]))
                tent = torch.tensor([0.25, 0.5, 0.25])
                image.weight.copy_(mixed[..., None, None] * tent[:, None] * tent)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if isinstance(module.conv_shortcut, WanCausalConv3d):
                nn.init.orthogonal_(module.conv_shortcut.weight.flatten(1))
                module.conv_shortcut.bias.zero_()
        elif isinstance(module, WanAttentionBlock):
            module.proj.weight.zero_()
            module.proj.bias.zero_()
    logvar = slice(vae.config.z_dim, None)
    vae.quant_conv.weight[logvar] *= 0.1
    vae.quant_conv.bias[logvar] = -8.0


def picture(index: int, frames: int) -> np.ndarray:
    """A clip like those that training or generation will encode: uint8 [frames, H, W, 3]."""
    rng = np.random.default_rng([7, index])
    scene, kind = world.make_scene("vae", index), PICTURES[index % len(PICTURES)]
    if kind == "reference":
        return np.repeat(world.reference_image(scene)[None], frames, axis=0)
    video = world.render(scene)
    source, _ = world.condition(scene, kind, video, index)
    start = int(rng.integers(0, world.FRAMES - frames + 1))
    return (video if source is None else source)[start : start + frames]


def batch_of(first: int, count: int, frames: int) -> Tensor:
    """[count, 3, frames, H, W] in [-1, 1]: pictures first, first + 1, …, so that a run is reproducible."""
    clips = np.stack([picture(first + i, frames) for i in range(count)])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The decoder without its final clamp, which would stop the gradient of every saturated pixel."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for frame in range(latents.shape[2]):
        vae._conv_idx = [0]
        chunk = hidden[:, :, frame : frame + 1]
        chunks.append(
            vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=frame == 0)
        )
    vae.clear_cache()
    return torch.cat(chunks, dim=2)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates, for convolution kernels as matrices (Jordan et al. 2024)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                direction = weight.grad.lerp(buffer, group["momentum"]).flatten(1)
                update = newton_schulz(direction[None])[0] * UPDATE_RMS * math.sqrt(max(direction.shape))
                weight.sub_(update.view_as(weight), alpha=group["lr"])


def mean_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over the processes, with one all-reduce."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def pixel_loss(error: Tensor, phase: Phase) -> Tensor:
    """Scalar loss of error [B, 3, T, H, W], with the weights of `phase`.

    On the first frame, the absolute and the squared error have equal weight.
    """
    colour = error - error.mean(dim=1, keepdim=True)
    loss = phase.absolute * error.abs().mean() + 2 * error.square().mean()
    loss = loss + phase.chroma * (phase.absolute * colour.abs().mean() + 2 * colour.square().mean())
    if phase.first_frame:
        first = error[:, :, 0]
        loss = loss + phase.first_frame * (first.abs().mean() + first.square().mean())
    return loss


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is worth using.

    On a CPU without AVX-512, bf16 convolutions are a plain loop, many times slower than in fp32.
    """
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def run_phase(vae: AutoencoderKLWan, phase: Phase, scale: float, latents_std: Sequence[float]) -> float:
    """Train for one phase and return the PSNR of its last fifty steps in dB.

    The learning rate warms up, then decays along a cosine to a twentieth. `latents_std` is the unit of
    `phase.noise`.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if phase.batch % ranks:
        raise ConfigError(
            f"{ranks} processes cannot share {phase.batch} clips",
            where=f"phase {phase.name!r}",
            fix="start 1, 2 or 4",
        )
    share, device = phase.batch // ranks, next(vae.parameters()).device
    seed = zlib.crc32(phase.name.encode())
    torch.manual_seed(seed + rank)  # the posterior's noise
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    trained = decoder if phase.decoder_only else list(vae.parameters())
    vae.requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(True)
    kernels = [w for w in trained if w.ndim >= 4 and min(w.flatten(1).shape) > 1]
    others = [w for w in trained if not (w.ndim >= 4 and min(w.flatten(1).shape) > 1)]
    optimizers = [
        Muon(kernels, phase.learning_rate),
        torch.optim.AdamW(others, phase.learning_rate, weight_decay=0.0),
    ]
    unit = phase.noise * torch.tensor(latents_std, device=device).view(1, -1, 1, 1, 1)
    steps = max(1, round(phase.steps * scale))
    started, errors = time.monotonic(), []
    for step in range(steps):
        factor = min(1.0, (step + 1) / 20) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = phase.learning_rate * factor
            optimizer.zero_grad(set_to_none=True)
        clips = batch_of(seed + step * phase.batch + rank * share, share, phase.frames).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=phase.bf16 and has_bf16(device)):
            with torch.set_grad_enabled(not phase.decoder_only):
                posterior = vae.encode(clips).latent_dist
                mean, logvar = posterior.mean.float(), posterior.logvar.float()
            variance = logvar.exp()
            latents = mean if phase.decoder_only else mean + variance.sqrt() * torch.randn_like(mean)
            if phase.noise:
                latents = latents + unit * torch.rand(share, 1, 1, 1, 1, device=device) * torch.randn_like(
                    latents
                )
            output = decode_unclamped(vae, latents).float()
        error = output - clips
        squared = error.detach().square().mean()
        kl = 0.5 * (mean.square() + variance - 1 - logvar).mean()
        loss = pixel_loss(error, phase) + 1e-6 * kl + 1e-4 * mean.square().mean()
        if phase.frames > 1:
            loss = loss + ALIKE * (mean[:, :, 0] - mean[:, :, 1]).square().mean() / mean.detach().var()
        loss.backward()
        mean_over_ranks([squared, *(weight.grad for weight in trained if weight.grad is not None)])
        for optimizer in optimizers:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
        errors.append(squared.item())
        psnr = 10 * math.log10(4 / np.mean(errors[-50:]))
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            LOGGER.info(
                "%-11s step %4d/%d  psnr %.2f dB  %.2f s/step",
                phase.name,
                step + 1,
                steps,
                psnr,
                seconds / (step + 1),
            )
    return psnr


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, clips: int = 32) -> Statistics:
    """The statistics that normalize a transformer's latents."""
    device = next(vae.parameters()).device
    pictures = (batch_of(number, 1, world.FRAMES).to(device) for number in range(clips))
    latents = torch.cat([vae.encode(clip).latent_dist.mean for clip in pictures])
    dims = (0, 2, 3, 4)
    return Statistics(latents.mean(dims).tolist(), latents.std(dims).tolist())


@torch.no_grad()
def measure_psnr(vae: AutoencoderKLWan) -> float:
    """Reconstruction PSNR of plain held-out clips in dB."""
    device, squared = next(vae.parameters()).device, []
    for index in range(8):
        pixels = torch.from_numpy(world.render(world.make_scene("heldout", index))).to(device)
        clip = pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1
        output = vae.decode(vae.encode(clip).latent_dist.mean, return_dict=False)[0]
        squared.append((output - clip).square().mean().item())
    return 10 * math.log10(4 / np.mean(squared))


def load(vae: AutoencoderKLWan, path: Path) -> tuple[Statistics, int]:
    """Load a file that `save` wrote into `vae`; return its latent statistics and its count of phases done."""
    state = torch.load(path, weights_only=True)
    vae.load_state_dict({_names(vae).to_theirs(name): weight.float() for name, weight in state.items()})
    facts = read_json(path.with_suffix(".json"))
    return Statistics(facts["latents_mean"], facts["latents_std"]), int(facts["_phases_done"])


def _names(vae: AutoencoderKLWan) -> KeyMap:
    return vae_key_map(levels=len(vae.config.dim_mult), res_blocks=vae.config.num_res_blocks)


def save(vae: AutoencoderKLWan, path: Path, statistics: Statistics, phases_done: int) -> None:
    """Save the weights in bf16 under the official names, and the latent statistics in `<stem>.json`.

    The official file has no place for the statistics.
    """
    weights = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in vae.state_dict().items()}
    state = {_names(vae).to_ours(name): weight for name, weight in weights.items()}
    facts = {"latents_mean": statistics.mean, "latents_std": statistics.std, "_phases_done": phases_done}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description="Train the tiny world's VAE.")
    parser.add_argument("path", type=Path, help="the Wan2.1_VAE.pth to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", action="store_true", help="resume after the phases that the file has seen"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every phase")
    given = parser.parse_args()
    setup_logging()
    with launch(Accelerator.detect()) as accelerator:
        vae = new_vae(given.seed).to(accelerator.device)
        statistics, done = Statistics([0.0] * vae.config.z_dim, [1.0] * vae.config.z_dim), 0
        if given.resume and given.path.is_file():
            statistics, done = load(vae, given.path)
        for number, phase in enumerate(PHASES[done:], start=done + 1):
            run_phase(vae, phase, given.scale, statistics.std)
            if not phase.decoder_only:
                statistics = measure_latents(vae)
            if dist.get_rank() == 0:
                save(vae, given.path, statistics, number)
                psnr = measure_psnr(vae)
                LOGGER.info("after %-11s held-out psnr %.2f dB; written to %s", phase.name, psnr, given.path)


if __name__ == "__main__":
    main()
