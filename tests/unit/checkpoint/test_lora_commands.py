"""LoRAs as mm-convert writes them.

Read again in every dialect, loaded by peft and diffusers, merged into a base.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.cli import main
from checkpoint.config import LoraToConfig, MergeLoraConfig
from checkpoint.lora import merge, write_comfyui, write_diffusers, write_peft
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.models.lora.adapter import merged
from mindspeed_mm.models.lora.saved import ENTRY
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.weights import open_adapter, open_weights
from tests.support.errors import raises
from tests.support.lora_files import ALPHA, DIALECTS, RANK, deltas, lora_matrices, write_lora
from tests.support.lora_files_bad import LFS_POINTER, REFUSED
from tests.support.tiny import TINY, tiny_inputs, tiny_transformer, write_transformer

pytestmark = pytest.mark.medium

WRITERS = {"peft": write_peft, "comfyui.safetensors": write_comfyui, "diffusers.safetensors": write_diffusers}
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_transformer(folder, tiny_transformer(), torch.float32)
    return folder


def to(target: str, source: Path, base: Path, folder: Path, **more: object) -> Path:
    path = folder / f"to-{target}"
    WRITERS[target](LoraToConfig(source_path=str(source), target_path=str(path), base_path=str(base), **more))
    return path


def sum_of(base: Path, lora: Path, strength: float = 1.0) -> Weights:
    source = open_weights(base)
    found = merged(source, [(open_adapter(lora, source.shapes), strength)])
    return {name: found.read(name) for name in found.tensors}


def model_of(weights: Weights) -> torch.nn.Module:
    model = tiny_transformer()
    model.load_state_dict(weights)
    return model.eval()


def assert_close(found: Weights, expected: Weights, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=atol), name


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_becomes_every_other(tmp_path: Path, base: Path, dialect: str) -> None:
    source = write_lora(dialect, tmp_path, lora_matrices())
    expected = sum_of(base, source)
    for target in WRITERS:
        assert_close(sum_of(base, to(target, source, base, tmp_path)), expected)


def test_alpha_is_written_for_every_layer(tmp_path: Path, base: Path) -> None:
    source = write_lora("peft", tmp_path, lora_matrices())
    keys = load_file(to("comfyui.safetensors", source, base, tmp_path, dtype="bf16"))
    assert len(keys) == 3 * len(lora_matrices())
    for name in lora_matrices():
        alpha = keys[f"diffusion_model.{name}.alpha"]
        assert alpha.dtype == torch.float32
        assert float(alpha) == ALPHA
        assert keys[f"diffusion_model.{name}.lora_down.weight"].dtype == torch.bfloat16
    config = json.loads((to("peft", source, base, tmp_path) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert sorted(config["target_modules"]) == sorted(lora_matrices())


def uneven(tmp_path: Path) -> Path:
    """Three ranks and alphas, a convolution and a difference."""
    generator = torch.Generator().manual_seed(4)
    keys, shapes = {}, {name: w.shape for name, w in tiny_transformer().state_dict().items()}
    layers = ("blocks.0.self_attn.q", "vace_blocks.0.self_attn.q", "blocks.1.ffn.0", "vace_patch_embedding")
    for rank, name in enumerate(layers, start=1):
        out, *rest = shapes[f"{name}.weight"]
        keys[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(rank, *rest, generator=generator)
        keys[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(out, rank, generator=generator)
        keys[f"diffusion_model.{name}.alpha"] = torch.tensor(rank / 3)
    save_file(keys, tmp_path / "uneven.safetensors")
    return tmp_path / "uneven.safetensors"


@pytest.mark.parametrize("target", WRITERS)
def test_each_layer_keeps_its_rank_and_alpha(tmp_path: Path, base: Path, target: str) -> None:
    source = uneven(tmp_path)
    assert_close(sum_of(base, to(target, source, base, tmp_path)), sum_of(base, source), atol=1e-5)


def plain_convolution(module: torch.nn.Conv3d) -> torch.nn.Conv3d:
    """The same weights in a module that peft can wrap."""
    size = module.kernel_size
    plain = torch.nn.Conv3d(module.in_channels, module.out_channels, size, stride=module.stride)
    plain.load_state_dict(module.state_dict())
    return plain


@pytest.mark.parametrize("make", [uneven, lambda folder: write_lora("kohya", folder, lora_matrices())])
def test_peft_loads_the_folder(tmp_path: Path, base: Path, make: object) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    source = make(tmp_path)
    model = tiny_transformer()
    model.vace_patch_embedding = plain_convolution(model.vace_patch_embedding)
    del model.config  # ours has no method that peft calls on one
    model = peft.PeftModel.from_pretrained(model, to("peft", source, base, tmp_path))
    assert_close(model.merge_and_unload().state_dict(), sum_of(base, source), atol=1e-5)


@pytest.mark.parametrize("make", [uneven, lambda folder: write_lora("peft", folder, lora_matrices())])
def test_diffusers_loads_the_file_and_agrees(tmp_path: Path, base: Path, make: object) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    source = make(tmp_path)
    cfg = {"source_path": str(base), "loras": str(source), "target_path": str(tmp_path / "theirs")}
    merge(MergeLoraConfig(**cfg, strengths=0.0, form="diffusers"))
    theirs = WanVACETransformer3DModel.from_pretrained(tmp_path / "theirs").eval()
    inputs = tiny_inputs(text=TINY.trunk.text_len)
    arguments = {
        "hidden_states": inputs["latents"],
        "timestep": inputs["timestep"],
        "encoder_hidden_states": inputs["prompt_embeds"],
        "control_hidden_states": inputs["vace_context"],
    }
    with torch.no_grad():
        plain = theirs(**arguments, return_dict=False)[0]
        theirs.load_lora_adapter(str(to("diffusers.safetensors", source, base, tmp_path)))
        adapted = theirs(**arguments, return_dict=False)[0]
        ours = model_of(sum_of(base, source))(**inputs)
    assert (adapted - plain).abs().max() > 0.01
    assert (adapted - ours).abs().max() < 1e-5


def test_merged_base_computes_what_base_and_lora_do(tmp_path: Path, base: Path) -> None:
    loras = [
        write_lora(name, tmp_path, lora_matrices(seed=seed)) for name, seed in (("peft", 1), ("kohya", 2))
    ]
    for form in ("source", "diffusers", "mm"):
        out = tmp_path / form
        merge(
            MergeLoraConfig(
                source_path=str(base),
                target_path=str(out),
                loras=[str(lora) for lora in loras],
                strengths=[1.0, -0.5],
                form=form,
            )
        )
        found = open_weights(out)
        one, two = deltas(lora_matrices(seed=1)), deltas(lora_matrices(seed=2))
        for name, weight in tiny_transformer().state_dict().items():
            expected = weight + one.get(name, torch.zeros(1)) - 0.5 * two.get(name, torch.zeros(1))
            assert torch.allclose(found.read(name), expected, atol=1e-6), name
        assert found.dialect == ("official" if form == "source" else form)


def checkpoint(path: Path, *, whole: bool = False) -> Path:
    """A merged checkpoint of training: LoRA on the branch, `vace_patch_embedding` whole."""
    names = KEY_MAPS["mm"]
    model, scales = {}, {}
    for module, (down, up) in lora_matrices("vace_blocks").items():
        layer = names.to_theirs(f"{module}.weight").removesuffix(".weight")
        model[f"{layer}.lora_A.weight"], model[f"{layer}.lora_B.weight"] = down, up
        scales[module] = ALPHA / RANK
    state = tiny_transformer().state_dict()
    for name in state if whole else ("vace_patch_embedding.weight", "vace_patch_embedding.bias"):
        model[names.to_theirs(name)] = state[name] + (name.startswith("vace_patch"))
    base = {} if whole else {"base": {"path": str(path.parent), "fingerprint": "", "dialect": "official"}}
    torch.save({"model": model, ENTRY: json.dumps({"type": "lora", "scales": scales}), **base}, path)
    return path


def expected_of_checkpoint(*, saved: bool) -> Weights:
    found = tiny_transformer().state_dict()
    for name, delta in deltas(lora_matrices("vace_blocks")).items():
        found[name] = found[name] + delta
    for name in found:
        if saved and name.startswith("vace_patch"):
            found[name] = found[name] + 1
    return found


@pytest.mark.parametrize("target", ["peft", "comfyui.safetensors"])
def test_training_checkpoint_becomes_a_lora(tmp_path: Path, base: Path, target: str) -> None:
    source = checkpoint(tmp_path / "lora.pt")
    assert_close(sum_of(base, to(target, source, base, tmp_path)), expected_of_checkpoint(saved=True))


def test_of_a_whole_checkpoint_the_lora_alone_is_taken(tmp_path: Path, base: Path) -> None:
    source = checkpoint(tmp_path / "lora.pt", whole=True)
    assert_close(sum_of(base, to("peft", source, base, tmp_path)), expected_of_checkpoint(saved=False))


def test_lora_of_a_published_model_needs_no_base(tmp_path: Path) -> None:
    down, up = torch.ones(2, 1536), torch.ones(1536, 2)
    stem = "lora_unet_vace_blocks_3_self_attn_q"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, tmp_path / "in.safetensors")
    cfg = LoraToConfig(source_path=str(tmp_path / "in.safetensors"), target_path=str(tmp_path / "peft"))
    write_peft(cfg)
    assert load_file(tmp_path / "peft/adapter_model.safetensors").keys() == {
        f"base_model.model.vace_blocks.3.self_attn.q.lora_{part}.weight" for part in "AB"
    }


def test_content_a_form_cannot_store_is_rejected_by_name(tmp_path: Path, base: Path) -> None:
    keys = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(96)}
    shape = tiny_transformer().blocks[0].ffn[0].bias.shape
    save_file({key: torch.ones(shape) for key in keys}, tmp_path / "diff.safetensors")
    for target in ("peft", "diffusers.safetensors"):
        with raises(WeightsError, "blocks.0.ffn.0.bias", where=tmp_path / "diff.safetensors"):
            to(target, tmp_path / "diff.safetensors", base, tmp_path)
        assert not (tmp_path / f"to-{target}").exists()
    written = to("comfyui.safetensors", tmp_path / "diff.safetensors", base, tmp_path)
    assert_close(sum_of(base, written), sum_of(base, tmp_path / "diff.safetensors"))


@pytest.mark.parametrize(
    ("strengths", "facts"), [([1.0], ("1", "2")), ([1.0, float("nan")], ("nan",)), (2000.0, ("2000",))]
)
def test_bad_strengths_are_rejected(tmp_path: Path, base: Path, strengths: object, facts: tuple[str]) -> None:
    lora = str(write_lora("kohya", tmp_path, lora_matrices()))
    cfg = {"source_path": str(base), "target_path": str(tmp_path / "out"), "loras": [lora, lora]}
    with raises(ConfigError, *facts, where="strengths"):
        merge(MergeLoraConfig.model_construct(**{**MergeLoraConfig(**cfg).__dict__, "strengths": strengths}))


def test_lora_as_base_names_the_command(tmp_path: Path) -> None:
    with raises(WeightsError, "merge_lora"):
        open_weights(write_lora("kohya", tmp_path, lora_matrices()))


@pytest.mark.parametrize("method", ["merge_lora", "lora_to_comfy", "lora_to_hf"])
def test_bad_lora_is_one_line_of_every_command(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    out = tmp_path / "out.safetensors"
    bad: dict[str, tuple[Path, list[object]]] = {"lfs": (tmp_path / "lfs.safetensors", ["LFS"])}
    bad["lfs"][0].write_text(LFS_POINTER)
    for name, (keys, facts) in REFUSED.items():
        bad[name] = (tmp_path / f"{name}.safetensors", list(facts))
        save_file(keys, bad[name][0])
    for path, facts in bad.values():
        argv = ["--cfg.source_path", str(path), "--cfg.base_path", str(base)]
        if method == "merge_lora":
            argv = ["--cfg.source_path", str(base), "--cfg.loras", str(path)]
        with pytest.raises(SystemExit) as caught:
            main(["VACEConverter", method, *argv, "--cfg.target_path", str(out)])
        line = capsys.readouterr().err
        assert caught.value.code == 1
        assert line.count("\n") == 1, line
        assert all(str(fact) in line for fact in [path.name, *facts]), line
    assert not out.exists()
