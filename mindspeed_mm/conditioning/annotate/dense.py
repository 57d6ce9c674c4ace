"""Networks with per-pixel output: depth, the salient subject, and the segment inside a box."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.networks import Network
from mindspeed_mm.conditioning.annotate.opencv import Box, Frame, Mask, opencv

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_DEPTH_SIDE, _PATCH = 518, 14  # shorter input side of Depth-Anything, and patch size of its ViT
_SALIENT_SIDE, _SEGMENT_SIDE = 320, 1024


def normalized(frame: Frame, height: int, width: int) -> NDArray[np.float32]:
    """Scale and normalize a frame for ImageNet networks: [1, 3, height, width]."""
    cv2 = opencv()
    scaled = cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32) / 255
    return np.ascontiguousarray(((scaled - _MEAN) / _STD).transpose(2, 0, 1)[None])


class Depth:
    """Depth-Anything-V2. Nearer pixels have larger values."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, frame: Frame) -> NDArray[np.float32]:
        """Estimate the disparity [H, W], of arbitrary scale."""
        height, width = frame.shape[:2]
        scale = _DEPTH_SIDE / min(height, width)
        rows, columns = (max(1, round(side * scale / _PATCH)) * _PATCH for side in (height, width))
        rows, columns = self._network.side(2, rows), self._network.side(3, columns)
        found = self._network(normalized(frame, rows, columns))[0]
        return _resized(found.reshape(found.shape[-2:]), height, width)


class Salient:
    """U2Net, which predicts the saliency of each pixel."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, frame: Frame) -> Mask:
        """Return a mask that is white on the subject."""
        side = self._network.side(2, _SALIENT_SIDE)
        found = self._network(normalized(frame, side, side))[0]
        values = found.reshape(found.shape[-2:])
        low, high = float(values.min()), float(values.max())
        values = _resized((values - low) / max(high - low, 1e-6), *frame.shape[:2])
        return np.where(values > 0.5, 255, 0).astype(np.uint8)


class Segment:
    """SAM 2, prompted with a box. The box is passed as two points with the labels 2 and 3."""

    def __init__(self, encoder: Network, decoder: Network) -> None:
        self._encoder, self._decoder = encoder, decoder

    def __call__(self, frame: Frame, box: Box) -> Mask:
        """Return a mask that is white on the subject in `box`."""
        height, width = frame.shape[:2]
        side = self._encoder.side(2, _SEGMENT_SIDE)
        encoded = self._encoder(normalized(frame, side, side))
        values: dict[str, NDArray[Any]] = dict(zip(self._encoder.outputs, encoded, strict=True))
        scale = np.array([side / width, side / height], np.float32)
        corners = np.array([[box[:2], box[2:]]], np.float32) * scale
        values["point_coords"] = corners
        values["point_labels"] = np.array([[2, 3]], np.float32)
        values["mask_input"] = np.zeros((1, 1, side // 4, side // 4), np.float32)
        values["has_mask_input"] = np.zeros(1, np.float32)
        values["orig_im_size"] = np.array([height, width], np.int32)
        outputs = self._decoder.run({name: values[name] for name in self._decoder.inputs if name in values})
        masks, scores = outputs[0], outputs[1]
        best = masks[0, int(np.argmax(scores.reshape(-1)))]
        return np.where(_resized(best, height, width) > 0, 255, 0).astype(np.uint8)


def _resized(values: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    cv2 = opencv()
    return np.asarray(
        cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR), np.float32
    )
