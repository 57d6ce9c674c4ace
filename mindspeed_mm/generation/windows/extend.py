"""Generates a long video window by window. Each window continues the last frames of the previous one.

The next window's src_video starts with those frames unchanged, and its mask keeps them, which is how VACE
extends videos. Control clips, masks and given frames are cut to each window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.data.conditions import Conditions, ReadConditions, to_tensor, to_tensors
from mindspeed_mm.data.video_writer import clip_bytes, mask_bytes
from mindspeed_mm.generation.parallel import SingleProcess
from mindspeed_mm.generation.request import GenerationRequest, Inputs
from mindspeed_mm.generation.windows.compose import Composition, Frames
from mindspeed_mm.generation.windows.context import references_of
from mindspeed_mm.generation.windows.store import WindowStore
from mindspeed_mm.generation.windows_config import Window, WindowKeys

# Window index, its request, its pixels on the main process → latents [16, R+F, h, w] on the host.
MakeWindow = Callable[[int, GenerationRequest, "Conditions | None"], Tensor]
DecodeWindow = Callable[[Tensor, int], Iterable[Frames]]  # latents, references → chunks of frames


@dataclass(frozen=True, kw_only=True)
class Extended:
    """A finished long video."""

    frames: Frames  # uint8 [T, H, W, 3]
    report: dict[str, Any]


def extend(
    request: GenerationRequest,
    whole: ReadConditions | None,
    make: MakeWindow,
    decode: DecodeWindow,
    *,
    parallel: SingleProcess,
    store: WindowStore | None = None,
) -> Extended | None:
    """Generate all windows in order. Returns None on all processes except the main one.

    All processes must call this together. `whole` has the pixels of the whole video, on the main process.
    `store` keeps the latents of each window for a resumed run.
    """
    run = _Run(request, whole, decode, store)
    for window in request.sampling.windows:
        run.window = window
        parallel.run_on_main(run.prepare)
        if parallel.run_on_main_and_broadcast(run.is_missing):
            run.latents = make(window.index, window_request(request, window), run.given)
            parallel.run_on_main(run.keep)
        parallel.run_on_main(run.take)
    return parallel.run_on_main(run.finish)


class _Run:
    """The current window, and the video so far. Its methods run on the main process."""

    def __init__(
        self,
        request: GenerationRequest,
        whole: ReadConditions | None,
        decode: DecodeWindow,
        store: WindowStore | None,
    ) -> None:
        self.request, self.whole, self.decode, self.store = request, whole, decode, store
        self.video: Composition | None = None
        self.window = request.sampling.windows[0]
        self.given: Conditions | None = None
        self.latents: Tensor | None = None
        self.key = ""

    def prepare(self) -> None:
        """Load the pixels of the window, and its latents if they are stored."""
        assert self.whole is not None
        if self.video is None:
            self.video = _composition(self.request, self.whole)
        lead = self.video.lead(self.window)
        self.given = window_conditions(self.whole, lead, self.window, self.request.sampling)
        self.latents = None
        if self.store is not None:
            pixels = (self.given.src_video, self.given.src_mask, *self.given.src_ref_images)
            part = window_request(self.request, self.window)
            self.key = self.store.key(part, pixels)
            num_refs = len(self.given.src_ref_images)
            self.latents = self.store.read(self.window.index, self.key, part, num_refs)

    def is_missing(self) -> bool:
        """Return whether the window must be generated."""
        return self.latents is None

    def keep(self) -> None:
        """Store the latents."""
        assert self.latents is not None
        assert self.given is not None
        if self.store is not None:
            part = window_request(self.request, self.window)
            num_refs = len(self.given.src_ref_images)
            self.store.write(self.window.index, self.key, part, self.latents, num_refs)

    def take(self) -> None:
        """Decode the latents, and add the frames to the video."""
        assert self.latents is not None
        assert self.given is not None
        assert self.video is not None
        num_refs = len(self.given.src_ref_images)
        self.video.add(self.window, np.concatenate(list(self.decode(self.latents, num_refs))))

    def finish(self) -> Extended:
        """Return the video and its report."""
        assert self.video is not None
        report = self.video.report()
        for row in report["windows"]:
            row["seed"] = window_seed(self.request.sampling.seed, row["window"])
            row["prompt"] = self.request.prompt_of(row["window"])
        return Extended(frames=self.video.frames, report=report)


def window_request(request: GenerationRequest, window: Window) -> GenerationRequest:
    """Return the request of a window, with its own prompt, seed and number of frames."""
    defaults = {name: field.default for name, field in WindowKeys.model_fields.items() if "window" in name}
    update = {
        **defaults,
        "num_frames": window.stop - window.start,
        "seed": window_seed(request.sampling.seed, window.index),
        "paste_back": None,
    }
    return replace(
        request,
        prompt=request.prompt_of(window.index),
        sampling=request.sampling.model_copy(update=update),
        inputs=Inputs(),
        window_prompts=(),
        task=None,
    )


def window_seed(seed: int, index: int) -> int:
    """Return the seed of a window. The first window uses the seed of the request."""
    if not index:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/window {index}".encode()).digest()[:7], "big")


def window_conditions(whole: ReadConditions, lead: Frames, window: Window, keys: WindowKeys) -> Conditions:
    """Return the pixels of a window: its part of the whole, with kept frames `lead` [lead, H, W, 3] first."""
    chosen = references_of(keys, window, len(whole.src_ref_images))
    part = to_tensors(
        ReadConditions(
            src_video=_cut(whole.src_video, window),
            src_mask=_cut(whole.src_mask, window),
            src_ref_images=tuple(whole.src_ref_images[number] for number in chosen),
        )
    )
    if not window.lead:
        return part
    shape = (window.stop - window.start, *lead.shape[1:3])
    pixels = torch.zeros(3, *shape) if part.src_video is None else part.src_video.clone()
    mask = torch.ones(1, *shape) if part.src_mask is None else part.src_mask.clone()
    pixels[:, : window.lead] = to_tensor(lead)
    mask[:, : window.lead] = 0
    return replace(part, src_video=pixels, src_mask=mask)


def _composition(request: GenerationRequest, whole: ReadConditions) -> Composition:
    sampling = request.sampling
    mask = None if whole.src_mask is None else mask_bytes(whole.src_mask)
    pastes = sampling.paste_back is not None and mask is not None
    video = clip_bytes(whole.src_video) if pastes and whole.src_video is not None else None
    return Composition(sampling, (sampling.height, sampling.width), video, mask)


def _cut(pixels: Any, window: Window) -> Any:
    """Return the window's part of uint8 [T, …] or of a tensor [C, T, …]."""
    if pixels is None:
        return None
    return pixels[:, window.frames] if isinstance(pixels, Tensor) else pixels[window.frames]
