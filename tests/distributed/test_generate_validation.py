"""Videos made during training are, bit for bit, those made afterwards from the saved checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from mindspeed_mm.evaluation.report import read_report
from mindspeed_mm.generation.stored import read_latents
from mindspeed_mm.tasks.generate import main
from mindspeed_mm.training.checkpoint_folder import read_best
from tests.support.runs import arguments, make_run, train_job
from tests.support.tiny import write_official


@pytest.mark.parametrize(
    ("dtype", "ranks", "lora", "stages"),
    [
        ("fp32", 1, (), ()),
        ("bf16", 2, (), ()),
        ("fp32", 2, ("--lora-rank=4", "--lora-on=both"), ()),
        ("fp32", 2, (), ("--pipeline-model-parallel-size=2",)),
        (
            "fp32",
            4,
            (),
            ("--pipeline-model-parallel-size=2", "--virtual-pipeline-model-parallel-size=2"),
        ),
    ],
    ids=["fp32", "bf16", "lora", "stages", "virtual"],
)
def test_validation_equals_generation_from_the_checkpoint(world, tmp_path, dtype, ranks, lora, stages):
    write_official(tmp_path / "tiny")
    environment = make_run(tmp_path / "run", dtype=dtype)
    inference = tmp_path / "inference.json"
    config = {
        "model": {"transformer": "unused while training", "vae": "tiny", "text_encoder": "tiny"},
        **{"prompt": "a red ball", "height": 32, "width": 48, "num_frames": 5, "steps": 2, "dtype": dtype},
        "output_path": str(tmp_path / "alone"),
    }
    inference.write_text(json.dumps(config))
    data_json = Path(environment["MM_DATA"])
    data = json.loads(data_json.read_text())
    data["dataset_param"]["validation"]["prompts"] = str(inference)
    data_json.write_text(json.dumps(data))
    bf16 = ["--bf16"] if dtype == "bf16" else []
    flags = {
        "train_iters": 2,
        "eval_interval": 1,
        "save_interval": 1,
        "lr": 1e-2,
        "load": environment["SAVE_PATH"],
    }
    scored = ["--eval-videos", "--save-best"]
    rows = world.run(ranks, train_job, [*arguments(environment, *bf16, *lora, *stages, *scored, **flags)])[-1]

    save = tmp_path / "run" / "save"
    losses = {row["iteration"]: row["validation/loss"] for row in rows if "validation/loss" in row}
    best = read_best(save)
    assert best is not None
    assert (best.loss, best.iteration) == min((loss, iteration) for iteration, loss in losses.items())
    made = {}
    for iteration in (1, 2):
        name = f"iter_{iteration:07d}"
        main([str(inference), "--transformer", str(save / name), "--output-path", str(tmp_path / name)])
        during = save / "validation" / name
        (scores,) = read_report(during / "eval.json").samples
        assert "flicker" in scores.scores
        for metric, score in scores.scores.items():
            assert [score] == [
                row[f"validation/videos/{metric}"]
                for row in rows
                if row["iteration"] == iteration and f"validation/videos/{metric}" in row
            ]
        latents = [
            read_latents(folder / "video1" / "latents.safetensors")[0] for folder in (during, tmp_path / name)
        ]
        made[iteration] = latents[0]
        if lora:  # during training the LoRA is beside its base, afterwards it is part of it
            assert torch.allclose(*latents, atol=1e-4)
            continue
        assert torch.equal(*latents)
        assert (during / "video1.mp4").read_bytes() == (tmp_path / name / "video1.mp4").read_bytes()
    assert not torch.equal(made[1], made[2])  # the model did learn something in between
