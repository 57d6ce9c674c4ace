"""ExtractJob: published files parse, errors are one line with a name, and nothing imports torch."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.tasks.jobs.extract import ExtractJob
from tests.support.errors import absent, raises

pytestmark = pytest.mark.medium

# the keys and values of the published examples/vace/feature_extract and tools.json
PUBLISHED_DATA = {
    "dataset_param": {
        "dataset_type": "vace",
        "basic_parameters": {
            "data_path": "./examples/vace/feature_extract/data.txt",
            "data_storage_mode": "vace",
        },
        "preprocess_parameters": {
            "video_processor_type": "VACEVideoProcessor",
            "video_reader_type": "DecordVideo",
            "image_reader_type": "Image",
            "image_processer_type": "image2image",
            "num_frames": 17,
            "frame_interval": 1,
            "auto_interval": False,
            "max_height": 480,
            "max_width": 832,
            "max_hxw": 399360,
            "train_fps": 24,
            "speed_factor": 1.0,
            "cfg": 0.0,
            "keep_last": False,
            "zero_start": True,
            "vae_stride": [4, 8, 8],
            "vae_patch_size": [1, 2, 2],
            "force_resolution": False,
            "train_pipeline": {
                "video": [
                    {
                        "trans_type": "ResizeCropVideo",
                        "param": {"antialias": True, "size": "auto", "interpolation_mode": "bicubic"},
                    },
                    {"trans_type": "ToTensorVideo"},
                    {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
                ],
                "image": [
                    {"trans_type": "ToTensorVideo"},
                    {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
                    {
                        "trans_type": "ResizeToFill",
                        "param": {"size": "auto", "interpolation_mode": "bilinear", "align_corners": False},
                    },
                ],
            },
        },
        "use_text_processer": True,
        "enable_text_preprocessing": True,
        "text_preprocess_methods": [{"method": "basic_clean"}, {"method": "whitespace_clean"}],
        "tokenizer_config": {
            "autotokenizer_name": "AutoTokenizer",
            "hub_backend": "hf",
            "from_pretrained": "./Wan2.1-VACE-1.3B/google/umt5-xxl",
            "model_max_length": 512,
        },
        "support_chinese": True,
    },
    "dataloader_param": {
        "dataloader_mode": "sampler",
        "sampler_type": "stateful_distributed_sampler",
        "shuffle": False,
        "drop_last": True,
        "pin_memory": True,
        "group_frame": False,
        "group_resolution": False,
        "group_data": True,
        "initial_global_step_for_sampler": 0,
    },
}
PUBLISHED_MODEL = {
    "ae": {
        "model_id": "wan_video_vae",
        "from_pretrained": "./Wan2.1-VACE-1.3B-diffusers/vae",
        "dtype": "bf16",
        "enable_tiling": False,
        "tiling_param": {"tile_size": [34, 34], "tile_stride": [18, 16]},
        "norm_latents": True,
        "norm_mode": "channel_specified_shift_scale",
        "do_sample": False,
    },
    "text_encoder": {
        "model_id": "UMT5",
        "dtype": "bf16",
        "hub_backend": "hf",
        "dropout_rate": 0.0,
        "from_pretrained": "./Wan2.1-VACE-1.3B-diffusers/text_encoder",
    },
}
PUBLISHED_TOOLS = {
    "profile": {
        "enable": False,
        "profile_type": "static",
        "ranks": [0, 1, 2, 3],
        "static_param": {
            "level": "level1",
            "with_stack": False,
            "with_memory": False,
            "record_shapes": False,
            "with_cpu": True,
            "save_path": "./npu_profiling",
            "start_step": 10,
            "end_step": 11,
            "data_simplification": False,
            "aic_metrics_type": "PipeUtilization",
        },
        "dynamic_param": {"config_path": "path to dynamic config folder"},
    },
    "memory_profile": {
        "enable": False,
        "start_step": 0,
        "end_step": 2,
        "save_path": "./memory_snapshot",
        "dump_ranks": [0],
        "stacks": "all",
        "max_entries": None,
        "mem_info": False,
    },
    "sorafeature": {"save_path": "./sora_features"},
}
PUBLISHED_FLAGS = [
    "--tensor-model-parallel-size",
    "1",
    "--pipeline-model-parallel-size",
    "1",
    "--context-parallel-size",
    "1",
    "--micro-batch-size",
    "1",
    "--global-batch-size",
    "8",
    "--num-workers",
    "8",
    "--distributed-backend",
    "nccl",
]


def changed(values, address, value):
    copied = json.loads(json.dumps(values))
    *path, last = address.split(".")
    inner = copied
    for key in path:
        inner = inner[key]
    inner[last] = value
    return copied


def flags(folder, data=PUBLISHED_DATA, model=PUBLISHED_MODEL, tools=PUBLISHED_TOOLS):
    given = []
    for name, values in (("data", data), ("model", model), ("tool", tools)):
        (folder / f"{name}.json").write_text(json.dumps(values))
        given += [f"--mm-{name}", str(folder / f"{name}.json")]
    return given


def test_published_files_and_flags_parse(tmp_path):
    job = ExtractJob.from_argv([*flags(tmp_path), *PUBLISHED_FLAGS])
    assert job.save_path == "./sora_features"
    assert job.extract.num_workers == 8
    assert (job.model.ae.dtype, job.text_len) == ("bf16", 512)
    notes = "\n".join(job.notes)
    for name in (
        "tiling_param",
        "max_height",
        "text_preprocess_methods",
        "group_data",
        "dynamic_param",
        "--global-batch-size",
    ):
        assert f"{name}: accepted, unused: " in notes


def test_files_of_this_repository_parse_without_a_remark():
    names = [
        "--mm-data=examples/vace/feature_extract/data.json",
        "--mm-model=examples/vace/feature_extract/model.json",
    ]
    job = ExtractJob.from_argv([*names, "--mm-tool=mindspeed_mm/tools/tools.json"])
    assert job.notes == ()
    assert job.raw_clips.preprocess_parameters.num_frames == 81


def test_save_path_as_a_flag_wins(tmp_path):
    assert ExtractJob.from_argv([*flags(tmp_path), "--save-path", "elsewhere"]).save_path == "elsewhere"


@pytest.mark.parametrize(
    ("file", "address", "value", "facts"),
    [
        (
            "model",
            "ae.from_pretrian",
            "x",
            ("model.json:ae.from_pretrian", "from_pretrained"),
        ),
        ("model", "ae.do_sample", True, ("model.json:ae.do_sample", False)),
        ("model", "ae.norm_latents", False, ("ae.norm_latents",)),
        ("model", "text_encoder.dtype", "fp16", ("text_encoder.dtype", "bf16", "fp32")),
        ("data", "dataset_param.preprocess_parameters.num_frames", 16, ("num_frames", "4k+1")),
        ("data", "dataset_param.dataset_type", "vaec", ("'vace'",)),
        ("tool", "sorafeature.savepath", "x", ("tool.json:sorafeature.savepath",)),
    ],
)
def test_error_in_a_file_names_its_address(tmp_path, file, address, value, facts):
    files = {"data": PUBLISHED_DATA, "model": PUBLISHED_MODEL, "tools": PUBLISHED_TOOLS}
    name = "tools" if file == "tool" else file
    files[name] = changed(files[name], address, value)
    with raises(ConfigError, *facts):
        ExtractJob.from_argv(flags(tmp_path, **files))


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        (["--skip-bad-sample", "3"], "--skip-bad-samples"),
        (["--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size"),
        (["--num-workers", "-1"], "num_workers"),
        (["--sample-timeout", "0"], "sample_timeout"),
    ],
)
def test_wrong_flags_are_named(tmp_path, more, fact):
    with raises(ConfigError, fact):
        ExtractJob.from_argv([*flags(tmp_path), *more])


def test_features_cannot_be_extracted_again(tmp_path):
    data = {"dataset_param": {"dataset_type": "feature", "basic_parameters": {"data_path": "x/data.jsonl"}}}
    with raises(ConfigError, "dataset_type", "feature"):
        ExtractJob.from_argv(flags(tmp_path, data=data))


def test_missing_weights_are_named_with_their_key(tmp_path):
    path = Path(PUBLISHED_MODEL["ae"]["from_pretrained"])
    with raises(WeightsError, "model.json:ae.from_pretrained", f"{path}: {absent(path)}"):
        ExtractJob.from_argv(flags(tmp_path)).check_inputs()


@pytest.mark.parametrize("place", ["vae.pth", "t5.pth", "tokenizer", "tokenizer/tokenizer.json"])
def test_fifo_among_the_weights_is_named_immediately(tmp_path, place):
    files = {"vae.pth": "ae", "t5.pth": "text_encoder"}
    model = {key: {"from_pretrained": str(tmp_path / name)} for name, key in files.items()}
    for name in files:
        (tmp_path / name).touch()
    (tmp_path / "tokenizer").mkdir()
    data = copy.deepcopy(PUBLISHED_DATA)
    data["dataset_param"]["tokenizer_config"] = {"from_pretrained": str(tmp_path / "tokenizer")}
    if (tmp_path / place).is_dir():
        (tmp_path / place).rmdir()
    (tmp_path / place).unlink(missing_ok=True)
    os.mkfifo(tmp_path / place)
    with raises(WeightsError, "FIFO", place.split("/")[-1], "from_pretrained"):
        ExtractJob.from_argv(flags(tmp_path, data=data, model=model)).check_inputs()


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (["--help"], 0, "--skip-bad-samples"),
        (["--mm-dta", "x"], 1, "--mm-data"),
        (["--mm-data", "gone.json", "--mm-model", "x"], 1, f"gone.json: {absent('gone.json')}"),
    ],
    ids=["help", "typo", "missing"],
)
def test_help_a_typo_and_a_missing_file_answer_without_torch(given, code, words):
    script = (
        "import sys\nfrom mindspeed_mm.tasks.extract import main\n"
        f"try:\n    main({given!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "print('torch' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().splitlines()[-1] == f"False {code}"
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
