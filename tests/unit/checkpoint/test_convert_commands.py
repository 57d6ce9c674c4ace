"""mm-convert as a user types it.

Every path there and back is exact, and what cannot be done is one line and exit code 1.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.cli import main
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.weights import open_weights
from tests.support.errors import absent, meant, names
from tests.support.tiny import TINY, tiny_inputs, tiny_transformer, write_transformer

pytestmark = pytest.mark.medium

Weights = dict[str, Tensor]


def run(method: str, source: object, target: object, *more: str) -> None:
    main(["VACEConverter", method, "--cfg.source_path", str(source), "--cfg.target_path", str(target), *more])


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that must exit with 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def convert_fails(
    capsys: pytest.CaptureFixture[str], method: str, source: object, target: object, *more: str
) -> str:
    return fails(
        capsys,
        "VACEConverter",
        method,
        "--cfg.source_path",
        str(source),
        "--cfg.target_path",
        str(target),
        *more,
    )


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Two dtypes, as in files that people bring."""
    state = tiny_transformer().state_dict()
    return {
        n: t.to(torch.float32 if n.startswith(("time_", "head.")) else torch.bfloat16)
        for n, t in state.items()
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    """Shared, so read only; `own_original` is a copy to write into."""
    folder = tmp_path_factory.mktemp("weights") / "original"
    write_transformer(folder, tiny_transformer(), torch.float32)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def own_original(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "original"))


@pytest.fixture(scope="module")
def mm(original: Path) -> Path:
    """Shared, so read only."""
    run("hf_to_mm", original, original.parent / "mm")
    return original.parent / "mm"


def assert_same(path: Path, weights: Weights) -> None:
    source = open_weights(path)
    assert source.config == TINY
    assert source.shapes.keys() == weights.keys()
    for name, tensor in weights.items():
        found = source.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


