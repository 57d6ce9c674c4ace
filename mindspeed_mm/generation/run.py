"""Generates one video, from its request to its pixels.

Shared by VacePipeline, the command line and validation videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from mindspeed_mm.data.conditions import Conditions, to_tensors
from mindspeed_mm.data.images import Frames
from mindspeed_mm.data.video_writer import clip_bytes, mask_bytes
from mindspeed_mm.generation.conditions import read_conditions
from mindspeed_mm.generation.denoise import Step, StepHook, denoise
from mindspeed_mm.generation.loras import applied
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.parallel import SINGLE, SingleProcess
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.generation.result import GeneratedVideo, PromptEmbeds
from mindspeed_mm.generation.stages import (
    decode,
    encode_conditions,
    encode_prompts,
    explain_oom,
)
from mindspeed_mm.generation.windows.extend import extend
from mindspeed_mm.generation.windows.paste import paste_chunks
from mindspeed_mm.generation.windows.report import Watch, report
from mindspeed_mm.generation.windows.store import WindowStore
from mindspeed_mm.generation.windows_config import WindowKeys
from mindspeed_mm.geometry import WAN
from mindspeed_mm.progress import Progress

T = TypeVar("T")
Chunks = Callable[[], Iterator[Frames]]  # frames [t, H, W, 3]; each call restarts at the first frame
OnConditions = Callable[[GenerationRequest, Conditions], None]
OpenStore = Callable[[GenerationRequest], WindowStore | None]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The encoded inputs of the transformer for one request."""

    conditions: Conditions | None  # the pixels of vace_context, on the main process only
    vace_context: Tensor  # [96, R+F, h, w] on the host
    prompts: tuple[PromptEmbeds, ...]  # one, or one for each context window


@dataclass(frozen=True, kw_only=True)
class Run:
    """The objects that all steps of a generation share."""

    models: ModelStore
    parallel: SingleProcess
    hooks: Sequence[StepHook]
    progress: bool


def generate(
    models: ModelStore,
    request: GenerationRequest,
    finish: Callable[[GeneratedVideo], T],
    *,
    parallel: SingleProcess = SINGLE,
    on_conditions: OnConditions | None = None,
    encoded: dict[str, Encoded] | None = None,
    hooks: Sequence[StepHook] = (),
    progress: bool = False,
    open_store: OpenStore | None = None,
) -> T | None:
    """Generate a video and pass it to `finish`.

    Returns the result of `finish` on the main process, and None on all others. All processes of `parallel`
    must call this function together; `on_conditions` and `finish` run on the main process only.

    `encoded` caches the encoded inputs by request name for the next call. `open_store` returns the store
    that keeps the windows of a long video for a later run. Raises ConfigError, DataError, WeightsError, and
    NonFiniteError on every process.
    """
    models.start_measuring()
    run = Run(models=models, parallel=parallel, hooks=hooks, progress=progress)
    if request.sampling.is_windowed and request.sampling.window_mode == "extend":
        return _generate_windows(run, request, finish, on_conditions, open_store)
    encoded = {} if encoded is None else encoded
    if request.name not in encoded:
        conditions = parallel.run_on_main(lambda: to_tensors(read_conditions(request)))
        encoded[request.name] = _encode(run, request, conditions, on_conditions)
    source = encoded[request.name]
    latents = _denoise(run, request, source)

    def finish_on_main() -> T:
        assert source.conditions is not None
        num_refs = len(source.conditions.src_ref_images)
        chunks, measured = _finished_chunks(
            lambda: decode(models, latents, num_refs), request.sampling, source.conditions
        )
        return finish(
            GeneratedVideo(
                request=request,
                conditions=source.conditions,
                num_refs=num_refs,
                latents=latents,
                chunks=chunks,
                report=measured,
            )
        )

    return parallel.run_on_main(finish_on_main)


def _finished_chunks(
    frames: Chunks, keys: WindowKeys, conditions: Conditions
) -> tuple[Chunks, Callable[[], dict[str, Any]]]:
    """Return the finished frames of a video, and a function that reports on it once they are consumed.

    The report is {} for a video of one window.
    """
    watch = Watch()

    def chunks() -> Iterator[Frames]:
        found = frames()
        if (
            keys.paste_back is not None
            and conditions.src_video is not None
            and conditions.src_mask is not None
        ):
            source, mask = clip_bytes(conditions.src_video), mask_bytes(conditions.src_mask)
            found = paste_chunks(found, source, mask, keys.paste_back)
        yield from watch.watched(found) if keys.is_windowed else found

    def measured() -> dict[str, Any]:
        if not keys.is_windowed or not watch.colors:
            return {}
        return report(keys, watch, [{} for _ in keys.windows])

    return chunks, measured


