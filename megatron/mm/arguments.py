"""Megatron's command line.

Flags with an effect are fields of our configs. This file lists Megatron's other flags. A flag is
implemented (a field), accepted but unused (UNUSED, with the reason), or an error (unknown, or in REFUSED with
advice, because ignoring it would change the training).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.schema import Config
from mindspeed_mm.errors import ConfigError

_JSON = "the model JSON sets it"
_DTYPE = "use predictor.dtype and param_dtype of fsdp2_config.yaml"
_NO_TP = "there is no tensor parallelism"
_NO_PP = "use predictor.pipeline_num_layers of the model JSON"
_FSDP = "FSDP2 always does this"
_TEXT = "the model has no token vocabulary"
_FUSED = "the device's fused kernels are used if it has them"
_DROPOUT = "the model has no dropout"
_INIT = "models are built on the meta device and filled from files"
_LOOP = "always on"

# flag → (number of values, why it has no effect here)
UNUSED: Mapping[str, tuple[int | str, str]] = {
    "--untie-embeddings-and-output-weights": (0, _TEXT),
    "--no-gradient-accumulation-fusion": (0, _FSDP),
    "--use-cpu-initialization": (0, _INIT),
    "--init-model-with-meta-device": (0, _INIT),
    "--downcast-to-bf16": (0, _DTYPE),
    "--fp16": (0, _DTYPE),
    "--params-dtype": (1, _DTYPE),
    "--accumulate-allreduce-grads-in-fp32": (0, "use reduce_dtype of fsdp2_config.yaml"),
    "--grad-reduce-in-bf16": (0, "use reduce_dtype of fsdp2_config.yaml"),
    "--loss-scale": (1, "bf16 needs no loss scale"),
    "--initial-loss-scale": (1, "bf16 needs no loss scale"),
    "--min-loss-scale": (1, "bf16 needs no loss scale"),
    "--use-fused-rmsnorm": (0, _FUSED),
    "--use-fused-swiglu": (0, _FUSED),
    "--use-fused-rotary-pos-emb": (0, _FUSED),
    "--use-flash-attn": (0, _FUSED),
    "--no-masked-softmax-fusion": (0, _FUSED),
    "--no-bias-gelu-fusion": (0, _FUSED),
    "--no-bias-swiglu-fusion": (0, _FUSED),
    "--no-bias-dropout-fusion": (0, _FUSED),
    "--no-rope-fusion": (0, _FUSED),
    "--no-persist-layer-norm": (0, _FUSED),
    "--attention-softmax-in-fp32": (0, _FUSED),
    "--attention-mask-type": (1, "attention has no mask"),
    "--attention-backend": (1, _FUSED),
    "--transformer-impl": (1, "there is only one implementation"),
    "--use-mcore-models": (0, "there is only one implementation"),
    "--use-legacy-models": (0, "there is only one implementation"),
    "--spec": ("+", "use predictor.model_id"),
    "--num-layers": (1, _JSON),
    "--hidden-size": (1, _JSON),
    "--ffn-hidden-size": (1, _JSON),
    "--num-attention-heads": (1, _JSON),
    "--kv-channels": (1, _JSON),
    "--group-query-attention": (0, _JSON),
    "--num-query-groups": (1, _JSON),
    "--norm-epsilon": (1, _JSON),
    "--normalization": (1, _JSON),
    "--swiglu": (0, _JSON),
    "--disable-bias-linear": (0, _JSON),
    "--add-qkv-bias": (0, _JSON),
    "--seq-length": (1, "the features determine the length"),
    "--max-position-embeddings": (1, "the features determine the length"),
    "--variable-seq-lengths": (0, "the features determine the length"),
    "--position-embedding-type": (1, "the model uses rotary position embeddings"),
    "--rotary-base": (1, "the model uses rotary position embeddings"),
    "--rotary-percent": (1, "the model uses rotary position embeddings"),
    "--attention-dropout": (1, _DROPOUT),
    "--hidden-dropout": (1, _DROPOUT),
    "--init-method-std": (1, _INIT),
    "--tokenizer-type": (1, _TEXT),
    "--tokenizer-model": (1, _TEXT),
    "--tokenizer-name-or-path": (1, _TEXT),
    "--tokenizer-not-use-fast": (0, _TEXT),
    "--vocab-size": (1, _TEXT),
    "--make-vocab-size-divisible-by": (1, _TEXT),
    "--data-path": ("*", "use --mm-data"),
    "--split": (1, "use dataset_param.validation of the data JSON"),
    "--dataloader-type": (1, "use dataloader_param of the data JSON"),
    "--no-create-attention-mask-in-dataloader": (0, "attention has no mask"),
    "--sequence-parallel": (0, _NO_TP),
    "--tp-comm-overlap": (0, _NO_TP),
    "--num-layers-per-virtual-pipeline-stage": (1, _NO_PP),
    "--use-distributed-optimizer": (0, _FSDP),
    "--overlap-grad-reduce": (0, _FSDP),
    "--overlap-param-gather": (0, _FSDP),
    "--use-precision-aware-optimizer": (0, "moments are always fp32"),
    "--start-weight-decay": (1, "--weight-decay is constant"),
    "--end-weight-decay": (1, "--weight-decay is constant"),
    "--weight-decay-incr-style": (1, "--weight-decay is constant"),
    "--distribute-saved-activations": (0, "use offload_block_inputs of fsdp2_config.yaml"),
    "--recompute-activations": (0, "use --recompute-granularity"),
    "--log-timers-to-tensorboard": (0, _LOOP),
    "--log-memory-to-tensorboard": (0, _LOOP),
    "--log-learning-rate-to-tensorboard": (0, _LOOP),
    "--log-validation-ppl-to-tensorboard": (0, "the model has no perplexity"),
    "--log-num-zeros-in-grad": (0, "not computed"),
    "--log-params-norm": (0, "not computed"),
    "--timing-log-option": (1, "the logging rank reports its own phase times"),
    "--tensorboard-queue-size": (1, "the writer's default is used"),
    "--no-check-for-nan-in-loss-and-grad": (0, "an iteration that is not finite is skipped and counted"),
    "--check-for-large-grads": (0, "a loss spike is reported with its samples"),
    "--manual-gc": (0, "not needed"),
    "--manual-gc-interval": (1, "not needed"),
    "--empty-unused-memory-level": (1, "not needed"),
    "--no-barrier-with-level-1-timing": (0, "timers never synchronize ranks"),
    "--local-rank": (1, "use the environment that torchrun sets"),
    "--local_rank": (1, "use the environment that torchrun sets"),
    "--use-tp-pp-dp-mapping": (0, _NO_TP),
    "--no-shared-storage": (0, "each rank reads only its own slices"),
    "--no-shared-fs": (0, "each rank reads only its own slices"),
    "--use-ascend-mc2": (0, _NO_TP),
    "--use-ascend-coc": (0, _NO_TP),
    "--jit-compile": (0, "the device's default is used"),
    "--allow-tf32": (0, "the device's default is used"),
    "--auto-detect-ckpt-format": (0, "checkpoints are always torch_dcp"),
    "--use-dist-ckpt": (0, "checkpoints are always torch_dcp"),
    "--dist-ckpt-strictness": (1, "loading is always strict"),
    "--ckpt-fully-parallel-save": (0, "each rank always writes its own shard"),
    "--ckpt-assume-constant-structure": (0, "not needed"),
    "--use-checkpoint-args": (0, "job.json in the checkpoint contains its arguments"),
    "--use-checkpoint-opt_param-scheduler": (
        0,
        ("the checkpoint sets the position in the schedule, the flags its shape"),
    ),
    "--override-opt_param-scheduler": (
        0,
        ("the checkpoint sets the position in the schedule, the flags its shape"),
    ),
}

# flag → what to do instead, because ignoring these would change the training
REFUSED: Mapping[str, str] = {
    "--rampup-batch-size": (
        "the global batch size is constant; set --global-batch-size, and --lr-warmup-samples "
        "for a gradual start"
    ),
    "--fp8-format": "matrix products are bf16 or fp32; remove the flag",
    "--calculate-per-token-loss": "the loss is a mean over samples; remove the flag",
}


class _NotUsed(argparse.Action):
    """Accept a flag and its values, and record its name."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        names: list[str] = namespace.__dict__.setdefault("not_used", [])
        names.append(str(option_string))


