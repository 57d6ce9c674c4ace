"""Datasets by name.

Features as extraction lists them, published lists, raw clips, another package's dataset.
"""

import json
import os

import pytest
import torch

from mindspeed_mm.data.config import FeatureDatasetConfig
from mindspeed_mm.data.dataset import FeatureDataset
from mindspeed_mm.data.features import write_feature, write_null_prompt
from mindspeed_mm.data.registry import DATASETS, DatasetSpec, read_data_config
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.registry import resolve
from tests.support.errors import absent, raises


def write(folder, name, refs=0, frames=2):
    shape = (refs + frames, 4, 6)
    record = FeatureRecord(
        latents=torch.zeros(16, *shape),
        vace_context=torch.ones(96, *shape),
        prompt_embeds=(torch.zeros(3, 8),),
        num_refs=refs,
        key=name,
    )
    write_feature(folder / "features" / f"{name}.safetensors", record, {})
    return {"file": f"features/{name}.safetensors", "shape": list(shape), "num_refs": refs}


def listed(folder, rows):
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FeatureDataset(FeatureDatasetConfig(basic_parameters={"data_path": str(folder / "data.jsonl")}))


def test_rows_come_in_the_order_of_the_list_with_their_shapes(tmp_path):
    dataset = listed(tmp_path, [write(tmp_path, "b", refs=1), write(tmp_path, "a", frames=5)])
    assert len(dataset) == 2
    assert [dataset.shape(i) for i in range(2)] == [(3, 4, 6, 1), (5, 4, 6, 0)]
    assert [dataset[i].key for i in range(2)] == ["b", "a"]
    assert isinstance(dataset[0], FeatureRecord)


def test_unlisted_shapes_are_read_from_the_files(tmp_path):
    row = write(tmp_path, "a", refs=2)
    dataset = listed(tmp_path, [{"file": row["file"]}])
    assert dataset.shape(0) == (4, 4, 6, 2)


def test_published_features_are_found_in_the_data_folder(tmp_path):
    torch.save(
        {
            "video": torch.zeros(16, 2, 4, 6),
            "vace_context": torch.ones(96, 2, 4, 6),
            "prompt_ids": torch.zeros(1, 5, 8),
            "prompt_mask": torch.ones(1, 5),
        },
        tmp_path / "x.pt",
    )
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/data.jsonl").write_text('{"file": "x.pt", "cap": "a"}\n')
    source = {"data_path": str(tmp_path / "lists/data.jsonl"), "data_folder": str(tmp_path)}
    dataset = FeatureDataset(FeatureDatasetConfig(basic_parameters=source))
    assert dataset.shape(0) == (2, 4, 6, 0)
    assert dataset[0].prompt_embeds[0].shape == (5, 8)


def test_null_prompt_is_next_to_the_list_or_none(tmp_path):
    rows = [write(tmp_path, "a")]
    assert listed(tmp_path, rows).null_prompt is None
    write_null_prompt(tmp_path / "null_prompt.safetensors", torch.ones(1, 8), "t5")
    assert torch.equal(listed(tmp_path, rows).null_prompt, torch.ones(1, 8, dtype=torch.bfloat16))


def test_errors_name_the_row(tmp_path):
    dataset = listed(
        tmp_path, [write(tmp_path, "a"), {"file": "features/gone.safetensors", "shape": [1, 2, 3]}]
    )
    with raises(DataError, "data.jsonl[1]", f"gone.safetensors: {absent('gone.safetensors')}"):
        dataset[1]
    wrong = write(tmp_path, "b") | {"shape": [9, 4, 6]}
    with raises(DataError, "shape", "[2, 4, 6]", "[9, 4, 6]", where="data.jsonl[0]"):
        listed(tmp_path, [wrong])[0]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "no features"),
        ('{"video": "a.mp4", "cap": "x"}\n', "a clip"),
        ('{"feature": "a.pt"}\n', "feature file"),
        ("{oops\n", "data.jsonl:1:2"),
        ('{"file": "a.pt", "shape": 7}\n', "data.jsonl[0].shape"),
        ('{"file": "a.pt", "shape": [1, null, 2]}\n', "data.jsonl[0].shape"),
        ('{"file": "a.pt", "shape": [1, 2, true]}\n', "data.jsonl[0].shape"),
        ('{"file": "a.pt", "shape": [1, 2, 9223372036854775808]}\n', "data.jsonl[0].shape"),
        ('{"file": "a.pt", "num_refs": -1}\n', "data.jsonl[0].num_refs"),
        ('{"file": "a.pt", "num_refs": "1"}\n', "data.jsonl[0].num_refs"),
    ],
)
def test_invalid_list_is_rejected(tmp_path, text, fact):
    (tmp_path / "data.jsonl").write_text(text)
    with raises(DataError, fact):
        FeatureDataset(FeatureDatasetConfig(basic_parameters={"data_path": str(tmp_path / "data.jsonl")}))


def test_missing_list_names_its_writer(tmp_path):
    with raises(DataError, "no.jsonl", "feature extraction"):
        FeatureDataset(FeatureDatasetConfig(basic_parameters={"data_path": str(tmp_path / "no.jsonl")}))


