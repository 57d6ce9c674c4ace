"""What the published VACE examples say, by key and flag.

Each of their files and argument lists is understood here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mindspeed_mm.distributed.config import Fsdp2Config
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.training.tools_config import ToolsConfig

SHARED = {
    "patch_size": [1, 2, 2],
    "text_len": 512,
    "freq_dim": 256,
    "text_dim": 4096,
    "img_dim": 1280,
    "out_dim": 16,
    "qk_norm": True,
    "qk_norm_type": "rmsnorm",
    "cross_attn_norm": True,
    "eps": 1e-6,
    "max_seq_len": 1024,
    "attention_async_offload": False,
    "use_fused_rmsnorm": True,
}
SIZES: dict[str, tuple[dict[str, int], list[int], list[int]]] = {
    "1.3B": ({"hidden_size": 1536, "ffn_dim": 8960, "num_heads": 12}, [7, 8, 8, 7], list(range(0, 30, 2))),
    "14B": (
        {"hidden_size": 5120, "ffn_dim": 13824, "num_heads": 40},
        [10, 10, 10, 10],
        list(range(0, 40, 5)),
    ),
}
DIFFUSION = {
    "model_id": "wan_flow_match_scheduler",
    "num_train_timesteps": 1000,
    "shift": 5,
    "sigma_min": 0.0,
    "extra_one_step": True,
}


def model_json(size: str, diffusion: dict[str, Any], patch: dict[str, bool]) -> dict[str, Any]:
    """The published pretrain_model.json of one size."""
    sizes, stages, layers = SIZES[size]
    shared = {**SHARED, **sizes, "pipeline_num_layers": stages}
    return {
        "patch": {"get_dist_model_load_from_pt": True, **patch},
        "load_video_features": True,
        "load_text_features": True,
        "task": "vace",
        "diffusion": {**DIFFUSION, **diffusion},
        "predictor": {
            "model_id": "vace",
            "dtype": "bf16",
            "model_type": "t2v",
            "in_dim": 16,
            "num_layers": sum(stages),
            **shared,
            "from_pretrained": "./weights/",
            "vace_dit": {**shared, "in_dim": 96, "vace_layers": layers, "vace_pretrained": None},
        },
    }


MODELS = {
    "1.3B": model_json("1.3B", {}, {}),
    "14B": model_json("14B", {}, {}),
    "high": model_json(
        "14B", {"max_timestep_boundary": 0.358, "min_timestep_boundary": 0.0}, {"clip_grad_async": True}
    ),
    "low": model_json(
        "14B", {"max_timestep_boundary": 1, "min_timestep_boundary": 0.358}, {"clip_grad_async": True}
    ),
}
DATA = {
    "dataset_param": {
        "dataset_type": "feature",
        "basic_parameters": {"data_path": "./vace_features/data.jsonl", "data_folder": "./vace_features"},
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
            "vae_stride": [4, 8, 8],
            "vae_patch_size": [1, 2, 2],
            "force_resolution": False,
        },
        "use_text_processer": True,
        "enable_text_preprocessing": False,
        "tokenizer_config": [
            {
                "autotokenizer_name": "AutoTokenizer",
                "hub_backend": "hf",
                "from_pretrained": "t",
                "model_max_length": 256,
            }
        ],
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
TOOLS = {
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
        "dynamic_param": {"config_path": "path"},
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
YAMLS = {
    "patterns": """
sharding_size: 8
sub_modules_to_wrap:
  - predictor.wan_dit.blocks.{*}
  - predictor.wan_dit.head
  - predictor.vace_dit.vace_blocks.{*}
reshard_after_forward: True
param_dtype: "bf16"
reduce_dtype: "fp32"
offload_to_cpu: False
cast_forward_inputs: True
recompute_modules:
  - predictor.wan_dit.blocks.{*}
  - predictor.vace_dit.vace_blocks.{*}
""",
    "minimal": (
        "sharding_size: 8\nreshard_after_forward: True\nparam_dtype: bf16\ncast_forward_inputs: True\n"
    ),
}
COMMON_ARGS = [
    "--tensor-model-parallel-size",
    "1",
    "--pipeline-model-parallel-size",
    "1",
    "--virtual-pipeline-model-parallel-size",
    "1",
    "--context-parallel-size",
    "1",
    "--context-parallel-algo",
    "ulysses_cp_algo",
    "--micro-batch-size",
    "1",
    "--global-batch-size",
    "8",
    "--num-workers",
    "8",
    "--lr",
    "5e-5",
    "--min-lr",
    "5e-5",
    "--adam-beta1",
    "0.9",
    "--adam-beta2",
    "0.95",
    "--adam-eps",
    "1e-5",
    "--lr-decay-style",
    "constant",
    "--weight-decay",
    "0.1",
    "--lr-warmup-init",
    "0",
    "--lr-warmup-iters",
    "0",
    "--clip-grad",
    "1.0",
    "--train-iters",
    "5000",
    "--no-gradient-accumulation-fusion",
    "--no-load-optim",
    "--no-load-rng",
    "--no-save-optim",
    "--no-save-rng",
    "--use-torch-fsdp2",
    "--untie-embeddings-and-output-weights",
    "--ckpt-format",
    "torch_dcp",
    "--use-cpu-initialization",
    "--log-interval",
    "1",
    "--save-interval",
    "10000",
    "--eval-interval",
    "10000",
    "--eval-iters",
    "10",
    "--save",
    "./save",
    "--distributed-backend",
    "nccl",
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["--downcast-to-bf16", "--bf16"])
def test_each_published_model_json_and_argument_list_makes_a_job(
    tmp_path: Path, model: str, precision: str
) -> None:
    paths = {"model": tmp_path / "m.json", "data": tmp_path / "d.json", "tool": tmp_path / "tools.json"}
    for name, values in (("model", MODELS[model]), ("data", DATA), ("tool", TOOLS)):
        paths[name].write_text(json.dumps(values), encoding="utf-8")
    config = tmp_path / "fsdp2_config.yaml"
    config.write_text(YAMLS["patterns"], encoding="utf-8")
    files = [f"--mm-{name}={path}" for name, path in paths.items()]
    job = PretrainJob.from_argv([*COMMON_ARGS, precision, *files, f"--fsdp2-config-path={config}"], ranks=8)
    assert job.training.batch.global_batch_size == 8
    assert job.predictor.model.trunk.num_layers == (30 if model == "1.3B" else 40)
    assert job.model.diffusion.role == (model if model in ("high", "low") else None)
    assert any("boundary" in note for note in job.notes) == (model in ("high", "low"))
    for unused in ("patch", "use_fused_rmsnorm", "group_data", "dynamic_param", "--use-cpu-initialization"):
        assert any(unused in note and "accepted, unused" in note for note in job.notes), unused


@pytest.mark.parametrize("name", YAMLS)
def test_each_published_yaml_parses(name: str) -> None:
    assert Fsdp2Config.model_validate(yaml.safe_load(YAMLS[name])).sharding_size == 8


def test_shipped_tools_json_parses() -> None:
    shipped = Path(__file__).resolve().parents[2] / "mindspeed_mm/tools/tools.json"
    assert not ToolsConfig.model_validate(json.loads(shipped.read_text())).profile.enable
