"""One loader opens every dialect, and says in one line why it does not open the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from megatron.mm.layout import write_tracker
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.load_model import load_transformer
from mindspeed_mm.models.wan.config_json import diffusers_json, official_json
from mindspeed_mm.models.wan.stages import split
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.weights import open_weights
from tests.support.errors import absent, raises
from tests.support.tiny import TINY, tiny_transformer, write_shards, write_transformer

pytestmark = pytest.mark.medium

Weights = dict[str, Tensor]
MM, DIFFUSERS = KEY_MAPS["mm"].to_theirs, KEY_MAPS["diffusers"].to_theirs


@pytest.fixture(scope="module")
def weights() -> Weights:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tiny_transformer().state_dict().items()}


def mm(weights: Weights) -> Weights:
    return {MM(name): tensor for name, tensor in weights.items()}


def config(folder: Path, values: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))


def save(state: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def official(folder: Path, weights: Weights) -> Path:
    config(folder, official_json(TINY))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def sharded(folder: Path, weights: Weights) -> Path:
    config(folder, official_json(TINY))
    write_shards(folder, weights)
    return folder


def unindexed(folder: Path, weights: Weights) -> Path:
    sharded(folder, weights)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    return folder


def shard_list(folder: Path, weights: Weights) -> list[Path]:
    return sorted(sharded(folder, weights).glob("*-of-*.safetensors"))


def prefixed(folder: Path, weights: Weights) -> Path:
    config(folder, official_json(TINY))
    save_file(
        {f"model.diffusion_model.{name}": t for name, t in weights.items()}, folder / "vace_fp16.safetensors"
    )
    return folder / "vace_fp16.safetensors"


def diffusers_root(folder: Path, weights: Weights) -> Path:
    config(folder / "transformer", diffusers_json(TINY))
    save_file(
        {DIFFUSERS(name): t for name, t in weights.items()},
        folder / "transformer/diffusion_pytorch_model.safetensors",
    )
    (folder / "model_index.json").write_text("{}")
    (folder / "vae").mkdir()
    save_file({"encoder.weight": torch.ones(1)}, folder / "vae/diffusion_pytorch_model.safetensors")
    return folder


def diffusers_transformer(folder: Path, weights: Weights) -> Path:
    return diffusers_root(folder, weights) / "transformer"


def release(folder: Path, weights: Weights) -> Path:
    save({"model": mm(weights)}, folder / "release/mp_rank_00/model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    config(folder / "release", official_json(TINY))
    return folder


def iteration(folder: Path, weights: Weights) -> Path:
    extra = {"iteration": 10, "optimizer": {"state": [torch.ones(3), {"step": 1}]}, "args": None}
    save({"model": mm(weights), **extra}, folder / "iter_0000010/mp_rank_00/model_optim_rng.pt")
    write_tracker(folder, 10)
    config(folder, official_json(TINY))
    return folder


def stages(folder: Path, weights: Weights) -> Path:
    for rank, stage in enumerate(split(weights, [1, 2, 1], TINY.vace_layers)):
        save({"model": mm(stage)}, folder / f"release/mp_rank_00_{rank:03d}/model_optim_rng.pt")
    config(folder / "release", official_json(TINY))
    return folder / "release"


def virtual_stages(folder: Path, weights: Weights) -> Path:
    flat = split(weights, [1, 1, 1, 1], TINY.vace_layers)
    for rank in range(2):
        chunks = {f"model{chunk}": mm(flat[chunk * 2 + rank]) for chunk in range(2)}
        save(
            {**chunks, "checkpoint_version": 3.0},
            folder / f"release/mp_rank_00_{rank:03d}/model_optim_rng.pt",
        )
    config(folder / "release", official_json(TINY))
    return folder


def flat_pt(folder: Path, weights: Weights) -> Path:
    config(folder, official_json(TINY))
    return save(weights, folder / "merged.pt")


def old_pt(folder: Path, weights: Weights) -> Path:
    config(folder, official_json(TINY))
    torch.save({"state_dict": weights}, folder / "merged.pth", _use_new_zipfile_serialization=False)
    return folder / "merged.pth"


def full_dcp(folder: Path, weights: Weights) -> Path:
    state = {"model": mm(weights), "iteration": torch.tensor(3), "config": TINY.model_dump_json()}
    dcp.save(state, checkpoint_id=folder / "iter_0000003", no_dist=True)
    write_tracker(folder, 3)
    return folder


FORMS: list[Callable[[Path, Weights], Any]] = [
    official, sharded, unindexed, shard_list, prefixed, diffusers_root, diffusers_transformer,
    release, iteration, stages, virtual_stages, flat_pt, old_pt, full_dcp,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_weights_and_sizes(
    tmp_path: Path, weights: Weights, form: Callable[[Path, Weights], Any]
) -> None:
    source = open_weights(form(tmp_path, weights))
    assert source.config == TINY
    assert source.shapes.keys() == weights.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in weights.items())
    assert set(source.dtypes.values()) == {torch.bfloat16}
    assert source.has_branch
    assert all(fact in source.description for fact in ("185 tensors", "bfloat16", "trunk", "branch"))


def test_old_torch_format_is_reported_as_held_in_memory(
    tmp_path: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        open_weights(flat_pt(tmp_path, weights))
        assert "1.6" not in caplog.text
        open_weights(old_pt(tmp_path, weights))
    assert "merged.pth: " in caplog.text
    assert "1.6" in caplog.text


def test_fingerprint_depends_on_weights_not_on_form(tmp_path: Path, weights: Weights) -> None:
    found = {
        open_weights(form(tmp_path / form.__name__, weights)).fingerprint()
        for form in (sharded, stages, full_dcp)
    }
    assert len(found) == 1
    other = {**weights, "head.head.bias": weights["head.head.bias"] + 1}
    assert open_weights(official(tmp_path / "other", other)).fingerprint() not in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_model_is_filled_in_the_requested_dtype(
    tmp_path: Path, weights: Weights, dtype: torch.dtype | None
) -> None:
    model = load_transformer(official(tmp_path, weights), dtype=dtype)
    assert model.blocks[0].ffn[0].weight.dtype == (dtype or torch.bfloat16)
    assert model.head.head.weight.dtype == (torch.bfloat16 if dtype is None else torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), weights[name].float())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_training_changes_no_file_and_no_other_model(tmp_path: Path, weights: Weights) -> None:
    folder = official(tmp_path, weights)
    first = load_transformer(folder, dtype=None)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    for name, tensor in load_transformer(folder, dtype=None).state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_release_is_preferred_to_original_files(
    tmp_path: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    official(tmp_path, weights)
    release(tmp_path, weights)
    with caplog.at_level("INFO"):
        assert open_weights(tmp_path, original=True).dialect == "official"
        assert "release/" not in caplog.text
        assert open_weights(tmp_path).dialect == "mm"
    assert f"{tmp_path}: reading release/, not" in caplog.text


# what a run leaves out


def trained_only(folder: Path, weights: Weights, base: Path) -> Path:
    """As training/checkpoint.py saves it: what trained, and where the rest lies."""
    source = open_weights(base)
    trained = {MM(name): tensor + 1 for name, tensor in weights.items() if name.startswith("vace_")}
    reference = {"path": str(source.path), "fingerprint": source.fingerprint(), "dialect": source.dialect}
    state = {
        "model": trained,
        "iteration": torch.tensor(5),
        "base": reference,
        "optimizer": {"state": {"a": torch.ones(2)}},
    }
    dcp.save(state, checkpoint_id=folder / "iter_0000005", no_dist=True)
    write_tracker(folder, 5)
    return folder


def trained(weights: Weights) -> Weights:
    return {name: tensor + 1 if name.startswith("vace_") else tensor for name, tensor in weights.items()}


def assert_trained(path: Path, weights: Weights, base_path: Path | None = None) -> None:
    source = open_weights(path, base_path=base_path)
    assert source.config == TINY
    assert source.base is not None
    for name, tensor in trained(weights).items():
        assert torch.equal(source.read(name), tensor)


def test_trained_part_is_completed_from_its_base(tmp_path: Path, weights: Weights) -> None:
    assert_trained(trained_only(tmp_path / "run", weights, official(tmp_path / "base", weights)), weights)


def test_it_still_is_after_the_guides_dcp_to_torch(tmp_path: Path, weights: Weights) -> None:
    run = trained_only(tmp_path / "run", weights, release(tmp_path / "base", weights))
    file = tmp_path / "out/release/mp_rank_00/model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    subprocess.run([*command, str(run / "iter_0000005"), str(file)], check=True, capture_output=True)
    (tmp_path / "out/latest_checkpointed_iteration.txt").write_text("release\n")
    assert_trained(tmp_path / "out", weights)
    assert_trained(file, weights)


def test_base_that_moved_is_named(tmp_path: Path, weights: Weights) -> None:
    base = official(tmp_path / "base", weights)
    run = trained_only(tmp_path / "run", weights, base)
    base.rename(tmp_path / "moved")
    with raises(WeightsError, "--cfg.base_path", "predictor.from_pretrained"):
        open_weights(run)
    assert_trained(run, weights, tmp_path / "moved")


def test_another_base_is_rejected(tmp_path: Path, weights: Weights) -> None:
    run = trained_only(tmp_path / "run", weights, official(tmp_path / "base", weights))
    other = official(tmp_path / "other", {**weights, "head.head.bias": weights["head.head.bias"] + 1})
    with raises(WeightsError, "base"):
        open_weights(run, base_path=other)


def test_base_in_another_dialect_is_the_same_base(tmp_path: Path, weights: Weights) -> None:
    run = trained_only(tmp_path / "run", weights, official(tmp_path / "base", weights))
    assert_trained(run, weights, diffusers_root(tmp_path / "other", weights))


def test_base_that_leads_back_to_itself_is_an_error(tmp_path: Path, weights: Weights) -> None:
    path = tmp_path / "loop.pt"
    torch.save({"model": {MM("head.head.bias"): torch.ones(2)}, "base": {"path": str(path)}}, path)
    with raises(WeightsError, "base"):
        open_weights(path)


def test_branch_without_a_base_is_an_error(tmp_path: Path, weights: Weights) -> None:
    branch = {name: tensor for name, tensor in weights.items() if name.startswith("vace_")}
    with raises(WeightsError, "VACE", "--cfg.base_path", "vace_pretrained", "model.transformer"):
        open_weights(save({"model": mm(branch)}, tmp_path / "branch.pt"))


# what is refused


def refused(path: Any, *words: str) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        open_weights(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    return caught.value


def test_root_of_a14b_is_an_error_that_names_both_experts(tmp_path: Path, weights: Weights) -> None:
    for expert in ("high_noise_model", "low_noise_model"):
        official(tmp_path / expert, weights)
    refused(tmp_path, str(tmp_path / "high_noise_model"), str(tmp_path / "low_noise_model"))
    assert open_weights(tmp_path / "low_noise_model").config == TINY


def test_diffusers_a14b_root_names_both_experts(tmp_path: Path, weights: Weights) -> None:
    diffusers_root(tmp_path, weights)
    (tmp_path / "transformer_2").mkdir()
    refused(tmp_path, str(tmp_path / "transformer"), "transformer_2")


@pytest.mark.parametrize(
    "name",
    [
        "vace_blocks.0.self_attn.q.lora_A.default.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight",
        "lora_unet__blocks_0_self_attn_q.lora_down.weight",
    ],
)
def test_lora_is_recognized_and_rejected_with_a_hint(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(4, 4)}, tmp_path / "lora.safetensors")
    error = refused(tmp_path / "lora.safetensors", "LoRA (1 adapter weights", name)
    assert "merge_lora" in error.fix


def test_bad_weights_are_listed_with_a_count(tmp_path: Path, weights: Weights) -> None:
    lacking = {
        name: tensor for name, tensor in weights.items() if "cross_attn.k" not in name and "norm3" not in name
    }
    refused(official(tmp_path / "a", lacking), "official names", "missing: ", "… (24 in all)")
    wrong = {**weights, "blocks.1.ffn.2.bias": torch.ones(7, dtype=torch.bfloat16)}
    refused(official(tmp_path / "b", wrong), "shape: blocks.1.ffn.2.bias [7]", "[48]")


def test_foreign_names_are_listed_with_the_dialect_that_was_seen(tmp_path: Path, weights: Weights) -> None:
    extra = {**weights, "vae.encoder.conv1.weight": torch.ones(1)}
    refused(official(tmp_path, extra), "official names (185 of 186)", "vae.encoder.conv1.weight")


def test_one_weight_in_two_shards_is_an_error(tmp_path: Path, weights: Weights) -> None:
    paths = shard_list(tmp_path, weights)
    save_file({"head.head.bias": weights["head.head.bias"]}, tmp_path / "again.safetensors")
    again = tmp_path / "again.safetensors"
    refused([*paths, again], f"{again}: head.head.bias ", "keep one")


def test_missing_shard_is_named(tmp_path: Path, weights: Weights) -> None:
    second = sharded(tmp_path, weights) / "diffusion_pytorch_model-00002-of-00003.safetensors"
    second.unlink()
    refused(tmp_path, "1 of 3 shards", second.name)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    refused(tmp_path, "2 of 3 shards")


def test_one_pipeline_stage_alone_names_the_folder_of_all(tmp_path: Path, weights: Weights) -> None:
    folder = stages(tmp_path, weights)
    for place, stage in (("mp_rank_00_001", 1), ("mp_rank_00_000/model_optim_rng.pt", 0)):
        error = refused(folder / place, f"pipeline stage {stage}")
        assert error.fix.endswith(f" {folder}")


def test_several_models_in_one_folder_are_an_error(tmp_path: Path, weights: Weights) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(weights, tmp_path / name)
    error = refused(tmp_path, "2 weight files", "a.safetensors, b.safetensors")
    assert error.fix


def test_integer_weights_are_an_error(tmp_path: Path, weights: Weights) -> None:
    numbers = {**weights, "head.head.bias": torch.ones(64, dtype=torch.int64)}
    refused(official(tmp_path, numbers), "head.head.bias torch.int64")


def test_empty_folder_and_a_missing_one_are_errors(tmp_path: Path) -> None:
    refused(tmp_path, "is empty")
    refused(tmp_path / "nowhere", absent(tmp_path / "nowhere"))


def test_config_of_another_model_is_rejected(tmp_path: Path, weights: Weights) -> None:
    folder = official(tmp_path, weights)
    config(folder, {**official_json(TINY), "dim": 16})
    with raises(WeightsError, "dim", 16, 48, where=folder / "config.json"):
        open_weights(folder)


def test_official_folder_of_the_tiny_maker_opens(tmp_path: Path) -> None:
    write_transformer(tmp_path, tiny_transformer())
    assert open_weights(tmp_path).config == TINY
