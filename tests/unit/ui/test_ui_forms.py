"""What the page asks for each task, and what it sends."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.conditioning.tasks.catalog import all_tasks
from mindspeed_mm.conditioning.tasks.spec import Clip, count_bounds
from mindspeed_mm.data.conditions import to_tensors
from mindspeed_mm.data.images import brightness
from mindspeed_mm.data.video import open_video
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.conditions import read_conditions
from mindspeed_mm.serve.client import Client
from mindspeed_mm.ui.config import UiConfig
from mindspeed_mm.ui.forms import FAMILIES, forms
from mindspeed_mm.ui.mask import Painting, clip_masks, frame_url, paintable, painted_mask, resized_edge
from mindspeed_mm.ui.places import find, inside
from mindspeed_mm.ui.presets import Presets
from mindspeed_mm.ui.request import Filled, build, form_of, number_of, plan, text_of
from mindspeed_mm.ui.sample import PROMPT, write_sample
from mindspeed_mm.ui.size import fit
from mindspeed_mm.ui.text import OPTIONS_ZH, TASKS_ZH, WORDS, Words
from tests.support.errors import raises

pytestmark = pytest.mark.medium

MODEL = {"id": "tiny", "experts": 1, "defaults": {"width": 64, "height": 64, "num_frames": 17, "fps": 16}}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample"))


def circle() -> np.ndarray:
    """The sample's circle in its first frame, painted at 512 pixels."""
    y, x = np.mgrid[:512, :512]
    return np.where(np.hypot(x - 152, y - 256) < 140, 255, 0).astype(np.uint8)


def test_every_task_that_one_upload_can_serve_has_a_form():
    served = {form.task.run for form in forms().values() if form.task}
    left_out = {task.name for task in all_tasks() if task.run not in served}
    assert left_out == {"composition"}  # two prepared pairs: paths, which a request cannot name
    assert {form.family for form in forms().values()} == set(FAMILIES)


def test_form_has_the_inputs_of_its_task_alone():
    for form in forms().values():
        if form.task is None:
            continue
        assert form.video == (count_bounds(form.task.needs, "clip")[1] > 0)
        assert {option.name for option in form.options} <= set(form.task.options.model_fields) - set(
            form.task.fixed
        )


def test_no_form_asks_for_a_path():
    names = {option.name for form in forms().values() for option in form.options}
    assert not names & {"annotators", "mask", "image_mask", "video_1", "mask_1"}


@pytest.mark.parametrize(("mode", "shown"), [("masktrack", False), ("bboxtrack", True), ("label", False)])
def test_box_belongs_to_its_modes(mode: str, shown: bool):
    form = forms()["inpainting"]
    box = next(option for option in form.options if option.name == "bbox")
    assert form.shown(box, mode) is shown


def test_both_languages_have_the_same_words():
    assert WORDS["en"].keys() == WORDS["zh"].keys()
    for key, text in WORDS["en"].items():
        fields = {part.split("}")[0] for part in text.split("{")[1:]}
        assert fields == {part.split("}")[0] for part in WORDS["zh"][key].split("{")[1:]}, key
    assert {form.name for form in forms().values() if form.task} <= set(TASKS_ZH)
    assert {option.name for form in forms().values() for option in form.options} <= set(OPTIONS_ZH)


def test_task_of_another_package_keeps_its_own_summary():
    assert Words("zh").task("ours", "a summary; --mode says how") == "a summary"


def test_painted_region_follows_the_subject_both_ways(sample: Path):
    clip = Clip.open(sample)
    first = list(clip_masks(clip, Painting(mask=circle(), frame=0)))
    middle = np.roll(circle(), 96, axis=1)  # where the circle is in frame 8
    both = list(clip_masks(clip, Painting(mask=middle, frame=8)))
    assert len(first) == len(both) == clip.num_frames
    for masks in (first, both):
        centres = [float(np.nonzero(mask)[1].mean()) for mask in masks]
        assert centres[0] < centres[8] < centres[16]
        assert centres[16] - centres[0] > 15


def test_still_region_stays(sample: Path):
    masks = list(clip_masks(Clip.open(sample), Painting(mask=circle(), follow=False)))
    assert all((mask == masks[0]).all() for mask in masks)


