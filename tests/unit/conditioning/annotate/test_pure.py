"""Annotators without a network, against OpenCV, closed formulas and scenes whose truth is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from mindspeed_mm.conditioning.annotate import (
    backdrop,
    flow,
    lines,
    maskaug,
    motion,
    opencv,
    shapes,
    spool,
    subject,
)
from mindspeed_mm.errors import ConfigError, DataError
from tests.support.errors import raises
from tests.support.scenes import iou, moving_disc

FRAMES, MASKS = moving_disc()
FRAME = FRAMES[0]


def test_gray_is_luma_with_the_weights_of_rgb() -> None:
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert lines.gray(primaries)[0].tolist() == [[76] * 3, [150] * 3, [29] * 3]


def test_official_gray_exchanges_red_and_blue() -> None:
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert lines.gray(primaries, official=True)[0, :, 0].tolist() == [29, 150, 76]
    assert np.array_equal(lines.gray(FRAME[..., ::-1].copy(), official=True), lines.gray(FRAME))


def test_canny_is_opencv_of_the_luma() -> None:
    expected = cv2.Canny(cv2.cvtColor(FRAME, cv2.COLOR_RGB2GRAY), 100, 200)
    assert expected.any()
    assert np.array_equal(lines.canny(FRAME), np.stack([expected] * 3, -1))


def test_edge_follows_a_square() -> None:
    square = np.zeros((64, 64, 3), np.uint8)
    square[16:48, 16:48] = 255
    found = lines.edge(square)[..., 0] > 0
    assert found[14:18, 20:44].any(axis=0).all()
    assert not found[22:42, 22:42].any()


def test_xdog_matches_its_formula() -> None:
    luma = cv2.cvtColor(FRAME, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    d = cv2.GaussianBlur(luma, (0, 0), 0.8) - 0.98 * cv2.GaussianBlur(luma, (0, 0), 0.8 * 1.6)
    expected = 255 * np.where(d >= 0, 1, 1 + np.tanh(200 * d))
    assert np.abs(lines.xdog(FRAME)[..., 0] - expected).max() <= 1
    assert (lines.xdog(np.full((8, 8, 3), 90, np.uint8)) == 255).all()


def test_scribble_is_black_on_white_where_the_disc_ends() -> None:
    strokes = lines.scribble(FRAME)[..., 0]
    assert set(np.unique(strokes)) == {0, 255}
    ring = cv2.morphologyEx(MASKS[0], cv2.MORPH_GRADIENT, np.ones((7, 7), np.uint8)) > 0
    assert (strokes[ring] == 0).mean() > 3 * (strokes[~ring] == 0).mean() / 2


def test_colour_wheel_has_the_published_hues() -> None:
    wheel = flow.colour_wheel()
    assert wheel.shape == (55, 3)
    assert wheel[[0, 15, 21, 25, 36, 49]].tolist() == [
        [255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255],
    ]  # fmt: skip
    assert wheel[7].tolist() == [255, 119, 0]
    assert wheel[18].tolist() == [255 - 127, 255, 0]


@pytest.mark.parametrize(("vector", "hue"), [((1, 0), (255, 0, 0)), ((-1, 1e-9), (0, 209, 255))])
def test_flow_colours_are_directions(vector: tuple[float, float], hue: tuple[int, int, int]) -> None:
    field = np.zeros((2, 2, 2), np.float32)
    field[0, 0] = vector
    picture = flow.colour_flow(field, 1.0)
    assert picture[1, 1].tolist() == [255, 255, 255]
    assert np.abs(picture[0, 0].astype(int) - hue).max() <= 2


def test_flow_finds_the_motion_and_repeats_the_first() -> None:
    found = list(flow.flow_frames(lambda: iter(FRAMES)))
    assert len(found) == len(FRAMES)
    assert np.array_equal(found[0], found[1])
    field = next(flow.flows(lambda: iter(FRAMES)))
    inside = cv2.erode(MASKS[0], np.ones((9, 9), np.uint8)) > 0
    assert np.abs(np.median(field[inside], axis=0) - (3, 0)).max() < 0.2
    assert list(flow.flow_frames(lambda: iter(FRAMES[:1]))) == []


def test_flow_has_one_scale_a_clip_and_official_one_a_frame() -> None:
    def source():
        yield from (FRAME, np.roll(FRAME, 4, axis=1), np.roll(FRAME, 5, axis=1))

    ours = list(flow.flow_frames(source))
    official = list(flow.flow_frames(source, official=True))
    inner = np.s_[30:60, 30:100]
    assert official[2][inner].mean() < ours[2][inner].mean() - 5  # 1 px fills its frame's own scale
    assert ours[1].min() == pytest.approx(official[1].min(), abs=40)


def test_motion_masks_cover_the_disc_from_the_first_frame() -> None:
    frames, masks = moving_disc(count=40, step=1.5)
    found = list(motion.motion_masks(lambda: iter(frames)))
    assert len(found) == 40
    assert set(np.unique(found)) <= {0, 255}
    assert min(iou(a, b) for a, b in zip(found[:3], masks[:3], strict=True)) > 0.5


def test_salient_mask_is_the_subject() -> None:
    frame = np.full((96, 128, 3), 60, np.uint8) + np.random.default_rng(0).integers(
        0, 8, (96, 128, 3), np.uint8
    )
    frame[30:60, 50:90] = (220, 40, 40)
    truth = shapes.box_mask((50, 30, 90, 60), 96, 128)
    assert iou(subject.salient_mask(frame), truth) > 0.7


def test_grabcut_finds_the_disc_in_its_box() -> None:
    box = shapes.mask_box(MASKS[0])
    assert box is not None
    assert iou(subject.grabcut(FRAME, box), MASKS[0]) > 0.85
    again = subject.grabcut(FRAME, box)
    assert np.array_equal(again, subject.grabcut(FRAME, box))


def test_salient_subject_before_a_gradient_is_whole() -> None:
    """The spectrum alone answers to the corners of a triangle, and to the edge of the frame."""
    frame = np.repeat(np.linspace(150, 222, 64).astype(np.uint8)[None, :, None], 64, 0).repeat(3, -1)
    truth = np.zeros((64, 64), np.uint8)
    cv2.fillPoly(truth, [np.array([[28, 4], [44, 34], [12, 34]])], 255)
    frame[truth > 0] = (244, 208, 44)
    assert iou(subject.salient_mask(frame), truth) > 0.9


def test_backdrop_with_detail_is_not_plain() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    assert backdrop.backdrop_contrast(cv2.resize(frame, (80, 60), interpolation=cv2.INTER_NEAREST)) is None
    plain = np.full((60, 80, 3), 90, np.uint8)
    plain[20:40, 0:30] = (200, 30, 30)  # touches the edge
    found = backdrop.backdrop_contrast(plain)
    assert found is not None
    assert iou(np.where(found > 0.5, 255, 0), shapes.box_mask((0, 20, 30, 40), 60, 80)) > 0.95


def _large_subject() -> tuple[np.ndarray, np.ndarray]:
    """A textured star with an arm before texture, 360x540."""
    rng = np.random.default_rng(0)
    around = np.linspace(0, 2 * np.pi, 400)
    radius = (0.32 + 0.05 * np.sin(5 * around) + 0.03 * np.sin(13 * around)) * 360
    points = np.stack([270 + 1.2 * radius * np.cos(around), 180 + radius * np.sin(around)], 1)
    mask = np.zeros((360, 540), np.uint8)
    cv2.fillPoly(mask, [points.round().astype(np.int32)], 255)
    cv2.rectangle(mask, (380, 175), (490, 185), 255, -1)
    texture = cv2.GaussianBlur(rng.normal(0, 60, (360, 540, 3)), (0, 0), 5)
    colours = np.where(mask[..., None] > 0, (200, 70, 60), (120, 120, 120)) + texture
    frame = np.clip(colours + rng.normal(0, 5, colours.shape), 0, 255).astype(np.uint8)
    return cv2.GaussianBlur(frame, (0, 0), 0.8), mask


def test_fast_cut_of_a_large_subject_is_the_full_one() -> None:
    frame, truth = _large_subject()
    box = shapes.mask_box(truth)
    assert box is not None
    full, fast = (subject.grabcut(frame, box, swing=9, fast=fast) for fast in (False, True))
    assert iou(full, fast) >= 0.98
    assert iou(fast, truth) >= 0.97
    assert not np.array_equal(full, fast)


def test_fast_cut_of_a_small_subject_is_bit_equal() -> None:
    full, fast = (
        [mask for _, mask in subject.track_mask(FRAMES[:3], MASKS[0], refine=how)] for how in (True, "fast")
    )
    assert np.array_equal(full, fast)


def test_grabcut_of_a_box_as_large_as_the_frame_is_the_box() -> None:
    assert (subject.grabcut(FRAME, (0, 0, 128, 96)) == 255).all()


def test_tracked_boxes_follow_the_disc() -> None:
    box = shapes.mask_box(MASKS[0])
    assert box is not None
    for (_, found), mask in zip(subject.track_box(FRAMES, box), MASKS, strict=True):
        assert iou(shapes.box_mask(found, 96, 128), shapes.box_mask(shapes.mask_box(mask), 96, 128)) > 0.7


@pytest.mark.parametrize("refine", [True, False])
def test_tracked_masks_follow_the_disc(refine: bool) -> None:
    found = [mask for _, mask in subject.track_mask(FRAMES, MASKS[0], refine=refine)]
    assert np.array_equal(found[0], MASKS[0])
    assert min(iou(a, b) for a, b in zip(found, MASKS, strict=True)) > 0.7


@pytest.mark.parametrize(("across", "down"), [(34, 1), (1, 34), (100, 1), (4, 4)])
def test_thin_box_is_tracked(across: int, down: int) -> None:
    left, top = 10, 40
    boxes = [found for _, found in subject.track_box(FRAMES, (left, top, left + across, top + down))]
    assert boxes[0] == (left, top, left + across, top + down)
    assert all(0 <= x < right <= 128 and 0 <= y < bottom <= 96 for x, y, right, bottom in boxes)


def test_box_that_cannot_be_tracked_is_named() -> None:
    frames = np.zeros((2, 2, 400, 3), np.uint8)
    with raises(DataError, where="box 0,0,400,2"):
        list(subject.track_box(frames, (0, 0, 400, 2)))


def test_limbs_that_leave_the_tracked_box_are_found() -> None:
    """A disc that grows by a third while it moves, over texture."""
    y, x = np.mgrid[:96, :128]
    found, true = [], []
    for i in range(9):
        inside = (x - 30 - 3 * i) ** 2 + (y - 48) ** 2 <= (15 + i / 2) ** 2
        true.append(np.where(inside, 255, 0).astype(np.uint8))
        found.append(np.where(inside[..., None], (220, 60, 40), FRAMES[0] // 3).astype(np.uint8))
    masks = [mask for _, mask in subject.track_box_masks(found, (15, 33, 46, 64))]
    assert min(iou(mask, truth) for mask, truth in zip(masks, true, strict=True)) > 0.8


def test_tracking_an_empty_mask_gives_empty_masks() -> None:
    found = [mask for _, mask in subject.track_mask(FRAMES, np.zeros((96, 128), np.uint8))]
    assert len(found) == len(FRAMES)
    assert not np.any(found)


def test_box_mask_truncates_and_is_clipped_to_the_frame() -> None:
    mask = shapes.box_mask((1.9, 2.9, 4.9, 5.9), 8, 10)
    assert shapes.mask_box(mask) == (1, 2, 4, 5)
    assert shapes.mask_box(shapes.box_mask((-5, -3, 4, 4), 8, 10)) == (0, 0, 4, 4)


@pytest.mark.parametrize("box", [(20, 0, 30, 5), (-9, -9, -1, -1), (4, 4, 4, 9), (6, 2, 3, 7)])
def test_box_without_a_pixel_in_the_frame_is_rejected(box: shapes.Box) -> None:
    with raises(DataError, shapes.show_box(box), where="bbox"):
        shapes.box_mask(box, 8, 10)


def test_layout_box_reaches_its_end_and_has_a_band_of_3() -> None:
    boxes = shapes.moving_boxes((10, 10, 30, 30), (50, 20, 70, 40), 5)
    assert boxes[0] == (10, 10, 30, 30)
    assert boxes[-1] == (50, 20, 70, 40)
    assert boxes[2] == (30, 15, 50, 35)
    frame = shapes.layout_frame((20, 15, 50, 40), 60, 80)
    assert np.flatnonzero(frame[30, :, 0] == 0).tolist() == [19, 20, 21, 49, 50, 51]
    assert frame[14, 19].tolist() == [255] * 3  # the outer corner is left out
    assert shapes.moving_boxes((0, 0, 4, 4), (9, 9, 12, 12), 1) == [(0, 0, 4, 4)]


def test_contours_are_outer_ones_of_5_pixels() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 20:60] = 255
    mask[28:32, 38:42] = 0
    frame = shapes.contour_frame(mask)
    assert np.flatnonzero(frame[24, :, 0] == 0).tolist() == [18, 19, 20, 21, 22, 57, 58, 59, 60, 61]
    assert (frame[27:33, 30:50] == 255).all()


def test_label_colours_are_stable_and_red_stays_red() -> None:
    assert shapes.label_colour("") == (0, 0, 0)
    assert shapes.label_colour("dog") == shapes.label_colour("dog") != shapes.label_colour("cat")
    frame = shapes.layout_frame((2, 2, 6, 6), 10, 10, (200, 10, 20))
    assert frame[2, 4].tolist() == [200, 10, 20]


def augmented(shape: maskaug.MaskShape, mask: np.ndarray, sides=(0.5, 0.25, 0.25, 0.5)) -> np.ndarray:
    return maskaug.MaskAugment(shape, sides)(mask)


def test_mask_shapes_are_box_hull_and_original() -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 30:34] = mask[36:40, 30:50] = 255  # an L
    assert np.array_equal(augmented("original", mask), mask)
    assert shapes.mask_box(augmented("bbox", mask)) == (30, 20, 50, 40)
    assert (augmented("bbox", mask)[20:40, 30:50] == 255).all()
    hull = augmented("hull", mask)
    assert shapes.mask_box(hull) == (30, 20, 50, 40)
    assert (mask > 0).sum() < (hull > 0).sum() < 400


def test_each_side_of_a_mask_grows_by_its_own_part() -> None:
    mask = shapes.box_mask((30, 20, 50, 40), 60, 80)
    assert shapes.mask_box(augmented("bbox_expand", mask)) == (20, 15, 55, 50)
    assert shapes.mask_box(augmented("original_expand", mask)) == (20, 15, 55, 50)


def test_mask_grows_by_at_most_half_of_the_free_margin() -> None:
    mask = shapes.box_mask((4, 20, 70, 40), 60, 80)
    assert shapes.mask_box(augmented("bbox_expand", mask, (1, 0, 1, 0))) == (2, 20, 75, 40)


@pytest.mark.parametrize("shape", maskaug.SHAPES)
def test_empty_mask_stays_empty(shape: maskaug.MaskShape) -> None:
    assert not augmented(shape, np.zeros((8, 8), np.uint8)).any()


def test_draw_of_the_augmentation_is_a_function_of_its_seed() -> None:
    draws = [maskaug.MaskAugment.draw("random", np.random.default_rng(seed)) for seed in range(40)]
    assert draws[3] == maskaug.MaskAugment.draw("random", np.random.default_rng(3))
    assert {draw.shape for draw in draws} == set(maskaug.SHAPES)
    assert all(0 <= side <= 0.3 for draw in draws for side in draw.sides)


def test_erased_pixels_are_128() -> None:
    mask = np.array([[0, 255]], np.uint8)
    frame = np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8)
    assert opencv.erase(frame, mask).tolist() == [[[9, 8, 7], [128, 128, 128]]]


def test_spool_returns_what_it_was_given_twice() -> None:
    with spool.Spool() as kept:
        for value in range(3):
            kept.add(np.full((2, 3), value, np.float32))
        assert [float(item.max()) for item in kept] == [0, 1, 2]
        assert [float(item.max()) for item in kept] == [0, 1, 2]


def test_opencv_without_contrib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    opencv.opencv.cache_clear()
    monkeypatch.delattr(cv2, "saliency")
    with raises(ConfigError, "saliency"):
        opencv.opencv()
    opencv.opencv.cache_clear()


def test_flow_colours_match_the_published_formula() -> None:
    """Baker et al.'s arithmetic in float64; a table in single precision is off by a level at most."""
    field = np.random.default_rng(0).normal(0, 3, (64, 64, 2)).astype(np.float32)
    field[0, 0] = 0
    for radius in (2.0, 12.0):
        across, down = (field[..., axis].astype(np.float64) / (radius + 1e-5) for axis in (0, 1))
        length = np.sqrt(across**2 + down**2)
        wheel = flow.colour_wheel() / 255
        place = (np.arctan2(-down, -across) / np.pi + 1) / 2 * (len(wheel) - 1)
        low = np.floor(place).astype(int)
        part = (place - low)[..., None]
        hue = (1 - part) * wheel[low] + part * wheel[(low + 1) % len(wheel)]
        colour = np.where((length <= 1)[..., None], 1 - length[..., None] * (1 - hue), hue * 0.75)
        expected = np.floor(255 * colour).astype(int)
        assert abs(flow.colour_flow(field, radius).astype(int) - expected).max() <= 1
        assert (flow.colour_flow(field, radius)[0, 0] == 255).all()
