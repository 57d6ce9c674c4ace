"""A LoRA from two checkpoints, and the branch alone as a module file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.config import ExtractLoraConfig, FromMmConfig, MergeLoraConfig, ToMmConfig
from checkpoint.converter import CONVERTERS
from checkpoint.extract import low_rank
from checkpoint.vace import extract_lora, hf_to_mm, merge_lora, mm_to_hf
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.lora.adapter import merged
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.weights import open_adapter, open_weights
from tests.support.errors import raises
from tests.support.lora_files import RANK, lora_matrices, write_lora
from tests.support.tiny import TINY, tiny_transformer, write_transformer

pytestmark = pytest.mark.medium


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and the same merged with a LoRA of rank RANK."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    write_transformer(base, tiny_transformer(), torch.float32)
    lora = write_lora("kohya", tmp_path, lora_matrices())
    merge_lora(MergeLoraConfig(source_path=str(base), target_path=str(tuned), loras=str(lora)))
    return base, tuned


def extracted(pair: tuple[Path, Path], target: Path, **more: object) -> Path:
    paths = {"base_path": str(pair[0]), "source_path": str(pair[1]), "target_path": str(target)}
    extract_lora(ExtractLoraConfig(**paths, **{"dtype": "fp32", **more}))
    return target


@pytest.mark.parametrize("form", ["comfyui", "peft", "diffusers"])
def test_merged_lora_is_found_again(tmp_path: Path, pair: tuple[Path, Path], form: str) -> None:
    target = tmp_path / ("peft" if form == "peft" else f"{form}.safetensors")
    report = tmp_path / "report.json"
    extracted(pair, target, form=form, rank=RANK, report=str(report))
    base, tuned = open_weights(pair[0]), open_weights(pair[1])
    found = merged(base, [(open_adapter(target, base.shapes), 1.0)])
    for name in base.tensors:
        torch.testing.assert_close(found.read(name), tuned.read(name), atol=1e-5, rtol=0)
    said = json.loads(report.read_text())
    assert said["total"] < 1e-4
    assert set(said["layers"]) == {f"{name}.weight" for name in lora_matrices()}


def test_smaller_rank_loses_what_it_says(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    report = tmp_path / "report.json"
    target = extracted(pair, tmp_path / "a.safetensors", rank=1, on="branch", report=str(report))
    said, base = json.loads(report.read_text()), open_weights(pair[0])
    adapter = open_adapter(target, base.shapes)
    assert all(name.startswith("vace_") for name in adapter.names)
    name = adapter.names[0]
    delta = open_weights(pair[1]).read(name) - base.read(name)
    left = torch.linalg.svdvals(delta)[1:].norm() / delta.norm()
    assert said["layers"][name]["error"] == pytest.approx(left.item(), rel=1e-3)
    assert 0.1 < said["total"] < 1


def test_large_layers_are_cut_nearly_as_well() -> None:
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.exp(-torch.arange(1100.0) / 20)
    left, right = (torch.linalg.qr(torch.randn(1100, 1100, generator=generator))[0] for _ in "ab")
    delta = left * spectrum @ right
    up, down = low_rank(delta, 32)
    best = spectrum[32:].norm()
    assert torch.linalg.norm(delta - up @ down) < 1.01 * best
    assert torch.equal(up, low_rank(delta, 32)[0])


def test_full_rank_differences_are_kept_or_rejected(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    path = pair[1] / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["blocks.0.ffn.0.bias"] = weights["blocks.0.ffn.0.bias"] + 1
    save_file(weights, path)
    base = open_weights(pair[0])
    adapter = open_adapter(extracted(pair, tmp_path / "a.safetensors"), base.shapes)
    assert list(adapter.diffs) == ["blocks.0.ffn.0.bias"]
    with raises(WeightsError, "blocks.0.ffn.0.bias"):
        extracted(pair, tmp_path / "peft", form="peft")


def test_checkpoints_that_give_no_lora_are_rejected(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    with raises(WeightsError, pair[0]):
        extracted((pair[0], pair[0]), tmp_path / "a.safetensors")
    other = tmp_path / "other"
    trunk = TINY.trunk.model_copy(update={"ffn_dim": TINY.trunk.ffn_dim * 2})
    write_transformer(other, tiny_transformer(config=VaceConfig(trunk=trunk, vace_layers=TINY.vace_layers)))
    with raises(WeightsError, "ffn.0"):
        extracted((pair[0], other), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_short_names_are_the_same_methods() -> None:
    methods = CONVERTERS.get("VACEConverter").methods
    assert methods["lora_to_comfy"] is methods["lora_to_comfyui"]
    assert "lora_to_hf" in methods


WIDE = VaceConfig(
    trunk=TINY.trunk.model_copy(update={"hidden_size": 256, "num_heads": 2}),
    vace_layers=(0, 2),
    vace_in_dim=96,
)


def test_branch_alone_is_written_and_read_with_its_trunk(tmp_path: Path) -> None:
    write_transformer(tmp_path / "base", tiny_transformer(config=WIDE), torch.float32)
    hf_to_mm(ToMmConfig(source_path=str(tmp_path / "base"), target_path=str(tmp_path / "mm")))
    target = tmp_path / "module.safetensors"
    mm_to_hf(FromMmConfig(source_path=str(tmp_path / "mm"), target_path=str(target), form="module"))
    names = set(load_file(target))
    assert names == {n for n in open_weights(tmp_path / "base").tensors if n.startswith("vace_")}
    with raises(WeightsError, "trunk", target):
        open_weights(target)
    trunk = {
        n: w for n, w in load_file(next((tmp_path / "base").glob("*.safetensors"))).items() if n not in names
    }
    save_file(trunk, tmp_path / "trunk.safetensors")
    joined = open_weights([tmp_path / "trunk.safetensors", target])
    base = open_weights(tmp_path / "base")
    assert all(torch.equal(joined.read(name), base.read(name)) for name in base.tensors)
    again = open_weights(target, base_path=tmp_path / "trunk.safetensors")
    assert set(again.tensors) == set(base.tensors)


def test_layout_that_comfyui_would_misread_is_not_a_module(tmp_path: Path) -> None:
    write_transformer(tmp_path / "base", tiny_transformer(), torch.float32)
    lora = write_lora("kohya", tmp_path, lora_matrices())
    target = str(tmp_path / "module.safetensors")
    cfg = {"source_path": str(tmp_path / "base"), "target_path": target, "loras": str(lora)}
    with raises(WeightsError, 128):
        merge_lora(MergeLoraConfig(**cfg, form="module"))
    assert not Path(target).exists()
