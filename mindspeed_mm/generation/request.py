"""GenerationRequest: one video, every number decided. Calls, the inference JSON and validation videos all build it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mindspeed_mm.generation.config import NEGATIVE_PROMPT, SamplingConfig
from mindspeed_mm.generation.inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One video: its texts, what it starts from, and its numbers."""

    prompt: str
    negative_prompt: str = NEGATIVE_PROMPT
    inputs: Inputs = field(default_factory=Inputs)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    name: str = ""  # of its files, and in messages
    noise: Tensor | None = None  # [16, R+F, h, w] in place of the seed's

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts that guidance uses."""
        return (self.prompt, self.negative_prompt) if self.sampling.needs_guidance else (self.prompt,)

    @property
    def where(self) -> str:
        """How a message about this video begins."""
        return f"{self.name}: " if self.name else ""
