"""Encodes the clips of a sample.

Each distinct clip is encoded once, clips of equal size share a batch, and constant gray is cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Vae(Protocol):
    """The VAE interface that conditioning requires."""

    @property
    def device(self) -> torch.device: ...

    def encode(self, video: Tensor, /) -> Tensor:
        """Encode pixels [B, 3, T, H, W] in [-1, 1] to normalized fp32 latents [B, 16, F, h, w]."""
        ...


class StreamEncoder:
    """A VAE wrapper that does not encode the same pixels twice.

    A clip that is zero (mid-gray) everywhere is encoded alone, once for each length and size, and cached. The
    latents are bit-identical with and without the cache. `max_batch` is the maximum number of clips per VAE
    pass, all of one size. It is fixed for a run, so that the latents of a sample depend only on the sample.
    """

    def __init__(self, vae: Vae, *, max_batch: int = 1, max_gray: int = 64) -> None:
        self.vae = vae
        self.max_batch = max_batch
        self.max_gray = max_gray
        self.encoded = 0  # number of clips that the VAE encoded
        self.requested = 0  # number of clips passed to `encode`
        self._gray: OrderedDict[torch.Size, Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """The device of the pixels and latents."""
        return self.vae.device

    def encode(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Encode clips [3, T, H, W] of any sizes to fp32 latents [16, F, h, w], in the same order."""
        self.requested += len(streams)
        answers: dict[int, Tensor] = {}
        pending: list[int] = []
        source = {index: self._first_equal(streams, index) for index in range(len(streams))}
        for index, stream in enumerate(streams):
            if source[index] != index:
                continue
            if not stream.any():
                answers[index] = self._gray_latents(stream.shape)
            else:
                pending.append(index)
        for group in self._groups(streams, pending):
            encoded = self.vae.encode(torch.stack([streams[index] for index in group]))
            self.encoded += len(group)
            answers.update(zip(group, encoded.unbind(0), strict=True))
        return [answers[source[index]] for index in range(len(streams))]

    def _first_equal(self, streams: Sequence[Tensor], index: int) -> int:
        """Return the index of the first stream with the same pixels."""
        for earlier in range(index):
            if streams[earlier] is streams[index] or (
                streams[earlier].shape == streams[index].shape
                and torch.equal(streams[earlier], streams[index])
            ):
                return earlier
        return index

    def _groups(self, streams: Sequence[Tensor], pending: Sequence[int]) -> list[list[int]]:
        by_shape: dict[torch.Size, list[int]] = {}
        for index in pending:
            by_shape.setdefault(streams[index].shape, []).append(index)
        return [
            members[start : start + self.max_batch]
            for members in by_shape.values()
            for start in range(0, len(members), self.max_batch)
        ]

    def _gray_latents(self, shape: torch.Size) -> Tensor:
        if shape not in self._gray:
            self._gray[shape] = self.vae.encode(torch.zeros(1, *shape, device=self.device))[0]
            self.encoded += 1
            if len(self._gray) > self.max_gray:
                self._gray.popitem(last=False)
        self._gray.move_to_end(shape)
        return self._gray[shape]


def stream_encoder(vae: Vae | StreamEncoder) -> StreamEncoder:
    """Return `vae` if it is a StreamEncoder, otherwise wrap it in one with an empty cache."""
    return vae if isinstance(vae, StreamEncoder) else StreamEncoder(vae)
