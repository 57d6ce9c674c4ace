"""Every task that needs no network: its closed formula, and what the published tool gets wrong there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.conditioning.annotate import lines, shapes
from mindspeed_mm.conditioning.tasks.catalog import TASKS, all_tasks
from mindspeed_mm.conditioning.tasks.compose import compose, kind_of
from mindspeed_mm.conditioning.tasks.spec import Prepared, Sources
from mindspeed_mm.data.video import open_video
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import ConfigError, DataError
from tests.support.errors import raises
from tests.support.scenes import iou, moving_disc

pytestmark = pytest.mark.medium

OFFICIAL = [
    "plain",
    "depth",
    "depthv2",
    "flow",
    "gray",
    "pose",
    "pose_body",
    "scribble",
    "framerefext",
    "frameref",
    "clipref",
    "firstframe",
    "lastframe",
    "firstlastframe",
    "firstclip",
    "lastclip",
    "firstlastclip",
    "inpainting",
    "inpainting_mask",
    "inpainting_bbox",
    "inpainting_masktrack",
    "inpainting_bboxtrack",
    "inpainting_label",
    "inpainting_caption",
    "outpainting",
    "outpainting_inner",
    "layout_bbox",
    "layout_track",
    "image_plain",
    "image_face",
    "image_salient",
    "image_inpainting",
    "image_reference",
    "image_outpainting",
    "image_depth",
    "image_gray",
    "image_pose",
    "image_scribble",
    "composition",
    "reference_anything",
    "animate_anything",
    "swap_anything",
    "expand_anything",
    "move_anything",
]
HEIGHT, WIDTH, COUNT = 96, 128, 9
FRAMES, MASKS = moving_disc(COUNT, HEIGHT, WIDTH)
GRAY = 128


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip.mkv (the disc, lossless), other.mkv (smaller, 24 fps), images, masks.mkv and empty.png."""
    folder = tmp_path_factory.mktemp("sources")
    write_video(folder / "clip.mkv", FRAMES, 16, lossless=True)
    write_video(folder / "other.mkv", FRAMES[:4, ::2, ::2], 24, lossless=True)
    write_video(folder / "masks.mkv", np.repeat(MASKS[..., None], 3, -1), 16, lossless=True)
    write_video(folder / "short.mkv", np.repeat(MASKS[:5, ..., None], 3, -1), 16, lossless=True)
    Image.fromarray(FRAMES[0]).save(folder / "image.png")
    Image.fromarray(FRAMES[8, :, :64]).save(folder / "tall.png")
    Image.fromarray(MASKS[0]).save(folder / "mask.png")
    Image.fromarray(MASKS[0, ::2, ::2]).save(folder / "half.png")
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(folder / "empty.png")
    return folder


def prepare(home: Path, name: str, videos: str = "", images: str = "", **options: Any) -> Prepared:
    entry = TASKS.get(name)
    sources = Sources.open(
        [home / f"{word}.mkv" for word in videos.split()], [home / f"{word}.png" for word in images.split()]
    )
    for key in ("mask", "image_mask", "video_1", "video_2", "mask_1", "mask_2"):
        if isinstance(options.get(key), str):
            options[key] = str(home / options[key])
    return entry.prepare(sources, entry.parse(options, "options"))


def read(made: Prepared) -> tuple[np.ndarray, np.ndarray | None]:
    frames, masks = zip(*made.read(), strict=True)
    assert len(frames) == made.num_frames
    assert frames[0].shape == (*made.size, 3)
    assert all(frame.dtype == np.uint8 for frame in frames)
    if masks[0] is None:
        assert all(mask is None for mask in masks)
        return np.stack(frames), None
    assert set(np.unique(masks)) <= {0, 255}
    return np.stack(frames), np.stack(masks)


def test_every_official_name_is_a_task() -> None:
    assert set(OFFICIAL) <= set(TASKS)
    assert len(OFFICIAL) == 44


def test_every_task_has_one_line_and_documented_options() -> None:
    for entry in all_tasks():
        assert len(entry.summary) <= 80, entry.name
        assert all(field.description for field in entry.options.model_fields.values()), entry.name


def test_tasks_that_ended_in_a_type_error_run(home: Path) -> None:
    assert np.array_equal(read(prepare(home, "plain", "clip"))[0], FRAMES)
    assert np.array_equal(read(prepare(home, "gray", "clip"))[0], [lines.gray(f) for f in FRAMES])
    assert np.array_equal(read(prepare(home, "image_plain", "", "image"))[0][0], FRAMES[0])
    assert np.array_equal(read(prepare(home, "image_gray", "", "image"))[0][0], lines.gray(FRAMES[0]))


