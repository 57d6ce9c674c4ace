"""The generate command on tiny weights.

What it leaves behind, how it resumes after an interruption, how it fails.
"""

import errno
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mindspeed_mm.data.video import open_video
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.generation import outputs
from mindspeed_mm.generation import run as generation_run
from mindspeed_mm.generation.config import RunConfig
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.log import setup_logging
from mindspeed_mm.tasks import generate_videos
from mindspeed_mm.tasks.generate import main
from mindspeed_mm.tasks.generate_videos import warn_ignored_options
from tests.support.scenes import write_scene
from tests.support.tiny import TINY, tiny_transformer, write_official, write_transformer

pytestmark = pytest.mark.medium

CLIP = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("weights") / "tiny", dtype=torch.float32)


@pytest.fixture
def config(tiny, tmp_path):
    def write(**values):
        base = {
            "model": {"transformer": [str(tiny)], "vae": str(tiny), "text_encoder": str(tiny)},
            **{
                "prompt": "a red ball",
                "height": 32,
                "width": 48,
                "num_frames": 5,
                "steps": 2,
                "dtype": "fp32",
            },
            "output_path": str(tmp_path / "out"),
        }
        path = tmp_path / "inference.json"
        path.write_text(json.dumps({**base, **values}))
        return str(path)

    return write


def run(path, *flags):
    main([path, *flags])
    return Path(json.loads(Path(path).read_text())["output_path"])


def refused(capsys, path, *flags):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as end:
        main([path, *flags])
    assert end.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    return line


def files(folder):
    return (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        if folder.exists()
        else []
    )


