"""One video from its request to its pixels: what calls, the command and validation videos share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.generation.conditions import conditions_of
from mindspeed_mm.generation.denoise import StepHook
from mindspeed_mm.generation.loras import applied
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.parallel import SINGLE, SingleProcess
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.generation.result import PromptEmbeds
from mindspeed_mm.generation.stages import (
    denoise,
    encode_conditions,
    encode_prompts,
    explain_oom,
)
from mindspeed_mm.progress import Progress

T = TypeVar("T")
OnConditions = Callable[[GenerationRequest, Conditions], None]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A request as the transformer takes it."""

    conditions: Conditions | None  # the pixels behind vace_context, on the main process alone
    vace_context: Tensor  # [96, R+F, h, w] on the host
    prompts: PromptEmbeds


def generate(
    models: ModelStore,
    request: GenerationRequest,
    finish: Callable[[GenerationRequest, Conditions, Tensor], T],
    *,
    parallel: SingleProcess = SINGLE,
    on_conditions: OnConditions | None = None,
    encoded: dict[str, Encoded] | None = None,
    hooks: Sequence[StepHook] = (),
    progress: bool = False,
) -> T | None:
    """What `finish` returns for the latents [16, R+F, h, w], references first, on the main process.

    None on the others.

    All processes of `parallel` call this together; `on_conditions` and `finish` run on the main one.
    `encoded` keeps what was encoded, by name, for the next call. Raises ConfigError, DataError, WeightsError,
    and NonFiniteError on every process.
    """
    models.start_measuring()
    encoded = {} if encoded is None else encoded
    if request.name not in encoded:
        encoded[request.name] = _encode(models, request, parallel, on_conditions)
    source = encoded[request.name]
    with explain_oom(request.name):
        _ = models.experts  # read before the bar starts, whose ETA knows denoising steps alone
    shown = None if progress else False
    with (
        Progress(
            f"{request.name}: denoising".removeprefix(": "),
            request.sampling.steps,
            "step",
            lines=5,
            shown=shown,
        ) as bar,
        explain_oom(request.name),
        applied(models.experts, request.loras, request.sampling) as clock,
    ):
        latents = denoise(
            models,
            source.vace_context,
            source.prompts,
            request.sampling,
            num_refs=len(request.inputs.src_ref_images),
            noise=request.noise,
            guide=parallel.guide,
            hooks=(clock.advance, lambda _: bar.step(), *hooks),
        ).cpu()

    def finish_on_main() -> T:
        assert source.conditions is not None
        return finish(request, source.conditions, latents)

    return parallel.run_on_main(finish_on_main)


def _encode(
    models: ModelStore,
    request: GenerationRequest,
    parallel: SingleProcess,
    on_conditions: OnConditions | None,
) -> Encoded:
    """Sources and prompts, read and encoded on the main process."""
    conditions = parallel.run_on_main(lambda: conditions_of(request))
    prompts = share_prompts(models, [request], parallel)

    def encode() -> Tensor:
        assert conditions is not None
        if on_conditions is not None:
            on_conditions(request, conditions)
        with explain_oom(request.name):
            return encode_conditions(models, conditions, request.sampling).cpu()

    rows = [prompts[prompt] for prompt in request.prompts]
    return Encoded(
        conditions=conditions,
        vace_context=parallel.run_on_main_and_broadcast(encode),
        prompts=PromptEmbeds(
            prompt_embeds=rows[0], negative_prompt_embeds=rows[1] if len(rows) == 2 else None
        ),
    )


def share_prompts(
    models: ModelStore, requests: Sequence[GenerationRequest], parallel: SingleProcess = SINGLE
) -> dict[str, Tensor]:
    """All prompts of `requests` → [L, text_dim] on every process.

    The main one encodes them, all in one go.
    """
    texts = [text for request in requests for text in request.prompts]
    if any(text not in models.cached_prompts for text in texts):
        with explain_oom(""):
            models.cached_prompts.update(
                parallel.run_on_main_and_broadcast(lambda: encode_prompts(models, texts))
            )
    return {text: models.cached_prompts[text] for text in texts}
