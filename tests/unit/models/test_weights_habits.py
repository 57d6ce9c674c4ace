"""Files as users have them.

Modules next to a trunk, wrapped names, pruned caches, pointers, models of other kinds.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.cli import main
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.safetensors import read_safetensors
from mindspeed_mm.models.umt5.encoder import load_text_encoder
from mindspeed_mm.models.umt5.tokenizer import Tokenizer
from mindspeed_mm.models.wan.config_json import official_json
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.wan.vae import load_vae
from mindspeed_mm.models.weights import open_weights
from tests.support.errors import raises
from tests.support.tiny import (
    TEXT_FILE,
    TINY,
    VAE_FILE,
    tiny_transformer,
    tiny_umt5,
    tiny_vae,
    write_tokenizer,
    write_umt5,
    write_vae,
)

pytestmark = pytest.mark.medium

Weights = dict[str, Tensor]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 34700000000\n"
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def weights() -> Weights:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tiny_transformer().state_dict().items()}


@pytest.fixture
def pair(tmp_path: Path, weights: Weights) -> tuple[Path, Path]:
    """A T2V folder and a VACE module, repackaged with a prefix."""
    trunk, module = tmp_path / "t2v", tmp_path / "module.safetensors"
    trunk.mkdir()
    (tmp_path / "config.json").write_text(json.dumps(official_json(TINY)))  # beside the module
    save_file({name: t for name, t in weights.items() if not name.startswith("vace_")}, trunk / FILE)
    save_file(
        {f"model.diffusion_model.{name}": t for name, t in weights.items() if name.startswith("vace_")},
        module,
    )
    return trunk, module


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"transformer.{name}",
        lambda name: f"pipe.{'vace' if name.startswith('vace_') else 'dit'}.{name}",
        lambda name: f"model._orig_mod.{name}",
        lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
        lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    ],
)
def test_wrapped_names_open(tmp_path: Path, weights: Weights, rename: Callable[[str], str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(official_json(TINY)))
    save_file(weights, tmp_path / "plain.safetensors")
    save_file({rename(name): tensor for name, tensor in weights.items()}, tmp_path / "wrapped.safetensors")
    plain, wrapped = (open_weights(tmp_path / f"{name}.safetensors") for name in ("plain", "wrapped"))
    assert wrapped.fingerprint() == plain.fingerprint()


def test_trunk_and_a_module_open_as_one_model(
    pair: tuple[Path, Path], tmp_path: Path, weights: Weights
) -> None:
    trunk, module = pair
    save_file(weights, tmp_path / "whole.safetensors")
    expected = open_weights(tmp_path / "whole.safetensors").fingerprint()
    for paths in ([trunk, module], [module, trunk], [trunk / FILE, module]):
        source = open_weights(paths)
        assert source.fingerprint() == expected
        assert source.config == TINY


def test_diffusers_trunk_takes_an_official_module(
    pair: tuple[Path, Path], tmp_path: Path, weights: Weights
) -> None:
    names = KEY_MAPS["diffusers"].to_theirs
    trunk = {names(name): tensor for name, tensor in weights.items() if not name.startswith("vace_")}
    save_file(trunk, tmp_path / "trunk.safetensors")
    source = open_weights([tmp_path / "trunk.safetensors", pair[1]])
    assert source.fingerprint() == open_weights(list(pair)).fingerprint()


def test_hf_to_mm_completes_a_module(pair: tuple[Path, Path], tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    trunk, module = pair
    command = [
        "VACEConverter",
        "hf_to_mm",
        f"--cfg.source_path={module}",
        f"--cfg.target_path={tmp_path / 'mm'}",
    ]
    with pytest.raises(SystemExit):
        main(command)
    assert "--cfg.base_path" in capsys.readouterr().err
    main([*command, f"--cfg.base_path={trunk}"])
    assert open_weights(tmp_path / "mm").fingerprint() == open_weights([trunk, module]).fingerprint()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", f"folder/{FILE}", f"folder/{FILE}.index.json"])
def test_lfs_pointer_of_a_transformer_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(POINTER)
    with raises(WeightsError, "LFS pointer", "34.7 GB"):
        open_weights(tmp_path / (name if "." in name.partition("/")[0] else "folder"))


@pytest.mark.parametrize(
    "name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "tokenizer.json", "spiece.model"]
)
def test_lfs_pointer_of_another_part_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    reader: Callable[[], object] = partial(Tokenizer, tmp_path, 512)
    if name.endswith(".pth"):
        reader = partial(load_vae if "VAE" in name else load_text_encoder, tmp_path)
    with raises(WeightsError, name, "LFS pointer", "34.7 GB"):
        reader()


@pytest.mark.parametrize("name", [FILE, "diffusion_pytorch_model.pth", "Wan2.1_VAE.pth"])
def test_dangling_link_is_named_with_its_target(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("../../blobs/4d7a")
    with raises(WeightsError, name, "../../blobs/4d7a"):
        load_vae(tmp_path) if "VAE" in name else open_weights(tmp_path)


@pytest.mark.parametrize("name", ["transformer", "transformer_2", "high_noise_model", "release"])
def test_dangling_link_to_a_folder_is_named(tmp_path: Path, weights: Weights, name: str) -> None:
    if name == "transformer_2":  # the other half must not pass for a whole model
        (tmp_path / "transformer").mkdir()
        save_file(weights, tmp_path / "transformer" / FILE)
    (tmp_path / name).symlink_to("/gone/blob")
    with raises(WeightsError, name, "/gone/blob"):
        open_weights(tmp_path)


def test_dangling_links_inside_transformer_are_named(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model-a").symlink_to("/gone/blob")
    with raises(WeightsError, "model-a", "/gone/blob"):
        open_weights(tmp_path)


def test_dangling_link_of_a_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    (tmp_path / "1.safetensors").symlink_to("gone")
    with raises(WeightsError, "1.safetensors", "gone"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma"], "a VAE"),
        (["token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"], "T5"),
        (["visual.transformer.0.attn.weight"], "CLIP"),
        (["double_blocks.0.img_attn.qkv.weight"], "HunyuanVideo"),
    ],
)
def test_another_model_is_named(tmp_path: Path, names: list[str], what: str) -> None:
    save_file({name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
    with raises(WeightsError, "VACE", what):
        open_weights(tmp_path / "x.safetensors")


def test_i2v_trunk_is_named(tmp_path: Path, weights: Weights) -> None:
    trunk = {name: tensor for name, tensor in weights.items() if not name.startswith("vace_")}
    patch = trunk["patch_embedding.weight"]
    trunk["patch_embedding.weight"] = torch.zeros(patch.shape[0], 36, *patch.shape[2:])
    save_file(trunk, tmp_path / FILE)
    with raises(WeightsError, "I2V", "in_dim", 36):
        open_weights(tmp_path)
    save_file({**trunk, "img_emb.proj.0.bias": torch.ones(1)}, tmp_path / FILE)
    with raises(WeightsError, "I2V"):
        open_weights(tmp_path)


def test_vae_of_wan22_is_named(tmp_path: Path) -> None:
    torch.save({"encoder.conv1.weight": torch.zeros(2, 12, 3, 3, 3)}, tmp_path / "Wan2.2_VAE.pth")
    with raises(WeightsError, "Wan2.2-TI2V-5B", "Wan2.1_VAE.pth"):
        load_vae(tmp_path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "vae.", "first_stage_model.", "pipe.vae."])
def test_wrapped_vae_opens(tmp_path: Path, prefix: str) -> None:
    plain, wrapped = tmp_path / VAE_FILE, tmp_path / "wrapped.pth"
    write_vae(plain, tiny_vae())
    torch.save(
        {f"{prefix}{name}": weight for name, weight in torch.load(plain, weights_only=True).items()}, wrapped
    )
    assert load_vae(wrapped).fingerprint == load_vae(plain).fingerprint


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "text_encoder."])
def test_wrapped_text_encoder_opens(tmp_path: Path, prefix: str) -> None:
    plain, wrapped = tmp_path / TEXT_FILE, tmp_path / "wrapped.pth"
    write_umt5(plain, tiny_umt5())
    write_tokenizer(tmp_path)
    torch.save(
        {f"{prefix}{name}": weight for name, weight in torch.load(plain, weights_only=True).items()}, wrapped
    )
    assert load_text_encoder(wrapped).fingerprint == load_text_encoder(plain).fingerprint


def test_vae_with_and_without_wrapper_is_rejected(tmp_path: Path) -> None:
    weight = torch.zeros(1)
    torch.save(
        {"encoder.conv1.weight": weight, "_orig_mod.encoder.conv1.weight": weight}, tmp_path / "vae.pth"
    )
    with raises(WeightsError, where=tmp_path / "vae.pth"):
        load_vae(tmp_path / "vae.pth")


def test_dangling_config_of_a_vae_is_named(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").symlink_to("../blobs/gone")
    with raises(WeightsError, "config.json", "blobs/gone"):
        load_vae(tmp_path)


def test_more_tensors_than_open_files_are_mapped(tmp_path: Path) -> None:
    save_file({f"w{i}": torch.full((3,), float(i)) for i in range(400)}, tmp_path / FILE)
    container = read_safetensors([tmp_path / FILE])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(int(path.name) for path in Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 50, hard))
    try:
        read = {name: tensor.read() for name, tensor in container.tensors.items()}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(read[f"w{i}"].tolist() == [i, i, i] for i in range(400))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists mappings")
def test_mapping_ends_with_its_last_tensor(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / FILE)
    tensor = read_safetensors([tmp_path / FILE]).tensors["w"].read()
    part = tensor[1:]
    del tensor
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    part += 1
    assert part.tolist() == [2, 2]
    del part
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
