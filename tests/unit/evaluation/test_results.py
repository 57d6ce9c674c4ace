"""Results on the disk.

Which videos are found, with which inputs, task and true clip; eval.json, comparison and page.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.evaluation.metrics.catalog import all_metrics
from mindspeed_mm.evaluation.report import ALL, compare, read_report, score_folder
from mindspeed_mm.evaluation.results import find_results, read_sample
from mindspeed_mm.evaluation.sample import Pixels
from mindspeed_mm.evaluation.sources import EvalData
from mindspeed_mm.evaluation.spec import Metric
from mindspeed_mm.files import read_json_object
from tests.support.errors import raises

pytestmark = pytest.mark.medium

SIDE, COUNT = 32, 5
RNG = np.random.default_rng(5)
CLIP = np.repeat(np.repeat(RNG.integers(40, 200, (COUNT, 8, 8, 3), dtype=np.uint8), 4, 1), 4, 2)
MASK = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
MASK[:, 8:24, 8:24] = 255
FAST = ("kept_psnr", "truth_psnr", "flicker")


def write_clip(path: Path, frames: Pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, frames, 16, lossless=True)


def noisy(clip: Pixels, amount: int, seed: int) -> Pixels:
    noise = np.random.default_rng(seed).integers(-amount, amount + 1, clip.shape)
    return np.clip(clip.astype(int) + noise, 0, 255).astype(np.uint8)


def write_run(folder: Path, noise: int, names: Sequence[str] = "abcdefg", task: Any = None) -> Path:
    """Videos of an inpainting request each, off by `noise` levels."""
    for number, name in enumerate(names):
        write_clip(folder / f"{name}.mp4", noisy(CLIP, noise, number))
        write_clip(folder / name / "src_video.mp4", np.where(MASK > 0, 128, CLIP).astype(np.uint8))
        write_clip(folder / name / "src_mask.mp4", MASK)
        settings = {"name": name, "prompt": f"clip {name}", "sampling": {"fps": 16.0}, "inputs": {}}
        (folder / f"{name}.json").write_text(json.dumps({**settings, **({"task": task} if task else {})}))
    return folder


def copy_of(run: Path, place: Path) -> Path:
    """A run without scores of another test."""
    return Path(shutil.copytree(run, place, ignore=shutil.ignore_patterns("eval.*")))


def write_data(folder: Path, names: Sequence[str] = "abcdefg") -> Path:
    rows = [{"video": f"{name}.mp4", "cap": f"clip {name}"} for name in names]
    for name in names:
        write_clip(folder / f"{name}.mp4", CLIP)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "good", 4)
    write_run(folder / "bad", 20)
    write_data(folder / "truth")
    return folder


def test_our_results_come_with_what_the_model_was_given(runs: Path) -> None:
    found = find_results(runs / "good")
    assert [result.name for result in found] == list("abcdefg")
    sample = read_sample(found[0], EvalData.open(runs / "truth/data.json"))
    assert sample is not None
    assert (sample.task, sample.prompt, sample.output.shape) == ("inpaint", "clip a", (COUNT, SIDE, SIDE, 3))
    assert sample.src_mask is not None
    assert sample.src_mask.sum() == COUNT * 16 * 16
    np.testing.assert_array_equal(sample.truth, CLIP)


def test_mask_is_read_as_the_model_reads_it(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 4, "a")
    write_clip(tmp_path / "run/a/src_mask.mp4", MASK * np.array([1, 0, 0], np.uint8))  # red is black
    sample = read_sample(find_results(tmp_path / "run")[0])
    assert sample is not None
    assert sample.src_mask is not None
    assert not sample.src_mask.any()


@pytest.mark.parametrize(
    ("key", "value", "address"),
    [
        ("sampling", {"fps": "abc"}, "sampling.fps"),
        ("sampling", {"fps": [1]}, "sampling.fps"),
        ("sampling", {"fps": None}, "sampling.fps"),
        ("sampling", [], "sampling"),
        ("inputs", {"video": 5}, "inputs.video"),
        ("inputs", {"video": {}}, "inputs.video"),
        ("inputs", {"video": "a\0b"}, "inputs.video"),
        ("inputs", {"mask": []}, "inputs.mask"),
        ("inputs", {"images": 7}, "inputs.images"),
        ("inputs", {"images": "abc"}, "inputs.images"),
        ("inputs", {"images": ["a\0b"]}, "inputs.images"),
        ("inputs", 3, "inputs"),
        ("task", {"type": ["a"]}, "task.type"),
        ("task", "gray", "task"),
    ],
)
def test_settings_of_another_kind_are_rejected(tmp_path: Path, key: str, value: Any, address: str) -> None:
    path = tmp_path / "a.json"
    (tmp_path / "a.mp4").touch()
    path.write_text(json.dumps({"name": "a", "prompt": "x", key: value}))
    with raises(DataError, where=f"{path}:{address}"):
        find_results(tmp_path)


def test_another_caption_has_no_true_clip(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "good", tmp_path / "run")
    settings = read_json_object(tmp_path / "run/a.json")
    (tmp_path / "run/a.json").write_text(json.dumps({**settings, "prompt": "another"}))
    sample = read_sample(find_results(tmp_path / "run")[0], EvalData.open(runs / "truth/data.json"))
    assert sample is not None
    assert sample.truth is None


def test_inputs_are_read_from_their_paths_and_resized(tmp_path: Path) -> None:
    large = np.repeat(np.repeat(CLIP, 2, 1), 2, 2)
    source = write_clip(tmp_path / "source.mp4", large)
    write_clip(tmp_path / "run/a.mp4", CLIP)
    settings = {"name": "a", "prompt": "x", "sampling": {"fps": 16.0}, "inputs": {"video": str(source)}}
    (tmp_path / "run/a.json").write_text(json.dumps(settings))
    sample = read_sample(find_results(tmp_path / "run")[0])
    assert sample is not None
    assert sample.task == "control"
    assert sample.src_video is not None
    assert np.abs(sample.src_video.astype(int) - CLIP)[:, 8:-8, 8:-8].mean() < 12


def test_task_of_the_settings_wins(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 4, "a", task={"type": "canny", "low": 50, "videos": ["x.mp4"], "images": []})
    sample = read_sample(find_results(tmp_path / "run")[0], task="gray")
    assert sample is not None
    assert (sample.task, dict(sample.options)) == ("canny", {"low": 50})


def test_published_layout_and_benchmark_labels(tmp_path: Path) -> None:
    """vace_wan_inference.py writes out_video.mp4 next to its inputs; the benchmark's folders name tasks."""
    case = tmp_path / "VACE-Benchmark/assets/examples/gray"
    control = np.repeat(CLIP[..., :1], 3, -1)
    write_clip(case / "src_video.mp4", control)
    write_clip(tmp_path / "results/gray/out_video.mp4", control)
    (tmp_path / "VACE-Benchmark/assets/examples/swap_anything").mkdir()
    Image.fromarray(CLIP[0]).save(case.parent / "swap_anything/src_ref_image_1.png")
    report = score_folder(
        tmp_path / "results", all_metrics(("gray_error",)), data=EvalData.open(tmp_path / "VACE-Benchmark")
    )
    (sample,) = report.samples
    assert (sample.name, sample.task) == ("gray", "gray")
    assert sample.scores["gray_error"] < 1


