"""Sources are fitted to the requested size by a named policy, or rejected in one line."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.conditions import load_conditions
from mindspeed_mm.generation.request import Inputs
from mindspeed_mm.generation.sampling_config import SamplingConfig
from tests.support.errors import names, raises

SIZE = {"height": 32, "width": 48, "num_frames": 9}
RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
MASK = np.repeat((RNG.random((9, 4, 6)) > 0.5).astype(np.uint8) * 255, 8, axis=1).repeat(8, axis=2)


def conditions(inputs, **values):
    return load_conditions(inputs, SamplingConfig(**{**SIZE, **values}))


def test_clip_may_come_in_every_form(tmp_path):
    wanted = torch.from_numpy(CLIP).permute(3, 0, 1, 2).float() / 127.5 - 1
    path = write_video(tmp_path / "clip.mkv", CLIP, 16, lossless=True)
    forms = [path, str(path), CLIP, CLIP / 255.0, [Image.fromarray(frame) for frame in CLIP], wanted]
    for form in forms:
        torch.testing.assert_close(conditions(Inputs(src_video=form)).src_video, wanted, atol=1e-6, rtol=0)


def test_mask_may_come_in_every_form(tmp_path):
    wanted = torch.from_numpy(MASK).float()[None] / 255
    path = write_video(tmp_path / "mask.mkv", MASK[..., None].repeat(3, -1), 16, lossless=True)
    for form in (path, MASK, MASK > 0, [Image.fromarray(frame) for frame in MASK], wanted):
        assert torch.equal(conditions(Inputs(src_video=CLIP, src_mask=form)).src_mask, wanted)


def test_reference_may_come_in_every_form(tmp_path):
    image = CLIP[0]
    Image.fromarray(image).save(tmp_path / "r.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    forms = [
        tmp_path / "r.png",
        str(tmp_path / "r.png"),
        Image.fromarray(image),
        image,
        image / 255.0,
        tensor,
    ]
    for form in [*forms, tensor[:, None]]:
        (found,) = conditions(Inputs(src_ref_images=[form])).src_ref_images
        torch.testing.assert_close(found, tensor[:, None], atol=1e-6, rtol=0)


def test_still_mask_holds_for_the_whole_clip():
    found = conditions(Inputs(src_video=CLIP, src_mask=Image.fromarray(MASK[0]))).src_mask
    assert torch.equal(found, torch.from_numpy(MASK[:1]).float()[None].expand(-1, 9, -1, -1) / 255)


def test_references_are_letterboxed_on_white():
    image = np.zeros((20, 10, 3), np.uint8)
    (reference,) = conditions(Inputs(src_ref_images=[image])).src_ref_images
    assert reference.shape == (3, 1, 32, 48)
    assert (reference[..., 16:32] == -1).all()
    assert (reference[..., :16] == 1).all()
    assert (reference[..., 32:] == 1).all()


def test_other_rate_length_and_size_are_noted(tmp_path):
    frames = RNG.integers(0, 256, (40, 40, 80, 3), dtype=np.uint8)
    path = write_video(tmp_path / "clip.mp4", frames, 30)
    notes = " | ".join(conditions(Inputs(src_video=path)).notes)
    assert names(notes, "16 fps", "first 9 frames")
    assert re.search(r"\b80x40\b.*\b48x32\b", notes)


@pytest.mark.parametrize(
    ("value", "where"), [(0, "nowhere"), (255, "everywhere"), (100, "nowhere"), (200, "everywhere")]
)
def test_mask_of_one_value_is_a_note(tmp_path, value, where):
    Image.new("L", (48, 32), value).save(tmp_path / "m.png")
    array = np.full((9, 32, 48), value, np.uint8)
    for form in (tmp_path / "m.png", array, torch.from_numpy(array).float()[None] / 255):
        (note,) = conditions(Inputs(src_video=CLIP, src_mask=form)).notes
        assert f"white {where}" in note
        assert len(conditions(Inputs(src_video=CLIP, src_mask=form), soft_mask=True).notes) == (
            value in (0, 255)
        )


def test_outpainting_notes_a_mask_of_one_value():
    white = np.full((9, 32, 48), 255, np.uint8)
    notes = conditions(
        Inputs(src_video=CLIP, src_mask=white, outpaint=(0.5, 0, 0.5, 0)), short_clip="pad"
    ).notes
    assert any("white everywhere" in note for note in notes)


def test_clip_that_fits_leaves_no_note():
    assert conditions(Inputs(src_video=CLIP, src_mask=MASK)).notes == ()


def test_frame_by_frame_takes_every_frame_whatever_its_rate(tmp_path):
    path = write_video(tmp_path / "clip.mkv", CLIP, 30, lossless=True)
    found = conditions(Inputs(src_video=path), timing="frames").src_video
    torch.testing.assert_close(found, conditions(Inputs(src_video=CLIP)).src_video)


@pytest.mark.parametrize(
    ("inputs", "values", "facts"),
    [
        ({"src_video": CLIP[:6]}, {}, ("6 frames", "num_frames to 5", "short_clip")),
        (
            {"src_video": np.concatenate((CLIP, CLIP))},
            {"long_clip": "reject"},
            ("18 frames", "long_clip"),
        ),
        ({"src_video": CLIP[:, :30]}, {"fit": "reject"}, ("48x30", "48x32")),
        ({"src_video": CLIP, "src_mask": MASK[:7]}, {}, ("src_mask", 7, "src_video", 9)),
        ({"first_frame": CLIP}, {}, ("first_frame", "9 of 9")),
        ({"src_video": CLIP, "src_mask": (MASK > 0).astype(np.uint8)}, {}, ("1 of 255",)),
        ({"src_video": "no/such.mp4"}, {}, ("no/such.mp4",)),
        (
            {"src_video": torch.from_numpy(CLIP).permute(3, 0, 1, 2)},
            {},
            ("tensor", "0 to 255", "-1 to 1"),
        ),
        ({"src_video": CLIP.astype(np.float32)}, {}, ("array", "0 to 255", "0 to 1")),
        ({"src_video": CLIP / 127.5 - 1}, {}, ("array", "-1 to 1", "0 to 1")),
        ({"src_video": torch.full((3, 9, 32, 48), float("nan"))}, {}, ("tensor", "nan to nan")),
        (
            {"src_video": CLIP, "src_mask": torch.from_numpy(MASK)[None]},
            {},
            ("tensor", "0 to 255", "0 to 1"),
        ),
    ],
)
def test_mismatch_is_rejected_in_one_line(inputs, values, facts):
    with raises(DataError, *facts) as caught:
        conditions(Inputs(**inputs), **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "where", "fact"),
    [
        ({"src_mask": MASK}, "src_mask", "src_video"),
        ({"outpaint": (0.5, 0, 0.5, 0)}, "outpaint", "src_video"),
        ({"first_frame": CLIP, "src_video": CLIP}, "src_video", "first_frame"),
        ({"last_frame": CLIP, "src_mask": MASK}, "src_mask", "last_frame"),
        ({"src_ref_images": ["r.png"] * 257}, "src_ref_images", 257),
    ],
)
def test_inputs_that_contradict_are_rejected(inputs, where, fact):
    with raises(ConfigError, fact, where=where):
        conditions(Inputs(**inputs))


@pytest.mark.parametrize(("policy", "last"), [("pad", 5), ("resample", 5)])
def test_short_clip_is_filled_on_request(policy, last):
    found = conditions(Inputs(src_video=CLIP[:6]), short_clip=policy)
    wanted = conditions(Inputs(src_video=CLIP)).src_video[:, last]
    torch.testing.assert_close(found.src_video[:, -1], wanted)
    assert any("9 frames" in note for note in found.notes)


def test_first_and_last_frames_are_kept_and_the_rest_is_gray():
    found = conditions(Inputs(first_frame=Image.fromarray(CLIP[0]), last_frame=CLIP[7:9]))
    whole = conditions(Inputs(src_video=CLIP)).src_video
    torch.testing.assert_close(found.src_video[:, [0, 7, 8]], whole[:, [0, 7, 8]])
    assert not found.src_video[:, 1:7].any()
    assert found.src_mask[0, :, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_outpainting_keeps_the_middle():
    found = conditions(Inputs(src_video=CLIP[:, :, 12:36], outpaint=(0.5, 0.0, 0.5, 0.0)))
    torch.testing.assert_close(
        found.src_video[..., 12:36], conditions(Inputs(src_video=CLIP)).src_video[..., 12:36]
    )
    assert not found.src_mask[..., 12:36].any()
    assert found.src_mask[..., :12].all()
    assert found.src_mask[..., 36:].all()
    assert not found.src_video[..., :12].any()


def test_soft_mask_stays_soft_on_request():
    gray = np.full((9, 32, 48), 100, np.uint8)
    inputs = Inputs(src_video=CLIP, src_mask=gray)
    assert conditions(inputs).src_mask.max() == 0
    torch.testing.assert_close(
        conditions(inputs, soft_mask=True).src_mask, torch.full((1, 9, 32, 48), 100 / 255)
    )