@pytest.mark.parametrize("name", ["gray", "scribble", "canny", "edge", "xdog", "flow"])
def test_control_keeps_length_size_and_rate(home: Path, name: str) -> None:
    made = prepare(home, name, "other")
    frames, masks = read(made)
    assert masks is None
    assert (frames.shape, made.fps) == ((4, 48, 64, 3), 24)


def test_official_gray_is_an_option(home: Path) -> None:
    frames, _ = read(prepare(home, "gray", "clip", compat="official"))
    assert np.array_equal(frames[0], lines.gray(FRAMES[0], official=True))


def test_flow_of_one_frame_is_rejected(home: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "one.mkv", FRAMES[:1], 16, lossless=True)
    with raises(DataError, 1, 2, where=tmp_path / "one.mkv"):
        prepare(tmp_path, "flow", "one")


def test_canny_takes_its_thresholds(home: Path) -> None:
    frames, _ = read(prepare(home, "canny", "clip", low="50", high="80"))
    assert np.array_equal(frames[2], lines.canny(FRAMES[2], 50, 80))


# Extension


@pytest.mark.parametrize("name", ["firstframe", "lastframe"])
def test_extension_is_gray_but_for_the_given_frame(home: Path, name: str) -> None:
    frames, masks = read(prepare(home, name, "", "image", expand_num=4))
    at = 0 if name == "firstframe" else 4
    assert np.array_equal(frames[at], FRAMES[0])
    assert [int(mask.max()) for mask in masks] == [0 if i == at else 255 for i in range(5)]
    assert (np.delete(frames, at, axis=0) == GRAY).all()


def test_first_and_last_frame_give_82_frames_or_num_frames(home: Path) -> None:
    assert prepare(home, "firstlastframe", "", "image image").num_frames == 82
    frames, masks = read(prepare(home, "firstlastframe", "", "image image", num_frames=81))
    assert len(frames) == 81
    assert np.flatnonzero(masks.max(axis=(1, 2)) == 0).tolist() == [0, 80]


def test_second_image_is_fitted_on_white(home: Path) -> None:
    made = prepare(home, "firstlastframe", "", "image tall", expand_num=1)
    last = read(made)[0][-1]
    assert np.array_equal(last[:, 32:96], FRAMES[8, :, :64])
    assert (last[:, :32] == 255).all()
    assert (last[:, 96:] == 255).all()
    assert "64x96" in made.notes[0]


def test_frameref_follows_its_mode(home: Path) -> None:
    frames, _ = read(prepare(home, "frameref", "", "image", mode="lastframe", expand_num=2))
    assert np.array_equal(frames[2], FRAMES[0])
    with raises(DataError, 1, 2):
        prepare(home, "frameref", "", "image", mode="firstlastframe")


def test_clips_extend_at_the_first_ones_rate(home: Path) -> None:
    made = prepare(home, "firstlastclip", "clip other", expand_num=3)
    frames, masks = read(made)
    assert (len(frames), made.fps) == (9 + 3 + 4, 16)
    assert np.array_equal(frames[:9], FRAMES)
    assert (masks.max(axis=(1, 2)) == 255).tolist() == [False] * 9 + [True] * 3 + [False] * 4
    assert any("24" in note for note in made.notes)


def test_num_frames_must_leave_something_to_generate(home: Path) -> None:
    with raises(ConfigError, 9, where="num_frames"):
        prepare(home, "firstclip", "clip", num_frames=9)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"mode": "first", "ref_num": 2}, [0, 1]),
        ({"mode": "last", "ref_num": 2}, [7, 8]),
        ({"mode": "firstlast", "ref_num": 1}, [0, 8]),
    ],
)
def test_framerefext_keeps_what_its_mode_says(home: Path, options: dict[str, Any], kept: list[int]) -> None:
    frames, masks = read(prepare(home, "framerefext", "clip", **options))
    assert np.flatnonzero(masks.max(axis=(1, 2)) == 0).tolist() == kept
    assert np.array_equal(frames[kept], FRAMES[kept])
    assert (np.delete(frames, kept, axis=0) == GRAY).all()


