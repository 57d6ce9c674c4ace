"""LoRA files: every key of every dialect is applied, or refused by name in one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.lora.adapter import Adapter, merged
from mindspeed_mm.models.lora.read import open_lora
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.wan.config import PRESETS
from mindspeed_mm.models.wan.shapes import layout
from tests.support.errors import raises
from tests.support.lora_files import DIALECTS, deltas, lora_matrices, write_lora, write_peft
from tests.support.lora_files_bad import LFS_POINTER, REFUSED, Q, pair
from tests.support.tiny import tiny_transformer

SHAPES = {name: tuple(w.shape) for name, w in tiny_transformer().state_dict().items()}


def source() -> WeightsSource:
    tensors = {
        name: TensorFile(w.shape, w.dtype, w.clone) for name, w in tiny_transformer().state_dict().items()
    }
    return WeightsSource(Path("base"), "official", "a base", tensors)


def save(tmp_path: Path, keys: dict[str, Tensor]) -> Path:
    save_file(keys, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def updates(adapter: Adapter, strength: float = 1.0) -> dict[str, Tensor]:
    base, sum_of = source(), merged(source(), [(adapter, strength)])
    found = {name: sum_of.read(name) - base.read(name) for name in base.tensors}
    return {name: delta for name, delta in found.items() if delta.any()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_lora_is_the_same_in_every_dialect(tmp_path: Path, dialect: str) -> None:
    matrices = lora_matrices()
    adapter = open_lora(write_lora(dialect, tmp_path, matrices), SHAPES)
    found, expected = updates(adapter), deltas(matrices)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.allclose(found[name], delta, atol=1e-6), name


def test_strengths_add_up_and_zero_reads_nothing(tmp_path: Path) -> None:
    first = open_lora(write_lora("kohya", tmp_path, lora_matrices("blocks")), SHAPES)
    second = open_lora(write_lora("comfyui", tmp_path, lora_matrices(seed=5)), SHAPES)
    sum_of = merged(source(), [(first, 0.5), (second, -2.0), (second, 0.0)])
    one, two = deltas(lora_matrices("blocks")), deltas(lora_matrices(seed=5))
    for name, base in source().tensors.items():
        expected = base.read() + 0.5 * one.get(name, torch.zeros(1)) - 2 * two.get(name, torch.zeros(1))
        assert torch.allclose(sum_of.read(name), expected, atol=1e-6), name
    assert sum_of.fingerprint() != source().fingerprint()


def test_peft_reads_rslora_and_alpha_patterns(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "peft", lora_matrices("blocks"))
    config = json.loads((path / "adapter_config.json").read_text())
    config |= {"use_rslora": True, "alpha_pattern": {"blocks.1.ffn.0": 8}}
    (path / "adapter_config.json").write_text(json.dumps(config))
    pairs = open_lora(path, SHAPES).pairs
    assert pairs["blocks.0.ffn.0.weight"].scale == pytest.approx(2 / 4**0.5)
    assert pairs["blocks.1.ffn.0.weight"].scale == pytest.approx(8 / 4**0.5)


def test_peft_file_takes_the_config_next_to_it(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "peft", lora_matrices("blocks"))
    expected = open_lora(path, SHAPES).pairs
    found = open_lora(path / "adapter_model.safetensors", SHAPES).pairs
    assert {name: pair.scale for name, pair in found.items()} == dict.fromkeys(expected, 0.5)
    (path / "adapter_config.json").write_text('{"use_dora": true}')
    with raises(WeightsError, "use_dora"):
        open_lora(path / "adapter_model.safetensors", SHAPES)


def test_peft_file_without_its_config_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_peft(tmp_path / "peft", lora_matrices("blocks")) / "adapter_model.safetensors"
    path.with_name("adapter_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert open_lora(path, SHAPES).pairs[f"{Q}.weight"].scale == 1
    assert "adapter_config.json" in caplog.text


@pytest.mark.parametrize("name", ["lora.sft", "lora", "lora.zip"])
def test_safetensors_file_is_read_under_any_ending(tmp_path: Path, name: str) -> None:
    path = write_lora("comfyui", tmp_path, lora_matrices()).rename(tmp_path / name)
    assert updates(open_lora(path, SHAPES)).keys() == deltas(lora_matrices()).keys()


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q", "ffn.2"],
        rank_pattern={"vace_blocks.0.ffn.2": 2},
        alpha_pattern={"vace_blocks.0.ffn.2": 3},
        modules_to_save=["vace_patch_embedding"],
        init_lora_weights=False,
    )
    model = tiny_transformer()
    del model.config  # ours has no method that peft calls on one
    model = peft.PeftModel(model, settings)
    with torch.no_grad():
        model.base_model.model.vace_patch_embedding.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path)
    adapter = open_lora(tmp_path, SHAPES)
    whole = model.merge_and_unload().state_dict()
    sum_of = merged(source(), [(adapter, 1.0)])
    assert {name: SHAPES[name] for name in whole} == SHAPES
    for name, weight in whole.items():
        assert torch.allclose(sum_of.read(name), weight, atol=1e-6), name


def test_differences_of_weights_biases_and_modulation(tmp_path: Path) -> None:
    names = {
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "diffusion_model.blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
        "diffusion_model.blocks.0.diff_m": "blocks.0.modulation",
        "blocks.1.modulation.diff_m": "blocks.1.modulation",
        "diffusion_model.head.modulation.diff": "head.modulation",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.text_embedding.0.diff": "text_embedding.0.weight",
    }
    path = save(tmp_path, {key: torch.full(SHAPES[name], 0.5) for key, name in names.items()})
    found = updates(open_lora(path, SHAPES), 2.0)
    assert found.keys() == set(names.values())
    assert all(torch.allclose(delta, torch.ones(1), atol=1e-6) for delta in found.values())


def test_convolution_has_low_rank_too(tmp_path: Path) -> None:
    out, *rest = SHAPES["vace_patch_embedding.weight"]
    down, up = torch.randn(2, *rest), torch.randn(out, 2, 1, 1, 1)
    stem = "diffusion_model.vace_patch_embedding"
    path = save(tmp_path, {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up})
    delta = updates(open_lora(path, SHAPES))["vace_patch_embedding.weight"]
    assert torch.allclose(delta, (up.flatten(1) @ down.flatten(1)).view(delta.shape), atol=1e-5)


def test_file_of_both_experts_gives_each_its_own(tmp_path: Path) -> None:
    keys = {}
    for prefix, value in (("transformer", 1.0), ("transformer_2", 2.0)):
        down, up = pair()
        keys[f"{prefix}.blocks.0.attn1.to_q.lora_A.weight"] = down
        keys[f"{prefix}.blocks.0.attn1.to_q.lora_B.weight"] = up * value
    path = save(tmp_path, keys)
    sizes = {
        expert: float(updates(open_lora(path, SHAPES, expert=expert))[f"{Q}.weight"].mean())
        for expert in ("high", "low")
    }
    assert sizes == pytest.approx({"high": 2.0, "low": 4.0})
    with raises(WeightsError, "high", "low", where=path):
        open_lora(path, SHAPES)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_layer_of_the_published_models_has_a_name(tmp_path: Path, preset: str) -> None:
    from mindspeed_mm.models.lora.names import NameTable

    weights = layout(PRESETS[preset])
    table = NameTable(weights)
    for weight in weights:
        module, _, last = weight.rpartition(".")
        if last == "weight":
            assert table.find(f"lora_unet_{module.replace('.', '_')}.lora_down.weight").weight == weight
            assert table.find(f"diffusion_model.{module}.alpha").weight == weight


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_than_loras_of_this_model_are_rejected(tmp_path: Path, name: str) -> None:
    keys, facts = REFUSED[name]
    path = save(tmp_path, keys)
    with raises(WeightsError, *facts, where=path):
        open_lora(path, SHAPES)


def test_one_foreign_key_among_many_is_rejected(tmp_path: Path) -> None:
    path = write_lora("comfyui", tmp_path, lora_matrices())
    keys = load_file(path)
    keys["diffusion_model.extra.lora_A.weight"] = torch.ones(2, 2)
    with raises(WeightsError, "diffusion_model.extra.lora_A.weight", f"1 of its {len(keys)}"):
        open_lora(save(tmp_path, keys), SHAPES)


def test_branch_lora_needs_a_branch(tmp_path: Path) -> None:
    path = write_lora("comfyui", tmp_path, lora_matrices("vace_blocks"))
    with raises(WeightsError, "branch", where=path):
        open_lora(path, {n: s for n, s in SHAPES.items() if not n.startswith("vace_")})


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"peft_type": "LOHA"}, ["peft_type", "LOHA"]),
        ({"use_dora": True}, ["use_dora"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "pissa"]),
        ({"lora_alpha": "big"}, ["lora_alpha", "big"]),
        ({"lora_alpha": 0}, ["adapter_config.json", 0]),
        ({"alpha_pattern": {"(a+)+b": 1}}, ["alpha_pattern", "(a+)+b"]),
        ({"alpha_pattern": []}, ["alpha_pattern", "a list"]),
        ({"alpha_pattern": False}, ["alpha_pattern", "false"]),
        ({"use_rslora": "false"}, ["use_rslora", "false"]),
        ({"use_dora": "false"}, ["use_dora", '"false"']),
        ({"lora_alpha": 10**400}, ["adapter_config.json"]),
    ],
)
def test_peft_config_that_means_more_is_rejected(tmp_path: Path, change: dict, facts: list) -> None:
    path = write_peft(tmp_path / "peft", lora_matrices("blocks"))
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | change))
    with raises(WeightsError, *facts):
        open_lora(path, SHAPES)


def test_diffusers_metadata_are_checked_as_pefts(tmp_path: Path) -> None:
    down, up = pair()
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": "false"})}
    path = tmp_path / "lora.safetensors"
    save_file({f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}, path, metadata)
    with raises(WeightsError, "use_rslora", "false", where=path):
        open_lora(path, SHAPES)


def test_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_text(LFS_POINTER)
    with raises(WeightsError, "LFS"):
        open_lora(path, SHAPES)


def test_update_that_is_not_finite_names_its_file(tmp_path: Path) -> None:
    down, up = pair()
    path = save(tmp_path, {f"{Q}.lora_A.weight": down * float("nan"), f"{Q}.lora_B.weight": up})
    with raises(WeightsError, f"{Q}.weight", where=path):
        merged(source(), [(open_lora(path, SHAPES), 1.0)]).read(f"{Q}.weight")
