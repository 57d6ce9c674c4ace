"""GenerationRequest: a fully specified request for one video.

VacePipeline, the inference JSON and validation videos all use it. This module does not import torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mindspeed_mm.data.sample import Clip, Inputs, Picture
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.config import NEGATIVE_PROMPT, RequestConfig
from mindspeed_mm.generation.loras_config import LoraUse
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # because pydantic evaluates the annotations at run time

__all__ = ["KEYS", "Clip", "GenerationRequest", "Inputs", "Picture"]
# Fields of Inputs → keys of the JSON.
KEYS = {
    "src_video": "video_path",
    "src_mask": "mask_path",
    "src_ref_images": "image_paths",
    "first_frame": "first_frame_path",
    "last_frame": "last_frame_path",
}


@dataclass(frozen=True)
class TaskRequest:
    """A task and its source files. Hashable and picklable."""

    name: str
    options: str  # JSON
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the task as job.json stores it."""
        options = json.loads(self.options)
        return {"type": self.name, **options, "videos": list(self.videos), "images": list(self.images)}


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A request for one video: prompts, inputs and sampling settings."""

    prompt: str
    negative_prompt: str = NEGATIVE_PROMPT
    inputs: Inputs = field(default_factory=Inputs)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    name: str = ""  # name of the output files, also used in messages
    noise: Tensor | None = None  # [16, R+F, h, w], replaces the noise of the seed
    loras: tuple[LoraUse, ...] = ()
    task: TaskRequest | None = None  # makes src_video, src_mask and references before generation
    # One for each window of a long video. The last one also applies to all later windows.
    window_prompts: tuple[str, ...] = ()

    @classmethod
    def resolve(
        cls,
        config: RequestConfig,
        inputs: Inputs,
        *,
        experts: int,
        name: str = "",
        noise: Tensor | None = None,
        task: TaskRequest | None = None,
    ) -> GenerationRequest:
        """Create a request from `config`, with unset values from its preset.

        `inputs` are the inputs that `config` names, already found and opened. `experts` is the number of
        transformers, 1 or 2. Raises ConfigError.
        """
        sampling = resolve_sampling(config, experts=experts)
        if task is None:
            _check_kept(sampling, inputs)
            _check_references(sampling, len(inputs.src_ref_images))
        if noise is not None and sampling.is_windowed and sampling.window_mode == "extend":
            raise ConfigError(
                "covers only one window", where="noise", fix="set seed, or window_mode to context_windows"
            )
        return cls(
            prompt=config.prompt or "",
            negative_prompt=NEGATIVE_PROMPT if config.negative_prompt is None else config.negative_prompt,
            inputs=inputs,
            sampling=sampling,
            name=name,
            noise=noise,
            loras=config.loras,
            task=task,
            window_prompts=config.window_prompts or (),
        )

    @property
    def prompt_per_window(self) -> tuple[str, ...]:
        """The prompt of each window."""
        return tuple(self.prompt_of(window.index) for window in self.sampling.windows)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The distinct prompts of all windows, followed by the negative prompt if guidance needs it."""
        own = tuple(dict.fromkeys(self.prompt_per_window))
        return (*own, self.negative_prompt) if self.sampling.needs_guidance else own

    def prompt_of(self, window: int) -> str:
        """Return the prompt of a window of a long video."""
        prompts = self.window_prompts or (self.prompt,)
        return prompts[min(window, len(prompts) - 1)]

    def to_json(self) -> dict[str, Any]:
        """Return the request as job.json stores it."""
        return {
            "name": self.name,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "inputs": self.inputs_to_json(),
            "sampling": self.sampling.model_dump(mode="json"),
            **({"loras": [lora.model_dump(mode="json") for lora in self.loras]} if self.loras else {}),
            **({} if self.task is None else {"task": self.task.to_json()}),
            **({"window_prompts": list(self.window_prompts)} if self.window_prompts else {}),
        }

    def inputs_to_json(self) -> dict[str, Any]:
        """Return the paths of the inputs as job.json and NAME.json store them."""
        inputs = self.inputs
        return {
            "video": inputs.src_video,
            "mask": inputs.src_mask,
            "images": list(inputs.src_ref_images),
            "first_frame": inputs.first_frame,
            "last_frame": inputs.last_frame,
            "outpaint": inputs.outpaint and list(inputs.outpaint),
        }


def _check_kept(sampling: SamplingConfig, inputs: Inputs) -> None:
    """Raise ConfigError if `paste_back` is set but no pixels are kept."""
    keeps = inputs.src_mask is not None or inputs.has_ends or inputs.outpaint is not None
    if sampling.paste_back is not None and not keeps:
        raise ConfigError(
            "copies the pixels that a mask keeps, but there is no mask",
            where="paste_back",
            fix="set a mask, or remove it",
        )


def _check_references(sampling: SamplingConfig, count: int) -> None:
    """Raise ConfigError if a window names a reference that is not given."""
    for number, row in enumerate(sampling.window_references or ()):
        if missing := [reference for reference in row if reference >= count]:
            raise ConfigError(
                f"names reference {missing[0]}, but there are {count}",
                where=f"window_references[{number}]",
                expected=f"numbers from 0 to {count - 1}" if count else "no numbers without references",
            )