def test_random_frames_are_a_function_of_the_seed(home: Path) -> None:
    def kept(seed: int) -> list[int]:
        _, masks = read(prepare(home, "framerefext", "clip", mode="random", ref_num=3, seed=seed))
        return np.flatnonzero(masks.max(axis=(1, 2)) == 0).tolist()

    assert kept(1) == kept(1)
    assert len({tuple(kept(seed)) for seed in range(6)}) > 1
    assert len(kept(1)) == 3


def test_ref_num_beyond_the_clip_and_0_are_rejected(home: Path) -> None:
    with raises(DataError, 9, 12, where=home / "clip.mkv"):
        prepare(home, "framerefext", "clip", mode="random", ref_num=12)
    with raises(ConfigError, "ref_num"):
        prepare(home, "framerefext", "clip", ref_num=0)


# Inpainting


def test_inpainting_erases_exactly_the_mask(home: Path) -> None:
    frames, masks = read(prepare(home, "inpainting_mask", "clip", mask="mask.png"))
    assert np.array_equal(masks, np.stack([MASKS[0]] * COUNT))
    assert np.array_equal(frames, np.where(masks[..., None] > 0, GRAY, FRAMES))


def test_video_mask_is_followed(home: Path) -> None:
    _, masks = read(prepare(home, "inpainting", "clip", mode="mask", mask="masks.mkv"))
    assert np.array_equal(masks, MASKS)


def test_mask_of_another_length_is_rejected(home: Path) -> None:
    with raises(DataError, 5, 9, where=home / "short.mkv"):
        prepare(home, "inpainting_mask", "clip", mask="short.mkv")


def test_mask_of_another_size_is_resized_with_a_note(home: Path) -> None:
    made = prepare(home, "inpainting_mask", "clip", mask="half.png")
    _, masks = read(made)
    assert iou(masks[0], MASKS[0]) > 0.9
    assert "64x48" in made.notes[0]
    assert "128x96" in made.notes[0]


def test_soft_mask_is_cut_at_one_half(home: Path, tmp_path: Path) -> None:
    soft = np.tile(np.array([0, 100, 127, 128, 255], np.uint8), (HEIGHT, 26))[:, :WIDTH]
    Image.fromarray(soft).save(tmp_path / "soft.png")
    _, masks = read(prepare(home, "inpainting_mask", "clip", mask=str(tmp_path / "soft.png")))
    assert np.array_equal(masks[0], np.where(soft > 127, 255, 0))


def test_fixed_box_is_half_open_and_clipped(home: Path) -> None:
    made = prepare(home, "inpainting_bbox", "clip", bbox="-10,20.9,40.5,60")
    _, masks = read(made)
    assert shapes.mask_box(masks[3]) == (0, 20, 40, 60)
    assert "-10" in made.notes[0]


@pytest.mark.parametrize("bbox", ["200,10,220,30", "-40,-40,-2,-2"])
def test_box_outside_the_frame_is_rejected(home: Path, bbox: str) -> None:
    with raises(DataError, bbox, "128x96"):
        prepare(home, "inpainting_bbox", "clip", bbox=bbox)


@pytest.mark.parametrize("bbox", ["1,2,3", "a,b,c,d", "30,10,20,40"])
def test_invalid_box_is_rejected(home: Path, bbox: str) -> None:
    with raises(ConfigError):
        prepare(home, "inpainting_bbox", "clip", bbox=bbox)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("bboxtrack", {"bbox": ",".join(map(str, shapes.mask_box(MASKS[0])))}),
        ("masktrack", {"mask": "mask.png"}),
        ("salientmasktrack", {}),
        ("salientbboxtrack", {}),
    ],
)
def test_tracking_modes_follow_the_subject(home: Path, mode: str, options: dict[str, Any]) -> None:
    _, masks = read(prepare(home, "inpainting", "clip", mode=mode, **options))
    assert min(iou(a, b) for a, b in zip(masks, MASKS, strict=True)) > 0.7


def test_mask_augmentation_is_one_draw_for_the_clip(home: Path) -> None:
    made = prepare(
        home,
        "inpainting_mask",
        "clip",
        mask="masks.mkv",
        maskaug_mode="bbox_expand",
        maskaug_ratio=0.5,
        seed=3,
    )
    boxes = [shapes.mask_box(mask) for mask in read(made)[1]]
    truth = [shapes.mask_box(mask) for mask in MASKS]
    grown = [
        [abs(a - b) for a, b in zip(found, true, strict=True)]
        for found, true in zip(boxes, truth, strict=True)
    ]
    assert max(map(max, grown)) > 3
    spread = np.ptp(np.array(grown), axis=0)
    assert spread.max() <= 1  # the disc's box is 32 or 33 pixels wide


