"""How the pixels of a video map to latents and tokens. Defines the constants 4, 8, 16, 64 and 96."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentGeometry:
    """Sizes that the VAE and the patches of a model determine. Clips have T = 4k+1 frames."""

    stride: tuple[int, int, int] = (4, 8, 8)  # pixels per latent element: time, height, width
    patch: int = 2  # latent elements per side of a token
    channels: int = 16  # latent channels

    @property
    def token_side(self) -> int:
        """The side of a token in pixels. Height and width must be multiples of it."""
        return self.stride[1] * self.patch

    @property
    def mask_channels(self) -> int:
        """The mask channels of vace_context, one for each pixel of a latent element."""
        return self.stride[1] * self.stride[2]

    @property
    def context_channels(self) -> int:
        """The channels of vace_context: inactive and reactive latents, then the mask."""
        return 2 * self.channels + self.mask_channels

    def fits_frames(self, frames: int) -> bool:
        """Return whether the VAE encodes all frames of a clip of this length."""
        return frames % self.stride[0] == 1

    def trim_frames(self, frames: int) -> int:
        """Return the largest 4k+1 that is at most `frames`."""
        return (frames - 1) // self.stride[0] * self.stride[0] + 1

    def nearest_frames(self, frames: int) -> int:
        """Return a 4k+1 close to `frames`, for messages."""
        return frames // self.stride[0] * self.stride[0] + 1

    def nearest_side(self, pixels: float) -> int:
        """Return the multiple of a token's side nearest to `pixels`, at least one token."""
        return max(self.token_side, round(pixels / self.token_side) * self.token_side)

    def latent_frames(self, frames: int) -> int:
        """Return the number of latent frames F of a clip of T frames."""
        return (frames - 1) // self.stride[0] + 1

    def video_frames(self, latent_frames: int) -> int:
        """Return the number of frames T of F latent frames."""
        return self.stride[0] * (latent_frames - 1) + 1

    def grid(self, frames: int, height: int, width: int, num_refs: int = 0) -> tuple[int, int, int]:
        """Return the latent size (R+F, h, w) of a video in pixels and its references."""
        return self.latent_frames(frames) + num_refs, height // self.stride[1], width // self.stride[2]

    def tokens(self, frames: int, height: int, width: int, num_refs: int = 0) -> int:
        """Return the number of tokens of a video in pixels and its references."""
        side = self.token_side
        return (self.latent_frames(frames) + num_refs) * (height // side) * (width // side)


WAN = LatentGeometry()  # for every VACE checkpoint: Wan2.1's VAE and patches of 1x2x2
