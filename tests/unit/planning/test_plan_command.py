"""`vace plan`: flags of training in, memory and time out; no torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.planning.devices import DEVICES, find_device
from mindspeed_mm.planning.fit import smallest_changes
from mindspeed_mm.planning.memory import training_memory
from mindspeed_mm.planning.time import step_time
from mindspeed_mm.tasks import plan_generation
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from mindspeed_mm.tasks.jobs.plan import largest_clip, read_job, run_of
from mindspeed_mm.tasks.plan import GIB, Plan, as_json, draw, make_plan, table
from tests.support.errors import meant, raises

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[3]
VACE = ROOT / "examples/vace"
CLIP = ("--devices=8", "--frames=81", "--height=480", "--width=832")


def files(size: str) -> list[str]:
    folder = VACE / size
    data = ["--data", f"{folder}/feature_data.json", "--fsdp2-config-path", f"{VACE}/fsdp2_config.yaml"]
    return ["--model", f"{folder}/pretrain_model.json", *data]


def lines(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main(["plan", *argv])
    written = capsys.readouterr()
    return written.out + written.err


def test_plan_prints_every_term_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    text = lines(capsys, *files("1.3B"), "--train-iters", "5000")

    for word in (
        "weights",
        "masters",
        "moments",
        "block inputs",
        "inside a",
        "slack",
        "fits",
        "samples/s",
        "hours",
        "kWh",
    ):
        assert word in text
    assert "32760 tokens" in text
    assert len(text.strip().splitlines()) <= 20


def test_plan_as_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    plan: dict[str, Any] = json.loads(lines(capsys, *files("14B"), "--device", "4090", "--json"))

    memory = plan["memory"]
    terms = [size for name, size in memory.items() if name not in ("total", "moment")]
    assert memory["total"] == pytest.approx(sum(terms))
    assert plan["fits"] is False
    assert plan["fits"] == (memory["total"] <= plan["capacity"])
    step = plan["step_seconds"]
    parts = sum(step[name] for name in ("products", "attention", "communication", "data"))
    assert step["total"] == pytest.approx(parts)


def test_plan_needs_no_torch() -> None:
    code = (
        f"import sys; from mindspeed_mm.cli.main import main; main(['plan', *{files('1.3B')!r}]); assert "
        "'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr


def test_known_memory_of_the_1_3b_model_on_eight_ranks() -> None:
    """torch's tracker, all 45 blocks traced once: 13.52 GiB of tensors."""
    job, flags = read_job(files("1.3B"))
    run = run_of(job, largest_clip(job, flags).grid, on_cpu=True)

    assert training_memory(run).total / GIB == pytest.approx(13.52, rel=0.02)


@pytest.mark.parametrize(
    ("size", "device", "count"), [("14B", "4090", 8), ("1.3B", "4090", 1), ("14B", "A100", 1)]
)
def test_every_proposed_change_fits(size: str, device: str, count: int) -> None:
    job, flags = read_job([*files(size), "--device", device, "--devices", str(count)])
    plan = make_plan(job, flags)

    assert not plan.fits
    assert plan.changes
    for change in plan.changes:
        assert change.memory <= plan.capacity
        assert len(change.settings) <= 3
    kept = [change.keeps_result for change in plan.changes]
    assert kept == sorted(kept, reverse=True)


def test_proposal_has_no_setting_too_many() -> None:
    job, flags = read_job([*files("14B"), "--device", "4090"])
    run, device = run_of(job, largest_clip(job, flags).grid), find_device("4090")
    names = [set(change.settings) for change in smallest_changes(run, device, "bf16", device.memory * GIB)]

    assert not any(one < other for one in names for other in names)


