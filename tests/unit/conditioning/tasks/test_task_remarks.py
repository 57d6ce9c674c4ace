"""What tasks say of their files: what is not honoured, masks that say nothing, masks of 0 and 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.conditioning.tasks.catalog import TASKS
from mindspeed_mm.conditioning.tasks.spec import Prepared, Sources
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.conditions import read_conditions
from mindspeed_mm.generation.request import GenerationRequest, Inputs
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.tasks import request_task
from tests.support.clips import write_as, write_clip
from tests.support.errors import names, raises

SIZE = (48, 64)
UNTIMED = remarks_on(["untimed"])[0]
BOX = np.zeros(SIZE, np.uint8)
BOX[8:32, 8:40] = 255
MASKS = {
    "box": BOX,
    "nowhere": np.zeros(SIZE, np.uint8),
    "gray": BOX // 2,
    "everywhere": np.full(SIZE, 255, np.uint8),
    "zero_one": BOX // 255,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_clip(tmp_path / "clip.mp4", 5, height=SIZE[0], width=SIZE[1])
    write_as(tmp_path / "raw.h264", "libx264", {}, 5, height=SIZE[0], width=SIZE[1])
    for name, values in MASKS.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    return tmp_path


def prepared(task: str, folder: Path, clip: str = "clip.mp4", **options: Any) -> Prepared:
    entry = TASKS.get(task)
    return entry.prepare(Sources.open([folder / clip]), entry.parse(options, "test"))


def inpainted(folder: Path, mask: str, mode: str = "mask") -> Prepared:
    return prepared("inpainting", folder, mode=mode, mask=str(folder / f"{mask}.png"))


def test_assumptions_about_a_clip_are_noted(folder: Path) -> None:
    assert prepared("gray", folder).notes == ()
    (note,) = prepared("gray", folder, "raw.h264").notes
    assert names(note, "clip")
    assert note.endswith(UNTIMED)


def test_assumptions_about_an_image_are_noted(folder: Path) -> None:
    pages = [Image.fromarray(BOX), Image.fromarray(BOX)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    entry = TASKS.get("image_gray")
    made = entry.prepare(Sources.open(images=[folder / "pages.tif"]), entry.parse({}, "test"))
    assert any("several pages" in note for note in made.notes)


@pytest.mark.parametrize(
    ("mask", "where"), [("nowhere", "nowhere"), ("gray", "nowhere"), ("everywhere",) * 2]
)
def test_task_mask_that_says_nothing_is_a_note(folder: Path, mask: str, where: str) -> None:
    assert inpainted(folder, "box").notes == ()
    (note,) = inpainted(folder, mask).notes
    assert names(note, "mask", f"white {where}")


@pytest.mark.parametrize("mode", ["mask", "masktrack"])
def test_task_mask_of_zero_and_one_is_rejected(folder: Path, mode: str) -> None:
    with raises(DataError, 1, 255, where=folder / "zero_one.png"):
        inpainted(folder, "zero_one", mode)


def test_moving_task_mask_of_zero_and_one_is_rejected(folder: Path) -> None:
    frames = np.repeat((BOX // 255)[None, ..., None].repeat(3, -1), 5, 0)
    path = write_video(folder / "zero_one.mkv", frames, 16, lossless=True)
    with raises(DataError, 1, 255, where=path):
        prepared("inpainting", folder, mode="mask", mask=str(path))


def test_masks_of_a_composition_are_checked_too(folder: Path) -> None:
    pairs = {f"video_{n}": str(folder / "clip.mp4") for n in (1, 2)}
    kinds = {"process_type_1": "repaint", "process_type_2": "control"}
    entry = TASKS.get("composition")
    for mask, fact in (("zero_one", ""), ("nowhere", "white nowhere")):
        options = entry.parse({**pairs, **kinds, "mask_1": str(folder / f"{mask}.png")}, "test")
        if not fact:
            with raises(DataError, 1, 255):
                entry.prepare(Sources(), options)
            continue
        assert any(fact in note for note in entry.prepare(Sources(), options).notes)


def test_notes_of_a_dataset_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"video": name, "cap": "x"} for name in ("raw.h264", "clip.mp4", "raw.h264")]
    (folder / "data.json").write_text(json.dumps(rows))
    main(
        [
            "prepare",
            "--task=gray",
            f"--data={folder / 'data.json'}",
            f"--out={folder / 'out'}",
            "--num-workers=0",
        ]
    )
    said = capsys.readouterr().out
    assert f"{UNTIMED} (2 rows)" in said


def test_request_with_a_task_notes_its_clip(folder: Path) -> None:
    task, inputs = request_task("gray", Inputs(src_video=str(folder / "raw.h264")), "x.json:task")
    sampling = SamplingConfig(height=SIZE[0], width=SIZE[1], num_frames=5, timing="frames")
    request = GenerationRequest(prompt="a", name="v", inputs=inputs, sampling=sampling, task=task)
    assert any(UNTIMED in note for note in read_conditions(request).notes)
