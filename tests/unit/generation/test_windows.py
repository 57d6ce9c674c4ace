"""Windows of a long video: where they lie, how they blend, what is measured, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.request import GenerationRequest, Inputs
from mindspeed_mm.generation.windows.colors import lab_stats, match
from mindspeed_mm.generation.windows.compose import Composition
from mindspeed_mm.generation.windows.paste import feather_weights, paste_chunks, paste_frame
from mindspeed_mm.generation.windows.ramp import ramp
from mindspeed_mm.generation.windows.report import Watch, report
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from tests.support.errors import raises

RNG = np.random.default_rng(0)


def sampling(**values):
    return resolve_sampling(parse(RequestConfig, values, "request"), experts=1)


@pytest.mark.parametrize("count", range(2, 8))
@pytest.mark.parametrize(("window", "overlap", "discard"), [(81, 13, 0), (81, 9, 8), (17, 5, 0), (49, 17, 4)])
def test_windows_follow_the_closed_formula(count, window, overlap, discard):
    total = (count - 1) * (window - overlap - discard) + window
    keys = sampling(num_frames=total, window=window, window_overlap=overlap, window_discard=discard)
    step = window - overlap - discard
    assert [(w.start, w.stop) for w in keys.windows] == [(i * step, i * step + window) for i in range(count)]
    assert [w.lead for w in keys.windows] == [0] + [overlap] * (count - 1)


@pytest.mark.parametrize("total", range(21, 130, 4))
def test_windows_cover_every_frame_of_any_length(total):
    windows = sampling(num_frames=total, window=17, window_overlap=5).windows
    assert windows[0].start == 0
    assert windows[-1].stop == total
    assert all(w.stop - w.start == 17 and w.lead % 4 == 1 for w in windows[1:])
    made = {frame for w in windows for frame in range(w.start + w.lead, w.stop)}
    assert made == set(range(total))
    assert sum(w.stop - w.start - w.lead for w in windows) == total  # and each one is new once


def test_video_within_a_window_has_one():
    assert len(sampling(num_frames=17, window=17).windows) == 1
    assert not sampling(num_frames=17, window=33).is_windowed
    assert len(sampling(num_frames=81).windows) == 1


@pytest.mark.parametrize(("window", "overlap"), [(81, 13), (49, 13), (33, 9), (17, 5), (9, 1), (5, 1)])
def test_usual_overlap_is_at_most_a_third(window, overlap):
    assert sampling(num_frames=161, window=window).overlap == overlap


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"window": 16}, ("window", "4k+1", 17)),
        ({"window": 17, "window_overlap": 6}, ("window_overlap", "4k+1", 5)),
        ({"window": 17, "window_overlap": 17}, ("window_overlap", 17, 5)),
        ({"window": 17, "window_overlap": 9, "window_discard": 8}, ("window_overlap", "window_discard", 17)),
        ({"window": 17, "window_discard": 3}, ("window_discard", 4)),
        ({"window_overlap": 5}, ("window", "window_overlap")),
        ({"window": 17, "window_mode": "context_windows", "window_discard": 4}, ("window_discard", "extend")),
        ({"window": 17, "window_mode": "sliding"}, ("window_mode", "context_windows")),
        ({"window": 17, "window_references": ((-1,),)}, ("window_references",)),
        ({"window": 17, "num_frames": 29, "window_prompts": ("a", "b", "c")}, ("window_prompts", 3, 2)),
        ({"window": 17, "num_frames": 29, "window_references": ((), (), ())}, ("window_references", 3, 2)),
        ({"window_prompts": ("a",)}, ("window_prompts", "window", 81)),
        ({"window": 17, "window_prompts": ("a", " ")}, ("window_prompts", 2)),
        ({"paste_back": -1}, ("paste_back",)),
    ],
)
def test_window_that_does_not_fit_is_one_line(values, facts):
    with raises(ConfigError, *facts):
        sampling(**values)


def test_tasks_of_a_json_have_the_window_of_its_top(tmp_path):
    values = {
        **{"prompt": "a", "output_path": "out", "num_frames": 13, "window": 9},
        "model": {"transformer": "t", "vae": "v", "text_encoder": "e"},
        "tasks": [{"window_mode": "context_windows"}, {"window_overlap": 1}, {"window": None}],
    }
    job = GenerateJob.from_values(values, tmp_path / "a.json", needs_weights=False)
    assert [len(video.sampling.windows) for video in job.videos] == [2, 2, 1]
    values["tasks"] = [{"window": None, "window_overlap": 1}]
    with raises(ConfigError, "tasks[0]", "window_overlap", "window"):
        GenerateJob.from_values(values, tmp_path / "a.json", needs_weights=False)


@pytest.mark.parametrize(
    ("values", "inputs", "facts"),
    [
        ({"paste_back": 4}, Inputs(src_video="a.mp4"), ("paste_back", "mask")),
        (
            {"window": 17, "window_references": ((0,), (1,))},
            Inputs(src_ref_images=["a.png"]),
            ("window_references[1]", 1),
        ),
    ],
)
def test_window_of_missing_sources_is_one_line(values, inputs, facts):
    config = parse(RequestConfig, {"prompt": "a", "num_frames": 29, **values}, "request")
    with raises(ConfigError, *facts):
        GenerationRequest.resolve(config, inputs, experts=1)


def test_colours_match_in_mean_and_deviation():
    wanted = RNG.integers(90, 150, (2, 24, 24, 3), dtype=np.uint8)
    made = RNG.integers(60, 140, (3, 24, 24, 3), dtype=np.uint8)
    target = lab_stats(wanted)
    found = lab_stats(match(made, lab_stats(made), target))
    np.testing.assert_allclose(found.mean, target.mean, atol=0.2)
    np.testing.assert_allclose(found.deviation, target.deviation, atol=0.3)
    assert lab_stats(made).distance(target) > 3


def test_colours_of_a_region_ignore_the_rest():
    frames = np.full((1, 16, 16, 3), 40, np.uint8)
    frames[:, :, 8:] = 200
    region = np.zeros((1, 16, 16), bool)
    region[:, :, 8:] = True
    assert lab_stats(frames, region).mean[0] == pytest.approx(lab_stats(frames[:, :, 8:]).mean[0])
    assert lab_stats(frames, np.zeros_like(region)) is None


def test_ramp_sums_to_one_with_the_old_frames():
    for lead in (1, 5, 13):
        weights = ramp(lead)
        np.testing.assert_allclose(weights + weights[::-1], 1, atol=1e-6)
        assert np.allclose(np.diff(weights), 1 / (lead + 1))


def flat(frames, level):
    return np.full((frames, 16, 16, 3), level, np.uint8)


def test_composition_crossfades_what_windows_share():
    keys = sampling(num_frames=29, window=17, window_overlap=5, window_colors="none", height=16, width=16)
    video = Composition(keys, (16, 16), None, None)
    for window, level in zip(keys.windows, (100, 160), strict=True):
        video.add(window, flat(17, level))
    levels = video.frames[:, 0, 0, 0]
    assert (levels[:12] == 100).all()
    assert (levels[17:] == 160).all()
    assert levels[12:17].tolist() == [110, 120, 130, 140, 150]


def test_composition_anchors_colours():
    texture = RNG.integers(80, 160, (1, 16, 16, 3), dtype=np.uint8)
    keys = sampling(num_frames=65, window=17, window_overlap=5)
    video = Composition(keys, (16, 16), None, None)
    for window in keys.windows:
        video.add(window, np.repeat(texture + np.uint8(8 * window.index), 17, axis=0))
    found = video.report()
    assert max(part["lab_drift_before_matching"] for part in found["windows"]) > 8
    assert found["max_lab_drift"] < 0.5
    assert found["min_seam_psnr"] > 40
    assert found["max_seam_jump"] < 4


def test_discarded_frames_are_not_in_the_video():
    keys = sampling(num_frames=25, window=17, window_overlap=5, window_discard=4, window_colors="none")
    video = Composition(keys, (16, 16), None, None)
    first = flat(17, 100)
    first[13:] = 0
    for window, made in zip(keys.windows, (first, flat(17, 100)), strict=True):
        video.add(window, made)
    assert (video.frames == 100).all()


def test_report_finds_drift_and_the_jump_at_a_seam():
    keys = sampling(num_frames=29, window=17, window_overlap=5, window_mode="context_windows")
    frames = flat(29, 100) + np.arange(29, dtype=np.uint8)[:, None, None, None]
    frames[14:] += 20
    watch = Watch()
    list(watch.watched([frames[:5], frames[5:]]))
    found = report(keys, watch, [{}, {}])
    assert found["max_seam_jump"] == pytest.approx(21)
    assert found["windows"][1]["lab_drift"] > 5
    assert found["min_seam_psnr"] is None


def test_pasted_frame_is_the_source_where_the_mask_keeps():
    source = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    made = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    for feather in (0, 4, 40):
        pasted = paste_frame(made, source, mask, feather)
        assert (pasted[mask == 0] == source[mask == 0]).all()
        far = feather_weights(mask > 127, feather) == 0
        assert (pasted[far & (mask > 0)] == made[far & (mask > 0)]).all()


def test_feather_closes_a_step_of_brightness_at_the_seam():
    source, made = np.full((32, 32, 3), 120, np.uint8), np.full((32, 32, 3), 150, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    source[mask > 0] = 128  # gray, as tasks leave it
    row = paste_frame(made, source, mask, 9)[16, :, 0].astype(int)
    assert np.abs(np.diff(row)).max() <= 4
    assert row[15] == 120
    assert row[26] == 150
    assert (np.diff(row) >= 0).all()


def test_feather_weights_fall_linearly():
    generated = np.zeros((8, 24), bool)
    generated[:, 4:] = True
    weights = feather_weights(generated, 9)[4]
    np.testing.assert_allclose(weights[4:14], 1 - np.arange(1, 11) / 10, atol=0.02)
    assert (weights[:4] == 0).all()


def test_chunks_are_pasted_in_their_place():
    source = RNG.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    mask = np.zeros((9, 16, 16), np.uint8)
    mask[5:] = 255
    made = flat(9, 77)
    pasted = np.concatenate(list(paste_chunks([made[:1], made[1:5], made[5:]], source, mask, 3)))
    assert (pasted[:5] == source[:5]).all()
    assert (pasted[5:] == 77).all()
