"""Checks that a training job has what its evaluation needs: held-out features, videos, a folder.

Does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import generating_spec
from mindspeed_mm.training.hooks.config import EarlyStopConfig

if TYPE_CHECKING:
    from mindspeed_mm.tasks.jobs.pretrain import PretrainJob


def check_evaluation(job: PretrainJob) -> None:
    """Raise ConfigError if an evaluation flag or key would have no effect."""
    validation = getattr(job.data.dataset_param, "validation", None)
    prompts = getattr(validation, "prompts", None)
    evaluation, where = job.training.eval, _prompts_key(job)
    for flag in _compares(job):
        if validation is None:
            raise ConfigError(
                "has no held-out loss to compare",
                where=flag,
                fix="set dataset_param.validation to held-out features, or remove it",
            )
        if not evaluation.eval_iters:
            raise ConfigError("has no effect with --eval-iters 0", where=flag, fix="raise --eval-iters")
    if evaluation.eval_videos and prompts is None:
        raise ConfigError(
            "has no videos to score",
            where="--eval-videos",
            fix="set dataset_param.validation.prompts to an inference JSON, or remove the flag",
        )
    if prompts is not None:
        generating_spec(job.predictor.model_id, where)
    role = job.model.diffusion.role
    if prompts is not None and role is not None:
        raise ConfigError(
            f"this is the {role}-noise expert, and one of two experts cannot generate a video alone",
            where=where,
            fix="remove prompts (data_path still measures the held-out loss) and generate with "
            "[high, low] afterwards",
        )


def check_evaluation_folder(job: PretrainJob) -> None:
    """Raise ConfigError if the evaluation writes files but --save is missing."""
    if job.training.checkpoint.save is not None:
        return
    validation = getattr(job.data.dataset_param, "validation", None)
    if getattr(validation, "prompts", None) is not None:
        raise ConfigError("needs a folder for the videos", where=_prompts_key(job), fix="set --save")
    if job.training.checkpoint.save_best:
        raise ConfigError("needs a folder for the checkpoint", where="--save-best", fix="set --save")


def check_prompts(job: PretrainJob) -> None:
    """Raise ConfigError if the prompts of raw clips can be longer than the model accepts."""
    if job.raw_clips is None:
        return
    given = job.raw_clips.tokenizer_config.model_max_length
    text_len = getattr(job.predictor, "text_len", None)
    if text_len is not None and given > text_len:
        raise ConfigError(
            f"{given} tokens are more than predictor.text_len {text_len}",
            where=f"{job.files.mm_data}:dataset_param.tokenizer_config.model_max_length",
            fix=f"set it to {text_len}: longer captions are truncated, with a warning",
        )


def _compares(job: PretrainJob) -> list[str]:
    """Return the flags and keys of the job that compare held-out losses."""
    hooks = enumerate(job.model.hooks)
    keys = [f"{job.files.mm_model}:hooks[{i}]" for i, hook in hooks if isinstance(hook, EarlyStopConfig)]
    return ["--save-best", *keys] if job.training.checkpoint.save_best else keys


def _prompts_key(job: PretrainJob) -> str:
    return f"{job.files.mm_data}:dataset_param.validation.prompts"