def test_videos_without_settings_are_one_line(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", CLIP)
    with raises(DataError, "a.mp4", where=tmp_path):
        score_folder(tmp_path, all_metrics(FAST))
    write_run(tmp_path, 4, "b")
    report = score_folder(tmp_path, all_metrics(FAST))
    assert [sample.name for sample in report.samples] == ["b"]
    assert "1 videos" in report.notes[0]


def test_folder_without_videos_is_rejected(tmp_path: Path) -> None:
    with raises(DataError, "no videos", where=tmp_path):
        find_results(tmp_path)
    with raises(DataError, "src_ref_image_1.png", where=tmp_path):
        EvalData.open(tmp_path)


def test_comparison_ranks_runs_and_equal_runs_do_not(runs: Path) -> None:
    data = EvalData.open(runs / "truth/data.json")
    good, bad = (score_folder(runs / name, all_metrics(FAST), data=data) for name in ("good", "bad"))
    verdicts = {one.metric: one.verdict for one in compare(bad, good)}
    assert verdicts == {"kept_psnr": "better", "truth_psnr": "better", "flicker": "better"}
    assert {one.verdict for one in compare(good, bad)} == {"worse"}
    assert {one.verdict for one in compare(good, good)} == {"no difference shown"}


def test_groups_by_task_and_all_together(tmp_path: Path) -> None:
    write_run(tmp_path, 4, "abc")
    write_run(tmp_path, 4, "de", task={"type": "inpainting"})
    means = score_folder(tmp_path, all_metrics(FAST)).means()
    assert {task: row["kept_psnr"].count for task, row in means.items()} == {
        "inpaint": 3,
        "inpainting": 2,
        ALL: 5,
    }
    assert means[ALL]["kept_psnr"].low is None


def test_missing_network_is_a_note(tmp_path: Path) -> None:
    write_run(tmp_path, 4, "ab", task={"type": "depth", "annotators": "nowhere"})
    report = score_folder(tmp_path, all_metrics(("depth_error", "flicker")))
    assert all(list(sample.scores) == ["flicker"] for sample in report.samples)
    assert "depth_error" in report.notes[0]
    assert "2 videos" in report.notes[0]


def test_scores_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path, 4, "abc")
    lost = Metric("lost", "", "higher", "NaN", lambda sample: float("nan"))
    rare = Metric("rare", "", "higher", "inf", lambda sample: np.inf if sample.name == "a" else None)
    report = score_folder(tmp_path, [*all_metrics(("flicker",)), lost, rare])
    assert all(list(sample.scores) == ["flicker"] for sample in report.samples)
    assert len(report.notes) == 2
    assert "lost" in report.notes[0]
    assert "3 videos" in report.notes[0]
    assert "rare" in report.notes[1]


