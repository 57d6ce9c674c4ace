"""Compares the generated pixels with the true clip, if the data has it."""

from __future__ import annotations

import numpy as np

from mindspeed_mm.data.psnr import region_psnr
from mindspeed_mm.evaluation.pixels import ssim_map
from mindspeed_mm.evaluation.sample import Sample
from mindspeed_mm.evaluation.spec import metric


@metric("truth_psnr", unit="dB", better="higher", summary="generated pixels against the true clip")
def truth_psnr(sample: Sample) -> float | None:
    """Return the PSNR over the generated region."""
    truth = sample.truth
    if truth is None:
        return None
    made = sample.generated
    return region_psnr([(sample.output[n][made[n]], truth[n][made[n]]) for n in range(len(made))])


@metric("truth_ssim", better="higher", summary="SSIM of these pixels")
def truth_ssim(sample: Sample) -> float | None:
    """Return the SSIM over the generated region."""
    truth = sample.truth
    if truth is None:
        return None
    made = sample.generated
    values = [ssim_map(sample.output[n], truth[n])[made[n]] for n in range(len(made)) if made[n].any()]
    return float(np.concatenate(values).mean()) if values else None
