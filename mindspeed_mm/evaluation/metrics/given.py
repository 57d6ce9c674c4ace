"""Measures whether given pixels and frames are kept, and whether a seam to the generated ones is visible."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.opencv import opencv
from mindspeed_mm.data.psnr import region_psnr
from mindspeed_mm.evaluation.pixels import SSIM_RADIUS, ssim_map
from mindspeed_mm.evaluation.sample import Sample
from mindspeed_mm.evaluation.spec import metric


@metric("kept_psnr", unit="dB", better="higher", summary="kept pixels of partly generated frames")
def kept_psnr(sample: Sample) -> float | None:
    """Return the PSNR against src_video where the mask is black."""
    source, mask = sample.src_video, sample.src_mask
    if source is None or mask is None:
        return None
    return region_psnr([(sample.output[n][~mask[n]], source[n][~mask[n]]) for n in sample.mixed_frames])


@metric("kept_ssim", better="higher", summary="SSIM of these pixels, in windows without generated pixels")
def kept_ssim(sample: Sample) -> float | None:
    """Return the SSIM against src_video, or None if no window fits between masked pixels."""
    source, mask = sample.src_video, sample.src_mask
    if source is None or mask is None:
        return None
    found: list[NDArray[np.float64]] = []
    window = np.ones((2 * SSIM_RADIUS + 1,) * 2, np.uint8)
    for n in sample.mixed_frames:
        whole = opencv().erode((~mask[n]).astype(np.uint8), window, borderValue=1) > 0
        if whole.any():
            found.append(ssim_map(sample.output[n], source[n])[whole])
    return float(np.concatenate(found).mean()) if found else None


@metric("given_frame_psnr", unit="dB", better="higher", summary="frames that are given completely")
def given_frame_psnr(sample: Sample) -> float | None:
    """Return the PSNR against src_video."""
    source = sample.src_video
    if source is None:
        return None
    return region_psnr([(sample.output[n], source[n]) for n in sample.kept_frames])


@metric(
    "seam", unit="levels", better="lower", summary="step across the mask's edge, minus the steps next to it"
)
def seam(sample: Sample) -> float | None:
    """Return the mean difference across the edge, minus that one pixel to either side of it."""
    mask = sample.src_mask
    if mask is None:
        return None
    across: list[float] = []
    beside: list[float] = []
    for n in sample.mixed_frames:
        for frame, where in (
            (sample.output[n], mask[n]),
            (sample.output[n].swapaxes(0, 1), mask[n].T),
        ):
            # The edge runs between columns 1 and 2 of four, so columns 0 and 3 must be on the outer sides.
            ordinary = where[:, :-3] == where[:, 1:-2]
            ordinary &= (where[:, 1:-2] != where[:, 2:-1]) & (where[:, 2:-1] == where[:, 3:])
            if ordinary.any():
                wide = frame.astype(np.int16)
                steps = np.abs(np.diff(wide, axis=1)).mean(-1)
                across += steps[:, 1:-1][ordinary].tolist()
                beside += ((steps[:, :-2] + steps[:, 2:]) / 2)[ordinary].tolist()
    return float(np.mean(across) - np.mean(beside)) if across else None
