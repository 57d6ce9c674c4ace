"""Files in 8 bits, and several models in one file, are read as the bf16 weights that they stand for."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.gguf_file import read_gguf
from mindspeed_mm.models.load_model import load_transformer
from mindspeed_mm.models.loading import read_tensors
from mindspeed_mm.models.umt5.encoder import load_text_encoder
from mindspeed_mm.models.wan.vae import load_vae
from mindspeed_mm.models.weights import open_adapter, open_weights
from tests.support.errors import raises
from tests.support.rounded_files import E4M3, FORMS, write_comfy_quant, write_fp8_scaled, write_gguf
from tests.support.tiny import (
    TEXT_FILE,
    TINY,
    TOKENIZER_FOLDER,
    VAE_FILE,
    official_config,
    tiny_transformer,
    tiny_umt5,
    tiny_vae,
    write_tokenizer,
    write_umt5,
    write_vae,
)

pytestmark = pytest.mark.medium

STATE = {name: weight.detach() for name, weight in tiny_transformer().state_dict().items()}


def sizes(folder: Path) -> None:
    """Heads of the tiny model are not 128 wide, so its config.json must say them."""
    (folder / "config.json").write_text(json.dumps(official_config(TINY)))


@pytest.mark.parametrize("form", FORMS)
def test_8_bit_files_are_read_as_their_values(tmp_path: Path, form: str) -> None:
    if form.endswith("gguf"):
        pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")
    sizes(tmp_path)
    rounded = FORMS[form](tmp_path / form, STATE)
    source = open_weights(tmp_path / form)
    assert set(source.tensors) == set(STATE)
    for name, expected in rounded.items():
        found = source.read(name)
        assert found.dtype in (torch.bfloat16, torch.float16, torch.float32)
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=0)
    load_transformer(tmp_path / form, dtype=torch.bfloat16)


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(64))
    with raises(WeightsError, "GGUF", where=tmp_path / "a.gguf"):
        open_weights(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with raises(WeightsError, "install gguf", where=tmp_path / "a.gguf"):
        open_weights(tmp_path / "a.gguf")


def test_gguf_of_anything_but_a_transformer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    write_tokenizer(tmp_path / TOKENIZER_FOLDER)
    for read in (load_vae, lambda p: load_text_encoder(p, tmp_path / TOKENIZER_FOLDER), open_adapter):
        with raises(WeightsError, "GGUF", ".safetensors", where=path):
            read(path)


def test_cut_gguf_is_damaged(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")
    path = tmp_path / "q8.gguf"
    write_gguf(path, STATE)
    path.write_bytes(path.read_bytes()[:-4096])
    with raises(WeightsError, where=path):
        open_weights(path)


def gguf_bytes(value: bytes, *, values: int = 1, tensors: int = 0) -> bytes:
    """A header of version 3 whose only metadata is `a`."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + struct.pack("<Q", 1) + b"a" + value


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (gguf_bytes(struct.pack("<IIQ", 9, 0, 1 << 40) + bytes(250)), [1 << 40, 250]),
        (gguf_bytes(struct.pack("<IIQ", 9, 4, 100) + bytes(399)), [100, 399]),
        (gguf_bytes(struct.pack("<IIQ", 9, 0, 5 << 20) + bytes(5 << 20)), [5 << 20]),
        (gguf_bytes(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000 + bytes(12)), ["nested", 4]),
        (gguf_bytes(struct.pack("<IQ", 8, 1 << 62)), ["early"]),
        (gguf_bytes(struct.pack("<I", 77)), [77]),
        (gguf_bytes(bytes(64), values=1 << 50), [1 << 50]),
        (gguf_bytes(bytes(64), tensors=1 << 50), [1 << 50]),
        (gguf_bytes(bytes(5) + struct.pack("<Q", 1 << 31) + bytes(64), tensors=1), [1 << 31]),
        (gguf_bytes(bytes(5) + struct.pack("<QI", 0, 1 << 31) + bytes(64), tensors=1), [1 << 31]),
    ],
    ids=range(10),
)
def test_gguf_header_cannot_claim_too_much(tmp_path: Path, data: bytes, facts: list[object]) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")
    (tmp_path / "a.gguf").write_bytes(data)
    with raises(WeightsError, *facts, where=tmp_path / "a.gguf"):
        open_weights(tmp_path / "a.gguf")


