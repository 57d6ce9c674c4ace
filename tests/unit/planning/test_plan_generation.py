"""`vace plan --generate`: the formula against measured allocations, the rules of the run, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.cli.main import main
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.models.transforms.quantize import quantize_blocks
from mindspeed_mm.models.wan.config import PRESETS, PredictorConfig, VaceDitConfig
from mindspeed_mm.models.wan.vace import VaceTransformer
from mindspeed_mm.planning.devices import DEVICES
from mindspeed_mm.planning.generation import (
    TEXT_PARAMETERS,
    GenerationRun,
    activation_bytes,
    generation_changes,
    generation_memory,
    generation_time,
)
from mindspeed_mm.tasks.plan_generation import text_parameters
from tests.support.errors import names

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[3]
JSON = "examples/vace/inference/inference_wan2.1_14b.json"
RUN = GenerationRun(model=PRESETS["Wan2.1-VACE-14B"])
GIB = 2.0**30


def small(ffn: int) -> PredictorConfig:
    return PredictorConfig(
        hidden_size=256,
        ffn_dim=ffn,
        num_heads=2,
        num_layers=3,
        vace_dit=VaceDitConfig(vace_layers=(0, 1)),
    )


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(
    ("dtype", "ffn"), [(torch.bfloat16, 512), (torch.bfloat16, 2048), (torch.float32, 1024)]
)
def test_activations_match_a_real_pass(dtype: torch.dtype, ffn: int, branch: bool, passes: int) -> None:
    config = small(ffn)
    model = VaceTransformer(config.model).to(dtype).eval()
    for name in ("time_embedding", "time_projection", "head"):
        getattr(model, name).float()
    grid = (3, 24, 24)
    inputs = (
        torch.randn(1, 16, *grid),
        torch.tensor([500.0]),
        torch.randn(passes, 8, 4096),
        torch.randn(1, 96, *grid) if branch else None,
    )
    with torch.no_grad():
        model(*inputs)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            model(*inputs)
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    measured = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    run = GenerationRun(
        model=config.model,
        frames=9,
        height=192,
        width=192,
        branch=branch,
        product=torch.finfo(dtype).bits // 8,
    )
    assert run.grid == grid
    assert activation_bytes(run, passes) == pytest.approx(measured, rel=0.1)


def test_weights_in_8_bits_match_the_model() -> None:
    config = small(512).model
    with torch.device("meta"):
        model = VaceTransformer(config).to(torch.bfloat16)
    for name in ("time_embedding", "time_projection", "head"):
        getattr(model, name).float()
    quantize_blocks(model.requires_grad_(False), "int8")
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    assert GenerationRun(model=config, quantized=True).weights == held


def test_quantize_changes_the_plan(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    exact, held = (
        json.loads(said(capfd, JSON, "--device=H200", "--json", *more))
        for more in ([], ["--quantize", "int8"])
    )
    assert held["memory"]["transformer"] == pytest.approx(exact["memory"]["transformer"] / 2, rel=0.05)
    assert held["memory"]["activations"] > exact["memory"]["activations"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_text_encoder_counts_by_its_shapes(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    weights = {"token_embedding.weight": torch.zeros(64, 8), "blocks.0.attn.q.weight": torch.zeros(8, 8)}
    stored = {name: weight.to(dtype) for name, weight in weights.items()}
    path = tmp_path / f"umt5{suffix}"
    torch.save(stored, path) if suffix == ".pth" else save_file(stored, path)
    assert text_parameters(str(path)) == 64 * 8 + 8 * 8


def test_tied_embedding_of_a_folder_counts_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "umt5"}')
    table = torch.zeros(64, 8)
    names = ("shared.weight", "encoder.embed_tokens.weight", "encoder.block.0.layer.0.SelfAttention.q.weight")
    save_file({name: table.clone() for name in names}, tmp_path / "model.safetensors")
    assert text_parameters(str(tmp_path)) == 2 * 64 * 8
    assert text_parameters(str(tmp_path / "nowhere")) == TEXT_PARAMETERS


def test_weights_match_the_model() -> None:
    config = small(512).model
    with torch.device("meta"):
        model = VaceTransformer(config).to(torch.bfloat16)
    for name in ("time_embedding", "time_projection", "head"):
        getattr(model, name).float()
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert GenerationRun(model=config).weights == held


def test_both_prompts_pass_together_as_the_run_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(512).model
    with torch.device("meta"):
        experts = Experts([VaceTransformer(config)], Accelerator.detect("cpu"), placed=True)
    for capacity in (1e7, 1e8, 1e9):
        monkeypatch.setattr(Accelerator, "total_memory", lambda self, capacity=capacity: int(capacity))
        run = GenerationRun(model=config, frames=17, height=256, width=256, product=4, capacity=capacity)
        assert run.is_batched == experts.fits_batched_cfg(run.tokens)


def test_offload_decides_what_the_device_holds() -> None:
    found = {mode: generation_memory(replace(RUN, offload=mode)) for mode in ("none", "model", "block")}
    assert found["none"].moments["decoding"] > found["model"].moments["decoding"] + 30 * GIB
    assert found["model"].moments["denoising"] > found["block"].moments["denoising"] + 25 * GIB
    assert found["none"].host == 0
    assert found["block"].host == RUN.weights


def test_two_experts_that_do_not_fit_take_turns() -> None:
    run = replace(RUN, experts=2, capacity=79 * GIB)
    assert run.mode == "model"
    assert replace(run, capacity=140 * GIB).mode == "none"


def test_changes_that_fit_come_with_their_price() -> None:
    run = replace(RUN, capacity=DEVICES["RTX 4090"].memory * GIB)
    changes = generation_changes(run, DEVICES["RTX 4090"], "bf16", run.capacity)
    assert changes[0].settings == ("offload block",)
    assert changes[0].keeps_result
    assert all(change.memory <= run.capacity for change in changes)
    assert all(change.cost > 0.9 for change in changes if change.keeps_result)


def test_more_devices_take_less_time() -> None:
    device = DEVICES["H100"]
    one = generation_time(RUN, device, "bf16")
    four = generation_time(replace(RUN, ranks=4, context_parallel=2, halves=2), device, "bf16")
    assert four.step == pytest.approx(one.step / 4, rel=0.1)
    assert replace(RUN, passes=1.0).tokens == RUN.tokens
    assert generation_time(replace(RUN, passes=1.0), device, "bf16").step == pytest.approx(one.step / 2)


@pytest.mark.parametrize("mode", ["extend", "context_windows"])
def test_windows_of_a_long_video_each_take_all_steps(
    mode: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    short, long = (
        json.loads(said(capfd, JSON, "--device=H100", "--json", "--num-frames", count, *more))
        for count, more in (("81", []), ("241", ["--window=81", "--window-mode", mode]))
    )
    assert long["windows"] == 4
    assert long["frames"] == 241
    assert long["step_seconds"] == short["step_seconds"]
    before, after = short["video_seconds"], long["video_seconds"]
    steps = before["steps"] * before["step"]
    coded = 4 if mode == "extend" else 241 / 81
    assert after["decode"] == pytest.approx(coded * before["decode"])
    known = before["text"] + coded * (before["encode"] + before["decode"]) + 4 * steps
    assert after["total"] == pytest.approx(known + after["move"])
    assert long["run_seconds"] > 3.5 * short["run_seconds"]
    assert (long["moments"]["decoding"] > short["moments"]["decoding"]) == (mode == "context_windows")
    text = said(capfd, JSON, "--num-frames=241", "--window=81", "--window-mode", mode)
    assert "4 x 50 steps" in text
    assert "3 videos" in text


@pytest.mark.parametrize("more", [(), ("--offload=block",), ("--num-frames=49",)])
def test_dry_run_ends_with_the_memory(
    more: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the plan has it for a device with room."""
    monkeypatch.chdir(ROOT)
    main(["generate", JSON, "--dry-run", *more])
    written = capfd.readouterr()
    line = next(line for line in (written.out + written.err).splitlines() if line.startswith("estimate"))
    plan = json.loads(said(capfd, JSON, "--device=H200", "--json", *more))
    assert names(line, f"{plan['memory']['total'] / GIB:.1f} GiB", "denoising")


