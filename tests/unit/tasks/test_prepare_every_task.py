"""Every name of the published tool runs from the command line, with tiny networks in place of real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.conditioning.annotate.networks import ANNOTATORS, Annotator
from mindspeed_mm.conditioning.annotate.opencv import Box, Frame
from mindspeed_mm.data.video import open_video
from mindspeed_mm.data.video_writer import write_video
from tests.support.scenes import moving_disc

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from tests.support.networks import write_networks

pytestmark = pytest.mark.medium
FRAMES, MASKS = moving_disc()
HEIGHT, WIDTH, COUNT, MORE = 96, 128, 9, 6
BOX = "15,30,50,66"
CLIP, IMAGE, TWO = "--video clip.mkv", "--image image.png", "--image image.png,other.png"
GROWN = f"--expand_num {MORE}"
CONTROLS = ("plain", "gray", "scribble", "flow", "depth", "depthv2", "pose", "pose_body")
# name → its flags, and how many frames of src_video come out: 0 for references alone
RUNS = {
    **dict.fromkeys(CONTROLS, (CLIP, COUNT)),
    "framerefext": (CLIP, COUNT),
    "frameref": (f"{IMAGE} {GROWN}", MORE + 1),
    "firstframe": (f"{IMAGE} {GROWN}", MORE + 1),
    "lastframe": (f"{IMAGE} {GROWN}", MORE + 1),
    "firstlastframe": (f"{TWO} {GROWN}", MORE + 2),
    "clipref": (f"{CLIP} {GROWN}", COUNT + MORE),
    "firstclip": (f"{CLIP} {GROWN}", COUNT + MORE),
    "lastclip": (f"{CLIP} {GROWN}", COUNT + MORE),
    "firstlastclip": (f"--video clip.mkv,clip.mkv {GROWN}", 2 * COUNT + MORE),
    "inpainting": (f"{CLIP} --mode salientmasktrack", COUNT),
    "inpainting_mask": (f"{CLIP} --mask masks.mkv", COUNT),
    "inpainting_bbox": (f"{CLIP} --bbox {BOX}", COUNT),
    "inpainting_masktrack": (f"{CLIP} --mask mask.png", COUNT),
    "inpainting_bboxtrack": (f"{CLIP} --bbox {BOX}", COUNT),
    "inpainting_label": (f"{CLIP} --label disc", COUNT),
    "inpainting_caption": (f"{CLIP} --caption disc", COUNT),
    "outpainting": (f"{CLIP} --direction left,right", COUNT),
    "outpainting_inner": (f"{CLIP} --direction left,right", COUNT),
    "layout_bbox": (f"--bbox {BOX} 60,30,95,66 --num_frames 9 --height {HEIGHT} --width {WIDTH}", COUNT),
    "layout_track": (f"{CLIP} --mode bboxtrack --bbox {BOX}", COUNT),
    **{f"image_{name}": (IMAGE, 1) for name in ["plain", "depth", "gray", "pose", "scribble"]},
    "image_face": (IMAGE, 0),
    "image_salient": (IMAGE, 0),
    "image_reference": (f"{IMAGE} --mode bboxtrack --bbox {BOX}", 0),
    "image_inpainting": (f"{IMAGE} --mode bbox --bbox {BOX}", 1),
    "image_outpainting": (f"{IMAGE} --direction up", 1),
    "composition": (
        "--process_type_1 inpainting --video_1 clip.mkv --mask_1 masks.mkv "
        "--process_type_2 gray --video_2 clip.mkv",
        COUNT,
    ),
    "reference_anything": (f"{TWO} --mode salient", 0),
    "animate_anything": (f"{CLIP} {IMAGE} --mode salient", COUNT),
    "swap_anything": (f"{CLIP} {IMAGE} --mode bboxtrack,salient --bbox {BOX}", COUNT),
    "expand_anything": (f"{TWO} --mode firstframe,plain --direction left {GROWN}", MORE + 1),
    "move_anything": (f"{IMAGE} --bbox {BOX} 60,30,95,66 {GROWN}", MORE + 1),
}  # fmt: skip


class Ground:
    """Names a box for any text."""

    def __call__(self, frame: Frame, text: str) -> Box:
        return (15, 30, 50, 66)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disc as a clip, its masks, two images, and a network of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    write_video(folder / "clip.mkv", FRAMES, 16, lossless=True)
    write_video(folder / "masks.mkv", np.repeat(MASKS[..., None], 3, -1), 16, lossless=True)
    for name, frame in (("image", FRAMES[0]), ("other", FRAMES[8]), ("mask", MASKS[0])):
        Image.fromarray(frame).save(folder / f"{name}.png")
    write_networks(folder / "annotators")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_every_official_name_runs_from_the_command_line(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(sources)
    monkeypatch.setitem(ANNOTATORS._entries, "ground", Annotator((), "", f"{__name__}:Ground"))
    flags, frames = RUNS[name]
    main(["prepare", "--task", name, *flags.split(), "--out", str(tmp_path / "out")])
    found = {path.stem: path for path in (tmp_path / "out").iterdir()}
    said = json.loads(found.pop("prepare").read_text())
    assert said["task"] == name
    assert ("src_video" in found) == bool(frames)
    for stem in found.keys() & {"src_video", "src_mask"}:
        assert open_video(found[stem]).num_frames == frames
    if "src_video" not in found or (name.endswith(("_anything", "_reference")) and "move" not in name):
        assert "reference_0" in found


def test_list_of_runs_is_the_list_of_names() -> None:
    from tests.unit.conditioning.tasks.test_tasks import OFFICIAL

    assert RUNS.keys() == set(OFFICIAL)
