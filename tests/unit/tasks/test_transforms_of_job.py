"""`transforms` and the LoRA flags of a training job are checked before torch is imported.

Each mistake has its address.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.models.wan.shapes import linears
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.jobs.transforms import check_lora_files
from tests.support.errors import raises
from tests.support.tiny import TINY, tiny_transformer
from tests.unit.tasks.test_pretrain_job import VACE, argv


def job(
    tmp_path: Path, transforms: object, *flags: str, model: str = "14B/pretrain_model.json"
) -> PretrainJob:
    values = json.loads((VACE / model).read_text())
    path = tmp_path / "model.json"
    path.write_text(json.dumps(values if transforms is None else {**values, "transforms": transforms}))
    return PretrainJob.from_argv(argv("14B", "pretrain_model.json", f"--mm-model={path}", *flags), ranks=1)


def lora(**values: object) -> list[dict[str, object]]:
    return [{"type": "lora", **values}]


@pytest.mark.parametrize(
    ("transforms", "key", "facts"),
    [
        (lora(match=["qq"]), "transforms[0].match", ["qq"]),
        (lora(match=["norm_q"]), "transforms[0].match", ["norm_q", "linear"]),
        (lora(match=["vace_patch_embedding"]), "transforms[0].match", ["linear"]),
        (lora(match=["after_proj"], on="trunk"), "transforms[0].on", ["trunk"]),
        (
            lora(rank=4096, match=["text_embedding.0", "time_embedding.0"], on="trunk"),
            "[0].rank",
            [4096, 256],
        ),
        (lora(modules_to_save=["vace_patch"]), "transforms[0].modules_to_save", ["vace_patch"]),
        (lora(modules_to_save=["vace_blocks.0"]), "[0].modules_to_save", ["vace_blocks.0.self_attn.q"]),
        (lora() + lora(match=["q"]), "transforms[1]", ["transforms[0]", "vace_blocks.0.self_attn.q"]),
        (lora(rank=0), "transforms[0].rank", [0]),
        (lora(rank=2.5), "transforms[0].rank", [2.5]),
        (lora(alpha=0), "transforms[0].alpha", [0]),
        (lora(alpha="x"), "transforms[0].alpha", ["x"]),
        (lora(dropout=1), "transforms[0].dropout", [1]),
        (lora(rslora="yes please"), "transforms[0].rslora", ["yes please"]),
        (lora(on="head"), "transforms[0].on", ["head", "branch", "trunk", "both"]),
        (lora(match="q"), "transforms[0].match", ["list"]),
        (lora(match=[""]), "transforms[0].match", []),
        (lora(expert="middle"), "transforms[0].expert", ["middle"]),
        ([{"type": "fuse_lora"}], "transforms[0].path", []),
        ([{"type": "fuse_lora", "path": "a", "strength": True}], "transforms[0].strength", ["true"]),
    ],
)
def test_bad_transforms_have_one_line(
    tmp_path: Path, transforms: object, key: str, facts: list[object]
) -> None:
    with raises(ConfigError, *facts) as caught:
        job(tmp_path, transforms)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_make_or_change_the_one_lora(tmp_path: Path) -> None:
    made = job(tmp_path, None, "--lora-rank=8", "--lora-alpha=4", "--lora-on=both").model.transforms
    assert [(t.rank, t.scale, t.on) for t in made] == [(8, 0.5, "both")]
    changed = job(tmp_path, lora(rank=4, dropout=0.1), "--lora-rank=8").model.transforms
    assert [(t.rank, t.dropout) for t in changed] == [(8, 0.1)]
    kinds = [t.type for t in job(tmp_path, lora(), "--fuse-lora=few.safetensors").model.transforms]
    assert kinds == ["fuse_lora", "lora"]
    with raises(ConfigError, "--lora-rank", where="pretrain_vace.py: --lora-init-from"):
        job(tmp_path, None, "--lora-init-from=a.safetensors")
    with raises(ConfigError, 2):
        job(tmp_path, lora(on="trunk") + lora(on="branch"), "--lora-rank=8")


def test_transforms_need_weights_that_exist_already(tmp_path: Path) -> None:
    none = "--set=model.predictor.from_pretrained=null"
    with raises(ConfigError, "predictor.from_pretrained"):
        job(tmp_path, [{"type": "fuse_lora", "path": "a"}], none)
    with raises(
        ConfigError, "transforms", where=f"{tmp_path / 'model.json'}:predictor.vace_dit.init_from_trunk"
    ):
        job(tmp_path, lora(), "--set=model.predictor.vace_dit.init_from_trunk=true")


def test_missing_lora_file_is_named_with_its_key(tmp_path: Path) -> None:
    transforms = job(tmp_path, lora(init_from="/no/such.safetensors")).model.transforms
    with raises(WeightsError, "/no/such.safetensors") as caught:
        check_lora_files(transforms, "model.json")
    assert caught.value.where.startswith("model.json:transforms[0].init_from")


def test_experts_job_reads_the_loras_of_that_expert(tmp_path: Path) -> None:
    transforms = [{"type": "fuse_lora", "path": "both.safetensors"}, *lora(expert="high")]
    made = job(tmp_path, transforms, model="A14B_wan2.2/pretrain_model_low.json")
    assert [t.expert for t in made.model.transforms] == ["low", "high"]


def test_table_of_linear_layers_is_the_models() -> None:
    model = tiny_transformer()
    found = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears(TINY) == found
