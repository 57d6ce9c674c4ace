"""Configuration of `diffusion` in a model JSON: noise schedule, loss and expert. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.schema import Config

Expert = Literal["high", "low"]


class ScheduleConfig(Config):
    """Flow matching on a shifted noise schedule. Training and generation use the same `boundary`."""

    model_id: Literal["wan_flow_match_scheduler"] = "wan_flow_match_scheduler"
    num_train_timesteps: int = Field(
        default=1000,
        gt=1,
        le=100000,
        description="number of steps in the schedule; timestep = this number · sigma",
    )
    shift: float = Field(
        default=5.0, ge=0.001, le=1000, description="shift of the schedule towards high noise"
    )
    sigma_min: float = Field(default=0.0, ge=0, lt=1, description="lower end of the unshifted schedule")
    extra_one_step: bool = Field(default=True, description="omit the end point of the schedule")
    expert: Expert | None = Field(default=None, description="A14B: which of the two experts this model is")
    boundary: float = Field(default=0.875, gt=0, lt=1, description="sigma at which the experts switch")
    ref_loss: Literal["include", "exclude"] = Field(
        default="include", description="whether reference frames count in the loss"
    )
    loss_weighting: Literal["bell", "none"] = Field(
        default="bell", description="how the loss of a sample is weighted by its timestep"
    )
    normalize_per_expert: bool = Field(
        default=False, description="divide the weight by its mean over the expert's range"
    )
    max_timestep_boundary: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="old key: end of the trained part of the schedule, as a fraction",
    )
    min_timestep_boundary: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="old key: start of the trained part of the schedule, as a fraction",
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "max_timesteps_boundary": "the key is called max_timestep_boundary"
    }

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> ScheduleConfig:
        low, high = self.old_range
        if low >= high:
            raise ValueError(f"min_timestep_boundary {low} must be below max_timestep_boundary {high}")
        if self.expert and self.inferred_expert not in (None, self.expert):
            raise ValueError(
                f"expert is {self.expert!r}, but the timestep boundaries {low} to {high} are those of "
                f"{self.inferred_expert!r}; remove the boundaries: expert and boundary are enough"
            )
        return self

    def sigma(self, index: int) -> float:
        """Return the noise level at index `index` of the schedule. It falls from 1 at index 0."""
        steps = self.num_train_timesteps - (not self.extra_one_step)
        u = 1.0 - (1.0 - self.sigma_min) * index / steps
        return self.shift * u / (1 + (self.shift - 1) * u)

    @property
    def indices(self) -> range:
        """Indices of the schedule on which this model trains.

        The high-noise expert has those with sigma ≥ boundary, and the low-noise expert the others. A single
        model has all of them, or the range of the older keys.
        """
        n = self.num_train_timesteps
        if self.role is None:
            low, high = self.old_range
            return range(round(low * n), round(high * n))
        first_low = sum(self.sigma(index) >= self.boundary for index in range(n))
        return range(0, first_low) if self.role == "high" else range(first_low, n)

    def boundary_note(self) -> str | None:
        """Return a note if the older keys and `boundary` switch experts at different sigmas, else None.

        Published A14B examples switch at timestep 900 in training, and at 875 in generation.
        """
        if self.inferred_expert is None:
            return None
        high = self.inferred_expert == "high"
        fraction = self.old_range[1] if high else self.old_range[0]
        key = "max_timestep_boundary" if high else "min_timestep_boundary"
        ours = self.indices.stop if high else self.indices.start
        theirs = round(fraction * self.num_train_timesteps)
        if ours == theirs:
            return None
        return (
            f"diffusion.{key} {fraction} splits the experts at sigma {self.sigma(theirs):.3f}, "
            f"diffusion.boundary at {self.boundary}; boundary decides, in training as in generation "
            f"({abs(ours - theirs)} indices of the schedule would train the wrong expert); set "
            "diffusion.expert and diffusion.boundary instead"
        )

    @property
    def old_range(self) -> tuple[float, float]:
        """The range of indices by the older keys, as fractions; (0, 1) without them."""
        return (
            self.min_timestep_boundary or 0.0,
            1.0 if self.max_timestep_boundary is None else self.max_timestep_boundary,
        )

    @property
    def inferred_expert(self) -> Expert | None:
        """The expert that the older keys imply: `high` for a range at the start, `low` for one at the end."""
        low, high = self.old_range
        if low == 0 and high < 1:
            return "high"
        return "low" if low > 0 and high == 1 else None

    @property
    def role(self) -> Expert | None:
        """Which expert this model is, by `expert` or the older keys; None for a single model."""
        return self.expert or self.inferred_expert
