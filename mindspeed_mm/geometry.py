"""How pixels of a video become latents and tokens: the one home of 4, 8, 16, 64 and 96."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentGeometry:
    """Sizes that the VAE and the patches of a model fix. Frames are T = 4k+1: one, then four at a time."""

    stride: tuple[int, int, int] = (4, 8, 8)  # pixels per latent element: time, height, width
    patch: int = 2  # latent elements per side of a token
    channels: int = 16  # of latents

    @property
    def token_side(self) -> int:
        """Pixels per side of a token, which height and width must be multiples of."""
        return self.stride[1] * self.patch

    @property
    def mask_channels(self) -> int:
        """Channels of a mask in vace_context: one for each pixel of a latent element."""
        return self.stride[1] * self.stride[2]

    @property
    def context_channels(self) -> int:
        """Channels of vace_context: inactive and reactive latents, then the mask."""
        return 2 * self.channels + self.mask_channels

    def fits_frames(self, frames: int) -> bool:
        """Whether the VAE encodes a clip of this length whole."""
        return frames % self.stride[0] == 1

    def trim_frames(self, frames: int) -> int:
        """The largest 4k+1 that is at most `frames`."""
        return (frames - 1) // self.stride[0] * self.stride[0] + 1

    def nearest_frames(self, frames: int) -> int:
        """A 4k+1 next to `frames`, for messages."""
        return frames // self.stride[0] * self.stride[0] + 1

    def nearest_side(self, pixels: float) -> int:
        """The multiple of a token's side nearest to `pixels`, at least one token."""
        return max(self.token_side, round(pixels / self.token_side) * self.token_side)

    def latent_frames(self, frames: int) -> int:
        """F of a clip of T frames."""
        return (frames - 1) // self.stride[0] + 1

    def video_frames(self, latent_frames: int) -> int:
        """T of F latent frames."""
        return self.stride[0] * (latent_frames - 1) + 1

    def grid(self, frames: int, height: int, width: int, num_refs: int = 0) -> tuple[int, int, int]:
        """Latent (R+F, h, w) of a video in pixels and its references."""
        return self.latent_frames(frames) + num_refs, height // self.stride[1], width // self.stride[2]

    def tokens(self, frames: int, height: int, width: int, num_refs: int = 0) -> int:
        """Tokens of a video in pixels and its references."""
        side = self.token_side
        return (self.latent_frames(frames) + num_refs) * (height // side) * (width // side)


WAN = LatentGeometry()  # of every VACE checkpoint: Wan2.1's VAE and patches of 1x2x2