def test_unknown_mode_and_option_name_the_nearest(home: Path) -> None:
    with raises(ConfigError, "mode"):
        prepare(home, "inpainting", "clip", mode="bboxtrak")
    with raises(ConfigError, "directon", "direction"):
        prepare(home, "outpainting", "clip", directon="left")
    with raises(ConfigError, "mode"):
        prepare(home, "inpainting", "clip")


def test_mode_against_the_tasks_name_is_rejected(home: Path) -> None:
    with raises(ConfigError, "mask", "bbox"):
        prepare(home, "inpainting_bbox", "clip", mode="mask", mask="mask.png")


@pytest.mark.parametrize("mode", ["label", "caption"])
def test_modes_that_need_grounding_say_so(home: Path, mode: str) -> None:
    with raises(ConfigError, "ground", mode):
        prepare(home, "inpainting", "clip", mode=mode, **{mode: "the disc"})
    with raises(ConfigError, f"--{mode}"):
        prepare(home, f"inpainting_{mode}", "clip")


def test_image_inpainting_has_one_frame(home: Path) -> None:
    frames, masks = read(prepare(home, "image_inpainting", "", "image", mode="mask", mask="mask.png"))
    assert np.array_equal(masks, MASKS[:1])
    assert np.array_equal(frames[0], np.where(MASKS[0][..., None] > 0, GRAY, FRAMES[0]))


# Outpainting


def test_outpainting_pastes_the_source_on_gray(home: Path) -> None:
    made = prepare(home, "outpainting", "clip", direction="left, right", expand_ratio=0.25)
    frames, masks = read(made)
    assert made.size == (96, 192)
    assert np.array_equal(frames[:, :, 32:160], FRAMES)
    assert (frames[:, :, :32] == GRAY).all()
    assert np.array_equal(masks[4] == 0, np.pad(np.ones((96, 128), bool), ((0, 0), (32, 32))))


def test_outpainted_canvas_is_rounded_up_where_it_grows(home: Path) -> None:
    made = prepare(home, "outpainting", "clip", direction="left", expand_ratio=0.1)  # 12 more
    frames, masks = read(made)
    assert made.size == (96, 144)
    assert np.array_equal(frames[0, :, 16:], FRAMES[0])
    assert (masks[0, :, :16] == 255).all()
    assert prepare(home, "outpainting", "clip", direction="down", expand_ratio=0.1, multiple=1).size == (
        105,
        128,
    )


def test_unknown_direction_is_rejected(home: Path) -> None:
    with raises(ConfigError, "direction"):
        prepare(home, "outpainting", "clip", direction="left,top")


def test_outpainting_inner_erases_int_of_ratio_times_side(home: Path) -> None:
    frames, masks = read(prepare(home, "outpainting_inner", "clip", direction="left up", expand_ratio=0.1))
    kept = np.zeros((96, 128), bool)
    kept[9:, 12:] = True
    assert np.array_equal(masks[0] == 0, kept)
    assert np.array_equal(frames[5], np.where(kept[..., None], FRAMES[5], GRAY))
    with raises(ConfigError, "128x96"):
        prepare(home, "outpainting_inner", "clip", expand_ratio=0.5)


def test_image_outpainting_keeps_its_mask(home: Path) -> None:
    made = prepare(home, "image_outpainting", "", "image", direction="right")
    frames, masks = read(made)
    assert frames.shape[1:3] == masks.shape[1:] == (96, 160)
    assert made.references == ()


# Layout


def test_layout_box_ends_at_its_last_box(home: Path) -> None:
    made = prepare(home, "layout_bbox", bbox="10,10,40,40 60,20,90,60", num_frames=5, height=80, width=112)
    frames, masks = read(made)
    assert masks is None
    assert np.array_equal(frames[0], shapes.layout_frame((10, 10, 40, 40), 80, 112))
    assert np.array_equal(frames[4], shapes.layout_frame((60, 20, 90, 60), 80, 112))
    with raises(ConfigError, 1, where="bbox"):
        prepare(home, "layout_bbox", bbox="10,10,40,40")


def test_layout_track_outlines_the_subject(home: Path) -> None:
    frames, _ = read(prepare(home, "layout_track", "clip", mode="mask", mask="masks.mkv", label="disc"))
    assert np.array_equal(frames[6], shapes.contour_frame(MASKS[6], shapes.label_colour("disc")))


# References and compositions


