"""The data JSONs: published files parse, what they say in vain is named, what would break VACE is refused."""

import copy
import json

import pytest

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.config import ClipPolicy, FeatureDatasetConfig, VaceDatasetConfig, VideoConfig
from mindspeed_mm.data.registry import DATASETS, DataConfig, DatasetSpec, read_data_config
from mindspeed_mm.errors import ConfigError
from tests.support.errors import raises

# keys and values of the published example (feature_extract/data.json)
PUBLISHED = {
    "dataset_param": {
        "dataset_type": "vace",
        "basic_parameters": {"data_path": "./data.txt", "data_storage_mode": "vace"},
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
                        "param": {"antialias": True, "size": "auto", ("interpolation_mode"): "bicubic"},
                    },
                    {"trans_type": "ToTensorVideo"},
                    {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
                ],
                "image": [
                    {"trans_type": "ToTensorVideo"},
                    {"trans_type": "norm_fun", "param": {"mean": 0.5, "std": 0.5}},
                    {
                        "trans_type": "ResizeToFill",
                        "param": {"size": "auto", ("interpolation_mode"): "bilinear", "align_corners": False},
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
            "from_pretrained": "./t",
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


def published_features():
    values = copy.deepcopy(PUBLISHED)
    values["dataset_param"]["dataset_type"] = "feature"
    values["dataset_param"]["basic_parameters"] = {"data_path": "f/data.jsonl", "data_folder": "f"}
    values["dataset_param"]["tokenizer_config"] = [values["dataset_param"]["tokenizer_config"]]
    return values


@pytest.fixture
def read(tmp_path):
    def read(values, notes=None):
        (tmp_path / "data.json").write_text(json.dumps(values))
        return read_data_config(tmp_path / "data.json", notes)

    return read


def changed(path, value):
    values = copy.deepcopy(PUBLISHED)
    *above, last = path
    place = values
    for key in above:
        place = place[key]
    place[last] = value
    return values


def test_published_extraction_file_parses(read):
    notes = []
    config = read(PUBLISHED, notes)
    assert isinstance(config.dataset_param, VaceDatasetConfig)
    video = config.dataset_param.preprocess_parameters
    assert (video.num_frames, video.max_hxw, video.train_fps, video.reader) == (17, 399360, 24, "decord")
    assert config.dataset_param.tokenizer_config.model_max_length == 512
    for key in ("max_height", "force_resolution", "frame_interval", "support_chinese", "group_data"):
        assert sum(f"{key}: accepted, unused: " in note for note in notes) == 1, key


def test_published_feature_file_parses(read):
    config = read(published_features())
    assert isinstance(config.dataset_param, FeatureDatasetConfig)
    assert config.dataset_param.basic_parameters.data_folder == "f"
    assert config.dataloader_param.drop_last


def test_config_that_was_written_into_a_job_reads_back_equal(read):
    for values in (PUBLISHED, published_features()):
        config = read(values)
        assert DataConfig.model_validate(json.loads(config.model_dump_json())) == config


VIDEO = ("dataset_param", "preprocess_parameters")
STEPS = (*VIDEO, "train_pipeline", "video")


def test_clip_policy_is_read_from_either_spelling():
    policy = parse(VideoConfig, {"fps": 24, "num_frames": 17, "long_clip": "reject"}, "data.json").policy
    assert policy == parse(VideoConfig, {"train_fps": 24, "num_frames": 17, "long_clip": "reject"}, "").policy
    assert policy == ClipPolicy(fps=24, num_frames=17, short_clip="keep", long_clip="reject")
    with raises(ConfigError, "data.json:fps"):
        parse(VideoConfig, {"fps": 24, "train_fps": 16}, "data.json")


@pytest.mark.parametrize(
    ("path", "value", "facts"),
    [
        (
            (*VIDEO, "num_frame"),
            17,
            ["dataset_param.preprocess_parameters.num_frame", "num_frames"],
        ),
        (
            (*VIDEO, "num_frames"),
            80,
            ["num_frames", 81, 80],
        ),
        ((*VIDEO, "vae_stride"), [8, 8, 8], ["vae_stride", "[4, 8, 8]"]),
        ((*VIDEO, "video_reader_type"), "Torchvision", ["DecordVideo", "AvVideo"]),
        ((*VIDEO, "short_clip"), "loop", ["keep", "pad", "resample", "reject"]),
        (
            (*STEPS,),
            [{"trans_type": "RandomHorizontalFlipVideo"}],
            ["RandomHorizontalFlipVideo"],
        ),
        (
            (*STEPS, 0, "param", "interpolation_mode"),
            "nearest",
            ["interpolation_mode", "nearest", "bicubic"],
        ),
        ((*STEPS, 2, "param", "mean"), 0.0, ["norm_fun.mean", "0.0", "0.5"]),
        (("dataset_param", "tokenizer_config"), [{}, {}], ["tokenizer_config", 2]),
        (
            ("dataset_param", "dataset_type"),
            "features",
            ["features", "feature"],
        ),
        (("dataset_param", "basic_parameters"), {}, ["basic_parameters.data_path"]),
        (
            ("dataloader_param", "shufle"),
            True,
            ["dataloader_param.shufle", "shuffle"],
        ),
    ],
)
def test_wrong_value_is_rejected_with_address_and_fix(read, path, value, facts):
    with raises(ConfigError, *facts) as error:
        read(changed(path, value))
    assert value == "features" or "data.json:" in error.value.where


def test_outside_dataset_is_one_class_and_one_line(read):
    class Mine(Config):
        dataset_type: str = "mine"
        shelf: str

    DATASETS.add("mine", DatasetSpec(config=Mine, build="my_package:Shelf"))
    try:
        config = read({"dataset_param": {"dataset_type": "mine", "shelf": "a"}})
        assert config.dataset_param == Mine(shelf="a")
        assert DataConfig.model_validate(config.model_dump()) == config
        with raises(ConfigError, "data.json:dataset_param.shelv", "'shelf'"):
            read({"dataset_param": {"dataset_type": "mine", "shelf": "a", "shelv": "b"}})
    finally:
        DATASETS._entries.pop("mine")
