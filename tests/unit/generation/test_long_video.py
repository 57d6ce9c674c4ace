"""Long videos on tiny models: windows that continue each other, and context windows."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.packed import write_packed
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.conditions import read_conditions
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.parallel import SINGLE
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.request import GenerationRequest, Inputs
from mindspeed_mm.generation.result import Prediction
from mindspeed_mm.generation.stored import read_latents
from mindspeed_mm.generation.windows.context import ContextWindows, Part, make_parts, window_weights
from mindspeed_mm.generation.windows.extend import extend, window_request, window_seed
from mindspeed_mm.generation.windows.store import WindowStore, identity
from mindspeed_mm.models.wan.vae import WanVae
from tests.support.errors import raises
from tests.support.tiny import TINY, tiny_transformer, tiny_vae

pytestmark = pytest.mark.medium

CPU = Accelerator.detect("cpu")
LONG = {"height": 32, "width": 48, "num_frames": 17, "window": 9, "window_overlap": 5, "steps": 2}
RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (17, 32, 48, 3), dtype=np.uint8)
IMAGES = [RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(2)]
ROWS = torch.randn(7, TINY.trunk.text_dim, generator=torch.Generator().manual_seed(1))


def request(inputs=None, **values):
    config = RequestConfig(**{**LONG, "prompt": "a", "negative_prompt": "b", **values})
    return GenerationRequest.resolve(config, inputs or Inputs(), experts=1)


@pytest.fixture(scope="module")
def pipe():
    store = ModelStore(
        Experts([tiny_transformer()], CPU, "none"), WanVae(tiny_vae(), "tiny"), None, accelerator=CPU
    )
    store.cached_prompts.update({"a": ROWS, "b": ROWS[:4].flip(0), "c": -ROWS})
    return VacePipeline(store)


class Fake:
    """Windows made of nothing: the latents are their number, and each frame has the level of its place."""

    def __init__(self, ends_at=None):
        self.given, self.requests, self.ends_at = [], [], ends_at

    def make(self, index, part, conditions):
        if index == self.ends_at:
            raise KeyboardInterrupt
        self.given.append(conditions)
        self.requests.append(part)
        frames = len(conditions.src_ref_images) + (part.sampling.num_frames + 3) // 4
        return torch.full((16, frames, 4, 6), float(index))

    @staticmethod
    def decode(latents, num_refs):
        return [np.full((9, 32, 48, 3), 50 + 40 * int(latents[0, 0, 0, 0]), np.uint8)]

    def run(self, wanted, store=None):
        return extend(wanted, read_conditions(wanted), self.make, self.decode, parallel=SINGLE, store=store)


def test_each_window_is_given_the_last_frames_of_the_one_before():
    fake = Fake()
    made = fake.run(request(window_colors="none"))
    first, second, third = fake.given
    assert first.src_video is None
    for given, level in ((second, 50), (third, 90)):
        assert given.src_mask[:, :5].eq(0).all()
        assert given.src_mask[:, 5:].eq(1).all()
        assert given.src_video[:, 5:].eq(0).all()  # exactly gray
        assert round(float((given.src_video[0, 4, 0, 0] + 1) * 127.5)) >= level
    np.testing.assert_allclose(
        (second.src_video[:, :5].permute(1, 2, 3, 0).numpy() + 1) * 127.5,
        np.full((5, 32, 48, 3), 50.0),
        atol=1e-3,
    )
    assert made.frames.shape == (17, 32, 48, 3)


def test_control_clip_and_its_mask_are_cut_along():
    fake, mask = Fake(), np.zeros((17, 32, 48), np.uint8)
    mask[:, 8:] = 255
    fake.run(request(Inputs(src_video=CLIP, src_mask=mask)))
    for window, given in zip(request().sampling.windows, fake.given, strict=True):
        fresh = slice(window.lead, None)
        frames = (given.src_video[:, fresh].permute(1, 2, 3, 0).numpy() + 1) * 127.5
        np.testing.assert_allclose(frames, CLIP[window.frames][fresh], atol=1e-3)
        np.testing.assert_array_equal(given.src_mask[0, fresh].numpy() * 255, mask[window.frames][fresh])


def test_prompts_seeds_and_references_match_the_window():
    fake = Fake()
    fake.run(
        request(
            Inputs(src_ref_images=IMAGES), window_prompts=("a", "c"), window_references=((0, 1), (), (1,))
        )
    )
    assert [part.prompt for part in fake.requests] == ["a", "c", "c"]
    assert [len(given.src_ref_images) for given in fake.given] == [2, 0, 1]
    seeds = [part.sampling.seed for part in fake.requests]
    assert seeds[0] == 2025
    assert len(set(seeds)) == 3
    assert seeds == [window_seed(2025, index) for index in range(3)]


def test_kept_pixels_are_the_sources_in_every_window():
    fake, mask = Fake(), np.zeros((17, 32, 48), np.uint8)
    mask[:, 8:24, 8:24] = 255
    made = fake.run(request(Inputs(src_video=CLIP, src_mask=mask), paste_back=3))
    assert (made.frames[mask == 0] == CLIP[mask == 0]).all()
    assert not (made.frames[mask > 0] == CLIP[mask > 0]).all()


def test_stopped_run_resumes_with_the_next_window(tmp_path):
    wanted, whole = request(), Fake().run(request())
    store = WindowStore(tmp_path / "video1", identity([], {}))
    with pytest.raises(KeyboardInterrupt):
        Fake(ends_at=2).run(wanted, store)
    again = Fake()
    made = again.run(wanted, store)
    assert [part.sampling.seed for part in again.requests] == [window_seed(2025, 2)]
    assert (made.frames == whole.frames).all()
    other = Fake()
    other.run(request(window_prompts=("a", "c")), store)  # the first window is the same
    assert len(other.requests) == 2
    store.path(0).write_bytes(b"damaged")
    healed = Fake()
    healed.run(wanted, store)
    assert len(healed.requests) == 3  # the second had been made again for another prompt


@pytest.mark.parametrize(
    ("damage", "fact"),
    [("shape", "[16, 2, 4, 6]"), ("references", "1 references"), ("dtype", "float16"), ("values", "NaN")],
)
def test_window_that_does_not_fit_is_recreated(tmp_path, monkeypatch, caplog, damage, fact):
    monkeypatch.setattr(logging.getLogger("mindspeed_mm"), "propagate", True)
    store = WindowStore(tmp_path / "video1", identity([], {}))
    whole = Fake().run(request(), store)
    path = store.path(1)
    latents, num_refs, settings = read_latents(path)
    values = settings.model_dump(mode="json", exclude={"num_refs"})
    if damage == "shape":
        values["sampling"]["num_frames"], latents = 5, latents[:, :2].clone()
    elif damage == "references":
        values["sampling"]["num_frames"], num_refs = 5, 1
    elif damage == "dtype":
        latents = latents.half()
    else:
        latents[0, 0, 0, 0] = torch.nan
    write_packed(path, {"latents": latents}, {"num_refs": str(num_refs), "settings": json.dumps(values)})
    healed = Fake()
    made = healed.run(request(), store)
    assert [part.sampling.seed for part in healed.requests] == [window_seed(2025, 1)]
    assert (made.frames == whole.frames).all()
    warnings = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    (warning,) = warnings
    assert str(path) in warning
    assert fact in warning
    kept = Fake()
    kept.run(request(), store)
    assert kept.requests == []


def test_windows_of_other_weights_are_recreated(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    Fake().run(request(), WindowStore(tmp_path / "video", identity([file], {"dtype": "fp32"})))
    file.write_bytes(b"22")
    for made_by in (identity([file], {"dtype": "fp32"}), identity([tmp_path], {})):
        fake = Fake()
        fake.run(request(), WindowStore(tmp_path / "video", made_by))
        assert len(fake.requests) == 3


def test_first_window_is_the_video_of_its_length(pipe):
    short = {name: value for name, value in LONG.items() if "window" not in name}
    plain = pipe("a", negative_prompt="b", **{**short, "num_frames": 9})
    long = pipe("a", negative_prompt="b", **LONG)
    assert long.frames.shape == (17, 32, 48, 3)
    assert long.latents is None
    assert (long.frames[:4] == plain.frames[:4]).all()
    assert [row["frames"] for row in long.settings["windows"]["windows"]] == [[0, 8], [4, 12], [8, 16]]
    assert {"max_lab_drift", "max_seam_jump", "min_seam_psnr"} <= long.settings["windows"].keys()


def test_progress_counts_the_steps_of_all_windows(pipe):
    seen = []
    pipe("a", negative_prompt="b", on_step=lambda done, total: seen.append((done, total)), **LONG)
    assert seen == [(done, 6) for done in range(1, 7)]


def test_saved_long_video_has_no_latents(pipe, tmp_path):
    path = pipe("a", negative_prompt="b", src_video=CLIP, **LONG).save(tmp_path / "long")
    assert path.is_file()
    assert not (tmp_path / "long/latents.safetensors").exists()


def test_noise_of_a_window_is_rejected(pipe):
    with raises(ConfigError, "noise"):
        pipe("a", negative_prompt="b", noise=torch.zeros(16, 5, 4, 6), **LONG)


@pytest.mark.parametrize(
    ("total", "window", "overlap"), [(17, 9, 5), (77, 17, 5), (161, 81, 13), (25, 17, 1)]
)
def test_context_weights_sum_to_one_where_windows_meet(total, window, overlap):
    values = {**LONG, "num_frames": total, "window": window, "window_overlap": overlap}
    keys = resolve_sampling(RequestConfig(**values), experts=1)
    sums = torch.zeros((total + 3) // 4)
    for span, weights in zip(keys.windows, window_weights(keys.windows), strict=True):
        sums[list(span.latents)] += weights
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_context_velocity_is_the_weighted_mean():
    def answer(level):
        return lambda latents, _: Prediction(velocity=torch.full_like(latents, level), outputs=[], model="m")

    parts = [
        Part(torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.0, 0.75])),
        Part(torch.tensor([2, 3]), torch.tensor([0.25, 1.0])),
    ]
    found = ContextWindows(parts, [answer(4.0), answer(8.0)])(torch.zeros(1, 16, 4, 2, 2), torch.ones(1))
    assert found.velocity[0, 0, :, 0, 0].tolist() == [4.0, 4.0, 5.0, 8.0]


def test_context_windows_see_their_references():
    keys = request(
        Inputs(src_ref_images=IMAGES), window_mode="context_windows", window_references=((0,), (0, 1))
    ).sampling
    indices = [part.indices.tolist() for part in make_parts(keys, 2)]
    assert indices == [[0, 2, 3, 4], [0, 1, 3, 4, 5], [0, 1, 4, 5, 6]]


def test_context_windows_of_one_velocity_are_not_windows(pipe):
    """A window that holds everything gives what a video without windows gives."""
    values = {**LONG, "num_frames": 9}
    plain = {name: value for name, value in values.items() if "window" not in name}
    one = pipe("a", negative_prompt="b", window_mode="context_windows", **values)
    assert torch.equal(one.latents, pipe("a", negative_prompt="b", **plain).latents)


def test_context_windows_make_a_video_with_its_report(pipe):
    values = {**LONG, "window_mode": "context_windows", "window_prompts": ("a", "c")}
    made = pipe("a", negative_prompt="b", src_video=CLIP, src_ref_images=IMAGES, **values)
    assert made.latents.shape == (16, 2 + 5, 4, 6)
    assert len(made.settings["windows"]["windows"]) == 3
    same = pipe(
        "a",
        negative_prompt="b",
        src_video=CLIP,
        src_ref_images=IMAGES,
        **{**values, "window_prompts": ("a", "a")},
    )
    assert not torch.equal(made.latents, same.latents)


def test_paste_back_holds_for_a_short_video(pipe):
    mask = np.zeros((9, 32, 48), np.uint8)
    mask[:, 8:24] = 255
    made = pipe(
        "a", negative_prompt="b", src_video=CLIP[:9], src_mask=mask, paste_back=2, height=32, width=48,
        num_frames=9, steps=1,
    )  # fmt: skip
    assert (made.frames[mask == 0] == CLIP[:9][mask == 0]).all()


def test_request_of_a_window_is_one_without_windows():
    wanted = request(window_prompts=("a", "c"), window_discard=0)
    part = window_request(wanted, wanted.sampling.windows[1])
    assert not part.sampling.is_windowed
    assert part.sampling.num_frames == 9
    assert part.prompts == ("c", "b")
    assert replace(wanted, window_prompts=()).prompts == ("a", "b")