def _generate_windows(
    run: Run,
    request: GenerationRequest,
    finish: Callable[[GeneratedVideo], T],
    on_conditions: OnConditions | None,
    open_store: OpenStore | None,
) -> T | None:
    """Generate a long video, in which each window continues the previous one."""
    models, parallel = run.models, run.parallel
    store = None if open_store is None else open_store(request)

    def read() -> Conditions:
        whole = read_conditions(request)
        if on_conditions is not None:
            on_conditions(request, whole)
        return whole

    share_prompts(models, request.prompts, parallel)
    whole = parallel.run_on_main(read)
    steps, count = request.sampling.steps, len(request.sampling.windows)

    def make(index: int, part: GenerationRequest, given: Conditions | None) -> Tensor:
        def shifted(step: Step, hook: StepHook) -> None:
            hook(replace(step, index=index * steps + step.index, total=count * steps))

        name = f"{request.name}: window {index + 1} of {count}".removeprefix(": ")
        hooks = [partial(shifted, hook=hook) for hook in run.hooks]
        part = replace(part, name=name)
        one = replace(run, hooks=hooks)
        return _denoise(one, part, _encode(one, part, given, None))

    def decode_part(latents: Tensor, num_refs: int) -> list[Frames]:
        with explain_oom(request.name, "while decoding", "set tiled to always, or use a smaller window"):
            return list(decode(models, latents, num_refs))

    extended = extend(request, whole, make, decode_part, parallel=parallel, store=store)

    def finish_on_main() -> T:
        assert whole is not None
        assert extended is not None
        return finish(
            GeneratedVideo(
                request=request,
                conditions=whole,
                num_refs=len(whole.src_ref_images),
                latents=None,
                chunks=lambda: iter([extended.frames]),
                report=lambda: extended.report,
            )
        )

    return parallel.run_on_main(finish_on_main)


def _denoise(run: Run, request: GenerationRequest, source: Encoded) -> Tensor:
    """Denoise with a progress bar. Returns latents [16, R+F, h, w] on the host, references first."""
    models, sampling = run.models, request.sampling
    with explain_oom(request.name):
        _ = models.experts  # load before the bar starts, so that its ETA covers only denoising steps
    with (
        Progress(
            f"{request.name}: denoising".removeprefix(": "),
            sampling.steps,
            "step",
            lines=5,
            shown=None if run.progress else False,
        ) as bar,
        explain_oom(request.name),
        applied(models.experts, request.loras, sampling) as lora_hooks,
    ):
        return denoise(
            models,
            source.vace_context,
            source.prompts,
            sampling,
            num_refs=source.vace_context.shape[1] - WAN.latent_frames(sampling.num_frames),
            noise=request.noise,
            guide=run.parallel.guide,
            hooks=(*lora_hooks, lambda _: bar.step(), *run.hooks),
        ).cpu()


def _encode(
    run: Run, request: GenerationRequest, conditions: Conditions | None, on_conditions: OnConditions | None
) -> Encoded:
    """Encode pixels and prompts on the main process, and send the results to all processes."""
    models, parallel = run.models, run.parallel
    rows = share_prompts(models, request.prompts, parallel)

    def encode() -> Tensor:
        assert conditions is not None
        if on_conditions is not None:
            on_conditions(request, conditions)
        with explain_oom(request.name):
            return encode_conditions(models, conditions, request.sampling).cpu()

    return Encoded(
        conditions=conditions,
        vace_context=parallel.run_on_main_and_broadcast(encode),
        prompts=_prompts_of(request, rows),
    )


def _prompts_of(request: GenerationRequest, rows: Mapping[str, Tensor]) -> tuple[PromptEmbeds, ...]:
    """Return the embedded prompts of each window."""
    negative = rows[request.negative_prompt] if request.sampling.needs_guidance else None
    return tuple(
        PromptEmbeds(prompt_embeds=rows[prompt], negative_prompt_embeds=negative)
        for prompt in request.prompt_per_window
    )


def share_prompts(
    models: ModelStore, prompts: Iterable[str], parallel: SingleProcess = SINGLE
) -> dict[str, Tensor]:
    """Return the embedding [L, text_dim] of each prompt, on every process.

    The main process encodes the new prompts. Pass those of all requests before the first video is generated,
    so that the text encoder is loaded once.
    """
    prompts = list(prompts)
    if any(prompt not in models.cached_prompts for prompt in prompts):
        with explain_oom(""):
            models.cached_prompts.update(
                parallel.run_on_main_and_broadcast(lambda: encode_prompts(models, prompts))
            )
    return {prompt: models.cached_prompts[prompt] for prompt in prompts}
