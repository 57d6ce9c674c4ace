"""Numbers that no run can use end at the config, and a switch in place of a number does, too."""

from __future__ import annotations

from typing import Any

import pytest

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.config import TokenizerConfig, VideoConfig
from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
from mindspeed_mm.distributed.patterns import match
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.flow.config import ScheduleConfig
from mindspeed_mm.generation.config import InferenceConfig, RequestConfig
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.models.wan.config import WAN_14B, WanConfig
from mindspeed_mm.tasks.jobs.extract import ExtractConfig
from mindspeed_mm.training.config import BatchConfig, CheckpointConfig, LogConfig, OptimizerConfig
from tests.support.errors import raises

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("schema", "key", "value"),
    [
        (WanConfig, "num_layers", 1_000_000),
        (WanConfig, "hidden_size", 10**9),
        (WanConfig, "text_len", 10**9),
        (WanConfig, "eps", NAN),
        (WanConfig, "num_heads", True),
        (WanConfig, "patch_size", [1, True, 2]),
        (ScheduleConfig, "num_train_timesteps", 10**12),
        (ScheduleConfig, "shift", 1e-300),
        (ScheduleConfig, "shift", INF),
        (RequestConfig, "steps", 10**9),
        (RequestConfig, "height", 160_000),
        (SamplingConfig, "height", 470),
        (RequestConfig, "width", 160_000),
        (RequestConfig, "num_frames", 4 * 10**9 + 1),
        (RequestConfig, "num_frames", True),
        (RequestConfig, "num_frames", "1:30"),
        (RequestConfig, "fps", 1e9),
        (RequestConfig, "fps", True),
        (RequestConfig, "shift", 1e-300),
        (RequestConfig, "guidance_scale", 1e38),
        (RequestConfig, "guidance_scale_2", NAN),
        (RequestConfig, "context_scale", 1e38),
        (RequestConfig, "context_scale", [1.0, 1e38]),
        (RequestConfig, "context_scale", [1.0, True]),
        (RequestConfig, "seed", True),
        (RequestConfig, "prompt", "half \ud83d"),
        (VideoConfig, "num_frames", True),
        (VideoConfig, "num_frames", 4 * 10**9 + 1),
        (VideoConfig, "train_fps", 1e300),
        (VideoConfig, "max_hxw", 10**15),
        (TokenizerConfig, "model_max_length", 10**9),
        (BatchConfig, "micro_batch_size", 10**9),
        (BatchConfig, "train_iters", 10**30),
        (BatchConfig, "num_workers", 10**6),
        (BatchConfig, "seed", 1 << 63),
        (OptimizerConfig, "lr", NAN),
        (OptimizerConfig, "lr", INF),
        (OptimizerConfig, "lr", True),
        (LogConfig, "log_interval", 10**30),
        (CheckpointConfig, "load", ""),
        (ExtractConfig, "num_workers", 10**6),
        (ParallelConfig, "distributed_timeout_minutes", 10**12),
        (Fsdp2Config, "num_to_forward_prefetch", 10**9),
    ],
)
def test_number_no_run_can_use_is_rejected(schema: type[Config], key: str, value: Any) -> None:
    base = WAN_14B.model_dump() if schema is WanConfig else {}
    with pytest.raises(ConfigError) as caught:
        parse(schema, {**base, key: value}, "f.json")
    message = str(caught.value)
    assert message.startswith(f"f.json:{key}")
    assert "Input should" not in message
    assert len(message) < 250


def test_pattern_of_too_many_blocks_is_rejected() -> None:
    with raises(ConfigError, 9999):
        match("blocks.{0-99999999999}", ["blocks.0"], "here")


def test_bad_task_is_not_also_a_short_list() -> None:
    values = {
        "model": {"transformer": "t", "vae": "v", "text_encoder": "e"},
        "output_path": "out",
        "tasks": [{"promt": "a cat"}],
    }
    with raises(ConfigError, "prompt", where="f.json:tasks[0].promt"):
        parse(InferenceConfig, values, "f.json")
    with raises(ConfigError, "tasks"):
        parse(InferenceConfig, {**values, "tasks": []}, "f.json")


@pytest.mark.parametrize(
    ("key", "value", "expected", "found"),
    [
        ("steps", "many", "integer", "many"),
        ("steps", [3], "integer", "list"),
        ("solver", "heun", "'unipc', 'dpm++', 'euler' or 'renoise'", "heun"),
        ("prompt", 7, "a string", 7),
        ("soft_mask", "maybe", "true or false", "maybe"),
        ("steps", "9" * 5000, "integer", 5002),
    ],
)
def test_messages_say_what_was_expected_and_found(key: str, value: Any, expected: str, found: object) -> None:
    with raises(ConfigError, found, where=f"f.json:{key}") as caught:
        parse(RequestConfig, {key: value}, "f.json")
    assert expected in caught.value.expected