def test_gguf_with_arrays_is_read_and_none_in_big_endian(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")

    def write(endian: object) -> Path:
        writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "wan", endianess=endian)
        writer.add_array("words", ["a", "", "red ball"])
        writer.add_array("numbers", list(range(1000)))
        writer.add_float64("one", 1.0)
        writer.add_tensor("x", torch.ones(2, 3).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "a.gguf"

    assert torch.equal(read_gguf(write(gguf.GGUFEndian.LITTLE)).tensors["x"].read(), torch.ones(2, 3))
    with raises(WeightsError, "big-endian", where=tmp_path / "a.gguf"):
        read_gguf(write(gguf.GGUFEndian.BIG))


def test_damaged_scale_of_a_gguf_prints_nothing(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")
    path = tmp_path / "q8.gguf"
    write_gguf(path, STATE)
    entry = next(e for e in gguf.GGUFReader(path).tensors if e.tensor_type.name == "Q8_0")
    with open(path, "r+b") as file:
        file.seek(int(entry.data_offset))
        file.write(b"\x00\x7c" + bytes(32))  # an infinite scale, and 32 zeros
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = open_weights(path).tensors[str(entry.name)].read()
    assert values.isnan().sum() == 32


def broken(path: Path, **changes: torch.Tensor | None) -> Path:
    """A fp8_scaled file with some keys replaced, or left out."""
    write_fp8_scaled(path, STATE)
    weights = {**load_file(path), **changes}
    save_file({name: weight for name, weight in weights.items() if weight is not None}, path)
    return path


STEM = "blocks.0.self_attn.q"


def quant(form: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({f"{STEM}.weight": None}, [STEM]),
        ({f"{STEM}.scale_weight": torch.ones(3)}, [STEM, 3]),
        ({f"{STEM}.weight_scale_2": torch.ones(1)}, ["weight_scale_2"]),
        ({f"{STEM}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}, ["nvfp4"]),
        ({f"{STEM}.comfy_quant": torch.tensor(list(b"nonsense"), dtype=torch.uint8)}, []),
        ({f"{STEM}.scale_weight": torch.full((24, 1), 127, dtype=torch.uint8)}, ["MXFP8", STEM]),
        ({f"{STEM}.scale_weight": torch.tensor([1])}, ["int64", STEM]),
        ({f"{STEM}.weight_scale": torch.ones(1)}, [f"{STEM}.weight_scale", f"{STEM}.scale_weight"]),
        ({f"{STEM}.weight": torch.ones(24, 24, dtype=torch.uint8)}, ["uint8", f"{STEM}.weight"]),
        ({f"{STEM}.weight": torch.ones(24, 24, dtype=torch.int8)}, ["int8", f"{STEM}.weight"]),
        ({f"{STEM}.weight": torch.ones(24, 24, dtype=torch.bool)}, ["bool", f"{STEM}.weight"]),
        ({f"{STEM}.comfy_quant": quant("int8_tensorwise")}, ["float8_e4m3fn", "int8", f"{STEM}.weight"]),
        ({f"{STEM}.comfy_quant": quant("float8_e5m2")}, ["float8_e4m3fn", "float8_e5m2", STEM]),
    ],
)
def test_forms_that_are_not_known_are_rejected_by_name(
    tmp_path: Path, changes: dict[str, torch.Tensor], facts: list[object]
) -> None:
    with raises(WeightsError, *facts):
        open_weights(broken(tmp_path / "a.safetensors", **changes))


def test_fp8_as_bytes_with_a_named_format_is_read(tmp_path: Path) -> None:
    sizes(tmp_path)
    exact = open_weights(broken(tmp_path / "fp8.safetensors")).read(f"{STEM}.weight")
    stored = load_file(tmp_path / "fp8.safetensors")[f"{STEM}.weight"].view(torch.uint8)
    changes = {f"{STEM}.weight": stored, f"{STEM}.comfy_quant": quant("float8_e4m3fn")}
    path = broken(tmp_path / "bytes.safetensors", **changes)
    assert torch.equal(open_weights(path).read(f"{STEM}.weight"), exact)


def all_in_one(folder: Path) -> Path:
    """Transformer, VAE and text encoder under ComfyUI's prefixes, two of them fp8_scaled."""
    sizes(folder)
    write_fp8_scaled(folder / "t.safetensors", STATE, prefix="model.diffusion_model.")
    write_vae(folder / VAE_FILE, tiny_vae())
    found = load_file(folder / "t.safetensors")
    vae = torch.load(folder / VAE_FILE, weights_only=True)
    found |= {f"vae.{name}": weight.contiguous() for name, weight in vae.items()}
    found |= comfy_umt5("text_encoders.umt5xxl.transformer.")
    found["text_encoders.umt5xxl.logit_scale"] = torch.tensor(1.0)
    save_file(found, folder / "all.safetensors")
    (folder / "t.safetensors").unlink()
    (folder / VAE_FILE).unlink()
    return folder / "all.safetensors"


def comfy_umt5(prefix: str = "") -> dict[str, torch.Tensor]:
    """Comfy-Org's umt5_xxl_fp8_e4m3fn_scaled: names of transformers, the tokenizer as a tensor."""
    found = {f"{prefix}scaled_fp8": torch.empty(0, dtype=E4M3)}
    for name, weight in tiny_umt5(0, TINY.trunk.text_dim).state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        if ".SelfAttention.q." in name:
            scale = weight.abs().max() / 448
            stem = prefix + name.removesuffix(".weight")
            found |= {f"{stem}.weight": (weight / scale).to(E4M3), f"{stem}.scale_weight": scale}
        else:
            found[prefix + name] = weight.half()
    found[f"{prefix}spiece_model"] = torch.arange(50, dtype=torch.uint8)
    return found


def test_each_part_of_one_file_is_read(tmp_path: Path) -> None:
    path = all_in_one(tmp_path)
    write_tokenizer(tmp_path / TOKENIZER_FOLDER)
    source = open_weights(path)
    assert set(source.tensors) == set(STATE)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"patch_size": [1, 2, 2]}
    (tmp_path / "config.json").write_text(json.dumps(settings))  # the transformer's, not the VAE's
    vae = load_vae(path)
    write_vae(tmp_path / "vae_alone.pth", tiny_vae())
    alone = load_vae(tmp_path / "vae_alone.pth")
    assert all(
        torch.equal(a, b) for a, b in zip(vae.model.parameters(), alone.model.parameters(), strict=True)
    )
    text = load_text_encoder(path, tmp_path / TOKENIZER_FOLDER, dtype=torch.float32)
    write_umt5(tmp_path / TEXT_FILE, tiny_umt5(0, TINY.trunk.text_dim), torch.float32)
    exact = load_text_encoder(tmp_path / TEXT_FILE, tmp_path / TOKENIZER_FOLDER, dtype=torch.float32)
    (found,), (expected,) = text.encode(["a red ball"]), exact.encode(["a red ball"])
    assert ((found - expected).norm() / expected.norm()).item() < 0.05


def test_comfyuis_text_encoder_needs_no_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / TOKENIZER_FOLDER)
    save_file(comfy_umt5(), tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    load_text_encoder(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", tmp_path / TOKENIZER_FOLDER)
    plain_t5 = {n: w for n, w in comfy_umt5().items() if "block.1.layer.0.SelfAttention.relative" not in n}
    save_file(plain_t5, tmp_path / "t5.safetensors")
    with raises(WeightsError, "UMT5"):
        load_text_encoder(tmp_path / "t5.safetensors", tmp_path / TOKENIZER_FOLDER)


def test_plain_fp8_of_other_models_keeps_its_dtype(tmp_path: Path) -> None:
    """Its dtype is part of a text encoder's fingerprint, which names features."""
    save_file({"a": torch.ones(2).to(E4M3)}, tmp_path / "a.safetensors")
    assert read_tensors([tmp_path / "a.safetensors"])["a"].dtype == E4M3


def test_files_in_8_bits_convert(tmp_path: Path) -> None:
    from checkpoint.config import ToMmConfig
    from checkpoint.vace import hf_to_mm

    sizes(tmp_path)
    rounded = write_comfy_quant(tmp_path / "a.safetensors", STATE)
    hf_to_mm(ToMmConfig(source_path=str(tmp_path / "a.safetensors"), target_path=str(tmp_path / "mm")))
    found = open_weights(tmp_path / "mm")
    name = "blocks.0.ffn.0.weight"
    torch.testing.assert_close(found.read(name).float(), rounded[name], rtol=2**-8, atol=0)
