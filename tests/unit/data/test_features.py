"""Feature files: what is written is read; what is damaged or foreign is refused; published files are read."""

import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch

from mindspeed_mm.data.features import (
    is_complete,
    read_feature,
    read_info,
    read_null_prompt,
    read_prompts,
    write_feature,
    write_null_prompt,
)
from mindspeed_mm.data.packed import write_packed
from mindspeed_mm.data.published import check_values
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.errors import DataError
from tests.support.errors import raises


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


def test_feature_comes_back_as_it_was_written_in_bf16(path):
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


def test_file_that_was_cut_or_never_finished_is_rejected(path):
    write_feature(path, record(), {})
    assert is_complete(path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not is_complete(path)
        with raises(DataError, path):
            read_feature(path)


def test_interrupted_write_leaves_the_old_file_and_no_rubbish(path, monkeypatch):
    write_feature(path, record(), {})
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_feature(path, record(refs=0), {})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"latents": torch.zeros(8, 3, 4, 6)}, ("video", "[8, 3, 4, 6]")),
        ({"vace_context": torch.zeros(96, 2, 4, 6)}, ("vace_context", "[96, 3, 4, 6]")),
        ({"prompt_embeds": (torch.zeros(0, 8),)}, ("prompt_ids",)),
        ({"prompt_embeds": (torch.zeros(3, 0),)}, ("prompt_ids",)),
        ({"prompt_embeds": (torch.zeros(3, 8), torch.zeros(3, 9))}, ("prompt_ids.1", "[3, 9]", "[L, 8]")),
        ({"num_refs": 3}, ("num_refs", 3)),
    ],
)
def test_shapes_that_do_not_belong_together_are_rejected(path, changes, facts):
    write_feature(path, replace(record(), **changes), {})
    for read in (read_feature, read_info):
        with raises(DataError, *facts, where=path):
            read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -20000.0])
@pytest.mark.parametrize("name", ["video", "vace_context", "prompt_ids", "prompt_ids.1"])
def test_values_that_no_feature_has_are_rejected(path, name, value):
    made = record(captions=2)
    tensors = {"video": made.latents, "vace_context": made.vace_context}
    tensors |= {"prompt_ids": made.prompt_embeds[0], "prompt_ids.1": made.prompt_embeds[1]}
    tensors[name].view(-1)[5] = value
    write_feature(path, made, {})
    with raises(DataError, name, where=path):
        read_feature(path)
    if name.startswith("prompt"):
        with raises(DataError, name, where=path):
            read_prompts(path)


@pytest.mark.parametrize("size", [1, 7, 64, 1001])
def test_nan_is_found_in_any_place_and_dtype(path, size):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for place in {0, size // 2, size - 1}:
            values = torch.ones(size, dtype=dtype)
            values[place] = float("nan")
            with raises(DataError, "x", where=path):
                check_values(path, "x", values)


@pytest.mark.parametrize(
    "name", ["prompt_ids.x", "prompt_ids.3", "prompt_ids.01", "prompt_ids." + "9" * 5000]
)
def test_prompt_without_a_place_among_the_captions_is_rejected(path, name):
    made = record()
    tensors = {"video": made.latents, "vace_context": made.vace_context, "prompt_ids": made.prompt_embeds[0]}
    write_packed(path, {**tensors, name: made.prompt_embeds[0].clone()}, {"num_refs": "1"})
    for read in (read_feature, read_info, read_prompts):
        with raises(DataError, where=path):
            read(path)


def test_references_are_counted_where_the_header_lacks_them(path):
    made = record(refs=2)
    tensors = {"video": made.latents, "vace_context": made.vace_context, "prompt_ids": made.prompt_embeds[0]}
    write_packed(path, tensors, {})
    assert read_info(path).num_refs == read_feature(path).num_refs == 2


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
def test_published_pt_is_read_without_padding(tmp_path, batched):
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


def test_pt_with_something_missing_or_misshapen_is_rejected(tmp_path):
    torch.save({"video": torch.zeros(16, 1, 2, 2)}, tmp_path / "a.pt")
    with raises(DataError, "prompt_ids, prompt_mask, vace_context", where=tmp_path / "a.pt"):
        read_feature(tmp_path / "a.pt")
    published(tmp_path / "b.pt", video=torch.zeros(2, 16, 3, 4, 6))
    with raises(DataError, "video", "4 axes", where=tmp_path / "b.pt"):
        read_feature(tmp_path / "b.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["video", "prompt_mask"])
@pytest.mark.parametrize("kind", ["sparse", "meta", "fp8", "quantized", "nested", "expanded", "complex"])
def test_pt_with_unusual_tensors_is_one_line(tmp_path, name, kind):
    plain = torch.ones(16, 4, 4, 6) if name == "video" else torch.ones(1, 16)
    made = {
        "sparse": lambda: plain.to_sparse(),
        "meta": lambda: plain.to("meta"),
        "fp8": lambda: plain.to(torch.float8_e4m3fn),
        "quantized": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]),
        "expanded": lambda: torch.zeros(1).expand(16, 10**5, 10**4, 10**3),
        "complex": lambda: plain.to(torch.complex64),
    }[kind]()
    published(tmp_path / "x.pt", **{name: made})
    with raises(DataError, where=tmp_path / "x.pt"):
        read_feature(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "mask",
    [
        [0] * 13 + [1] * 3,
        [1, 0, 1] + [0] * 13,
        [0] * 16,
        [1] * 500,
        [1] * 3,
        [2] * 16,
        [float("nan")] * 16,
        [0.5] * 16,
    ],
)
def test_pt_mask_that_is_not_padded_on_the_right_is_rejected(tmp_path, mask):
    published(tmp_path / "x.pt", prompt_mask=torch.tensor([mask]))
    with raises(DataError, "prompt_mask", where=tmp_path / "x.pt"):
        read_feature(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_pt_mask_of_any_dtype_is_read(tmp_path, dtype):
    published(tmp_path / "x.pt", prompt_mask=torch.tensor([[1] * 3 + [0] * 13]).to(dtype))
    assert len(read_feature(tmp_path / "x.pt").prompt_embeds[0]) == 3


def test_pt_that_unpacks_to_more_than_it_holds_is_rejected(tmp_path):
    published(tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record.filename))
        target.writestr("x/data/99", b"\0" * (1 << 20))
    with raises(DataError, "compressed", where=tmp_path / "bomb.pt"):
        read_feature(tmp_path / "bomb.pt")


