"""`vace prepare`: files of true size and rate, lossless masks, the published flags, one-line errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.conditioning.tasks.catalog import TASKS
from mindspeed_mm.data.video import open_video
from mindspeed_mm.data.video_writer import write_video
from tests.support.scenes import moving_disc

FRAMES, MASKS = moving_disc()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of clip.mkv, next to one.mkv (one frame of it) and short.mkv (five frames)."""
    path = tmp_path_factory.mktemp("prepare") / "clip.mkv"
    for name, count in (("one", 1), ("short", 5)):
        write_video(path.with_name(f"{name}.mkv"), FRAMES[:count], 24, lossless=True)
    return str(write_video(path, FRAMES, 24, lossless=True))


def test_prepared_clip_keeps_size_rate_and_exact_masks(clip: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["prepare", "--task", "inpainting", "--mode", "bbox", "--bbox", "-3,10,41,50"]
    main([*argv[:-1], "10,10,41,50", "--video", clip, "--out", str(out)])
    video, mask = open_video(out / "src_video.mp4"), open_video(out / "src_mask.mkv")
    assert (video.num_frames, video.width, video.height, video.fps) == (9, 128, 96, 24)
    values = mask.read(range(9))
    assert set(np.unique(values)) == {0, 255}
    assert (values[:, 10:50, 10:41] == 255).all()
    assert (values > 0).sum() == 9 * 40 * 31 * 3
    said = json.loads((out / "prepare.json").read_text())
    assert said["task"] == "inpainting"
    assert said["options"]["mode"] == "bbox"
    assert sorted(path.name for path in out.iterdir()) == ["prepare.json", "src_mask.mkv", "src_video.mp4"]


def test_published_tools_flags_are_accepted(clip: str, tmp_path: Path) -> None:
    argv = ["prepare", "--task", "outpainting", "--direction", "left,right", "--expand_ratio", "0.25"]
    main([*argv, "--video", clip, "--pre_save_dir", str(tmp_path / "old")])
    assert open_video(tmp_path / "old/src_video.mp4").width == 192


def test_odd_sizes_and_images_are_written_whole(clip: str, tmp_path: Path) -> None:
    odd = write_video(tmp_path / "odd.mkv", FRAMES[:3, :95, :127], 16, lossless=True)
    main(["prepare", "--task", "gray", "--video", str(odd), "--out", str(tmp_path / "a")])
    assert open_video(tmp_path / "a/src_video.mkv").height == 95


@pytest.mark.parametrize("which", ["video", "mask", "frames", "options"])
def test_prepare_rejects_to_overwrite_an_input(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    source = shutil.copy(clip, tmp_path / "source.mkv")
    argv = ["--task", "gray", "--video", str(source)]
    if which == "video":
        target = write_video(tmp_path / "src_video.mp4", FRAMES, 24)
        argv[-1] = str(target)
    elif which == "frames":
        target = tmp_path / "src_video.png"
        Image.fromarray(FRAMES[0]).save(target)
        (tmp_path / "source.mkv").unlink()
        argv[-1] = str(tmp_path)
    elif which == "mask":
        target = write_video(tmp_path / "src_mask.mkv", np.repeat(MASKS[..., None], 3, -1), 24, lossless=True)
        argv = ["--task", "inpainting", "--mode", "mask", "--mask", str(target), "--video", str(source)]
    else:
        target = tmp_path / "prepare.json"
        target.write_text("{}")
        argv += ["--options", str(target)]
    before = target.read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(["prepare", *argv, "--out", str(tmp_path)])
    line = capsys.readouterr().err
    assert caught.value.code == 1
    assert line.count("\n") == 1
    assert "--out" in line
    assert target.name in line
    assert target.read_bytes() == before


def test_list_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    main(["prepare", "--list"])
    text = capsys.readouterr().out
    assert all(f"{name} " in text for name in TASKS)


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        (["--task", "grey"], ["gray"]),
        (["--task", "inpainting_bbox", "--bbox", "900,1,950,9"], ["128x96"]),
        (["--task", "inpainting", "--mode", "bbx"], ["mode"]),
        (["--task", "depth"], ["depth.onnx", "--annotators"]),
        (["--task", "gray", "--direction", "left"], ["direction"]),
        ([], ["--task"]),
        (["--task", "inpainting", "--mode", "caption", "--caption", "a disc"], ["caption", "ground"]),
        (["--task", "inpainting", "--mode", "mask", "--mask", "short.mkv"], ["short.mkv", "5", "9"]),
        (["--task", "framerefext", "--ref_num", "12"], ["clip.mkv", "9", "12"]),
        (["--task", "flow", "--video", "one.mkv"], ["one.mkv", "1", "2"]),
        (
            [
                *("--task", "composition", "--process_type_1", "gray", "--process_type_2", "depth"),
                *("--video_1", "clip.mkv", "--video_2", "short.mkv"),
            ],
            ["short.mkv", "9", "5"],
        ),
        (["--task", "outpainting", "--direction", "sideways"], ["direction", "sideways"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    clip: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    facts: list[str],
) -> None:
    monkeypatch.chdir(Path(clip).parent)
    video = [] if {"--video", "--video_1"} & {*argv} else ["--video", clip]
    with pytest.raises(SystemExit) as caught:
        main(["prepare", *argv, *video, "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(fact in line for fact in facts), line
    assert not (tmp_path / "out").exists()


def test_mask_of_another_size_is_resized_and_reported(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = write_video(tmp_path / "half.mkv", np.repeat(MASKS[:, ::2, ::2, None], 3, -1), 24, lossless=True)
    argv = ["prepare", "--task", "inpainting", "--mode", "mask", "--mask", str(mask), "--video", clip]
    main([*argv, "--out", str(tmp_path / "out")])
    (note,) = json.loads((tmp_path / "out/prepare.json").read_text())["notes"]
    assert "64x48" in note
    assert "128x96" in note
    assert note in " ".join("".join(capsys.readouterr()).split())
