"""Pipeline stages in the plan: what waits, what each rank computes, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.pipelining.schedules import _get_warmup_ops

from mindspeed_mm.cli.main import main
from mindspeed_mm.distributed.config import bubble
from mindspeed_mm.models.wan.config import PRESETS
from mindspeed_mm.models.wan.flops import step_flops, tokens_of
from mindspeed_mm.models.wan.pipeline import split_vace
from mindspeed_mm.models.wan.shapes import layout
from mindspeed_mm.models.wan.vace import VaceTransformer
from mindspeed_mm.planning.counts import at_counts
from mindspeed_mm.planning.devices import DEVICES
from mindspeed_mm.planning.fit import smallest_changes, usual_lora
from mindspeed_mm.planning.memory import memory_of_ranks, training_memory
from mindspeed_mm.planning.stages import block_costs, pipeline_ranks, rank_shares, waiting
from mindspeed_mm.planning.time import step_time
from mindspeed_mm.planning.units import TrainingRun, unit_of, units
from tests.support.tiny import TINY

VACE = Path(__file__).resolve().parents[3] / "examples/vace"
GIB = 2.0**30
H100 = DEVICES["H100"]
PLAIN = TrainingRun(model=PRESETS["Wan2.1-VACE-14B"], grid=(21, 60, 104), ranks=16, shards=4, micro_batches=8)
STAGED = replace(PLAIN, stages=(10, 10, 10, 10), pipeline=4)


@pytest.mark.parametrize("layers", [(1, 3), (2, 2), (1, 1, 1, 1)])
def test_each_rank_holds_the_weights_of_its_stages(layers: tuple[int, ...]) -> None:
    run = TrainingRun(model=TINY, grid=(3, 8, 8), ranks=2, stages=layers, pipeline=2, micro_batches=2)
    names = {unit.name for unit in units(run)}
    for rank in pipeline_ranks(run):
        with torch.device("meta"):
            model = VaceTransformer(TINY)
        split = split_vace(model, layers, [stage.number for stage in rank.stages])
        held = {
            name for part in (split.reader, *split.stages.values()) for name, _ in part.named_parameters()
        }
        planned = {name for name in names if rank.holds(name, TINY.vace_layers)}
        assert planned == {unit_of(name) for name in held}


@pytest.mark.parametrize(("ranks", "virtual", "count"), [(2, 1, 8), (4, 1, 4), (2, 2, 4), (4, 3, 8)])
def test_waiting_micro_batches_match_torchs_schedules(ranks: int, virtual: int, count: int) -> None:
    run = replace(STAGED, stages=(1,) * ranks * virtual, pipeline=ranks, micro_batches=count)
    in_round = count // max(1, count // ranks)
    for rank in range(ranks):
        found = waiting(run, rank, virtual)
        if virtual == 1:
            assert found == (min(count, ranks - rank),)
        else:
            before = _get_warmup_ops(rank, virtual, in_round, ranks, count)
            assert sum(found) == min(before + 1, count * virtual)
        assert waiting(replace(run, gpipe=True), rank, virtual) == (count,) * virtual


@pytest.mark.parametrize("part", ["branch", "trunk", "all"])
@pytest.mark.parametrize("mode", [None, "selective", "full"])
def test_costs_of_blocks_sum_to_those_of_a_step(part: str, mode: str | None) -> None:
    names = [unit.name for unit in units(PLAIN) if "blocks." in unit.name]
    run = replace(PLAIN, trainable=part, recompute=dict.fromkeys(names, mode) if mode else {})
    costs = block_costs(run)
    tokens = tokens_of(run.grid, run.model)
    whole = step_flops(run.model, tokens, part, 0.0).hardware  # type: ignore[arg-type]
    plain = block_costs(replace(run, recompute={}))
    assert sum(plain.values()) == pytest.approx(whole, rel=0.01)
    assert (sum(costs.values()) > 1.1 * sum(plain.values())) == (mode is not None)
    assert set(costs) == set(names)


def test_bubble_imbalance_and_tokens_match_the_formulas() -> None:
    plain, staged = step_time(PLAIN, H100, "bf16"), step_time(STAGED, H100, "bf16")
    computing = (plain.products + plain.attention) / 4
    assert staged.products + staged.attention == pytest.approx(computing)
    slowest = computing + staged.imbalance
    assert staged.imbalance == pytest.approx(computing * (4 * max(rank_shares(STAGED)) - 1))
    assert staged.bubble == pytest.approx(slowest * 3 / 8)
    assert staged.bubble / (staged.bubble + slowest) == pytest.approx(bubble(4, 1, 8))
    two = replace(STAGED, stages=(5,) * 8)
    assert step_time(two, H100, "bf16").bubble == pytest.approx(staged.bubble / 2, rel=0.1)
    sent = 2 * 11 * 2 * tokens_of(PLAIN.grid, PLAIN.model) * 5120 * 4
    assert staged.tokens == pytest.approx(sent / (H100.network * 1e9))


def test_uneven_stages_cost_what_the_longest_computes() -> None:
    even, uneven = (step_time(replace(STAGED, stages=s), H100, "bf16") for s in ((10,) * 4, (16, 8, 8, 8)))
    assert uneven.imbalance > even.imbalance + 0.4 * (even.products + even.attention)
    assert uneven.total > even.total


def test_stages_divide_weights_and_keep_more_micro_batches() -> None:
    of_ranks = memory_of_ranks(STAGED)
    whole = training_memory(replace(PLAIN, shards=16))
    assert [memory.rank for memory in of_ranks] == [0, 1, 2, 3]
    assert sum(memory.terms["weights"] for memory in of_ranks) == pytest.approx(
        4 * whole.terms["weights"], rel=0.1
    )
    kept = [memory.terms["block inputs"] for memory in of_ranks]
    assert kept == sorted(kept, reverse=True)
    assert training_memory(STAGED) == max(of_ranks, key=lambda memory: memory.total)
    gpipe = memory_of_ranks(replace(STAGED, gpipe=True))
    assert gpipe[0].terms["block inputs"] == pytest.approx(2 * kept[0], rel=0.05)
    assert gpipe[3].terms["block inputs"] > 6 * kept[3]


def test_scaling_and_changes_know_the_stages() -> None:
    counts = at_counts(STAGED, H100, "bf16", 80 * GIB)
    assert [one.devices for one in counts] == [2**power for power in range(2, 11)]
    changes = smallest_changes(STAGED, DEVICES["RTX 4090"], "bf16", 60 * GIB)
    assert changes
    assert all(change.memory <= 60 * GIB for change in changes)


@pytest.mark.parametrize("on", [("blocks.",), ("vace_blocks.",), ("blocks.", "vace_blocks.")])
def test_costs_of_a_lora_sum_to_those_of_a_step(on: tuple[str, ...]) -> None:
    lora = {
        name: rank
        for name, rank in usual_lora(replace(PLAIN, trainable="all"), 32).items()
        if name.startswith(on)
    }
    run = replace(PLAIN, lora=lora)
    shapes = layout(run.model)
    counts = {name: rank * sum(shapes[f"{name}.weight"]) for name, rank in lora.items()}
    whole = step_flops(run.model, tokens_of(run.grid, run.model), "branch", lora=counts).hardware
    assert sum(block_costs(run).values()) == pytest.approx(whole, rel=0.01)


def test_rings_send_keys_and_values_around() -> None:
    run = replace(PLAIN, context_parallel=4, recompute={})
    ulysses, ring, hybrid = (
        step_time(replace(run, ulysses=u), H100, "bf16").communication for u in (4, 1, 2)
    )
    assert step_time(run, H100, "bf16").communication == ulysses
    assert ring == pytest.approx(ulysses * (3 * 2 * 3) / (2 * 4 * 3 / 4))
    assert ulysses < hybrid < ring


def test_command_says_what_stages_cost(capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", f"{VACE}/14B/feature_data.json", "--fsdp2-config-path", f"{VACE}/fsdp2_config.yaml"]
    argv = [
        "plan",
        "--model",
        f"{VACE}/14B/pretrain_model.json",
        *data,
        "--devices=16",
        "--global-batch-size=32",
    ]
    argv += ["--pipeline-model-parallel-size=4", "--virtual-pipeline-model-parallel-size=2"]
    main(argv)
    text = capsys.readouterr().out
    for word in ("bubble", "imbalance", "tokens sent", "[[5, 5, 5, 5], [5, 5, 5, 5]] layers", "+ stages"):
        assert word in text
    main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["stage_layers"] == [5] * 8
    assert [one["rank"] for one in found["stages"]] == [0, 1, 2, 3]
    assert found["memory"]["total"] == max(one["memory"] for one in found["stages"])
    step = found["step_seconds"]
    parts = ("products", "attention", "communication", "data", "imbalance", "bubble", "tokens")
    assert step["total"] == pytest.approx(sum(step[name] for name in parts))
