"""Networks that return boxes and keypoints: faces, people and whole-body poses."""

from __future__ import annotations

import colorsys
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.networks import Network
from mindspeed_mm.conditioning.annotate.opencv import Box, Frame, opencv

_PERSON, _STRIDES = 0, (8, 16, 32)
_MIN_SCORE, _OVERLAP = 0.3, 0.45  # minimum score of a person; IoU above which two boxes are the same person
_MIN_FACE_SCORE = 0.7
_MIN_POINT_SCORE = 0.3
# COCO indices of the 18 body points in OpenPose order. 17 is the neck, midway between the shoulders.
_BODY = (0, 17, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_FACE = slice(23, 91)  # face points among the 133 whole-body points
Part = Literal["body", "body_face"]


class Face:
    """Ultra-Light-Fast-Generic-Face-Detector. Only the largest face is used."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, frame: Frame) -> Box | None:
        """Return the box of the largest face, or None if there is no face."""
        height, width = frame.shape[:2]
        rows, columns = self._network.side(2, 240), self._network.side(3, 320)
        scaled = opencv().resize(frame, (columns, rows)).astype(np.float32)
        values = np.ascontiguousarray(((scaled - 127) / 128).transpose(2, 0, 1)[None])
        scores, boxes = self._network(values)[:2]
        likely = boxes[0][scores[0, :, 1] > _MIN_FACE_SCORE] * (width, height, width, height)
        if not len(likely):
            return None
        left, top, right, bottom = max(likely, key=lambda b: (b[2] - b[0]) * (b[3] - b[1])).tolist()
        return left, top, right, bottom


class Pose:
    """DWPose: YOLOX detects people, then SimCC estimates 133 keypoints for each."""

    def __init__(self, detector: Network, estimator: Network) -> None:
        self._detector, self._estimator = detector, estimator

    def __call__(self, frame: Frame, part: Part = "body_face") -> Frame:
        """Draw the skeletons of all people on black. `body_face` also draws the keypoints of the face."""
        canvas = np.zeros_like(frame)
        for box in self.people(frame):
            points = self.points(frame, box)
            _draw_body(canvas, points)
            if part == "body_face":
                _draw_face(canvas, points[_FACE])
        return canvas

    def people(self, frame: Frame) -> list[Box]:
        """Return the boxes of people, highest score first."""
        cv2 = opencv()
        side = self._detector.side(2, 640)
        scale = min(side / frame.shape[0], side / frame.shape[1])
        rows, columns = round(frame.shape[0] * scale), round(frame.shape[1] * scale)
        canvas = np.full((side, side, 3), 114, np.float32)
        canvas[:rows, :columns] = cv2.resize(frame, (columns, rows))[..., ::-1]  # YOLOX takes BGR
        found = self._detector(np.ascontiguousarray(canvas.transpose(2, 0, 1)[None]))[0][0]
        cells = [np.stack(np.meshgrid(*[np.arange(side // s)] * 2), -1).reshape(-1, 2) for s in _STRIDES]
        stride = np.concatenate([np.full((len(c), 1), s) for c, s in zip(cells, _STRIDES, strict=True)])
        centre = (found[:, :2] + np.concatenate(cells)) * stride / scale
        half = np.exp(found[:, 2:4]) * stride / scale / 2
        scores = found[:, 4] * found[:, 5 + _PERSON]
        corners = np.concatenate([centre - half, centre + half], axis=1)
        likely = np.flatnonzero(scores > _MIN_SCORE)
        flat = [[b[0], b[1], b[2] - b[0], b[3] - b[1]] for b in corners[likely].tolist()]
        kept = cv2.dnn.NMSBoxes(flat, scores[likely].tolist(), _MIN_SCORE, _OVERLAP) if flat else []
        boxes = [corners[likely[int(place)]].tolist() for place in np.array(kept).reshape(-1)]
        return [(left, top, right, bottom) for left, top, right, bottom in boxes]

    def points(self, frame: Frame, box: Box) -> NDArray[np.float32]:
        """Return the K keypoints [K, 3]: x and y in frame pixels, and the score."""
        cv2 = opencv()
        rows, columns = self._estimator.side(2, 384), self._estimator.side(3, 288)
        left, top, right, bottom = box
        across, down = (right - left) * 1.25, (bottom - top) * 1.25
        across, down = max(across, down * columns / rows), max(down, across * rows / columns)
        corner = np.array([(left + right - across) / 2, (top + bottom - down) / 2], np.float32)
        scale = np.array([across / columns, down / rows], np.float32)
        matrix = np.array(
            [[1 / scale[0], 0, -corner[0] / scale[0]], [0, 1 / scale[1], -corner[1] / scale[1]]]
        )
        area = cv2.warpAffine(frame, matrix, (columns, rows)).astype(np.float32)
        values = (area - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
        x, y = self._estimator(np.ascontiguousarray(values.transpose(2, 0, 1)[None].astype(np.float32)))[:2]
        points = np.stack([x[0].argmax(-1) * columns / x.shape[-1], y[0].argmax(-1) * rows / y.shape[-1]], -1)
        scores = np.minimum(x[0].max(-1), y[0].max(-1))
        return np.concatenate([points * scale + corner, scores[:, None]], axis=1).astype(np.float32)


def _draw_body(canvas: Frame, points: NDArray[np.float32]) -> None:
    """Draw limbs and joints in OpenPose's colours, which the weights were trained on."""
    cv2 = opencv()
    neck = (points[5] + points[6]) / 2
    neck[2] = min(points[5][2], points[6][2])
    body = np.concatenate([points[:17], neck[None]])[list(_BODY)]
    width = max(1, round(4 * min(canvas.shape[:2]) / 512))
    for index, (start, end) in enumerate(_LIMBS):
        if min(body[start, 2], body[end, 2]) > _MIN_POINT_SCORE:
            ends = [tuple(round(float(v)) for v in body[joint, :2]) for joint in (start, end)]
            colour = tuple(int(0.6 * part) for part in _hue(index))
            cv2.line(canvas, ends[0], ends[1], colour, 2 * width, cv2.LINE_AA)
    for index, (x, y, score) in enumerate(body):
        if score > _MIN_POINT_SCORE:
            cv2.circle(canvas, (round(float(x)), round(float(y))), width, _hue(index), -1)


def _draw_face(canvas: Frame, points: NDArray[np.float32]) -> None:
    width = max(1, round(3 * min(canvas.shape[:2]) / 512))
    for x, y, score in points:
        if score > _MIN_POINT_SCORE:
            opencv().circle(canvas, (round(float(x)), round(float(y))), width, (255, 255, 255), -1)


def _hue(index: int) -> tuple[int, int, int]:
    """Return one of the 18 colours of OpenPose: hues in steps of 20 degrees."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(index / 18, 1, 1))
    return red, green, blue
