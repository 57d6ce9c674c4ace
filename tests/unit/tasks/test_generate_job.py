"""The inference JSON.

Who wins over whom, where paths are looked for, and one line for everything that is wrong.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError, MindSpeedMMError
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from tests.support.errors import meant, raises

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[3]
FILES = ("t.safetensors", "vae.pth", "t5.pth", "a.mp4", "m.mp4", "r.png", "s.png")


@pytest.fixture
def config(tmp_path):
    """`config(key=value, …)` writes an inference JSON next to existing files and returns its path."""
    for name in FILES:
        (tmp_path / name).touch()

    def write(**values):
        base = {
            "model": {"transformer": ["t.safetensors"], "vae": "vae.pth", "text_encoder": "t5.pth"},
            "prompt": "a cat",
            "output_path": "out",
        }
        path = tmp_path / "inference.json"
        path.write_text(
            json.dumps({key: value for key, value in {**base, **values}.items() if value != "drop"})
        )
        return path

    return write


def job(path, *flags):
    return GenerateJob.from_argv([str(path), *flags])


def test_one_json_is_one_video_with_official_preset(config):
    (video,) = job(config(video_path="a.mp4")).videos
    sampling = video.sampling
    assert (video.name, video.prompt) == ("video1", "a cat")
    assert (sampling.height, sampling.width, sampling.num_frames, sampling.fps) == (480, 832, 81, 16.0)
    assert (sampling.steps, sampling.guidance_scale, sampling.shift, sampling.seed) == (50, 5.0, 16.0, 2025)
    assert video.negative_prompt.startswith("色调艳丽")


def test_job_json_keeps_its_words(config):
    path = config(video_path="a.mp4", mask_path="m.mp4", image_path="r.png", outpaint=[1, 0, 0, 0])
    (video,) = json.loads(job(path).to_json())["videos"]
    assert list(video) == ["name", "prompt", "negative_prompt", "inputs", "sampling"]
    a, m, r = (str(path.parent / name) for name in ("a.mp4", "m.mp4", "r.png"))
    ends = {"first_frame": None, "last_frame": None}
    assert video["inputs"] == {"video": a, "mask": m, "images": [r], **ends, "outpaint": [1, 0, 0, 0]}
    assert video["sampling"]["grid"] == "official"


def test_tasks_inherit_and_null_unsets(config):
    tasks = [
        {"image_path": None},
        {"video_path": None, "prompt": "a dog", "seed": None},
        {"name": "both", "seed": 3},
    ]
    videos = job(config(video_path="a.mp4", image_path="r.png", seed=1, tasks=tasks)).videos
    assert [bool(video.inputs.src_video) for video in videos] == [True, False, True]
    assert [len(video.inputs.src_ref_images) for video in videos] == [0, 1, 1]
    assert [video.name for video in videos] == ["video1", "video2", "both"]
    assert [video.sampling.seed for video in videos] == [1, 2025, 3]
    assert videos[1].prompt == "a dog"


def test_flags_win_over_tasks_and_may_be_spelled_like_keys(config):
    path = config(seed=1, tasks=[{"seed": 2}, {"image_paths": ["r.png", "s.png"]}])
    videos = job(path, "--seed=9", "--num_frames", "17", "--image_path", str(path.parent / "s.png")).videos
    assert [video.sampling.seed for video in videos] == [9, 9]
    assert [video.sampling.num_frames for video in videos] == [17, 17]
    assert all(
        Path(video.inputs.src_ref_images[0]).name == "s.png" and len(video.inputs.src_ref_images) == 1
        for video in videos
    )


def test_data_parallel_accepts_sharing_with_none(config):
    job = GenerateJob.from_argv([str(config(context_parallel_size=1)), "--data-parallel"])
    assert job.run.data_parallel


def test_empty_negative_prompt_is_honoured(config):
    assert job(config(negative_prompt="")).videos[0].negative_prompt == ""


def test_paths_are_resolved_in_the_working_directory_first(config, tmp_path, monkeypatch):
    path = config(video_path="a.mp4")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert Path(job(path).videos[0].inputs.src_video) == tmp_path / "a.mp4"
    (here / "a.mp4").touch()
    assert Path(job(path).videos[0].inputs.src_video) == here / "a.mp4"


def test_prompts_file_makes_a_video_of_each_line(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("# two of them\na cat\n\na dog\n")
    assert [video.prompt for video in job(config(prompt="drop", prompts_file="prompts.txt")).videos] == [
        "a cat",
        "a dog",
    ]
    rows = [{"prompt": "a cat", "seed": 1}, {"name": "dog", "image_path": "r.png"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = job(config(prompts_file="prompts.jsonl")).videos
    assert (first.sampling.seed, second.name, len(second.inputs.src_ref_images)) == (1, "dog", 1)


@pytest.mark.parametrize(
    ("values", "flags", "facts"),
    [
        ({"prompt": "drop"}, [], ("inference.json:prompt", '"prompt"')),
        ({"promt": "x"}, [], ("inference.json:promt", "'prompt'")),
        ({"height": 470}, [], ("height", 16, 464)),
        ({"num_frames": 80}, [], ("num_frames", "4k+1", 81)),
        ({}, ["--sed", "3"], ("'--sed'", "'--seed'")),
        ({}, ["--steps", "many"], ("--steps", "many")),
        ({"video_path": "b.mp4"}, [], ("inference.json:video_path: b.mp4",)),
        ({"mask_path": "m.mp4"}, [], ("mask_path", "video_path")),
        ({"guidance_scale_2": 2}, [], ("guidance_scale_2", "low-noise")),
        ({"image_path": "r.png", "image_paths": ["s.png"]}, [], ("image_path", "image_paths")),
        ({"image_paths": ["r.png"] * 257}, [], ("image_paths", 256, 257)),
        ({"cfg_parallel": "on"}, ["--data-parallel"], ("data_parallel", "cfg_parallel")),
        ({"data_parallel": True, "context_parallel_size": 2}, [], ("data_parallel", "context_parallel_size")),
        ({"data_parallel": True}, ["--shard-weights"], ("data_parallel", "shard_weights")),
        ({"tasks": [{"name": "a"}, {"name": "a"}]}, [], ("2 videos", "'a'")),
        ({"tasks": [{"promt": "a"}]}, [], ("tasks[0].promt",)),
        ({"tasks": []}, [], ("tasks",)),
        ({"name": "../x"}, [], ("name",)),
        (
            {"first_frame_path": "r.png", "video_path": "a.mp4"},
            [],
            ("video_path", "first_frame_path"),
        ),
        ({"outpaint": [0.5, 0, 0, 0]}, [], ("outpaint", "video_path")),
        ({"outpaint": [0, 0, 0, 0], "video_path": "a.mp4"}, [], ("outpaint",)),
        (
            {"model": {"transformer": "gone", "vae": "vae.pth", "text_encoder": "t5.pth"}},
            [],
            ("model.transformer[0]: gone",),
        ),
        ({"model": {"transformer": ["a", "b", "c"], "vae": "v", "text_encoder": "t"}}, [], ("3 models",)),
        (
            {
                "model": {
                    "transformer": ["low_noise_model", "high_noise_model"],
                    "vae": "v",
                    "text_encoder": "t",
                }
            },
            [],
            ("model.transformer", "low-noise", "[high, low]"),
        ),
        ({"solver": "ddim"}, [], ("solver",)),
        ({"preset": "wann"}, [], ("preset",)),
        ({"seed": -1}, [], ("seed",)),
        ({"seed": 1 << 63}, [], ("inference.json:seed", 9223372036854775808)),
        ({}, ["--context-scale", "nan"], ("inference.json:context_scale", "finite")),
        ({}, ["--context-scale", "1,much"], ("--context-scale", "1,much")),
        ({}, ["--guidance-scale", "inf"], ("inference.json:guidance_scale", "finite")),
    ],
)
def test_errors_are_named_in_one_line(config, values, flags, facts):
    with raises(ConfigError, *facts) as caught:
        job(config(**values), *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("word", "wanted"), [("0.5", 0.5), ("1,0.8", (1.0, 0.8))])
def test_context_scale_flag_is_one_number_or_one_a_block(config, word, wanted):
    path = config(context_scale=0.1)
    (video,) = GenerateJob.from_argv(["--context-scale", word, str(path)]).videos
    assert video.sampling.context_scale == wanted


@pytest.mark.parametrize("size", ["wan2.1_1.3b", "wan2.1_14b", "wan2.2_A14b"])
def test_guides_three_files_name_the_guides_three_tasks(size, tmp_path, monkeypatch):
    path = ROOT / "examples" / "vace" / "inference" / f"inference_{size}.json"
    values = json.loads(path.read_text())
    work = tmp_path / "work"
    paths = [
        values["image_path"],
        values["video_path"],
        *(p for p in values["model"].values() if isinstance(p, str)),
    ]
    for entry in values["model"]["transformer"]:
        paths += [entry] if isinstance(entry, str) else entry
    for name in paths:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
    monkeypatch.chdir(work)
    videos = job(path).videos
    assert [video.name for video in videos] == ["video1", "video2", "video3"]
    assert [(bool(v.inputs.src_video), len(v.inputs.src_ref_images)) for v in videos] == [
        (True, 0),
        (False, 1),
        (True, 1),
    ]
    assert videos[0].sampling.shift == (12.0 if "A14b" in size else 16.0)


def test_help_typo_missing_file_and_dry_run_leave_torch_alone(config):
    code = (
        "import sys\nfrom mindspeed_mm.tasks.generate import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(int('torch' in sys.modules))"
    )
    path = str(config())
    for argv in (["--help"], [path, "--sed", "3"], ["gone.json"], [path, "--dry-run"]):
        ran = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, argv
        assert "Traceback" not in ran.stderr


MINDSPEED = {
    "seed": 1,
    "fps": 15.0,
    "solver": "euler",
    "shift": 5.0,
    "timing": "frames",
    "diffsynth_noise": True,
}


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        ({"video_path": "a.mp4", "image_path": "r.png"}, ["video1", "video2", "video3"]),
        ({"video_path": "a.mp4"}, ["video1"]),
        ({"image_path": "r.png"}, ["video2"]),
    ],
)
def test_json_of_mindspeed_mm_makes_its_videos(config, inputs, names):
    made = job(config(prompt="drop", **inputs))
    assert [video.name for video in made.videos] == names
    assert all(video.prompt for video in made.videos)
    assert all(MINDSPEED.items() <= video.sampling.model_dump().items() for video in made.videos)
    shown = {"video1": (True, 0), "video2": (False, 1), "video3": (True, 1)}
    assert [(bool(v.inputs.src_video), len(v.inputs.src_ref_images)) for v in made.videos] == [
        shown[name] for name in names
    ]
    assert made.notes
    assert "preset mindspeed" in made.notes[0]


@pytest.mark.parametrize("foreign", [{"tiled": True}, {"seed": 3}, {"negative_prompt": "dark"}])
def test_foreign_key_in_a_mindspeed_json_names_the_preset(config, foreign):
    path = config(prompt="drop", video_path="a.mp4", image_path="r.png", **foreign)
    with raises(ConfigError, "--preset mindspeed", *foreign, where="inference.json:prompt"):
        job(path)
    assert len(job(path, "--preset", "mindspeed").videos) == 3
    assert len(job(path, "--prompt", "a cat").videos) == 1


def test_preset_mindspeed_takes_a_prompt_and_other_numbers(config):
    path = config(video_path="a.mp4", image_path="r.png", seed=7)
    made = job(path, "--preset", "mindspeed", "--steps", "4")
    assert [(video.prompt, video.sampling.seed, video.sampling.steps) for video in made.videos] == [
        ("a cat", 7, 4)
    ] * 3
    (video,) = job(path).videos
    assert (video.sampling.preset, video.sampling.fps) == ("wan", 16.0)


def test_fifo_as_an_input_ends_immediately_with_its_key(config, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with raises(ConfigError, "inference.json:video_path", "FIFO"):
        job(config(video_path="pipe"))


@pytest.mark.parametrize("path", ["a\0.mp4", "x" * 5000])
def test_impossible_path_is_one_line_with_its_key(config, path):
    with raises(ConfigError, "inference.json:video_path") as caught:
        job(config(video_path=path))
    assert len(str(caught.value)) < 1000


def test_prompts_keep_line_separators_and_byte_order_marks_go(config, tmp_path):
    (tmp_path / "p.jsonl").write_text(
        '\ufeff{"prompt": "one\u2028two"}\r\n{"prompt": "b"}\n', encoding="utf-8"
    )
    assert [video.prompt for video in job(config(prompts_file="p.jsonl")).videos] == ["one\u2028two", "b"]
    (tmp_path / "p.txt").write_text("\ufeffone\x85two\r\nb\n", encoding="utf-8")
    assert [video.prompt for video in job(config(prompts_file="p.txt")).videos] == ["one\x85two", "b"]


def test_set_replaces_nested_keys_and_flags_win_over_it(config):
    path = config(tasks=[{"seed": 1}, {"seed": 2}])
    words = ["--set", "tasks[1].seed=5", "--set=height=512", "--set", "model.vae=t5.pth"]
    made = job(path, *words)
    assert [video.sampling.seed for video in made.videos] == [1, 5]
    assert [video.sampling.height for video in made.videos] == [512, 512]
    assert Path(made.model.vae).name == "t5.pth"
    assert [video.sampling.seed for video in job(path, *words, "--seed", "9").videos] == [9, 9]


def test_task_takes_the_clip_the_mask_and_its_images(config):
    task = {"type": "inpainting", "mode": "mask"}
    (video,) = job(config(video_path="a.mp4", mask_path="m.mp4", image_path="r.png", task=task)).videos
    found = json.loads(json.dumps(video.to_json()))
    assert [Path(name).name for name in found["task"]["videos"]] == ["a.mp4"]
    assert Path(found["task"]["mask"]).name == "m.mp4"
    assert found["inputs"]["video"] is None
    assert [Path(image).name for image in found["inputs"]["images"]] == ["r.png"]
    (video,) = job(config(video_path="a.mp4", image_paths=["r.png"]), "--task", "swap_anything").videos
    assert video.to_json()["inputs"]["images"] == []
    assert len(video.to_json()["task"]["images"]) == 1


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"task": "inpaintin", "video_path": "a.mp4"}, ["task", meant("inpainting")]),
        ({"task": {"type": "gray", "mode": "bbox"}, "video_path": "a.mp4"}, ["mode", "gray"]),
        ({"task": {"mode": "bbox"}, "video_path": "a.mp4"}, ["type"]),
        ({"task": "gray"}, ["video_path", "0 clips"]),
        ({"task": "gray", "video_path": "a.mp4", "mask_path": "m.mp4"}, ["mask_path"]),
        ({"task": "gray", "video_path": "a.mp4", "outpaint": [1, 0, 0, 0]}, ["outpaint"]),
        ({"task": "depth", "video_path": "a.mp4"}, ["depth.onnx", "inference.json:task"]),
    ],
)
def test_task_is_rejected_before_anything_is_loaded(config, values, facts):
    with pytest.raises(MindSpeedMMError) as caught:
        job(config(**values))
    assert all(fact in str(caught.value) for fact in facts), str(caught.value)


def test_loras_are_found_and_flags_replace_them(config, tmp_path):
    path = config(loras=[{"path": "t.safetensors", "strength": 0.5}], steps=3, tasks=[{}, {"loras": None}])
    first, second = job(path).videos
    assert [(lora.path, lora.strength) for lora in first.loras] == [(str(tmp_path / "t.safetensors"), 0.5)]
    assert second.loras == ()
    assert json.loads(job(path).to_json())["videos"][0]["loras"][0]["strength"] == 0.5
    videos = job(path, "--loras", f"{tmp_path}/vae.pth=-1").videos
    assert [(lora.path, lora.strength) for lora in videos[1].loras] == [(str(tmp_path / "vae.pth"), -1.0)]


@pytest.mark.parametrize(
    ("loras", "facts"),
    [
        ([{"path": "gone.safetensors"}], ("loras[0].path", "gone.safetensors")),
        ([{"path": "t.safetensors", "strength": [1, 2]}], ("loras[0].strength", "2", "3")),
        ([{"path": "t.safetensors", "strength": 2000}], ("loras[0]", "2000")),
        ([{"path": "t.safetensors", "on": "high"}], ("loras", "one model")),
        ([{"path": "t.safetensors", "weight": 1}], ("loras[0].weight", "unknown key")),
    ],
)
def test_bad_loras_are_rejected_with_their_address(config, loras, facts):
    with pytest.raises(MindSpeedMMError) as caught:
        job(config(loras=loras, steps=3))
    assert all(fact in str(caught.value) for fact in ("inference.json", *facts)), str(caught.value)


def test_few_step_preset_without_loras_is_noted(config):
    assert "lightx2v" in job(config(preset="lightx2v-4step")).notes[0]
    assert not job(config(preset="lightx2v-4step", loras=["t.safetensors"])).notes


def test_numbers_next_to_a_few_step_preset_are_noted(config):
    loras = ["t.safetensors"]
    (note,) = job(config(preset="lightx2v-4step", loras=loras, steps=10, shift=3)).notes
    assert all(fact in note for fact in ("lightx2v-4step", "steps 10", "4", "shift 3", "5")), note
    assert not job(config(preset="lightx2v-4step", loras=loras, steps=4)).notes
    assert not job(config(preset="wan", loras=loras, steps=10)).notes
