"""GenerationRequest: one video, every number decided. Calls, the inference JSON and validation videos all build it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.config import NEGATIVE_PROMPT, RequestConfig, SamplingConfig, resolve_sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    Picture = str | Path | NDArray[Any] | Tensor | Image.Image
    Clip = Picture | Sequence[Image.Image]
else:
    Tensor = Clip = Picture = Any  # for pydantic, in a job

# What the JSON calls each of Inputs.
KEYS = {
    "src_video": "video_path",
    "src_mask": "mask_path",
    "src_ref_images": "image_paths",
    "first_frame": "first_frame_path",
    "last_frame": "last_frame_path",
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one video starts from, as the user has it.

    A clip is a path, Pillow images, an array [T, H, W, 3] (uint8, or floats from 0 to 1) or a tensor [3, T, H, W] in [-1, 1].
    A mask is the same in one channel: 1, white = generate; 0, black = keep.
    """

    src_video: Clip | None = None
    src_mask: Clip | None = None
    src_ref_images: Sequence[Picture] = ()
    first_frame: Clip | None = None
    last_frame: Clip | None = None
    outpaint: tuple[float, float, float, float] | None = (
        None  # left, top, right, bottom, in parts of its size
    )

    @property
    def given(self) -> bool:
        """Whether there is anything beside the prompt."""
        return self.src_video is not None or self.has_ends or len(self.src_ref_images) > 0

    @property
    def has_ends(self) -> bool:
        """Whether frames are given that the video begins or ends with."""
        return self.first_frame is not None or self.last_frame is not None

    def check(self, where: str = "", keys: Mapping[str, str] | None = None) -> None:
        """Raises ConfigError for inputs that contradict each other; `keys`: what its line calls them."""
        words = keys or {key: key for key in KEYS}
        video, ends = words["src_video"], f"{words['first_frame']}/{words['last_frame']}"
        made = "which make their own src_video and src_mask"
        others = {"src_video": self.src_video, "src_mask": self.src_mask, "outpaint": self.outpaint}
        for name, value in others.items():
            key = words.get(name, name)
            address = f"{where}:{key}" if where else key
            if value is not None and self.has_ends:
                raise ConfigError(f"contradicts {ends}, {made}", where=address, fix=f"leave {key} out")
            if value is not None and self.src_video is None:
                raise ConfigError(f"applies to {video}, which is missing", where=address, fix=f"give {video}")

    def to_json(self) -> dict[str, Any]:
        """Paths, as job.json and NAME.json say them."""
        return {
            "video": self.src_video,
            "mask": self.src_mask,
            "images": list(self.src_ref_images),
            "first_frame": self.first_frame,
            "last_frame": self.last_frame,
            "outpaint": self.outpaint and list(self.outpaint),
        }


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One video: its texts, what it starts from, and its numbers."""

    prompt: str
    negative_prompt: str = NEGATIVE_PROMPT
    inputs: Inputs = field(default_factory=Inputs)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    name: str = ""  # of its files, and in messages
    noise: Tensor | None = None  # [16, R+F, h, w] in place of the seed's

    @classmethod
    def resolve(
        cls,
        config: RequestConfig,
        inputs: Inputs,
        *,
        experts: int,
        name: str = "",
        noise: Tensor | None = None,
    ) -> GenerationRequest:
        """Texts and numbers of `config`, what it leaves open from its preset; `inputs` are those it names, found and opened.

        `experts`: 1 or 2 transformers.
        """
        return cls(
            prompt=config.prompt or "",
            negative_prompt=NEGATIVE_PROMPT if config.negative_prompt is None else config.negative_prompt,
            inputs=inputs,
            sampling=resolve_sampling(config, experts=experts),
            name=name,
            noise=noise,
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts that guidance uses."""
        return (self.prompt, self.negative_prompt) if self.sampling.needs_guidance else (self.prompt,)

    def to_json(self) -> dict[str, Any]:
        """As job.json says it."""
        return {
            "name": self.name,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "inputs": self.inputs.to_json(),
            "sampling": self.sampling.model_dump(mode="json"),
        }