def test_region_grows_and_shrinks_and_never_vanishes():
    mask = np.zeros((100, 100), np.uint8)
    mask[40:60, 40:60] = 255
    assert resized_edge(mask, 5).sum() > mask.sum() > resized_edge(mask, -5).sum() > 0
    assert (resized_edge(mask, -20) == mask).all()


def test_painter_output_is_read(tmp_path: Path):
    picture = np.zeros((40, 60, 4), np.uint8)
    picture[10:20, 30:50, 3] = 255
    url = frame_url(picture)
    mask = painted_mask(url)
    assert mask is not None
    assert (mask[10:20, 30:50] == 255).all()
    assert mask.sum() == 255 * 200
    assert painted_mask("") is painted_mask(frame_url(np.zeros_like(picture))) is None


@pytest.mark.parametrize(
    "text", ["data:image/png;base64,AAAA", "data:text/html,x", "x", "data:image/png;base64,é"]
)
def test_invalid_painting_is_rejected(text: str):
    with raises(DataError, where="mask"):
        painted_mask(text)


def test_frames_are_painted_on_at_a_usable_size():
    assert paintable(np.zeros((64, 64, 3), np.uint8)).shape == (512, 512, 3)
    assert max(paintable(np.zeros((1080, 1920, 3), np.uint8)).shape) == 768


def test_painting_is_sent_as_the_mask_of_the_clip(sample: Path, tmp_path: Path):
    filled = Filled(
        form="inpainting", prompt=PROMPT, video=sample, painted=circle(), options={"mode": "masktrack"}
    )
    request = build(filled, tmp_path)
    assert request.fields["task"] == {"type": "inpainting", "mode": "mask"}
    reader = open_video(request.files["src_mask"][0], mask=True)
    assert reader.num_frames == 17
    conditions = to_tensors(read_conditions(plan(request, MODEL, tmp_path)))
    assert conditions.src_mask is not None
    white = np.asarray(conditions.src_mask[0]).reshape(17, -1).mean(axis=1)
    assert ((white > 0.1) & (white < 0.5)).all()
    again = build(filled, tmp_path)
    assert again.files == request.files  # tracked once


def test_painting_becomes_a_box_where_the_mode_needs_one(sample: Path, tmp_path: Path):
    filled = Filled(
        form="inpainting", prompt="x", video=sample, painted=circle(), options={"mode": "bboxtrack"}
    )
    box = build(filled, tmp_path).fields["task"]["bbox"]
    assert box == "2,15,37,50"
    typed = Filled(form="inpainting", prompt="x", video=sample, options={"mode": "bbox", "bbox": "1,2,30,40"})
    assert build(typed, tmp_path).fields["task"]["bbox"] == "1,2,30,40"


def test_painting_on_an_image_is_its_mask(tmp_path: Path):
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(image)
    filled = Filled(
        form="image_inpainting", prompt="x", images=(image,), painted=circle(), options={"mode": "mask"}
    )
    request = build(filled, tmp_path)
    mask = brightness(open_video(request.files["src_mask"][0], mask=True).read([0]))[0]
    assert mask.shape == (64, 64)
    assert 0 < mask.mean() < 128


@pytest.mark.parametrize(
    ("filled", "where"),
    [
        (Filled(form="text"), "prompt"),
        (Filled(form="inpainting", prompt="x"), "src_video"),
        (Filled(form="frameref", prompt="x"), "images"),
        (Filled(form="ends", prompt="x"), "first and last frame"),
    ],
)
def test_missing_input_is_named(filled: Filled, where: str, tmp_path: Path):
    with raises(ConfigError, where=where):
        build(filled, tmp_path)


def test_unpainted_mask_is_named(sample: Path, tmp_path: Path):
    with raises(ConfigError, where="mask"):
        build(Filled(form="inpainting", prompt="x", video=sample, options={"mode": "masktrack"}), tmp_path)


def test_server_s_rules_hold_before_anything_is_sent(tmp_path: Path):
    request = build(Filled(form="text", prompt="x", numbers={"width": 65}), tmp_path)
    with raises(ConfigError, 64, where="width"):
        plan(request, MODEL, tmp_path)


def test_sides_are_shares_of_the_frame(sample: Path, tmp_path: Path):
    filled = Filled(form="sides", prompt="x", video=sample, sides=(50, 0, 50, 0))
    request = build(filled, tmp_path)
    assert request.fields["outpaint"] == [0.5, 0, 0.5, 0]
    planned = plan(request, MODEL, tmp_path)
    assert planned.inputs.outpaint == (0.5, 0, 0.5, 0)


