"""`bash examples/vace/quickstart.sh`, as the README has it: real clips in, a generated video out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mindspeed_mm.data.video import open_video
from tests.examples.conftest import Quickstart

pytestmark = pytest.mark.slow


def test_it_can_be_interrupted_and_run_again(quickstart: Quickstart) -> None:
    assert "[5/8]" in quickstart.interrupted
    assert "[6/8]" not in quickstart.interrupted
    assert "[8/8]" in quickstart.printed


def test_it_installs_nothing_the_second_time(quickstart: Quickstart) -> None:
    assert "installing" not in quickstart.printed
    assert re.search(r"^environment: .*, Python 3\.\d+\.\d+, torch ", quickstart.printed)


def test_it_ends_with_the_paths_of_what_it_made(quickstart: Quickstart) -> None:
    last = quickstart.printed.strip().splitlines()[-2:]
    assert all(Path(line).is_file() for line in quickstart.printed.split("pictures show")[1].splitlines()[1:] if line)
    assert any(line.endswith(".png") for line in last)


def test_the_video_has_the_asked_size_frames_and_rate(quickstart: Quickstart) -> None:
    results = sorted((quickstart.out / "results").glob("*.mp4"))
    assert [path.stem for path in results] == [
        "heldout_00000_inpaint",
        "heldout_00000_reference",
        "heldout_00000_silhouette",
    ]
    for path in results:
        video = open_video(path, "av")
        assert (video.width, video.height, video.num_frames) == (64, 64, 17)
        assert video.fps == pytest.approx(16)
        frames = video.read(range(17))
        assert frames.std() > 1, "a video of one colour"


def test_beside_it_lie_a_contact_sheet_and_the_settings_that_made_it(quickstart: Quickstart) -> None:
    sheet = Image.open(quickstart.out / "results" / "heldout_00000_inpaint.png")
    assert min(sheet.size) > 200
    settings = json.loads((quickstart.out / "results" / "heldout_00000_inpaint.json").read_text())
    assert "2025" in json.dumps(settings)  # the seed


def test_training_moved_the_branch_and_nothing_else(quickstart: Quickstart) -> None:
    before, after = (
        load_file(next((quickstart.out / "weights" / name).glob("*.safetensors")))
        for name in ("Tiny-VACE", "Tiny-VACE-trained")
    )
    assert sorted(before) == sorted(after)
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name].to(weight.dtype))}
    assert {name.split(".")[0] for name in moved} == {"vace_blocks", "vace_patch_embedding"}
    in_the_branch = {name for name in before if name.startswith("vace_")}
    assert len(moved) > 0.5 * len(in_the_branch)  # bf16 hides the smallest steps


def test_the_checkpoint_is_the_small_default_kind_that_names_its_base(quickstart: Quickstart) -> None:
    flat = torch.load(quickstart.out / "save-release/release/mp_rank_00/model_optim_rng.pt", weights_only=True)
    assert "Tiny-VACE-mm" in flat["base"]["path"]
    assert all(name.startswith("vace_dit.") for name in flat["model"])


def test_the_features_are_listed_in_the_order_of_the_dataset(quickstart: Quickstart) -> None:
    asked = json.loads((quickstart.out / "world" / "data.json").read_text())
    rows = [json.loads(line) for line in (quickstart.out / "features" / "data.jsonl").read_text().splitlines()]
    assert [row["cap"] for row in rows] == [row["cap"] for row in asked]
    assert len({row["file"] for row in rows}) == len(asked), "two clips with one caption are two files"
    shapes = {tuple(row["shape"]) for row in rows}
    assert {(5, 8, 12), (5, 12, 8), (5, 8, 8)} <= shapes, "landscape, portrait and square keep their layout"
    assert [row["num_refs"] for row in rows].count(2) == 1


def test_every_iteration_is_logged_in_megatron_s_words(quickstart: Quickstart) -> None:
    log = (quickstart.out / "logs" / "5.log").read_text()
    lines = re.findall(r"iteration +(\d+)/ +10 \| consumed samples: +(\d+) \|.*? loss: (\d\.\d{6}E[+-]\d\d) \|", log)
    assert [(int(i), int(n)) for i, n, _ in lines] == [(i, 2 * i) for i in range(1, 11)]
    assert re.search(r"^Elapsed Time Per iteration: [\d.]+, Average Samples per Second: [\d.]+$", log, re.MULTILINE)
