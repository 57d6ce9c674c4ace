"""Copies the pixels that a mask keeps from the source into the result. No torch.

Under the mask, the source is often plain gray, so it is never blended in. Instead, the difference at the seam
is added to the generated pixels nearby, fading with distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # [T, H, W, 3]
Masks = NDArray[np.uint8]  # [T, H, W], above 127 = generated


def paste_frame(made: Frames, source: Frames, mask: NDArray[np.uint8], feather: int) -> Frames:
    """Return a frame [H, W, 3] that is `source` where the mask [H, W] keeps it, and adapted `made` elsewhere.

    `feather` is the distance from the seam in pixels beyond which `made` is unchanged.
    """
    generated = mask > 127
    if generated.all():
        return made
    if not feather or not generated.any():
        return np.where(generated[..., None], made, source)
    weight = feather_weights(generated, feather)
    rim = weight > 0
    shift = _difference_beside(made, source, generated, feather)
    adapted = made.astype(np.float32)
    adapted[rim] += weight[rim][:, None] * shift[rim]
    pasted = np.rint(adapted).clip(0, 255).astype(np.uint8)
    return np.where(generated[..., None], pasted, source)


def feather_weights(generated: NDArray[np.bool_], feather: int) -> NDArray[np.float32]:
    """Return fp32 [H, W], 1 at the last kept pixel, falling linearly to 0 at `feather` + 1 pixels from it."""
    distance = cv2.distanceTransform(generated.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.where(generated, np.clip(1 - distance / (feather + 1), 0, 1), 0).astype(np.float32)


def _difference_beside(
    made: Frames, source: Frames, generated: NDArray[np.bool_], feather: int
) -> NDArray[np.float32]:
    """Return fp32 [H, W, 3]: `source` − `made` at nearby kept pixels, smoothed over the feather."""
    kept = (~generated).astype(np.float32)
    difference = (source.astype(np.float32) - made) * kept[..., None]
    sigma = max(1.0, feather / 2)
    blurred = cv2.GaussianBlur(difference, (0, 0), sigma)
    share = cv2.GaussianBlur(kept, (0, 0), sigma)
    return np.asarray(blurred / np.maximum(share, 1e-6)[..., None], dtype=np.float32)


def paste_chunks(chunks: Iterable[Frames], source: Frames, mask: Masks, feather: int) -> Iterator[Frames]:
    """Apply `paste_frame` to a stream of chunks [t, H, W, 3] that starts at the first frame."""
    start = 0
    for chunk in chunks:
        span = range(start, start + len(chunk))
        yield np.stack(
            [
                paste_frame(frame, source[index], mask[index], feather)
                for index, frame in zip(span, chunk, strict=True)
            ]
        )
        start += len(chunk)