def test_both_datasets_are_built_by_name(tmp_path):
    listed(tmp_path, [write(tmp_path, "a")])
    (tmp_path / "feature.json").write_text(
        json.dumps(
            {
                "dataset_param": {
                    "dataset_type": "feature",
                    "basic_parameters": {"data_path": str(tmp_path / "data.jsonl")},
                }
            }
        )
    )
    config = read_data_config(tmp_path / "feature.json")
    assert len(resolve(DATASETS.get(config.dataset_type).build)(config.dataset_param)) == 1
    assert DATASETS.get("vace").build == "mindspeed_mm.data.dataset:VaceDataset"
    assert callable(resolve(DATASETS.get("vace").build))


def test_other_dataset_is_one_line_and_a_typo_names_the_nearest(tmp_path):
    DATASETS.add(
        "mine", DatasetSpec(config=FeatureDatasetConfig, build="mindspeed_mm.data.dataset:FeatureDataset")
    )
    try:
        assert "mine" in DATASETS
        with raises(ConfigError, "feature"):
            DATASETS.get("featur")
    finally:
        del DATASETS._entries["mine"]


@pytest.mark.parametrize(
    ("row", "sizes", "facts"),
    [
        ({"shape": [9, 4, 6]}, (8, 512), ("shape", "[9, 4, 6]", "[3, 4, 6]")),
        ({"num_refs": 0}, (8, 512), ("num_refs", 0, 1)),
        ({}, (4096, 512), ("prompt_ids", 8, "predictor.text_dim 4096")),
        ({}, (8, 2), ("prompt_ids", "3 tokens", "predictor.text_len 2")),
        (
            {"file": "features/gone.safetensors"},
            (8, 512),
            (f"gone.safetensors: {absent('gone.safetensors')}",),
        ),
    ],
)
def test_header_check_names_row_file_and_fact(tmp_path, row, sizes, facts):
    dataset = listed(tmp_path, [write(tmp_path, "a"), write(tmp_path, "b", refs=1) | row])
    dataset.check(0, text_dim=8, text_len=512)
    with raises(DataError, "data.jsonl[1]", *facts):
        dataset.check(1, text_dim=sizes[0], text_len=sizes[1])


@pytest.mark.parametrize(
    ("sizes", "facts"), [((9, 512), (8, 9)), ((8, 4), (5, 4)), ((8, 512), ("num_refs", 1, 0))]
)
def test_pt_is_checked_by_the_same_sizes_when_it_is_read(tmp_path, sizes, facts):
    published = {
        "video": torch.zeros(16, 2, 4, 6),
        "vace_context": torch.ones(96, 2, 4, 6),
        "prompt_ids": torch.zeros(1, 5, 8),
        "prompt_mask": torch.ones(1, 5),
    }
    torch.save(published, tmp_path / "x.pt")
    dataset = listed(tmp_path, [{"file": "x.pt", "num_refs": 1 if "num_refs" in facts else 0}])
    dataset.check(0, text_dim=sizes[0], text_len=sizes[1])
    with raises(DataError, "data.jsonl[0]", *facts):
        dataset[0]


def test_key_of_the_list_cannot_stand_for_the_header(tmp_path):
    row = {"file": write(tmp_path, "a", refs=1)["file"], "_info": 5}
    assert listed(tmp_path, [row]).shape(0) == (3, 4, 6, 1)


def test_fifo_as_null_prompt_is_named(tmp_path):
    os.mkfifo(tmp_path / "null_prompt.safetensors")
    with raises(DataError, "FIFO"):
        listed(tmp_path, [write(tmp_path, "a")]).check_null_prompt(8, 512)


@pytest.mark.parametrize(("sizes", "facts"), [((9, 512), (8, 9)), ((8, 3), (4, 3))])
def test_null_prompt_of_other_sizes_is_rejected(tmp_path, sizes, facts):
    dataset = listed(tmp_path, [write(tmp_path, "a")])
    write_null_prompt(tmp_path / "null_prompt.safetensors", torch.ones(4, 8), "t5")
    with raises(DataError, *facts, where=tmp_path / "null_prompt.safetensors"):
        dataset.check_null_prompt(*sizes)


def test_flag_and_key_leave_checksums_out(tmp_path):
    rows = [write(tmp_path, "a")]
    file = tmp_path / rows[0]["file"]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with raises(DataError, "data.jsonl[0]"):
        listed(tmp_path, rows)[0]
    source = {"data_path": str(tmp_path / "data.jsonl")}
    config = FeatureDatasetConfig(basic_parameters=source, verify_checksums=False)
    assert FeatureDataset(config)[0].key == "a"


def test_caption_with_a_line_separator_does_not_split_a_row(tmp_path):
    row = write(tmp_path, "a") | {"cap": "one\u2028two\x85three"}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "data.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    source = {"data_path": str(tmp_path / "data.jsonl")}
    assert len(FeatureDataset(FeatureDatasetConfig(basic_parameters=source))) == 1


def test_csv_of_clips_is_not_a_list_of_features(tmp_path):
    (tmp_path / "metadata.csv").write_text("video,prompt\n")
    with raises(DataError, "extract"):
        FeatureDataset(FeatureDatasetConfig(basic_parameters={"data_path": str(tmp_path / "metadata.csv")}))


@pytest.mark.parametrize("file", ["a\0b.safetensors", "x" * 300 + ".safetensors"])
def test_feature_path_that_cannot_exist_names_its_row(tmp_path, file):
    with raises(DataError, "data.jsonl[0]"):
        listed(tmp_path, [{"file": file, "shape": [2, 4, 6], "num_refs": 0}])[0]
