"""What a LoRA starts from: another LoRA, part of one, or a base that has one fused into it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.config import FuseLoraConfig, LoraConfig
from mindspeed_mm.models.transforms.fuse import FuseLora
from mindspeed_mm.models.transforms.match import lora_targets
from mindspeed_mm.models.transforms.plan import plan_transforms
from mindspeed_mm.models.wan.config import PRESETS
from mindspeed_mm.models.wan.shapes import linears, modules
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.training.build import fill_parameters
from tests.support.errors import raises
from tests.support.lora_files import deltas, lora_matrices, write_lora
from tests.support.tiny import tiny_inputs, tiny_transformer, write_transformer

pytestmark = pytest.mark.medium

VACE = MODELS.get("vace")
GUIDE = Path(__file__).resolve().parents[4] / "docs/guide/lora.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_transformer(folder, tiny_transformer(), torch.float32)
    return folder


def started(base: Path, *configs: LoraConfig | FuseLoraConfig) -> torch.nn.Module:
    """The tiny transformer, changed by these and filled as a training run fills it."""
    model, source = tiny_transformer(1), open_weights(base)
    plan = plan_transforms(VACE, "branch", torch.float32, configs)
    for transform in plan:
        transform.apply(model)
        source = transform.change_source(source)
    fill_parameters(model, source, 0, plan)
    return model


def with_deltas(scale: float = 0.5) -> torch.nn.Module:
    """The base with the LoRA of `lora_matrices` by hand."""
    model = tiny_transformer()
    for name, delta in deltas(lora_matrices(), scale).items():
        model.get_parameter(name).data += delta
    return model


def test_lora_resumes_with_another_alpha_and_the_same_product(base: Path, tmp_path: Path) -> None:
    path = str(write_lora("kohya", tmp_path, lora_matrices()))  # rank 4, alpha 2
    model = started(base, LoraConfig(rank=4, alpha=3, rslora=True, on="both", init_from=path))
    inputs = tiny_inputs()
    assert torch.allclose(model(**inputs), with_deltas()(**inputs), atol=2e-6)


def test_fusing_and_continuing_add_up(base: Path, tmp_path: Path) -> None:
    path = str(write_lora("lightx2v", tmp_path, lora_matrices()))
    fuse = FuseLoraConfig(path=path, strength=0.5)
    model = started(base, fuse, LoraConfig(rank=4, on="both", init_from=path))
    inputs = tiny_inputs()
    assert torch.allclose(model(**inputs), with_deltas(0.75)(**inputs), atol=2e-6)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "blocks",
        "vace_blocks",
    }


def test_layers_that_a_lora_leaves_out_start_from_zero(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(write_lora("comfyui", tmp_path, lora_matrices("vace_blocks")))
    with caplog.at_level(logging.INFO):
        model = started(base, LoraConfig(rank=4, on="both", init_from=path))
    ups = {name: p for name, p in model.named_parameters() if name.endswith("lora_B.weight")}
    assert all(bool(p.any()) == name.startswith("vace_") for name, p in ups.items())
    assert "40 of 60 layers" in caplog.text


def test_whole_weights_of_a_peft_folder_are_taken_over(base: Path, tmp_path: Path) -> None:
    folder = write_lora("peft", tmp_path, lora_matrices())
    file = folder / "adapter_model.safetensors"
    name = "vace_patch_embedding.weight"
    whole = torch.full_like(tiny_transformer().get_parameter(name), 0.25)
    save_file({**load_file(file), f"base_model.model.{name}": whole}, file)
    saved = {"modules_to_save": ("vace_patch_embedding",)}
    model = started(base, LoraConfig(rank=4, on="both", init_from=str(folder), **saved))
    assert torch.equal(model.get_parameter(name), whole)
    assert model.get_parameter(name).requires_grad
    with raises(WeightsError, name):
        started(base, LoraConfig(rank=4, on="both", init_from=str(folder)))


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"rank": 8, "on": "both"}, [4, 8]),
        ({"rank": 4, "on": "trunk"}, [20, "vace_blocks.0.cross_attn.k.weight"]),
    ],
    ids=["rank", "part"],
)
def test_lora_without_a_place_is_rejected(
    base: Path, tmp_path: Path, settings: dict[str, object], facts: list[object]
) -> None:
    path = write_lora("diffsynth", tmp_path, lora_matrices())
    with raises(WeightsError, *facts, where=f"transforms: lora.init_from: {path}"):
        started(base, LoraConfig(init_from=str(path), **settings))


def test_file_of_both_experts_gives_the_one_that_trains(base: Path, tmp_path: Path) -> None:
    high, low = lora_matrices(seed=1), lora_matrices(seed=2)
    keys = {}
    for prefix, matrices in (("dit.", high), ("dit2.", low)):
        for name, (down, up) in matrices.items():
            keys[f"{prefix}{name}.lora_A.weight"], keys[f"{prefix}{name}.lora_B.weight"] = down, up
    save_file(keys, tmp_path / "both.safetensors")
    path = str(tmp_path / "both.safetensors")
    model = started(base, LoraConfig(rank=4, on="both", init_from=path, expert="low"))
    for name, (down, _) in low.items():
        assert torch.equal(model.get_parameter(f"{name}.lora_A.weight"), down)
    with raises(WeightsError, "high", "low"):
        started(base, FuseLoraConfig(path=path))


def test_fused_lora_is_rounded_once(base: Path, tmp_path: Path) -> None:
    path = str(write_lora("comfyui-alpha", tmp_path, lora_matrices()))
    write_transformer(tmp_path / "bf16", tiny_transformer(), torch.bfloat16)
    source = open_weights(tmp_path / "bf16")
    found = FuseLora(FuseLoraConfig(path=path)).change_source(source)
    for name, delta in deltas(lora_matrices()).items():
        assert torch.equal(found.read(name), (source.read(name).float() + delta).to(torch.bfloat16)), name


@pytest.mark.parametrize(("size", "column"), [("Wan2.1-VACE-1.3B", 2), ("Wan2.1-VACE-14B", 3)])
def test_guide_counts_parameters_and_megabytes(size: str, column: int) -> None:
    config = PRESETS[size]
    layers = linears(config)
    for on in ("branch", "trunk", "both"):
        targets = lora_targets(LoraConfig(on=on), VACE, "branch", modules(config), layers, "")
        count = sum(32 * sum(layers[name]) for name in targets)
        (row,) = [line for line in GUIDE.read_text("utf-8").splitlines() if line.startswith(f"| `{on}` |")]
        numbers = re.findall(r"([\d.]+) M.*?(\d+)(?: MiB)", row.split("|")[column + 1])
        assert numbers == [(f"{count / 1e6:.1f}", f"{count * 4 / 2**20:.0f}")], (on, numbers)
