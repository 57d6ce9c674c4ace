"""The list of flags changes only on purpose: a removed or renamed flag breaks somebody's script."""

from __future__ import annotations

from pathlib import Path

from megatron.mm.arguments import REFUSED, UNUSED
from mindspeed_mm.config.flags import flag_name
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.tasks.jobs.pretrain import SCHEMAS, PretrainJob, job_parser
from mindspeed_mm.tools.flag_reference import reference
from tests.support.errors import raises

ROOT = Path(__file__).resolve().parents[2]
HONOURED = [
    "--mm-model",
    "--mm-data",
    "--mm-tool",
    "--bf16",
    "--dry-run",
    "--print-config",
    "--check-inputs",
    "--set",
    "--lora-rank",
    "--lora-alpha",
    "--lora-on",
    "--lora-init-from",
    "--fuse-lora",
    "--quantize",
    "--micro-batch-size",
    "--global-batch-size",
    "--train-iters",
    "--train-samples",
    "--num-workers",
    "--seed",
    "--lr",
    "--min-lr",
    "--lr-decay-style",
    "--lr-decay-iters",
    "--lr-decay-samples",
    "--lr-wsd-decay-style",
    "--lr-wsd-decay-iters",
    "--lr-wsd-decay-samples",
    "--lr-warmup-init",
    "--lr-warmup-iters",
    "--lr-warmup-samples",
    "--lr-warmup-fraction",
    "--optimizer",
    "--muon-momentum",
    "--adam-beta1",
    "--adam-beta2",
    "--adam-eps",
    "--weight-decay",
    "--weight-decay-all",
    "--clip-grad",
    "--optimizer-selection",
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--virtual-pipeline-model-parallel-size",
    "--pipeline-schedule",
    "--context-parallel-size",
    "--context-parallel-algo",
    "--ulysses-degree-in-cp",
    "--use-torch-fsdp2",
    "--fsdp2-config-path",
    "--distributed-backend",
    "--distributed-timeout-minutes",
    "--recompute-granularity",
    "--recompute-method",
    "--recompute-num-layers",
    "--use-mindspeed",
    "--save",
    "--save-interval",
    "--load",
    "--ckpt-step",
    "--finetune",
    "--ignore-existing-checkpoints",
    "--exit-on-missing-checkpoint",
    "--ckpt-format",
    "--async-save",
    "--save-retain-interval",
    "--save-best",
    "--save-full-model",
    "--no-load-optim",
    "--no-load-rng",
    "--no-save-optim",
    "--no-save-rng",
    "--no-verify-checksums",
    "--log-interval",
    "--log-throughput",
    "--timing-log-level",
    "--tensorboard-dir",
    "--tensorboard-log-interval",
    "--wandb-project",
    "--wandb-exp-name",
    "--wandb-save-dir",
    "--peak-tflops",
    "--spike-factor",
    "--eval-interval",
    "--eval-iters",
    "--eval-quantiles",
    "--eval-videos",
    "--exit-interval",
    "--exit-duration-in-mins",
    "--exit-signal-handler",
    "--check-for-nan-in-loss-and-grad",
    "--max-skipped-iterations",
    "--profile",
    "--profile-step-start",
    "--profile-step-end",
    "--profile-ranks",
]
UNUSED_THAT_SCRIPTS_CARRY = [
    "--untie-embeddings-and-output-weights",
    "--no-gradient-accumulation-fusion",
    "--use-cpu-initialization",
    "--downcast-to-bf16",
    "--use-fused-rmsnorm",
    "--transformer-impl",
    "--num-layers",
    "--hidden-size",
    "--num-attention-heads",
    "--seq-length",
    "--max-position-embeddings",
    "--position-embedding-type",
    "--tokenizer-type",
    "--variable-seq-lengths",
    "--no-masked-softmax-fusion",
]


def test_honoured_flags_are_these() -> None:
    assert sorted(flag_name(name) for schema, _ in SCHEMAS for name in schema.model_fields) == sorted(
        HONOURED
    )


def test_every_honoured_flag_says_what_it_does() -> None:
    for schema, _ in SCHEMAS:
        for name, field in schema.model_fields.items():
            assert field.description, f"{schema.__name__}.{name}"


def test_unused_published_flags_are_accepted_with_reason() -> None:
    assert set(UNUSED_THAT_SCRIPTS_CARRY) <= set(UNUSED)
    assert all(reason for _, reason in UNUSED.values())
    assert not set(UNUSED) & set(HONOURED)


def test_unused_flags_swallow_their_values_and_are_named_once(tmp_path: Path) -> None:
    with raises(ConfigError, "--mm-model"):
        PretrainJob.from_argv(
            ["--num-layers", "3", "--swiglu", "--data-path", "a", "b", "--num-layers", "3", "--lr", "1"]
        )


def test_ramp_of_the_batch_size_is_rejected_with_advice() -> None:
    with raises(ConfigError, "--rampup-batch-size"):
        PretrainJob.from_argv(["--lr", "1", "--rampup-batch-size", "2", "2", "100"])
    assert set(REFUSED).isdisjoint({*HONOURED, *UNUSED})


def test_abbreviation_is_rejected_with_the_whole_flag() -> None:
    with raises(ConfigError, "--micro-batch", "--micro-batch-size"):
        job_parser().parse_strict(["--micro-batch", "1"])


def test_reference_page_is_current() -> None:
    page = ROOT / "docs/reference/flags.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run: python -m mindspeed_mm.tools.flag_reference docs/reference/flags.md"
    )