def test_devices_are_found_in_any_spelling() -> None:
    assert {find_device(name).name for name in ("h100", "NVIDIA H100", "H-100")} == {"H100"}
    assert find_device("rtx_5090").name == "RTX 5090"
    assert find_device("ascend910b").name == "Ascend 910B"
    assert all(device.link > 0 and 10 < device.memory < 300 for device in DEVICES.values())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("H1000", "H100"),
        ("4080", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("Ascend910D", "Ascend 910C"),
    ],
)
def test_unknown_device_names_the_nearest(name: str, nearest: str) -> None:
    with raises(ConfigError, name, meant(nearest), "Ascend 910B", where="--device"):
        find_device(name)


def test_clip_that_does_not_divide_is_an_error() -> None:
    job, flags = read_job([*files("1.3B"), "--frames", "80", "--height", "470"])
    with raises(ConfigError, 80, "470x832", where="--frames, --height, --width"):
        largest_clip(job, flags)


def test_largest_clip_of_the_data_decides(tmp_path: Path) -> None:
    shutil.copy(VACE / "1.3B/pretrain_model.json", tmp_path)
    listing = tmp_path / "data.jsonl"
    rows = [
        {"file": "a.safetensors", "shape": [5, 16, 16]},
        {"file": "b.safetensors", "shape": [13, 30, 52], "num_refs": 2},
        {"file": "c"},
    ]
    listing.write_text("\n".join(map(json.dumps, rows)))
    data = tmp_path / "data.json"
    source = {"data_path": str(listing), "data_folder": str(tmp_path)}
    data.write_text(json.dumps({"dataset_param": {"dataset_type": "feature", "basic_parameters": source}}))
    argv = ["--model", f"{tmp_path}/pretrain_model.json", "--data", str(data)]
    job, flags = read_job(argv)

    assert largest_clip(job, flags).grid == (13, 30, 52)
    assert largest_clip(job, flags).size == "41 frames of 240x416 with 2 references"
    plan = make_plan(job, flags)
    assert plan.hours(plan.epoch) == pytest.approx(2 / plan.samples * plan.time.total / 3600)
    assert ("epoch", f"2 samples: at most {plan.hours(0.25):.3g} hours") in [
        (name, text.partition(",")[0]) for name, text in table(plan, job)
    ]
    assert as_json(plan)["epoch"]["kwh"] == plan.kwh(0.25)
    assert as_json(make_plan(*read_job([*argv, *CLIP])))["epoch"] is None
    listing.write_text(json.dumps({"file": "a", "shape": "big"}))
    with raises(ConfigError, "shape", where=None):
        largest_clip(job, flags)


def test_more_devices_are_never_slower_for_each_sample() -> None:
    times = []
    for count in (1, 8, 64, 512, 1024):
        job, flags = read_job([*files("14B"), "--devices", str(count)])
        plan = make_plan(job, flags)
        times.append(plan.time.total / plan.samples)
    assert times == sorted(times, reverse=True)


def test_recomputing_costs_time_and_saves_memory() -> None:
    job, flags = read_job(files("1.3B"))
    full = run_of(job, largest_clip(job, flags).grid)
    none, device = replace(full, recompute={}), find_device("H100")

    assert training_memory(none).total > 2 * training_memory(full).total
    assert 1.2 < step_time(full, device, "bf16").total / step_time(none, device, "bf16").total < 1.45


def test_weak_scaling_uses_only_divisors(capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(lines(capsys, *files("14B"), "--json", "--context-parallel-size", "4"))

    assert [one["devices"] for one in plan["counts"]] == [2**power for power in range(2, 11)]
    speeds = [one["samples_per_second"] for one in plan["counts"]]
    assert speeds == sorted(speeds)


def test_picture_has_a_bar_for_each_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(capsys, *files("14B"), "--picture", str(tmp_path / "plan.png"))

    with Image.open(tmp_path / "plan.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {
        (0xE1, 0x57, 0x59),
        (0xF2, 0x8E, 0x2B),
        (0x4E, 0x79, 0xA7),
    } <= colours  # inside, block inputs, weights


@pytest.mark.parametrize("place", [".", "", "/"])
def test_picture_in_place_of_a_folder_is_one_line(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *files("1.3B"), f"--picture={place}"])
    assert ended.value.code == 1
    said = "".join(capsys.readouterr())
    assert "--picture" in said
    assert len(said.strip().splitlines()) == 1