def test_command_writes_scores_and_a_page(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "eval",
            str(runs / "bad"),
            str(runs / "good"),
            "--data",
            str(runs / "truth/data.json"),
            "--metrics",
            *FAST,
        ]
    )
    assert "truth_psnr (+)" in capfd.readouterr().out
    report = read_report(runs / "good/eval.json")
    assert len(report.samples) == 7
    assert read_json_object(runs / "good/eval.json")["tasks"]["inpaint"]["truth_psnr"]["low"] > 30
    page = (runs / "bad/eval.html").read_text()
    sources = [part.split('"')[0] for part in page.split('<video src="')[1:]]
    assert len(sources) == 7 * 4  # given, two runs, the true clip
    assert all((runs / "bad" / source).is_file() for source in sources)
    assert not any(source.startswith(("/", "http")) for source in sources)
    assert "<script src" not in page


def test_page_shows_references_that_were_given(runs: Path, tmp_path: Path) -> None:
    run = copy_of(runs / "good", tmp_path / "a run")
    Image.new("RGB", (SIDE, SIDE), "red").save(run / "a/reference_0.png")
    main(["eval", str(run), "--metrics", "flicker", "--page", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") == 1
    assert '<img src="a%20run/a/reference_0.png" alt="reference"' in page
    assert read_report(run / "eval.json").samples[0].references == ("a/reference_0.png",)


def test_compare_reads_scores_that_are_current(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(runs / "truth/data.json"), "--metrics", *FAST]
    main(["eval", str(runs / "bad"), str(runs / "good"), *flags])
    capfd.readouterr()
    main(["eval", "--compare", str(runs / "bad"), str(runs / "good"), "--json"])
    said = capfd.readouterr().out
    found = json.loads(said[said.index("{") :])
    assert {row["metric"] for row in found["differences"]} == set(
        FAST
    )  # truth_psnr without --data: it was kept
    os.utime(runs / "bad/a.mp4")  # the same bytes
    main(["eval", "--compare", str(runs / "bad"), str(runs / "good"), "--metrics", "flicker"])
    assert str(runs / "bad/eval.json") in capfd.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("change", ["video", "settings", "input", "one more", "one less"])
def test_scores_of_other_files_are_not_read(
    change: str, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = (copy_of(runs / name, tmp_path / name) for name in ("bad", "good"))
    flags = ["--compare", str(first), str(second), "--metrics", "flicker"]
    main(["eval", *flags])
    old = os.stat(second / "b.mp4").st_mtime - 100
    if change == "video":
        shutil.copy(first / "a.mp4", second / "a.mp4")
        os.utime(second / "a.mp4", (old, old))  # older than eval.json
    elif change == "settings":
        settings = read_json_object(second / "a.json")
        (second / "a.json").write_text(json.dumps({**settings, "task": {"type": "gray"}}))
    elif change == "input":
        shutil.copy(first / "a.mp4", second / "a/src_video.mp4")
    elif change == "one more":
        write_run(second, 4, "h")
    else:
        (second / "a.mp4").unlink()
    capfd.readouterr()
    main(["eval", *flags])
    read = [line for line in capfd.readouterr().out.splitlines() if line.startswith("scores read from")]
    assert [str(first) in line for line in read] == [True]


def test_scores_under_another_flag_are_not_read(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = [str(copy_of(runs / name, tmp_path / name)) for name in ("bad", "good")]
    flags = ["--compare", *pair, "--metrics", "flicker"]
    said = []
    for more in ([], ["--task", "gray"], ["--task", "gray"], [], ["--annotators", str(tmp_path)]):
        main(["eval", *flags, *more])
        said.append("read from" in capfd.readouterr().out)
    assert said == [False, False, True, True, False]
    main(["eval", pair[0], "--metrics", "flicker", "--task", "layout"])
    capfd.readouterr()
    main(["eval", *flags])
    assert "--task layout" in "".join(capfd.readouterr())


def test_page_of_read_scores_finds_its_videos(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("bad", "good"):
        copy_of(runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    flags = ["--compare", "--metrics", "flicker", "truth_psnr"]
    main(["eval", "bad", "good", *flags, "--data", os.path.relpath(runs / "truth/data.json")])
    monkeypatch.chdir(tmp_path / "sub")
    main(["eval", "../bad", "../good", *flags, "--page", "page.html"])
    page = Path("page.html").read_text()
    sources = [part.split('"')[0] for part in page.split('<video src="')[1:]]
    assert len(sources) == 7 * 4
    assert all(Path(source).is_file() for source in sources)


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        ([], ["RESULTS"]),
        (["nowhere"], ["nowhere"]),
        (["good", "good"], ["twice"]),
        (["--compare", "good"], ["--compare", "two"]),
        (["good", "--metrics", "kept_pnsr"], ["kept_psnr"]),
        (["good", "--data", "nowhere.json"], ["nowhere.json"]),
        (["good", "--encoder", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_arguments_are_one_line(
    argv: list[str],
    facts: list[str],
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as ended:
        main(["eval", *argv])
    printed = "".join(capfd.readouterr())
    assert ended.value.code == 1
    assert len(printed.strip().splitlines()) == 1
    assert all(fact in printed for fact in facts)


def test_transparent_reference_is_white_as_for_the_model(tmp_path: Path) -> None:
    write_run(tmp_path, 4, "a")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a/src_ref_image_0.png")
    sample = read_sample(find_results(tmp_path)[0], None)
    assert (sample.references[0] == 255).all()
