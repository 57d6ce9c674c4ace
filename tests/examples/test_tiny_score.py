"""The tiny world's measures: a true clip scores almost perfectly; each failure lowers its own measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import score
import world
from heldout import heldout_indices

from mindspeed_mm.data.video_writer import write_video

INDEX = 3
SCENE = world.make_scene("heldout", INDEX)


def scored(tmp_path: Path, frames: world.Pixels, kind: str, colour: str | None = None) -> score.Score:
    name = f"heldout_{INDEX:05d}_{kind}" + (f"_{colour}" if colour else "")
    found = score.score_clip(write_video(tmp_path / f"{name}.mp4", frames, world.FPS, lossless=True))
    assert found is not None
    return found


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("colour", world.COLOURS)
def test_shape_ends_at_half_of_the_requested_colour(shape: str, colour: str) -> None:
    scene = replace(SCENE, shape=shape, colour=colour)
    inside = world.coverage(scene) > 0.5
    coloured = score.is_coloured(world.render(scene), colour)
    assert (coloured & inside).sum() / (coloured | inside).sum() > 0.97


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_true_shape_is_found_wherever_it_moves(shape: str) -> None:
    for index in range(12):
        scene = replace(world.make_scene("heldout", index), shape=shape)
        assert score.nearest_shape(score.is_coloured(world.render(scene), scene.colour)) == shape


def test_image_without_a_known_shape_is_none() -> None:
    blots = np.zeros((3, 64, 64), bool)
    blots[:, 10:30, 10:30] = blots[:, 26:50, 20:34] = True
    assert score.nearest_shape(blots) is None
    seen = score.is_coloured(world.render(SCENE), SCENE.colour)
    seen[3:] = False  # it vanishes
    assert score.nearest_shape(seen) is None


def test_held_out_scenes_show_every_shape_equally_often() -> None:
    indices = heldout_indices(8)
    assert [world.make_scene("heldout", index).shape for index in indices] == [*world.SHAPES] * 2
    assert indices == sorted(set(indices))
    assert heldout_indices(3) == indices[:3]


def test_shape_is_recognized_at_other_sizes_and_places(tmp_path: Path) -> None:
    bar = replace(SCENE, shape="bar")
    assert not scored(tmp_path, world.render(bar), "extension").shape_obeyed
    small = replace(SCENE, radius=0.8 * SCENE.radius, across=-SCENE.across)
    found = scored(tmp_path, world.render(small), "extension")
    assert found.shape_obeyed
    assert found.iou < 0.9


def test_true_clip_is_perfect(tmp_path: Path) -> None:
    truth = world.render(SCENE)
    inpaint, extension = scored(tmp_path, truth, "inpaint"), scored(tmp_path, truth, "extension")
    assert (inpaint.masked_psnr, inpaint.kept_psnr, extension.first_frame_psnr) == (99.0, 99.0, 99.0)
    assert inpaint.colour_obeyed
    assert inpaint.shape_obeyed
    assert inpaint.iou > 0.97


def test_another_colour_is_found_at_its_place(tmp_path: Path) -> None:
    other = SCENE.recoloured()
    assert not scored(tmp_path, world.render(other), "silhouette").colour_obeyed
    changed = scored(tmp_path, world.render(other), "silhouette", other.colour)
    assert changed.changed
    assert changed.colour_obeyed
    assert changed.iou > 0.97


def test_misplaced_shape_loses_overlap_and_masked_psnr(tmp_path: Path) -> None:
    moved = np.roll(world.render(SCENE), 12, axis=2)
    found = scored(tmp_path, moved, "inpaint")
    assert found.iou < 0.6
    assert found.masked_psnr is not None
    assert found.masked_psnr < 20


def test_empty_clip_matches_no_colour(tmp_path: Path) -> None:
    gray = np.repeat(world.background(SCENE)[None], world.FRAMES, axis=0).astype(np.uint8)
    found = scored(tmp_path, gray, "edge")
    assert not found.colour_obeyed
    assert not found.shape_obeyed
    assert found.iou == 0


def test_psnr_matches_the_closed_formula() -> None:
    zeros, tens = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 10, np.uint8)
    assert score.psnr(tens, zeros) == pytest.approx(20 * np.log10(255 / 10))


def test_names_without_a_request_are_skipped(tmp_path: Path) -> None:
    write_video(tmp_path / "other.mp4", world.render(SCENE), world.FPS)
    assert score.score_folder(tmp_path) == []