def test_references_are_cropped_and_white_outside(home: Path) -> None:
    made = prepare(home, "image_reference", "", "image", mode="mask", mask="mask.png")
    left, top, right, bottom = shapes.mask_box(MASKS[0])
    inside = MASKS[0, top:bottom, left:right, None] > 0
    assert np.array_equal(made.references[0], np.where(inside, FRAMES[0, top:bottom, left:right], 255))
    assert made.steps is None


def test_plain_and_box_references(home: Path) -> None:
    assert np.array_equal(prepare(home, "image_reference", "", "image").references[0], FRAMES[0])
    made = prepare(home, "reference_anything", "", "image tall", mode="bbox", bbox="8,4,40,30 0,0,20,20")
    assert [r.shape for r in made.references] == [(26, 32, 3), (20, 20, 3)]
    with raises(ConfigError, 1, 2):
        prepare(home, "reference_anything", "", "image tall", mode="bbox", bbox="8,4,40,30")


def test_empty_subject_is_rejected(home: Path) -> None:
    with raises(DataError, where=str(home / "image.png")):
        prepare(home, "image_reference", "", "image", mode="mask", mask="empty.png")


def test_salient_reference_is_the_disc(home: Path) -> None:
    (found,) = prepare(home, "image_salient", "", "image").references
    assert abs(found.shape[0] - 33) <= 4
    assert abs(found.shape[1] - 33) <= 4


def test_swap_has_a_mode_for_clip_and_images(home: Path) -> None:
    made = prepare(
        home, "swap_anything", "clip", "image", mode="mask,bbox", mask="masks.mkv", image_bbox="8,4,40,30"
    )
    frames, masks = read(made)
    assert np.array_equal(masks, MASKS)
    assert np.array_equal(frames[2], np.where(MASKS[2][..., None] > 0, GRAY, FRAMES[2]))
    assert made.references[0].shape == (26, 32, 3)
    with raises(ConfigError, where="mode"):
        prepare(home, "swap_anything", "clip", "image", mode="mask,bbx")


@pytest.mark.parametrize(("mode", "at"), [("firstframe,plain", 0), ("lastframe,plain", 3)])
def test_expand_anything_masks_the_frame_of_the_image(home: Path, mode: str, at: int) -> None:
    made = prepare(home, "expand_anything", "", "image", mode=mode, direction="right", expand_num=3)
    frames, masks = read(made)
    assert made.size == (96, 160)
    assert np.array_equal(frames[at, :, :128], FRAMES[0])
    assert (masks[at, :, :128] == 0).all()
    assert (masks[at, :, 128:] == 255).all()
    assert (np.delete(masks, at, axis=0) == 255).all()
    assert made.references == ()  # an image alone is enough


def test_move_anything_keeps_the_image_then_moves_a_box(home: Path) -> None:
    frames, masks = read(
        prepare(home, "move_anything", "", "image", bbox="4,4,30,30 60,40,90,80", expand_num=4)
    )
    assert np.array_equal(frames[0], FRAMES[0])
    assert [int(mask.min()) for mask in masks] == [0, 255, 255, 255, 255]
    assert np.array_equal(frames[4], shapes.layout_frame((60, 40, 90, 80), 96, 128))


F1, F2 = np.full((1, 4, 3), 10, np.uint8), np.full((1, 4, 3), 20, np.uint8)
M1, M2 = np.array([[0, 0, 255, 255]], np.uint8), np.array([[0, 255, 0, 255]], np.uint8)


@pytest.mark.parametrize(
    ("kinds", "frame", "mask"),
    [
        (("extension", "repaint"), [10, 10, 20, 20], [0, 0, 0, 1]),
        (("extension", "control"), [10, 10, 20, 20], [0, 0, 0, 1]),
        (("extension", "extension"), [10, 10, 20, 20], [0, 0, 0, 1]),
        (("repaint", "extension"), [20, 10, 20, 10], [0, 0, 0, 1]),
        (("control", "extension"), [20, 10, 20, 10], [0, 0, 0, 1]),
        (("repaint", "repaint"), [10, 20, 10, 20], [0, 1, 1, 1]),
        (("control", "control"), [10, 20, 10, 20], [0, 1, 1, 1]),
        (("repaint", "control"), [10, 10, 20, 20], [0, 0, 1, 1]),
        (("control", "repaint"), [20, 10, 20, 10], [0, 1, 0, 1]),
    ],
)
def test_compositions_match_their_formulas(kinds: Any, frame: list[int], mask: list[int]) -> None:
    made, found = compose(F1, M1, F2, M2, kinds)
    assert made[0, :, 0].tolist() == frame
    assert found[0].tolist() == [255 * value for value in mask]


