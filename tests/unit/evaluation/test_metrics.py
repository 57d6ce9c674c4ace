"""Each metric against a closed formula on a constructed clip, or against an independent computation."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate import lines
from mindspeed_mm.conditioning.annotate.flow import colour_flow, flow_frames
from mindspeed_mm.conditioning.annotate.shapes import layout_frame
from mindspeed_mm.data.psnr import region_psnr
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.evaluation.metrics.catalog import all_metrics
from mindspeed_mm.evaluation.metrics.control import overlap_f1
from mindspeed_mm.evaluation.metrics.movement import box_iou, decode_flow
from mindspeed_mm.evaluation.pixels import ssim_map
from mindspeed_mm.evaluation.sample import Pixels, Sample, kind_of
from mindspeed_mm.evaluation.spec import METRICS
from tests.support.errors import raises

SIDE = 48
RNG = np.random.default_rng(0)
NOISE = RNG.integers(60, 180, (SIDE, SIDE, 3), dtype=np.uint8)
TEXTURE = cv2.GaussianBlur(np.tile(RNG.integers(0, 255, (96, 160, 3), dtype=np.uint8), (1, 1, 1)), (0, 0), 2)


def measure(name: str, sample: Sample) -> float:
    found = METRICS.get(name).measure(sample)
    assert found is not None
    return found


def flat(levels: list[float]) -> Pixels:
    """Frames of one gray level each."""
    return np.stack([np.full((SIDE, SIDE, 3), level, np.uint8) for level in levels])


def box_mask(count: int = 1) -> NDArray[np.bool_]:
    mask = np.zeros((count, SIDE, SIDE), bool)
    mask[:, 12:30, 12:30] = True
    return mask


def moving(count: int, step: int = 2, size: tuple[int, int] = (96, 96)) -> Pixels:
    """A texture that moves to the left: its flow is (-step, 0)."""
    return np.stack([TEXTURE[: size[0], n * step : n * step + size[1]] for n in range(count)])


def test_psnr_of_a_known_error_matches_its_formula() -> None:
    assert region_psnr([(flat([100]), flat([110]))]) == pytest.approx(20 * math.log10(255 / 10))
    assert region_psnr([(flat([100]), flat([100]))]) == 99


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    a, b, c1 = 100.0, 140.0, (0.01 * 255) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    np.testing.assert_allclose(ssim_map(flat([a])[0], flat([b])[0]), expected, rtol=1e-9)


def test_ssim_equals_the_formula_window_by_window() -> None:
    other = np.clip(NOISE.astype(int) + RNG.integers(-40, 40, NOISE.shape), 0, 255).astype(np.uint8)
    x, y = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(float) for picture in (NOISE, other))
    axis = np.arange(-5, 6)
    gauss = np.exp(-(axis**2) / (2 * 1.5**2))
    window = np.outer(gauss, gauss) / gauss.sum() ** 2
    row, column = 20, 31
    part = np.s_[row - 5 : row + 6, column - 5 : column + 6]
    mx, my = (window * x[part]).sum(), (window * y[part]).sum()
    vx, vy = (window * (x[part] - mx) ** 2).sum(), (window * (y[part] - my) ** 2).sum()
    both = (window * (x[part] - mx) * (y[part] - my)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim_map(NOISE, other)[row, column] == pytest.approx(expected, rel=1e-9)


def test_kept_metrics_ignore_what_is_made() -> None:
    output = flat([100])
    output[0, 12:30, 12:30] = 250
    sample = Sample(name="a", output=output, src_video=flat([110]), src_mask=box_mask())
    assert measure("kept_psnr", sample) == pytest.approx(20 * math.log10(255 / 10))
    c1 = (0.01 * 255) ** 2
    assert measure("kept_ssim", sample) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1))


def test_given_frames_are_those_without_white() -> None:
    mask = np.ones((3, SIDE, SIDE), bool)
    mask[0] = False
    sample = Sample(name="a", output=flat([105, 0, 0]), src_video=flat([100, 128, 128]), src_mask=mask)
    assert measure("given_frame_psnr", sample) == pytest.approx(20 * math.log10(255 / 5))
    assert METRICS.get("kept_psnr").measure(sample) is None


def test_seam_is_the_step_at_the_mask_alone() -> None:
    ramp = np.repeat(np.arange(SIDE, dtype=np.uint8)[None, :, None] * 2, SIDE, 0).repeat(3, 2)[None]
    stepped = ramp.copy()
    stepped[:, :, 24:] += 30
    mask = np.zeros((1, SIDE, SIDE), bool)
    mask[:, :, 24:] = True
    assert measure("seam", Sample(name="a", output=ramp, src_mask=mask)) == pytest.approx(0)
    assert measure("seam", Sample(name="a", output=stepped, src_mask=mask)) == pytest.approx(30)


def test_truth_counts_the_made_pixels_alone() -> None:
    output = flat([100])
    output[0, 12:30, 12:30] = 120
    sample = Sample(name="a", output=output, truth=flat([130]), src_mask=box_mask())
    assert measure("truth_psnr", sample) == pytest.approx(20 * math.log10(255 / 10))


def test_flicker_of_even_change_is_zero() -> None:
    assert measure("flicker", Sample(name="a", output=flat([10, 20, 30, 40]))) == 0
    blinking = Sample(name="a", output=flat([100, 106, 100, 106, 100]))
    assert measure("flicker", blinking) == pytest.approx(6)


def test_latent_jump_is_the_ratio_of_changes() -> None:
    levels, level = [100.0], 100.0
    for n in range(16):
        level += 6 if n % 4 == 0 else 2
        levels.append(level)
    assert measure("latent_jump", Sample(name="a", output=flat(levels))) == pytest.approx(3)


def test_motion_and_warp_error_of_a_moving_texture() -> None:
    sample = Sample(name="a", output=moving(4))
    assert measure("motion", sample) == pytest.approx(2, rel=0.1)
    still = np.abs(np.diff(sample.output.astype(int), axis=0)).mean()
    assert measure("warp_error", sample) < 0.25 * still
    noisy = sample.output.copy()
    noisy[2] = np.clip(noisy[2].astype(int) + 20, 0, 255)
    assert measure("warp_error", Sample(name="a", output=noisy)) > 5


def test_colour_drift_is_a_distance_in_cielab() -> None:
    output = np.stack([np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in ([255, 0, 0], [0, 0, 255])])
    red, blue = np.array([53.24, 80.09, 67.20]), np.array([32.30, 79.19, -107.86])  # sRGB, D65, by definition
    expected = float(np.linalg.norm(red - blue))
    assert measure("colour_drift", Sample(name="a", output=output)) == pytest.approx(expected, rel=2e-3)
    assert measure("colour_drift", Sample(name="a", output=output, truth=output)) == 0


def test_gray_error_is_the_difference_of_lumas() -> None:
    control = np.stack([lines.gray(frame) for frame in moving(2)])
    exact = Sample(name="a", task="gray", output=moving(2), src_video=control)
    assert measure("gray_error", exact) == 0
    brighter = Sample(name="a", task="gray", output=flat([107, 107]), src_video=flat([100, 100]))
    assert measure("gray_error", brighter) == pytest.approx(7)


@pytest.mark.parametrize("task", ["canny", "edge", "scribble", "xdog"])
def test_line_f1_falls_when_lines_move(task: str) -> None:
    scene = np.full((SIDE, SIDE, 3), 200, np.uint8)
    cv2.rectangle(scene, (10, 10), (30, 34), (20, 60, 40), -1)
    control = np.stack([getattr(lines, task)(scene)])
    same = Sample(name="a", task=task, output=scene[None], src_video=control)
    shifted = Sample(name="a", task=task, output=np.roll(scene, 8, 1)[None], src_video=control)
    assert measure("line_f1", same) == pytest.approx(1)
    assert measure("line_f1", shifted) < 0.6


def test_f1_matches_within_the_tolerance() -> None:
    first, second = np.zeros((2, 1, 9, 9), bool)
    first[0, 4, 2], second[0, 4, 3] = True, True
    assert overlap_f1(first, second, 1) == 1
    assert overlap_f1(first, second, 0) == 0
    second[0, 4, 8] = True  # one of two lines is found
    assert overlap_f1(first, second, 1) == pytest.approx(2 / 3)


def test_flow_colours_decode_to_the_vectors() -> None:
    angle = np.linspace(-np.pi, np.pi, 64, endpoint=False)
    flow = np.stack([np.cos(angle), np.sin(angle)], -1)[None].astype(np.float32) * np.linspace(0.2, 4, 8)[
        :, None, None
    ].astype(np.float32)
    found = 4 * decode_flow(colour_flow(flow, 4.0))
    assert np.abs(found - flow).max() < 0.15


def test_flow_error_sees_motion_the_wrong_way() -> None:
    control = np.stack(list(flow_frames(lambda: iter(moving(4)))))
    same = Sample(name="a", task="flow", output=moving(4), src_video=control)
    reverse = Sample(name="a", task="flow", output=moving(4)[::-1], src_video=control)
    assert measure("flow_error", same) < 0.2
    assert measure("flow_error", reverse) == pytest.approx(2, rel=0.2)


def test_layout_iou_follows_the_box() -> None:
    boxes = [(4 + 2 * n, 10, 24 + 2 * n, 30) for n in range(12)]
    output = np.stack([np.full((64, 64, 3), 40, np.uint8) for _ in boxes])
    for frame, (left, top, right, bottom) in zip(output, boxes, strict=True):
        frame[top:bottom, left:right] = (220, 60, 60)
    control = np.stack([layout_frame(box, 64, 64) for box in boxes])
    follows = Sample(name="a", task="layout_bbox", output=output, src_video=control)
    leaves = Sample(name="a", task="layout_bbox", output=output[:, ::-1], src_video=control)
    assert measure("layout_iou", follows) > 0.7
    assert measure("layout_iou", leaves) < 0.2
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)


def test_depth_error_needs_its_network() -> None:
    sample = Sample(
        name="a", task="depth", output=moving(2), src_video=moving(2), options={"annotators": "no"}
    )
    with raises(ConfigError, where="no/depth.onnx"):
        measure("depth_error", sample)


def test_reference_metrics_find_colour_and_shape() -> None:
    picture = np.full((64, 64, 3), 255, np.uint8)
    cv2.circle(picture, (32, 32), 20, (200, 40, 40), -1)
    frame = np.full((64, 96, 3), 90, np.uint8)
    round_, square, blue = frame.copy(), frame.copy(), frame.copy()
    cv2.circle(round_, (60, 30), 12, (200, 40, 40), -1)
    square[20:40, 50:70] = (200, 40, 40)
    cv2.circle(blue, (60, 30), 12, (40, 40, 200), -1)

    def scores(shown: Pixels) -> tuple[float, float]:
        sample = Sample(name="a", output=shown[None], references=(picture,))
        return measure("reference_colour", sample), measure("reference_shape", sample)

    assert scores(round_)[0] == pytest.approx(1, abs=0.02)
    assert scores(square)[0] == pytest.approx(1, abs=0.02)
    assert scores(blue) == (0, 0)
    assert scores(round_)[1] > scores(square)[1] + 0.1


@pytest.mark.parametrize(
    ("kind", "box"),
    [("inpaint", np.s_[:, 4:9, 4:9]), ("outpaint", np.s_[:, :, :20]), ("extension", np.s_[1:])],
)
def test_kind_follows_from_the_mask(kind: str, box: tuple[slice, ...]) -> None:
    mask = np.zeros((3, SIDE, SIDE), bool)
    mask[box] = True
    assert kind_of(True, mask, 0) == kind


def test_kind_without_a_mask() -> None:
    assert [kind_of(True, None, 1), kind_of(False, None, 1), kind_of(False, None, 0)] == [
        "control",
        "reference",
        "text",
    ]


def test_inputs_of_another_length_are_rejected() -> None:
    with raises(DataError, 3, 2, "src_video", where="clip"):
        Sample(name="clip", output=flat([1, 2]), src_video=flat([1, 2, 3]))


def test_every_metric_is_in_the_table_once() -> None:
    names = [metric.name for metric in all_metrics()]
    assert len(names) == len(set(names)) >= 19
    with raises(ConfigError, "kept_psnr"):
        all_metrics(("kept_psn",))
