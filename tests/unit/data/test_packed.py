"""Checksums of our own files.

One flipped bit is found with file and tensor, and older files without any stay readable.
"""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mindspeed_mm.data.features import (
    read_feature,
    read_info,
    read_null_prompt,
    read_prompts,
    write_feature,
    write_null_prompt,
)
from mindspeed_mm.data.packed import read_header, read_packed, write_packed
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.errors import DataError, WeightsError
from mindspeed_mm.generation.stored import read_latents, write_latents
from tests.support.errors import raises

pytestmark = pytest.mark.medium


def record(refs=1, captions=2):
    generator = torch.Generator().manual_seed(0)
    return FeatureRecord(
        latents=torch.randn(16, refs + 2, 4, 6, generator=generator),
        vace_context=torch.randn(96, refs + 2, 4, 6, generator=generator),
        prompt_embeds=tuple(torch.randn(3 + i, 8, generator=generator) for i in range(captions)),
        num_refs=refs,
        key="k0",
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "k0.safetensors"
    write_feature(path, record(), {"fps": "16", "captions": '["红"]'})
    return path


def place_of(path, name):
    """Where the bytes of a tensor begin, and how many there are."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + begin, end - begin


def flip(path, place, bit=3):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["video", "vace_context", "prompt_ids", "prompt_ids.1", "prompt_mask"])
def test_one_bit_of_a_feature_is_found_with_file_and_tensor(path, name):
    start, size = place_of(path, name)
    flip(path, start + size // 2)
    with raises(DataError, name, where=path):
        read_feature(path)
    assert read_feature(path, verify=False).key == "k0"


def test_any_bit_of_the_file_is_found_or_changes_nothing(path):
    whole, good = path.read_bytes(), read_feature(path)
    chance = random.Random(7)
    for _ in range(150):
        path.write_bytes(whole)
        flip(path, chance.randrange(min(len(whole), 2500)), chance.randrange(8))
        try:
            found = read_feature(path)
        except DataError:
            continue
        assert torch.equal(found.latents, good.latents)
        assert found.num_refs == good.num_refs


def test_number_in_the_header_is_covered(path):
    path.write_bytes(path.read_bytes().replace(b'"num_refs":"1"', b'"num_refs":"0"'))
    with raises(DataError, "header", where=path):
        read_info(path)
    assert read_info(path, verify=False).num_refs == 0


def test_file_without_checksums_is_read(tmp_path):
    made, path = record(), tmp_path / "old.safetensors"
    tensors = {"video": made.latents, "vace_context": made.vace_context, "prompt_ids": made.prompt_embeds[0]}
    save_file(tensors, path, {"num_refs": "1", "key": "old"})
    assert torch.equal(read_feature(path).latents, made.latents)
    assert read_info(path).num_refs == 1


def test_checksums_stay_inside_the_file(path):
    assert "crc32.video" in (safe_open(path, "pt").metadata() or {})
    assert not any("crc32" in key for key in read_info(path).metadata)


def test_null_prompt_has_a_checksum(tmp_path):
    path = tmp_path / "null_prompt.safetensors"
    write_null_prompt(path, torch.ones(2, 8), "t5")
    flip(path, place_of(path, "prompt_ids")[0])
    with raises(DataError, "prompt_ids", where=path):
        read_null_prompt(path)
    assert read_null_prompt(path, verify=False).shape == (2, 8)


def test_header_of_a_null_prompt_and_of_prompts_is_covered(tmp_path, path):
    null = tmp_path / "null_prompt.safetensors"
    write_null_prompt(null, torch.ones(2, 8), "t5")
    null.write_bytes(null.read_bytes().replace(b'"t5"', b'"t6"'))
    with raises(DataError, "header", where=null):
        read_null_prompt(null)
    path.write_bytes(path.read_bytes().replace(b'"16"', b'"17"'))
    with raises(DataError, "header", where=path):
        read_prompts(path)


def test_binary_metadata_is_one_line(path):
    header = b'{"__metadata__":{"num_refs":1},"video":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with raises(DataError, where=path):
        read_info(path)


def test_kept_latents_have_a_checksum(tmp_path):
    made = torch.randn(16, 3, 4, 6)
    sampling = {"num_frames": 5, "height": 32, "width": 48, "fps": 16}
    path = write_latents(tmp_path, made, 1, {"prompt": "红", "sampling": sampling})
    found, refs, settings = read_latents(path)
    assert torch.equal(found, made)
    assert (refs, settings.prompt) == (1, "红")
    flip(path, place_of(path, "latents")[0])
    with raises(WeightsError, "latents", where=path):
        read_latents(path)
    assert read_latents(path, verify=False)[1] == 1


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 11) + b'{"video":1}',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 20) + b'{"__metadata__": []} ',
        b"",
    ],
)
def test_invalid_header_is_one_line(tmp_path, raw):
    (tmp_path / "x.safetensors").write_bytes(raw)
    with raises(DataError, "x.safetensors"):
        read_header(tmp_path / "x.safetensors")
    with raises(DataError, "x.safetensors"):
        read_packed(tmp_path / "x.safetensors", ("video",))


def test_empty_tensor_has_a_checksum_too(tmp_path):
    write_packed(tmp_path / "x.safetensors", {"a": torch.zeros(0, 3), "b": torch.ones(2)}, {})
    assert read_packed(tmp_path / "x.safetensors", ("a", "b"))["a"].shape == (0, 3)


# ---- what no feature has


def odd(path, **changes):
    made = record()
    tensors = {
        "video": made.latents,
        "vace_context": made.vace_context,
        "prompt_ids": made.prompt_embeds[0],
        **changes,
    }
    metadata = {"num_refs": str(tensors.pop("num_refs", 1))}
    write_packed(path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"video": torch.zeros(16, 3, 4, 6, dtype=torch.int16)}, ("video",)),
        ({"video": torch.zeros(16, 3, 4, 6).to(torch.float8_e4m3fn)}, ("video",)),
        ({"prompt_ids": torch.zeros(3, 8, dtype=torch.int64)}, ("prompt_ids",)),
        ({"vace_context": torch.zeros(96, 3, 4, 8)}, ("vace_context", "[96, 3, 4, 8]")),
        ({"vace_context": None}, ("vace_context",)),
        ({"num_refs": 3}, ("num_refs", 3)),
        ({"num_refs": -1}, ("num_refs", "'-1'")),
        ({"num_refs": "two"}, ("num_refs", "'two'")),
        ({"num_refs": "9" * 5000}, ("num_refs",)),
    ],
)
def test_foreign_file_is_rejected_by_its_header(tmp_path, changes, facts):
    path = odd(tmp_path / "x.safetensors", **changes)
    for read in (read_info, read_feature):
        with raises(DataError, *facts, where=path):
            read(path)