def test_one_video_of_windows_is_one_video(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    argv = ("examples/vace/tiny/inference.json", "--prompt=x", "--num-frames=29", "--window=17")
    text = said(capfd, *argv)
    assert "1 video:" in text
    assert "kWh" in text


def said(capfd: pytest.CaptureFixture[str], *argv: str) -> Any:
    main(["plan", "--generate", *argv])
    return capfd.readouterr().out


def test_command_says_terms_and_verdict(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = said(capfd, JSON, "--device", "RTX 4090")
    for word in ("transformer", "VAE", "not fit", "offload block", "50 steps", "3 videos"):
        assert word in text
    assert "fits" in said(capfd, JSON, "--device=H200", "--num-frames", "49")


def test_command_reads_the_sizes_of_weights(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = json.loads(said(capfd, "examples/vace/tiny/inference.json", "--prompt", "x", "--json"))
    assert found["fits"]
    assert found["grid"] == [5, 8, 8]
    assert found["memory"]["total"] == pytest.approx(
        sum(found["memory"][name] for name in found["memory"] if name not in ("total", "moment"))
    )


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        (["--device", "H1000"], ["--device", "H100"]),
        (["--transformer", "nowhere"], ["nowhere", "model.transformer"]),
        (["--devices", "3"], ["3"]),
        (["--num-framse", "49"], ["--num-frames"]),
        (["--height", "481"], ["480"]),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], facts: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--generate", JSON, *argv])
    printed = "".join(capfd.readouterr())
    assert ended.value.code == 1
    assert len(printed.strip().splitlines()) == 1
    assert all(fact in printed for fact in facts)