def test_two_prepared_clips_compose(home: Path, tmp_path: Path) -> None:
    options = {"video_1": "clip.mkv", "video_2": "clip.mkv", "mask_1": "masks.mkv"}
    made = prepare(home, "composition", process_type_1="inpainting", process_type_2="depth", **options)
    frames, masks = read(made)
    assert np.array_equal(masks, MASKS)
    assert np.array_equal(frames, FRAMES)
    assert kind_of("layout_bbox") == kind_of("layout") == "control"


def test_clips_of_unequal_length_or_size_do_not_compose(home: Path) -> None:
    kinds = {"process_type_1": "gray", "process_type_2": "repaint"}
    with raises(DataError, 9, 4, "128x96", "64x48", where=f"video_2 {home / 'other.mkv'}"):
        prepare(home, "composition", video_1="clip.mkv", video_2="other.mkv", **kinds)
    with raises(DataError, 5, 9, where=f"video_1 {home / 'clip.mkv'}"):
        prepare(home, "composition", video_1="clip.mkv", mask_1="short.mkv", video_2="clip.mkv", **kinds)
    with raises(ConfigError, "reference_anything"):
        kind_of("reference_anything")


@pytest.mark.parametrize(
    "name", ["depth", "depthv2", "pose", "pose_body", "image_depth", "image_pose", "image_face"]
)
def test_task_without_its_network_names_file_and_place(home: Path, tmp_path: Path, name: str) -> None:
    entry = TASKS.get(name)
    sources = ("", "image") if name.startswith("image") else ("clip", "")
    with raises(ConfigError, "--annotators") as caught:
        prepare(home, name, *sources, annotators=str(tmp_path))
    assert str(tmp_path) in caught.value.where
    assert ".onnx" in str(caught.value)
    assert entry.network


@pytest.mark.parametrize(
    ("name", "videos", "images", "facts"),
    [
        ("gray", "", "", (0, 1, "--video")),
        ("gray", "clip clip", "", (2, 1)),
        ("firstframe", "", "", (0, 1, "--image")),
        ("gray", "clip", "image", (1, 0, "--image")),
    ],
)
def test_missing_and_superfluous_sources_are_named(
    home: Path, name: str, videos: str, images: str, facts: tuple[object, ...]
) -> None:
    with raises(DataError, *facts, where=f"task {name}"):
        prepare(home, name, videos, images)


def test_long_clip_is_never_in_memory(home: Path) -> None:
    read_at_once = []

    class Long:
        path, num_frames, height, width, fps, timed = Path("long"), 10_000, 16, 16, 16.0, True
        times, duration, traits = (), 625.0, ()

        def read(self, indices: Any) -> np.ndarray:
            read_at_once.append(len(indices))
            return np.zeros((len(indices), 16, 16, 3), np.uint8)

    from mindspeed_mm.conditioning.tasks.spec import Clip

    entry = TASKS.get("gray")
    made = entry.prepare(Sources(clips=(Clip(Long()),)), entry.parse({}, ""))
    steps = made.read()
    for _ in range(20):
        next(steps)
    assert max(read_at_once) <= 8
    assert sum(read_at_once) <= 28


def test_odd_sizes_stay(tmp_path: Path) -> None:
    write_video(tmp_path / "odd.mkv", FRAMES[:3, :95, :127], 16, lossless=True)
    assert read(prepare(tmp_path, "gray", "odd"))[0].shape == (3, 95, 127, 3)
    assert open_video(tmp_path / "odd.mkv").width == 127
    assert cv2.__version__


def test_mode_decides_which_text_names_the_subject() -> None:
    for name in ("inpainting", "image_reference", "swap_anything", "expand_anything"):
        task = TASKS.get(name)
        mode = {"mode": "label"} if name in ("inpainting", "image_reference") else {}
        both = task.parse({"label": "a cat", "caption": "a cat on a mat", **mode}, name)
        assert (both.text("label"), both.text("caption")) == ("a cat", "a cat on a mat")
        assert task.parse({"label": "a cat", **mode}, name).text("caption") == "a cat"


def test_missing_image_is_an_error_with_its_flag_and_key() -> None:
    with raises(DataError, "1 image", "src_ref_images", "--image", where="task swap_anything"):
        TASKS.get("swap").prepare(Sources(clips=(None,)), None)  # type: ignore[arg-type]