def test_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    job, flags = read_job(files("1.3B"))
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "plan.png"
    with raises(ConfigError, where=f"--picture: {path}"):
        draw(make_plan(job, flags), job, path)


def test_8_bits_halve_the_planned_weights() -> None:
    argv = [*files("14B"), "--lora-rank=32", "--device=A100", "--devices=1"]
    exact, held = (run_plan([*argv, *more]) for more in ([], ["--quantize=int8"]))
    assert held.memory.terms["weights"] == pytest.approx(exact.memory.terms["weights"] / 2, rel=0.06)
    assert held.run.quantized == frozenset()
    named = run_plan([*argv, '--set=model.transforms=[{"type": "quantize", "match": "blocks.*"}]'])
    assert len(named.run.quantized or ()) == 400


def test_8_bits_are_offered_where_they_fit() -> None:
    plan = run_plan([*files("14B"), "--lora-rank=32", "--lora-on=both", "--device=A100", "--devices=1"])
    assert not plan.fits
    (change,) = (one for one in plan.changes if one.settings == ("--quantize int8",))
    assert change.memory <= plan.capacity
    assert not change.keeps_result


TRAINED = {  # the README's words → flags
    ("train the VACE branch", "训练 VACE 分支"): (),
    ("train all", "训练全部权重"): ("--set=model.predictor.trainable=all",),
    ("train a LoRA, rank 32", "训练 LoRA，秩 32"): ("--lora-rank=32",),
}
GENERATED = {
    "1.3B": "inference_wan2.1_1.3b.json",
    "14B": "inference_wan2.1_14b.json",
    "A14B": "inference_wan2.2_A14b.json",
}


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_readme_table_matches_vace_plan(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    for ours in (("昇腾", "Ascend"), ("分钟", "min"), ("：", ": "), ("，", ", "), ("LoRA, ", "LoRA，")):
        text = text.replace(*ours) if readme == "README_zh.md" else text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    start = next(number for number, row in enumerate(rows) if "H100" in row)
    devices = rows[start][2:]
    for sizes, part, *cells in rows[start + 2 : start + 8]:
        flags = next(flags for words, flags in TRAINED.items() if part in words)
        for size in re.findall(r"[\d.]+B", sizes):  # of A14B, one expert trains
            for device, cell in zip(devices, cells, strict=True):
                plan = run_plan([*files(size), *CLIP, f"--device={device}", *flags])
                said = f"{plan.memory.total / GIB:.0f} GiB, {plan.time.total:.1f} s" if plan.fits else "–"
                assert cell == said, (readme, size, part, device)
    for size, part, *cells in rows[start + 8 : start + 11]:
        assert part in ("generate", "生成")
        job = GenerateJob.from_file(VACE / "inference" / GENERATED[size], needs_weights=False)
        for device, cell in zip(devices, cells, strict=True):
            assert cell == generation_cell(job, device), (readme, size, part, device)


def generation_cell(job: GenerateJob, device: str) -> str:
    """Memory and minutes, of the cheapest change where the job does not fit as it is."""
    plan = plan_generation.make_plan(job, plan_generation.GenerationPlanFlags(device=device))
    if plan.fits:
        return f"{plan.memory.total / GIB:.0f} GiB, {minutes(plan.time.total)}"
    change = plan.changes[0]
    return f"`{change.settings[0]}`: {change.memory / GIB:.0f} GiB, {minutes(change.cost * plan.time.total)}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.2g} min"


def test_moments_read_as_a_sentence() -> None:
    job, flags = read_job([*files("1.3B"), "--devices=1", "--frames=17", "--height=256", "--width=256"])
    (said,) = (text for _, text in table(make_plan(job, flags), job) if "in all, at" in text)
    assert re.search(r", at (summing|the (?!the |summing ))", said)


def run_plan(argv: list[str]) -> Plan:
    job, flags = read_job(argv)
    return make_plan(job, flags)
