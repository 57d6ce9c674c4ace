"""Feature files: what is written is read; what is damaged or foreign is refused; published files are read."""

import os
import pickle
from dataclasses import replace

import pytest
import torch

from mindspeed_mm.data.features import (
    is_complete,
    read_feature,
    read_info,
    read_null_prompt,
    write_feature,
    write_null_prompt,
)
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.errors import DataError


def record(refs=1, captions=1, key="k0"):
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(96, refs + 2, 4, 6, generator=generator)
    context[16:, :refs] = 0
    return FeatureRecord(
        latents=torch.randn(16, refs + 2, 4, 6, generator=generator),
        vace_context=context,
        prompt_embeds=tuple(torch.randn(3 + i, 8, generator=generator) for i in range(captions)),
        num_refs=refs,
        key=key,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "features" / "k0.safetensors"


def test_a_feature_comes_back_as_it_was_written_in_bf16(path):
    written = record(captions=12)
    write_feature(path, written, {"fps": "16", "captions": '["红"]'})
    found = read_feature(path)
    assert torch.equal(found.latents, written.latents.bfloat16())
    assert torch.equal(found.vace_context, written.vace_context.bfloat16())
    assert len(found.prompt_embeds) == 12  # prompt_ids.10 comes after prompt_ids.2
    for ours, theirs in zip(found.prompt_embeds, written.prompt_embeds, strict=True):
        assert torch.equal(ours, theirs.bfloat16())
    assert (found.num_refs, found.key) == (1, "k0")
    info = read_info(path)
    assert (info.shape, info.num_refs, info.num_captions) == ((3, 4, 6), 1, 12)
    assert (info.metadata["fps"], info.metadata["captions"], info.metadata["schema_version"]) == (
        "16",
        '["红"]',
        "1",
    )


def test_tensor_names_are_the_published_ones(path):
    from safetensors import safe_open

    write_feature(path, record(captions=2), {})
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes == {
        "video": [16, 3, 4, 6],
        "vace_context": [96, 3, 4, 6],
        "prompt_ids": [3, 8],
        "prompt_mask": [3],
        "prompt_ids.1": [4, 8],
        "prompt_mask.1": [4],
    }


def test_equal_features_are_equal_files(tmp_path):
    metadata = {f"name {i}": str(i) for i in range(20)}
    for name in ("a", "b"):
        write_feature(
            tmp_path / name, record(), dict(reversed(metadata.items())) if name == "b" else metadata
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_was_cut_or_never_finished_is_refused(path):
    write_feature(path, record(), {})
    assert is_complete(path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not is_complete(path)
        with pytest.raises(DataError, match=str(path)):
            read_feature(path)


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(path, monkeypatch):
    write_feature(path, record(), {})
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_feature(path, record(refs=0), {})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents": torch.zeros(8, 3, 4, 6)}, r"video has shape \[8, 3, 4, 6\]"),
        ({"vace_context": torch.zeros(96, 2, 4, 6)}, r"vace_context has shape .* expected \[96, 3, 4, 6\]"),
        ({"prompt_embeds": (torch.zeros(0, 8),)}, "prompt_ids"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(path, changes, words):
    write_feature(path, replace(record(), **changes), {})
    with pytest.raises(DataError, match=words):
        read_feature(path)


def published(path, **changes):
    source = record(refs=2)
    prompt = torch.zeros(1, 16, 8)
    prompt[0, :3] = source.prompt_embeds[0]
    mask = torch.zeros(1, 16, dtype=torch.int64)
    mask[0, :3] = 1
    values = {
        "video": source.latents,
        "prompt_ids": prompt,
        "prompt_mask": mask,
        "vace_context": source.vace_context,
    }
    torch.save({**values, **changes}, path)
    return source


@pytest.mark.parametrize("batched", [False, True])
def test_a_published_pt_is_read_without_its_padding_and_its_references_are_counted(tmp_path, batched):
    path = tmp_path / "x.pt"
    source = published(path)
    if batched:
        source = published(path, video=record(2).latents[None], vace_context=[record(2).vace_context])
    found = read_feature(path)
    assert torch.equal(found.latents, source.latents)
    assert torch.equal(found.vace_context, source.vace_context)
    assert torch.equal(found.prompt_embeds[0], source.prompt_embeds[0])
    assert (found.num_refs, found.key) == (2, "x")
    assert read_info(path).shape == (4, 4, 6)


def test_a_pt_with_something_missing_or_misshapen_is_refused(tmp_path):
    torch.save({"video": torch.zeros(16, 1, 2, 2)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="prompt_ids, prompt_mask, vace_context missing"):
        read_feature(tmp_path / "a.pt")
    published(tmp_path / "b.pt", video=torch.zeros(2, 16, 3, 4, 6))
    with pytest.raises(DataError, match="4 axes are wanted"):
        read_feature(tmp_path / "b.pt")


@pytest.mark.parametrize("damage", ["bit", "empty", "fifo"])
def test_a_damaged_pt_is_refused(tmp_path, damage):
    path = tmp_path / "a.pt"
    published(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b"" if damage == "empty" else bytes(data))
    with pytest.raises(DataError, match=r"a\.pt"):
        read_feature(path)


def test_a_feature_with_nan_is_refused(tmp_path):
    latents = torch.zeros(16, 3, 4, 6)
    latents[0, 1, 2, 3] = float("nan")
    published(tmp_path / "a.pt", video=latents)
    with pytest.raises(DataError, match=r"a\.pt: video has values that are NaN"):
        read_feature(tmp_path / "a.pt")


class Forged:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_a_pt_that_carries_code_is_refused_and_the_code_does_not_run(tmp_path):
    torch.save({"video": Forged()}, tmp_path / "forged.pt")
    with pytest.raises(DataError, match=r"forged\.pt: cannot be read as tensors"):
        read_feature(tmp_path / "forged.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Forged()))
    with pytest.raises(DataError, match="cannot be read as tensors"):
        read_feature(tmp_path / "bare.pt")


def test_the_null_prompt_comes_back(tmp_path):
    embeds = torch.randn(1, 8)
    write_null_prompt(tmp_path / "null_prompt.safetensors", embeds, "fingerprint")
    assert torch.equal(read_null_prompt(tmp_path / "null_prompt.safetensors"), embeds.bfloat16())


@pytest.mark.parametrize("raw", [b"", b"PK", b"text"])
def test_a_damaged_pt_gives_a_reason_of_our_own(tmp_path, raw):
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(DataError, match=r"x\.pt: cannot be read as tensors") as caught:
        read_feature(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)


def test_a_fifo_as_a_feature_ends_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(DataError, match="FIFO"):
        read_feature(tmp_path / "x.pt")