@pytest.mark.parametrize("damage", ["bit", "empty", "fifo"])
def test_damaged_pt_is_rejected(tmp_path, damage):
    path = tmp_path / "a.pt"
    published(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b"" if damage == "empty" else bytes(data))
    with raises(DataError, "a.pt"):
        read_feature(path)


def test_pt_checksums_are_skipped_on_request(tmp_path):
    source = published(tmp_path / "x.pt")
    raw = bytearray((tmp_path / "x.pt").read_bytes())
    place = raw.index(source.vace_context.numpy().tobytes())
    raw[place + 5] ^= 1
    (tmp_path / "x.pt").write_bytes(raw)
    with raises(DataError, "checksum", where=tmp_path / "x.pt"):
        read_feature(tmp_path / "x.pt")
    with raises(DataError, "checksum", where=tmp_path / "x.pt"):
        read_info(tmp_path / "x.pt")
    read_feature(tmp_path / "x.pt", verify=False)
    read_info(tmp_path / "x.pt", verify=False)


def test_pt_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        source = published(tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_feature(tmp_path / "x.pt")
    assert torch.equal(found.vace_context, source.vace_context)


def test_feature_with_nan_is_rejected(tmp_path):
    latents = torch.zeros(16, 3, 4, 6)
    latents[0, 1, 2, 3] = float("nan")
    published(tmp_path / "a.pt", video=latents)
    with raises(DataError, "video", "NaN", where=tmp_path / "a.pt"):
        read_feature(tmp_path / "a.pt")


class Forged:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_pt_with_code_is_rejected_and_not_run(tmp_path):
    torch.save({"video": Forged()}, tmp_path / "forged.pt")
    with raises(DataError, where=tmp_path / "forged.pt"):
        read_feature(tmp_path / "forged.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Forged()))
    with raises(DataError, where=tmp_path / "bare.pt"):
        read_feature(tmp_path / "bare.pt")


def test_null_prompt_comes_back(tmp_path):
    embeds = torch.randn(1, 8)
    write_null_prompt(tmp_path / "null_prompt.safetensors", embeds, "fingerprint")
    assert torch.equal(read_null_prompt(tmp_path / "null_prompt.safetensors"), embeds.bfloat16())


@pytest.mark.parametrize(
    "embeds",
    [
        torch.tensor([[float("nan"), 1.0]]),
        torch.tensor([[float("inf"), 1.0]]),
        torch.tensor([[1e30, 1.0]]),
        torch.ones(2, 8).to(torch.float8_e4m3fn),
        torch.ones(2, 8, dtype=torch.int16),
        torch.ones(2, 0),
        torch.ones(8),
    ],
    ids=["nan", "inf", "huge", "fp8", "int", "width", "axes"],
)
def test_malformed_null_prompt_is_rejected(path, embeds):
    write_packed(path, {"prompt_ids": embeds}, {})
    with raises(DataError, "prompt_ids", where=path):
        read_null_prompt(path)


@pytest.mark.parametrize("raw", [b"", b"PK", b"text"])
def test_damaged_pt_gives_our_own_reason(tmp_path, raw):
    (tmp_path / "x.pt").write_bytes(raw)
    with raises(DataError, where=tmp_path / "x.pt") as caught:
        read_feature(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)


def test_fifo_as_a_feature_ends_immediately(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with raises(DataError, "FIFO"):
        read_feature(tmp_path / "x.pt")