def test_clip_decides_size_and_length():
    assert fit((480, 832), 100, 480 * 832, 81) == (832, 480, 81)
    assert fit((64, 64), 18, 64 * 64, 81) == (64, 64, 17)
    width, height, _ = fit((64, 64), 17, 64 * 64, 17, (50, 0, 50, 0))
    assert (width, height) == (96, 48)


def test_settings_come_back_to_their_form():
    assert form_of({"task": {"type": "inpainting_masktrack", "refine": False}}) == (
        "inpainting",
        {"refine": False, "mode": "masktrack"},
    )
    assert form_of({"outpaint": [0.5, 0, 0, 0]})[0] == "sides"
    assert form_of({"inputs": []})[0] == "text"
    assert form_of({"inputs": ["first_frame"]})[0] == "ends"
    assert form_of({"inputs": ["video"]})[0] == "own"


def test_settings_are_kept_under_a_name(tmp_path: Path):
    presets = Presets(tmp_path / "presets")
    filled = Filled(
        form="canny", prompt="x", numbers={"steps": 7, "preset": ""}, options={"low": 50, "high": 200}
    )
    presets.save("mine", filled.settings())
    loaded = presets.load("mine")
    assert loaded["steps"] == 7
    assert form_of(loaded) == ("canny", {"low": 50})
    assert presets.names() == ["mine"]
    for name in ("", "../x", ".hidden", "a/b"):
        with raises(ConfigError):
            presets.save(name, {})
    with raises(ConfigError, where="../mine"):
        presets.load("../mine")


def test_only_paths_inside_the_folder_are_opened(tmp_path: Path):
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/data.json").write_text("[]")
    (tmp_path / "secret.json").write_text("[]")
    (root / "link.json").symlink_to(tmp_path / "secret.json")
    assert inside(root, "a/b") == (root / "a/b").resolve()
    for text in (
        "../secret.json",
        str(tmp_path / "secret.json"),
        "link.json",
        "a/../../secret.json",
        "gone",
        "\0",
    ):
        with raises(ConfigError):
            inside(root, text)
    assert find(root, frozenset({"data.json"})) == ["a/b/data.json"]


def test_page_listens_on_loopback_by_default():
    assert UiConfig().host == "127.0.0.1"


def test_long_video_fields_of_the_page_match_the_json(tmp_path: Path):
    images = []
    for name in ("a", "b"):
        images.append(tmp_path / f"{name}.png")
        Image.new("RGB", (32, 32)).save(images[-1])
    filled = Filled(
        form="own",
        prompt="x",
        numbers={"num_frames": 29, "window": 17, "window_mode": "", "paste_back": None},
        images=tuple(images),
        window_prompts=("a", "b"),
        window_references=("1, 2", "-"),
    )
    settings = filled.settings()
    assert settings["window_prompts"] == ["a", "b"]
    assert settings["window_references"] == [[0, 1], []]
    assert "window_mode" not in settings
    with raises(ConfigError, where="window_references"):
        Filled(form="text", window_references=("0",)).settings()


class Refusing:
    """A server that deletes nothing."""

    status_code, reason = 503, "Service Unavailable"
    headers: ClassVar[dict[str, str]] = {}

    def json(self) -> dict[str, dict[str, str]]:
        return {"error": {"message": "busy", "problem": "busy"}}


def test_rejected_deletion_is_an_error(monkeypatch: pytest.MonkeyPatch):
    client = Client("http://127.0.0.1:1")
    monkeypatch.setattr(client, "_send", lambda *_: Refusing())
    with raises(ConfigError, "busy"):
        client.delete("video_1")
    monkeypatch.setattr(Refusing, "status_code", 404)
    client.delete("video_1")  # gone already


@pytest.mark.parametrize(
    ("text", "number"),
    [("", None), (" ", None), ("7", 7), ("0.5", 0.5), ("1, 0.8", [1, 0.8]), ("x", "x"), (3, 3)],
)
def test_empty_box_is_not_a_number(text: object, number: object):
    assert number_of(text) == number
    if number is not None and number != "x":
        assert number_of(text_of(number)) == number