def test_video_with_everything_that_made_it(config, tmp_path):
    source = write_video(tmp_path / "a.mkv", CLIP, 16, lossless=True)
    mask = np.zeros((32, 48, 3), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(CLIP[0]).save(tmp_path / "r.png")
    path = config(video_path=str(source), mask_path="m.png", image_paths=["r.png", "r.png"], fps=12.5, seed=4)
    with pytest.raises(SystemExit):
        main([path])  # five frames at 16 fps are four at 12.5: refused
    out = run(path, "--timing", "frames")
    assert files(out) == [
        *("job.json", "video1.json", "video1.mp4", "video1.png", "video1/latents.safetensors"),
        *("video1/reference_0.png", "video1/reference_1.png", "video1/src_mask.mp4", "video1/src_video.mp4"),
    ]
    with av.open(str(out / "video1.mp4")) as made:
        stream = made.streams.video[0]
        assert (stream.width, stream.height, stream.frames, float(stream.average_rate)) == (48, 32, 5, 12.5)
    said = json.loads((out / "video1.json").read_text())
    assert (said["prompt"], said["sampling"]["seed"], said["num_refs"]) == ("a red ball", 4, 2)
    assert said["inputs"]["video"] == str(source)
    assert {"torch", "diffusers", "transformers"} <= said["versions"].keys()
    assert said["peak_memory_gb"] > 0
    assert Image.open(out / "video1.png").width > 1000
    shown = open_video(out / "video1" / "src_mask.mp4").read([0])[0]
    assert abs(shown.astype(int) - mask.astype(int)).mean() < 2


def test_several_videos_share_weights_and_keep_names(config):
    out = run(
        config(tasks=[{"name": "one"}, {"name": "two", "seed": 5}, {"name": "three", "solver": "euler"}])
    )
    assert [path.name for path in sorted(out.glob("*.mp4"))] == ["one.mp4", "three.mp4", "two.mp4"]
    texts = [json.loads((out / f"{name}.json").read_text())["seconds"] for name in ("one", "two")]
    assert "load" in texts[0]
    assert "load" not in texts[1]


def test_from_latents_decodes_the_same_video(config, tmp_path, tiny):
    out = run(config(seed=3))
    video = (out / "video1.mp4").read_bytes()
    model = {"transformer": ["gone"], "vae": str(tiny), "text_encoder": "gone"}
    path = config(model=model, output_path=str(tmp_path / "again"))
    again = run(path, "--from-latents", str(out / "video1" / "latents.safetensors"))
    assert (again / "video1.mp4").read_bytes() == video
    assert json.loads((again / "video1.json").read_text())["sampling"]["seed"] == 3


@pytest.mark.parametrize("suffix", [".mp4", ".png", ".json"])
def test_from_latents_judges_its_targets_before_decoding(config, tmp_path, monkeypatch, capsys, suffix):
    def never(*_, **__):
        raise AssertionError("decoded before the target was checked")

    kept = run(config()) / "video1" / "latents.safetensors"
    target = tmp_path / "again" / f"video1{suffix}"
    target.mkdir(parents=True)
    monkeypatch.setattr(generate_videos, "load_vae", never)
    line = refused(capsys, config(output_path=str(target.parent)), "--from-latents", str(kept))
    assert str(target) in line


def test_from_latents_reports_ignored_settings(config, tmp_path, capsys):
    run(config())
    capsys.readouterr()
    flags = ["--data-parallel", "--from-latents", str(tmp_path / "out" / "video1" / "latents.safetensors")]
    run(config(fps=8), *flags)
    said = capsys.readouterr().out
    assert re.search(r"data_parallel: ignored\b.*\bfrom_latents\b", said)
    assert re.search(r"video1: fps is 8\.0, .* 16\.0", said)
    assert "height" not in said


def test_one_process_says_which_keys_are_for_several(config, capsys):
    run(config(context_parallel_size=2), "--shard-weights")
    said = capsys.readouterr().out
    assert re.search(r"shard_weights, context_parallel_size: .*\bgenerate\.sh\b", said)
    assert "cfg_parallel" not in said
    run(config(data_parallel=True))
    assert re.search(r"data_parallel: .*\bgenerate\.sh\b", capsys.readouterr().out)


def test_sharded_weights_override_offload_and_log_it(capsys):
    """The shipped JSONs of the big models set it, and these are the models that are sharded."""
    setup_logging()
    shared = {"output_path": "o", "offload": "model"}
    warn_ignored_options(RunConfig(shard_weights=True, **shared), 2)
    assert re.search(r"\boffload model\b.*\bshard_weights\b", capsys.readouterr().out)
    warn_ignored_options(RunConfig(**shared), 2)
    assert not capsys.readouterr().out


def test_from_latents_takes_what_a_result_of_python_saved(config, tmp_path, tiny):
    pipe = VacePipeline.from_pretrained(tiny, dtype=torch.float32, device="cpu")
    result = pipe("a red ball", height=32, width=48, num_frames=5, steps=2)
    video = result.save(tmp_path / "saved" / "ball").read_bytes()
    out = run(config(), "--from-latents", str(tmp_path / "saved" / "ball" / "latents.safetensors"))
    assert (out / "ball.mp4").read_bytes() == video


@pytest.mark.parametrize(
    ("output", "free", "message"),
    [
        ("inference.json/out", None, r"output_path: .*\binference\.json is a\b"),
        ("new/folder", 100_000, r"\b0\.1 MB\b.*\b0\.3\d\d MB\b.*\boutput_path\b"),
    ],
)
def test_unwritable_output_is_rejected_before_loading(
    config, tmp_path, capsys, monkeypatch, output, free, message
):
    def never(*_, **__):
        raise AssertionError("loaded before the disk was looked at")

    monkeypatch.setattr(generate_videos, "open_models", never)
    if free is not None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert re.search(message, refused(capsys, config(output_path=str(tmp_path / output))))
    assert not (tmp_path / "new").exists()


def test_latents_are_safe_when_the_disk_is_full(config, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs, "write_video", full)
    line = refused(capsys, config())
    kept = tmp_path / "out" / "video1" / "latents.safetensors"
    assert os.strerror(errno.ENOSPC) in line
    assert f"--from-latents {kept}" in line
    assert files(tmp_path / "out") == ["job.json", "video1/latents.safetensors"]
    monkeypatch.undo()
    run(config(), "--from-latents", str(kept))
    assert (tmp_path / "out" / "video1.mp4").exists()


def test_small_disk_is_rejected_and_leaves_nothing(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate"])  # the lock names the command, and must fit
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (512, hard)
    )  # what the system itself refuses, not a patched function
    try:
        line = refused(capsys, config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(rf"job\.json: .*\b{os.strerror(errno.EFBIG)}", line)
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("module", "stage", "message"),
    [
        (generation_run, "denoise", r"video1: .*\bmemory before\b.*\boffload\b.*\bmodel\b.*\bblock\b"),
        (generation_run, "encode_prompts", r"\bmemory before\b"),
        (generation_run, "encode_conditions", r"video1: .*\bmemory before\b"),
        (
            generation_run,
            "decode",
            r"\bmemory while\b.*--from-latents .*latents\.safetensors --tiled always",
        ),
    ],
)
def test_out_of_memory_is_one_line_with_advice(config, monkeypatch, capsys, module, stage, message):
    def small(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, stage, small)
    assert re.search(message, refused(capsys, config()))


def test_disk_full_while_writing_leaves_nothing(config, tmp_path, monkeypatch, capsys):
    def tear(frames, *_):
        yield next(frames)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watched = outputs._watched
    monkeypatch.setattr(outputs, "_watched", lambda *args: tear(watched(*args)))
    refused(capsys, config())
    assert files(tmp_path / "out") == ["job.json", "video1/latents.safetensors"]


def test_inner_list_is_the_shards_of_one_model(config, tiny, tmp_path):
    state = load_file(tiny / "diffusion_pytorch_model.safetensors")
    names = sorted(state)
    shutil.copy(tiny / "config.json", tmp_path)
    shards = []
    for number in range(2):
        shards.append(str(tmp_path / f"shard{number}.safetensors"))
        save_file({name: state[name] for name in names[number::2]}, shards[-1])
    found = []
    for transformer in ([str(tiny)], [shards]):
        model = {"transformer": transformer, "vae": str(tiny), "text_encoder": str(tiny)}
        out = run(config(model=model))
        found.append(load_file(out / "video1" / "latents.safetensors")["latents"])
    assert torch.equal(*found)


def test_two_experts_are_two_paths(config, tiny, tmp_path):
    write_transformer(tmp_path / "low", tiny_transformer(1), torch.float32)
    model = {"transformer": [str(tiny), str(tmp_path / "low")], "vae": str(tiny), "text_encoder": str(tiny)}
    out = run(config(model=model, guidance_scale_2=2.0), "--offload", "model")
    assert json.loads((out / "video1.json").read_text())["sampling"]["shift"] == 12.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_scale": [1, 1, 1]}, r"context_scale: .*\b2 branch blocks\b.*\b3 numbers\b"),
        ({"video_path": "short.mkv"}, r"video1: src_video .*\b3 frames\b.*\b16 fps\b.*\bnum_frames\b.*\b5\b"),
        ({"video_path": "a.mkv", "mask_path": "short.mkv"}, r"src_mask .*\b3 frames\b.*\bsrc_video .*\b5\b"),
        ({"video_path": "no.mp4.json"}, r"no\.mp4\.json: .*\btext\b"),
        ({"from_latents": "inference.json"}, r"inference\.json: .*\bsafetensors\b"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(config, tmp_path, capsys, values, message):
    write_video(tmp_path / "a.mkv", CLIP, 16, lossless=True)
    write_video(tmp_path / "short.mkv", CLIP[:3], 16, lossless=True)
    (tmp_path / "no.mp4.json").write_text("{}")
    assert re.search(message, refused(capsys, config(**values)))
    assert files(tmp_path / "out") == []


def test_foreign_weights_are_named_before_loading(config, tiny, tmp_path, capsys):
    model = {"transformer": [str(tiny / "Wan2.1_VAE.pth")], "vae": str(tiny), "text_encoder": str(tiny)}
    assert refused(capsys, config(model=model)).startswith("WeightsError: ")
    assert files(tmp_path / "out") == []


def test_trunk_alone_rejects_to_look_at_a_video(config, tiny, tmp_path, capsys):
    write_video(tmp_path / "a.mkv", CLIP, 16, lossless=True)
    bare = TINY.model_copy(update={"vace_layers": ()})
    write_transformer(tmp_path / "t2v", tiny_transformer(config=bare), torch.float32)
    model = {"transformer": [str(tmp_path / "t2v")], "vae": str(tiny), "text_encoder": str(tiny)}
    line = refused(capsys, config(model=model, video_path="a.mkv"))
    assert re.match(r"DataError: video1: .*\bVACE branch\b", line)
    assert (run(config(model=model)) / "video1.mp4").exists()


def test_json_of_mindspeed_mm_runs_with_its_three_videos(tiny, tmp_path, capsys):
    source = write_video(tmp_path / "depth.mp4", CLIP, 16)
    Image.fromarray(CLIP[0]).save(tmp_path / "cat.jpg")
    values = {
        "model": {"transformer": [str(tiny)], "vae": str(tiny), "text_encoder": str(tiny), "tokenizer": None},
        **{
            "image_path": str(tmp_path / "cat.jpg"),
            "video_path": str(source),
            "output_path": str(tmp_path / "out"),
        },
    }
    (tmp_path / "inference.json").write_text(json.dumps(values))
    out = run(
        str(tmp_path / "inference.json"),
        "--height=32",
        "--width=48",
        "--num-frames=5",
        "--steps=2",
        "--dtype=fp32",
    )
    assert "preset mindspeed" in capsys.readouterr().out
    for name, refs in (("video1", 0), ("video2", 1), ("video3", 1)):
        settings = json.loads((out / f"{name}.json").read_text())
        assert settings["num_refs"] == refs
        assert (settings["sampling"]["seed"], settings["sampling"]["solver"]) == (1, "euler")
        with av.open(str(out / f"{name}.mp4")) as made:
            assert float(made.streams.video[0].average_rate) == 15


def test_task_prepares_its_inputs_and_keeps_them(config, tmp_path, capsys):
    clip = write_scene(tmp_path / "scene.mkv", 9, 16, 32, 48)
    task = {"type": "inpainting", "mode": "bbox", "bbox": [8, 8, 24, 24]}
    run(config(video_path=str(clip), task=task, num_frames=9))
    assert re.search(r"\btask inpainting\b.*\b9 frames of 48x32\b", capsys.readouterr().out)
    mask = open_video(tmp_path / "out/video1/src_mask.mp4").read([0])[0, ..., 0]
    assert (mask[9:23, 9:23] > 250).all()
    assert mask[0, 0] < 5
    assert json.loads((tmp_path / "out/video1.json").read_text())["task"]["type"] == "inpainting"
