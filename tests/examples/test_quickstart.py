"""`bash examples/vace/quickstart.sh`, as the README has it: real clips in, a generated video out."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from heldout import heldout_indices
from PIL import Image
from safetensors.torch import load_file
from score import Score, score_folder
from torch.distributed.checkpoint import FileSystemReader

from mindspeed_mm.cli.main import main as vace
from mindspeed_mm.data.video import open_video
from mindspeed_mm.evaluation.metrics.catalog import all_metrics
from mindspeed_mm.evaluation.report import ALL, compare
from mindspeed_mm.evaluation.report import score_folder as report_of
from mindspeed_mm.evaluation.sources import EvalData
from mindspeed_mm.models.weights import open_weights
from tests.examples.conftest import ITERATIONS, ROOT, Quickstart

KINDS = ("inpaint", "silhouette", "edge", "extension", "outpaint", "reference")

pytestmark = pytest.mark.slow


def test_it_can_be_interrupted_and_run_again(quickstart: Quickstart) -> None:
    assert "[4/7]" in quickstart.interrupted
    assert "[5/7]" not in quickstart.interrupted
    assert "[7/7]" in quickstart.printed


def test_it_installs_nothing_the_second_time(quickstart: Quickstart) -> None:
    assert "installing" not in quickstart.printed
    assert re.search(r"^environment: .*, Python 3\.\d+\.\d+, torch ", quickstart.printed)


def test_it_ends_with_the_paths_of_what_it_made(quickstart: Quickstart) -> None:
    listed, _, _ = quickstart.printed.split("their results:\n")[1].partition("\n\n")
    paths = [Path(line) for line in listed.splitlines()]
    assert all(path.is_file() for path in paths)
    assert paths[-1].name == "quickstart.png"
    assert (
        len(paths) == 1 + 3 * 2 * len(KINDS) + 2 * 4
    )  # three columns, two scenes; four kinds asked for in another colour


def test_videos_have_the_requested_size_frames_and_rate(quickstart: Quickstart) -> None:
    results = sorted((quickstart.out / "after").glob("*.mp4"))
    scenes = heldout_indices(len(KINDS) + 1)
    asked = [
        f"heldout_{i:05d}_{kind}" for number, kind in enumerate(KINDS) for i in scenes[number : number + 2]
    ]
    assert [path.stem for path in results] == sorted(asked)
    for path in results:
        video = open_video(path, "av")
        assert (video.width, video.height, video.num_frames) == (64, 64, 17)
        assert video.fps == pytest.approx(16)
        frames = video.read(range(17))
        assert frames.std() > 1, "a video of one colour"


def test_first_edited_clips_come_before_everything_else(quickstart: Quickstart) -> None:
    first, _, _ = quickstart.printed.partition("[2/7]")
    made = re.findall(r"^ *(\d+) s \| (\S+\.mp4)$", first, re.MULTILINE)
    names = [Path(path).stem for _, path in made]
    assert sorted(names) == sorted(path.stem for path in (quickstart.out / "shipped").glob("*.mp4"))
    assert all(re.search("_(blue|red|green|yellow|purple)$", name) for name in names[:2]), "edits first"
    sheet = Image.open(quickstart.out / "edited.png")
    assert min(sheet.size) > 500
    for path in map(Path, (path for _, path in made)):
        assert (ROOT / path).with_suffix(".png").is_file(), "each with its contact sheet"


def test_every_step_shows_its_progress(quickstart: Quickstart) -> None:
    parts = re.split(r"^\[\d/7\] ", quickstart.printed, flags=re.MULTILINE)[1:]
    assert len(parts) == 7
    for number in (0, 2, 3, 4, 5, 6):
        assert re.search(r"^ *\d+ s \| ", parts[number], re.MULTILINE), parts[number]
    lines = re.findall(rf"\| iteration +\d+/ +{ITERATIONS} loss: [\d.E+-]+", parts[3])
    assert len(lines) == ITERATIONS // 10


def test_commands_that_it_ends_with_are_sound(
    quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    _, _, after = quickstart.printed.partition("\nNext, in this folder:\n")
    lines = [line.strip() for line in after.splitlines() if line.startswith("  vace ")]
    assert [line.split()[1] for line in lines] == ["generate", "ui", "serve", "prepare", "init"]
    for line in lines:
        if line.startswith("vace ui") and find_spec("gradio") is None:
            continue
        words = shlex.split(line.replace("my_project", str(tmp_path / "new")), comments=True)[1:]
        vace([*words, *(["--dry-run"] if words[0] in ("generate", "ui", "serve") else [])])
    assert (tmp_path / "new").is_dir()


def test_training_teaches_the_branch_to_look_at_its_inputs(quickstart: Quickstart) -> None:
    """The shipped trunk places shapes freely; after training they follow the clip and fill the masked box."""
    before, after, shipped = (score_folder(quickstart.out / name) for name in ("before", "after", "shipped"))
    assert len(before) == len(after) == 2 * len(KINDS)
    for kind in ("silhouette", "edge"):
        assert mean(before, "iou", kind) < 0.3
        assert mean(after, "iou", kind) > 0.6
        assert mean(shipped, "iou", kind) > 0.75
    for measure in ("masked_psnr", "kept_psnr", "first_frame_psnr"):
        assert mean(after, measure) >= mean(before, measure) + 1.5
    assert mean(shipped, "masked_psnr") >= 18
    assert mean(shipped, "kept_psnr") >= 34
    assert "| inpaint: masked PSNR |" in quickstart.printed


def mean(scores: list[Score], field: str, kind: str | None = None) -> float:
    values = [getattr(score, field) for score in scores if kind is None or score.kind == kind]
    values = [value for value in values if value is not None]
    return sum(values) / len(values)


def test_video_comes_with_sheet_and_settings(quickstart: Quickstart) -> None:
    sheet = Image.open(quickstart.out / "after" / "heldout_00000_inpaint.png")
    assert min(sheet.size) > 200
    settings = json.loads((quickstart.out / "after" / "heldout_00000_inpaint.json").read_text())
    assert "2025" in json.dumps(settings)  # the seed


def test_training_moves_the_branch_only(quickstart: Quickstart) -> None:
    trunk = load_file(ROOT / "examples/vace/tiny/weights/t2v/diffusion_pytorch_model.safetensors")
    after = load_file(quickstart.out / "weights/vace-trained/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, after[name].to(weight.dtype)) for name, weight in trunk.items())
    branch = {name for name in after if name not in trunk}
    assert {name.split(".")[0] for name in branch} == {"vace_blocks", "vace_patch_embedding"}
    assert all(after[f"vace_blocks.{n}.after_proj.weight"].any() for n in range(2)), (
        "after_proj starts at zero"
    )


def test_checkpoint_holds_the_branch_and_names_its_base(quickstart: Quickstart) -> None:
    source = open_weights(quickstart.out / "save")
    assert source.base is not None
    assert "tiny/weights/t2v" in str(source.base.path)
    saved = (
        FileSystemReader(quickstart.out / f"save/iter_{ITERATIONS:07d}").read_metadata().state_dict_metadata
    )
    model = [name for name in saved if name.startswith("model.")]
    assert model
    assert all(name.startswith("model.vace_dit.") for name in model)


def test_features_are_listed_in_the_order_of_the_dataset(quickstart: Quickstart) -> None:
    asked = json.loads((quickstart.out / "world" / "data.json").read_text())
    rows = [
        json.loads(line) for line in (quickstart.out / "features" / "data.jsonl").read_text().splitlines()
    ]
    assert [row["cap"] for row in rows] == [row["cap"] for row in asked]
    assert len({row["file"] for row in rows}) == len(asked), "two clips with one caption are two files"
    shapes = {tuple(row["shape"]) for row in rows}
    assert {(5, 8, 12), (5, 12, 8), (5, 8, 8)} <= shapes, "landscape, portrait and square keep their layout"
    assert [row["num_refs"] for row in rows].count(2) == 1


def test_iterations_are_logged_in_megatron_s_words(quickstart: Quickstart) -> None:
    log = (quickstart.out / "logs" / "4.log").read_text()
    lines = re.findall(
        rf"iteration +(\d+)/ +{ITERATIONS} \| consumed samples: +(\d+) \|.*? loss: (\d\.\d{{6}}E[+-]\d\d) \|",
        log,
    )
    assert [(int(i), int(n)) for i, n, _ in lines] == [(i, 16 * i) for i in range(10, ITERATIONS + 1, 10)]
    assert re.search(
        r"^Elapsed Time Per iteration: [\d.]+, Average Samples per Second: [\d.]+$", log, re.MULTILINE
    )


def test_vace_eval_ranks_trunk_trained_and_shipped(quickstart: Quickstart) -> None:
    """On the same requests, each of the three checkpoints beats the previous one, and not vice versa."""
    data = EvalData.open(quickstart.out / "heldout/data.json")
    metrics = all_metrics(("truth_psnr", "truth_ssim", "latent_jump"))
    trunk, trained, shipped = (
        report_of(quickstart.out / name, metrics, data=data) for name in ("before", "after", "shipped")
    )
    for worse, better in ((trunk, trained), (trained, shipped)):
        found = {one.metric: one for one in compare(worse, better) if one.task == ALL}
        assert found["truth_psnr"].verdict == found["truth_ssim"].verdict == "better", found
        assert found["truth_psnr"].change.count == 2 * len(KINDS)
        assert compare(better, worse)[-1].verdict != "better"