def test_hf_to_mm_writes_what_megatron_and_torch_read(mm: Path, weights: Weights) -> None:
    assert (mm / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    state = torch.load(mm / "release/mp_rank_00/model_optim_rng.pt", weights_only=True)
    assert state.keys() == {"model"}
    to_mm = KEY_MAPS["mm"].to_theirs
    assert state["model"].keys() == {to_mm(name) for name in weights}
    assert all(torch.equal(state["model"][to_mm(name)], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "target", ["out", "out.pt", "out.pth", "out.safetensors", "deep/er/out.pt", "out.pt/"]
)
def test_mm_to_hf_restores_names_and_bits(tmp_path: Path, mm: Path, weights: Weights, target: str) -> None:
    run("mm_to_hf", mm, f"{tmp_path}/{target}")
    path = Path(f"{tmp_path}/{target}")
    assert path.is_file() == (path.suffix != "")
    assert_same(path, weights)
    if path.suffix in (".pt", ".pth"):
        assert torch.load(path, weights_only=True).keys() == weights.keys()
    if path.suffix == ".safetensors":
        assert load_file(path).keys() == weights.keys()


def test_mm_to_hf_writes_the_official_folder(tmp_path: Path, mm: Path, original: Path) -> None:
    run("mm_to_hf", mm, tmp_path / "out")
    ours, theirs = (
        load_file(tmp_path / "out/diffusion_pytorch_model.safetensors"),
        load_file(original / "diffusion_pytorch_model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    written, given = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", original)
    )
    assert {key: written[key] for key in given} == given


def test_sharded_folders_are_written_with_an_index_and_read_back(
    tmp_path: Path, mm: Path, weights: Weights
) -> None:
    run("mm_to_hf", mm, tmp_path / "out", "--cfg.max_shard_gb", "0.0002")
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert (
        {name for shard in shards for name in load_file(shard)}
        == index["weight_map"].keys()
        == weights.keys()
    )
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert_same(tmp_path / "out", weights)


@pytest.mark.parametrize("shard_gb", ["10", "0.0003"])
def test_diffusers_loads_what_we_wrote_and_computes_the_same(tmp_path: Path, mm: Path, shard_gb: str) -> None:
    run("mm_to_hf_diffusers", mm, tmp_path / "out", "--cfg.max_shard_gb", shard_gb, "--cfg.dtype", "fp32")
    model, report = WanVACETransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report  # missing_keys, unexpected_keys, mismatched_keys, error_msgs
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= report.keys()
    assert not any(weight.is_meta for weight in model.parameters())
    inputs = tiny_inputs(text=TINY.trunk.text_len)
    ours = tiny_transformer()
    source = open_weights(mm)
    ours.load_state_dict({name: source.read(name).float() for name in source.shapes})
    with torch.no_grad():
        theirs = model(
            hidden_states=inputs["latents"],
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["prompt_embeds"],
            control_hidden_states=inputs["vace_context"],
            return_dict=False,
        )[0]
        assert (ours(**inputs) - theirs).abs().max() < 5e-5


def test_there_and_back_through_diffusers_names(tmp_path: Path, mm: Path, weights: Weights) -> None:
    run("mm_to_hf_diffusers", mm, tmp_path / "diffusers")
    run("hf_diffusers_to_mm", tmp_path / "diffusers", tmp_path / "mm2")
    assert_same(tmp_path / "mm2", weights)


def test_transformer_is_found_in_a_diffusers_pipeline(tmp_path: Path, mm: Path, weights: Weights) -> None:
    run("mm_to_hf_diffusers", mm, tmp_path / "pipe/transformer")
    (tmp_path / "pipe/model_index.json").write_text("{}")
    run("hf_diffusers_to_mm", tmp_path / "pipe", tmp_path / "mm2")
    assert_same(tmp_path / "mm2", weights)


@pytest.mark.parametrize(
    "layers", ["[4]", "[1,3]", "[1,1,1,1]", "[2,1,1]", "[[1,1],[1,1]]", "[[2],[2]]", "[[1],[1],[2]]"]
)
def test_stages_split_and_merge_to_the_same_bits(
    tmp_path: Path, original: Path, weights: Weights, layers: str
) -> None:
    run("hf_to_mm", original, tmp_path / "split", "--cfg.target_parallel_config.pp_layers", layers)
    run("resplit", tmp_path / "split", tmp_path / "merged")
    merged = torch.load(tmp_path / "merged/release/mp_rank_00/model_optim_rng.pt", weights_only=True)["model"]
    run("mm_to_hf", tmp_path / "split", tmp_path / "out.safetensors")
    hf = load_file(tmp_path / "out.safetensors")
    to_mm = KEY_MAPS["mm"].to_theirs
    assert merged.keys() == {to_mm(name) for name in weights}
    assert hf.keys() == weights.keys()
    for name, tensor in weights.items():
        assert all(
            found.dtype == tensor.dtype and torch.equal(found, tensor)
            for found in (merged[to_mm(name)], hf[name])
        )


def test_stages_hold_what_the_guide_says(tmp_path: Path, original: Path, weights: Weights) -> None:
    run("hf_to_mm", original, tmp_path / "pp", "--pp_layers", "[1,2,1]")
    found = [
        torch.load(tmp_path / f"pp/release/mp_rank_00_{rank:03d}/model_optim_rng.pt", weights_only=True)[
            "model"
        ]
        for rank in range(3)
    ]
    assert sum(len(stage) for stage in found) == len(weights)
    assert "wan_dit.patch_embedding.weight" in found[0]
    assert "vace_dit.vace_blocks.0.before_proj.weight" in found[0]
    assert "vace_dit.vace_patch_embedding.weight" in found[0]
    assert "wan_dit.head.head.weight" in found[2]
    assert torch.equal(found[1]["wan_dit.blocks.1.ffn.0.bias"], weights["blocks.2.ffn.0.bias"])
    mine = found[1]["vace_dit.vace_blocks.0.after_proj.bias"]  # feeds layer 2, which is on stage 1
    assert torch.equal(mine, weights["vace_blocks.1.after_proj.bias"])
    assert not any("vace" in name for name in found[2])


def test_virtual_stages_match_megatron(tmp_path: Path, original: Path, weights: Weights) -> None:
    run("hf_to_mm", original, tmp_path / "vpp", "--pp_layers", "[[1,1],[1,1]]")
    second = torch.load(tmp_path / "vpp/release/mp_rank_00_001/model_optim_rng.pt", weights_only=True)
    assert second.keys() == {"model0", "model1", "checkpoint_version"}
    assert second["checkpoint_version"] == 3.0
    assert torch.equal(
        second["model1"]["wan_dit.blocks.0.ffn.0.bias"], weights["blocks.3.ffn.0.bias"]
    )  # chunk 1, rank 1


@pytest.mark.parametrize(
    ("layers", "facts"),
    [("[7,8,8,7]", (30, 4)), ("[4,0]", ("got [4, 0]",)), ("[[1,1],[2]]", ("got [[1, 1], [2]]",))],
)
def test_layers_that_do_not_fit_are_an_error_and_write_nothing(
    tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str], layers: str, facts: tuple[object, ...]
) -> None:
    line = convert_fails(capsys, "hf_to_mm", original, tmp_path / "a/mm", "--pp_layers", layers)
    assert names(line, "pp_layers", *facts)
    assert not (tmp_path / "a").exists()


def test_conversion_runs_twice_into_one_target(tmp_path: Path, original: Path, weights: Weights) -> None:
    run("hf_to_mm", original, tmp_path / "mm", "--pp_layers", "[2,2]")
    run("hf_to_mm", original, tmp_path / "mm")
    assert sorted(path.name for path in (tmp_path / "mm/release").iterdir()) == ["config.json", "mp_rank_00"]
    assert_same(tmp_path / "mm", weights)
    for shard in ("0.0002", "10"):
        run("mm_to_hf", tmp_path / "mm", tmp_path / "hf", "--cfg.max_shard_gb", shard)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert_same(tmp_path / "hf", weights)


def test_conversion_prints_one_table_and_keeps_its_job(
    tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run("hf_to_mm", original, tmp_path / "mm")
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line.split(None, 1) for line in lines[:-1])
    assert list(rows) == ["method", "source", "weights", "checksums", "output", "check"]
    assert str(original) in rows["source"]
    assert str(tmp_path / "mm") in rows["output"]
    job = json.loads((tmp_path / "mm/job.json").read_text())
    assert job["method"] == "hf_to_mm"
    assert job["source_path"] == str(original)
    run("mm_to_hf", tmp_path / "mm", tmp_path / "hf")
    assert not (tmp_path / "hf/job.json").exists()  # a folder of other programs


def test_source_and_target_can_be_one_folder(own_original: Path, weights: Weights) -> None:
    for _ in range(2):
        run("hf_to_mm", own_original, own_original)
    assert_same(own_original / "release", weights)
    assert_same(own_original / "diffusion_pytorch_model.safetensors", weights)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_dtype_matches_every_written_weight(
    tmp_path: Path, mm: Path, weights: Weights, name: str, dtype: torch.dtype
) -> None:
    run("mm_to_hf", mm, tmp_path / "x.pt", "--cfg.dtype", name, "--cfg.verify", "bits")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(torch.equal(found[key], tensor.to(dtype)) for key, tensor in weights.items())


@pytest.mark.parametrize(
    ("method", "use"),
    [
        ("mm_to_hf", "use hf_to_mm"),
        ("hf_diffusers_to_mm", "use hf_to_mm"),
        ("mm_to_hf_diffusers", "use hf_to_mm"),
        ("resplit", "use hf_to_mm"),
    ],
)
def test_method_fixes_the_dialect_that_is_read(
    tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str], method: str, use: str
) -> None:
    assert use in convert_fails(capsys, method, original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a14b_root_is_an_error_that_names_both_folders(
    tmp_path: Path, own_original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "a14b"
    root.mkdir()
    for expert in ("high_noise_model", "low_noise_model"):
        own_original.rename(root / expert) if expert.startswith("high") else (root / expert).mkdir()
    error = convert_fails(capsys, "hf_to_mm", root, root)
    assert "high_noise_model" in error
    assert "low_noise_model" in error
    run("hf_to_mm", root / "high_noise_model", root / "high_noise_model")


def test_folder_of_a_training_run_is_not_overwritten(
    tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("10\n")
    assert "training run" in convert_fails(capsys, "hf_to_mm", original, tmp_path / "run")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["VACEConvertr"], meant("VACEConverter")),
        (["VACEConverter", "hf_to_m"], meant("hf_to_mm")),
        (["VACEConverter", "hf_to_mm", "--cfg.sorce_path", "x"], meant("--cfg.source_path")),
        (["VACEConverter", "hf_to_mm", "--cfg.source_path", "x"], "cfg.target_path"),
        (
            ["VACEConverter", "hf_to_mm", "--cfg.source_path", "/x", "--cfg.target_path", "y"],
            f"/x: {absent('/x')}",
        ),
        (
            [
                "VACEConverter",
                "hf_to_mm",
                "--cfg.source_path",
                "x",
                "--cfg.target_path",
                "y",
                "--cfg.dtype",
                "f",
            ],
            "bf16",
        ),
        (["VACEConverter", "hf_to_mm", "--cfg", "nowhere.yaml"], "nowhere.yaml"),
        (["VACEConverter", "hf_to_mm", "--config=--"], "--config"),
        (["VACEConverter", "hf_to_mm", "--cfg.target_parallel_config.pp_layers=="], "Expected a list"),
    ],
)
def test_command_line_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert said in fails(capsys, *argv)


