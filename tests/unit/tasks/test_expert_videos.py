"""One expert of A14B makes no validation videos, and the refusal says what to do instead."""

from types import SimpleNamespace

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.flow.config import ScheduleConfig
from mindspeed_mm.tasks.assembly import build_videos
from tests.support.errors import raises


@pytest.mark.parametrize(
    ("diffusion", "name"), [({"expert": "high"}, "high"), ({"min_timestep_boundary": 0.358}, "low")]
)
def test_one_of_two_experts_is_refused_in_one_line(diffusion, name):
    validation = SimpleNamespace(prompts="inference.json")
    job = SimpleNamespace(
        data=SimpleNamespace(dataset_param=SimpleNamespace(validation=validation)),
        model=SimpleNamespace(diffusion=ScheduleConfig(**diffusion)),
    )
    with raises(ConfigError, f"{name}-noise", "prompts") as caught:
        build_videos(job, None, None, None)
    assert "\n" not in str(caught.value)