class _Refused(argparse.Action):
    """Raise an error with the advice in `help`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        raise ConfigError(f"{option_string} is not supported: {self.help}", where=parser.prog)


def build_parser(prog: str, description: str, schemas: Sequence[tuple[type[Config], str]]) -> FlagParser:
    """Build a parser with a flag for each field of each (schema, title), and all of UNUSED and REFUSED."""
    parser = FlagParser(prog, description)
    for schema, title in schemas:
        add_flags(parser, schema, title)
    group = parser.add_argument_group("accepted, unused")
    taken = set(parser.flags())
    for flag, (values, reason) in UNUSED.items():
        if flag not in taken:
            group.add_argument(
                flag, action=_NotUsed, nargs=values, dest=argparse.SUPPRESS, metavar="VALUE", help=reason
            )
    group = parser.add_argument_group("refused")
    for flag, advice in REFUSED.items():
        group.add_argument(
            flag,
            action=_Refused,
            nargs="*",
            dest=argparse.SUPPRESS,
            metavar="VALUE",
            help=advice.replace("%", "%%"),
        )
    return parser


def parse_arguments(
    parser: FlagParser, argv: Iterable[str], schemas: Sequence[tuple[type[Config], str]]
) -> tuple[dict[type[Config], dict[str, Any]], list[str]]:
    """Parse `argv` into the values for each schema, and a note for each flag without effect."""
    namespace = parser.parse_strict(argv)
    notes = [
        f"{flag}: accepted, unused: {UNUSED[flag][1]}"
        for flag in dict.fromkeys(getattr(namespace, "not_used", []))
    ]
    return {schema: given(namespace, schema) for schema, _ in schemas}, notes