def test_yaml_file_gives_the_settings_and_flags_override_it(
    tmp_path: Path, original: Path, weights: Weights
) -> None:
    (tmp_path / "c.yaml").write_text(
        f"source_path: {original}\ntarget_path: /nowhere/at/all\ntarget_parallel_config:\n  pp_layers: [2, "
        "2]\n"
    )
    main(
        [
            "VACEConverter",
            "hf_to_mm",
            "--cfg",
            str(tmp_path / "c.yaml"),
            "--cfg.target_path",
            str(tmp_path / "mm"),
        ]
    )
    assert (tmp_path / "mm/release/mp_rank_00_001").is_dir()
    assert_same(tmp_path / "mm", weights)


def test_print_config_is_a_yaml_file_that_can_be_given_back(
    tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str], weights: Weights
) -> None:
    argv = [
        "VACEConverter",
        "hf_to_mm",
        "--cfg.source_path",
        str(original),
        "--cfg.target_path",
        str(tmp_path / "mm"),
    ]
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--print-config"])
    assert caught.value.code == 0
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    main(["VACEConverter", "hf_to_mm", "--config", str(tmp_path / "all.yaml")])
    assert_same(tmp_path / "mm", weights)


def test_help_and_typos_answer_without_torch() -> None:
    cases = [
        (["--help"], "VACEConverter", 0),
        (["VACEConverter", "--help"], "mm_to_hf", 0),
        (["VACEConverter", "hf_to_mm", "--help"], "--cfg.target_parallel_config.pp_layers", 0),
        (["VACEConverter", "hf_to_mm", "--cfg.sorce_path", "x"], meant("--cfg.source_path"), 1),
    ]
    program = (
        "import json, sys\nfrom checkpoint.cli import main\nfor words in json.loads(sys.argv[1]):\n"
        "    try:\n        main(words)\n    except SystemExit as ended:\n        print('CODE', ended.code, "
        "flush=True)\n"
        "    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([words for words, _, _ in cases])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    printed = re.split(r"CODE (\d)\n", done.stdout)
    assert [int(code) for code in printed[1::2]] == [code for _, _, code in cases]
    assert all(said in text for text, (_, said, _) in zip(printed[::2], cases, strict=False))
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("target", ["new/mm", "one.pt"])
def test_dry_run_opens_the_source_and_writes_nothing(
    original: Path, mm: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    if target.endswith(".pt"):
        run("mm_to_hf", mm, tmp_path / target, "--cfg.dry_run=true")
    else:
        run("hf_to_mm", original, tmp_path / target, "--cfg.dry_run=true")
    assert f"{tmp_path / target}: " in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
