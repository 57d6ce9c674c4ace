"""The inference JSON: weights, requests and how the run uses memory and devices. No torch.

A value is looked for in the task, then at the top of the JSON, then in the preset; a flag replaces the first
two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mindspeed_mm.config.schema import Config
from mindspeed_mm.data.config import MAX_REFERENCES
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import parse_json
from mindspeed_mm.generation.loras_config import FEW_STEPS, LoraUse
from mindspeed_mm.generation.windows_config import WindowKeys
from mindspeed_mm.outputs import name_problem, text_problem

OUTPUT_SUFFIXES = (".mp4", ".png", ".json")  # of the files NAME.mp4 …, beside the folder NAME
Solver = Literal["unipc", "dpm++", "euler", "renoise"]
Preset = Literal[
    "wan",
    "diffsynth",
    "diffusers",
    "mindspeed",
    "lightx2v-4step",
    "lightx2v-8step",
    "causvid",
    "fusionix",
    "self-forcing",
    "vace-3phase",
]
Tiled = Literal["auto", "always", "never"]
Offload = Literal["none", "model", "block"]

# What a run and its plan judge memory by.
WORKSPACE = 24 << 30  # bytes of a device that two experts side by side must leave to activations
TOKEN_BYTES = (
    48  # of a token and hidden channel: residual streams, a norm, the feed-forward's two wide tensors
)
VAE_PLANES = (
    90  # base_dim feature maps of the output's size alive at once: 88 measured on a CPU, fp32, 192x256
)

# Of preset mindspeed, for a JSON of MindSpeed-MM, which holds none: its inputs are a boxing clip and a
# picture of cats.
MINDSPEED_PROMPT = "两只橘猫戴着红色拳击手套，在聚光灯下的拳击台上对打，镜头缓缓推近。"
# What the official code uses when none is given.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class WeightPaths(Config):
    """`model`: where the weights are. Each may be in any known format."""

    transformer: tuple[str | tuple[str, ...], ...] = Field(
        min_length=1,
        description=(
            "one path, or [high, low] for two experts; an inner list holds the parts of one model: its "
            "shards, or a trunk and a VACE module"
        ),
    )
    vae: str = Field(description="official .pth, or a diffusers folder")
    text_encoder: str = Field(description="official .pth, or a diffusers folder")
    tokenizer: str | None = Field(
        default=None, description="folder of the tokenizer (default: beside the text encoder)"
    )

    @field_validator("transformer", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("transformer")
    @classmethod
    def _one_or_two(cls, value: tuple[str | tuple[str, ...], ...]) -> tuple[str | tuple[str, ...], ...]:
        if len(value) > 2:
            raise ValueError(
                f"lists {len(value)} models; give one, or [high, low]; shards of one model go into an inner "
                "list: [[…]]"
            )
        if any(not entry for entry in value):
            raise ValueError("has an empty entry")
        first, *rest = (entry if isinstance(entry, str) else entry[0] for entry in value)
        if "low_noise" in first and any("high_noise" in entry for entry in rest):
            raise ValueError("names the low-noise expert first; wanted [high, low]")
        return value

    @property
    def experts(self) -> tuple[tuple[str, ...], ...]:
        """The files of each expert, high noise first."""
        return tuple((entry,) if isinstance(entry, str) else entry for entry in self.transformer)


class Numbers(WindowKeys):
    """The numbers of one video and their bounds."""

    height: int = Field(default=480, gt=0, le=16384, description="pixels, a multiple of 16 (default: 480)")
    width: int = Field(default=832, gt=0, le=16384, description="pixels, a multiple of 16 (default: 832)")
    short_clip: Literal["reject", "pad", "resample"] = Field(
        default="reject", description="a source with fewer frames than num_frames (default: reject)"
    )
    preset: Preset = Field(
        default="wan",
        description=(
            "whose sampler settings to start from; mindspeed: MindSpeed-MM's three videos, too; "
            "lightx2v-4step and the others after it: for a few-step LoRA (default: wan)"
        ),
    )
    solver: Solver = Field(default="unipc", description="how noise becomes a clip (default: by preset)")
    steps: int = Field(default=50, gt=0, le=1000, description="denoising steps (default: 50)")
    shift: float = Field(
        default=16.0,
        ge=0.001,
        le=1000,
        description="how far the sigmas lean to high noise (default: by preset)",
    )
    timesteps: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description=(
            "timesteps of the steps, falling, at most 1000, in place of steps and shift; solver euler or "
            "renoise"
        ),
    )
    guidance_scale: float = Field(
        default=5.0, ge=0, le=1000, description="1 = without the negative prompt (default: 5)"
    )
    guidance_scale_2: float = Field(
        default=5.0, ge=0, le=1000, description="of the low-noise expert (default: guidance_scale)"
    )
    guidance_end: float = Field(
        default=0.0, ge=0, le=1000, description="timestep below which guidance is 1 (default: 0)"
    )
    boundary: float = Field(
        default=0.875, gt=0, lt=1, description="sigma at which the experts take turns (default: 0.875)"
    )
    context_scale: float | tuple[float, ...] = Field(
        default=1.0,
        description=(
            "weight of the VACE branch: one number, or one for each of its blocks; on the command line "
            "1,0.8,0.5 (default: 1)"
        ),
    )
    diffsynth_noise: bool = Field(
        default=False,
        description="with references, order the noise as DiffSynth-Studio does (default: false)",
    )
    diffsynth_references: bool = Field(
        default=False,
        description=(
            "stretch references to the video's size, as DiffSynth-Studio's VACE examples do (default: false)"
        ),
    )
    videoxfun_sigmas: bool = Field(
        default=False,
        description="the sigmas of VideoX-Fun's sampler Flow: solver euler, shifted twice (default: false)",
    )
    seed: int = Field(default=2025, ge=0, lt=1 << 63, description="of the noise (default: 2025)")

    @field_validator("height", "width")
    @classmethod
    def _is_whole_tokens(cls, value: int) -> int:
        if value % 16:
            raise ValueError(f"must be a multiple of 16; nearest: {max(16, round(value / 16) * 16)}")
        return value

    @field_validator("context_scale")
    @classmethod
    def _is_a_weight(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        for scale in value if isinstance(value, tuple) else (value,):
            if abs(scale) > 1000:
                raise ValueError(f"expected numbers from -1000 to 1000, got {scale:g}")
        return value

    @field_validator("timesteps")
    @classmethod
    def _falls(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not all(
            1000 >= high > low for high, low in zip(value, (*value[1:], 0.0), strict=True)
        ):
            raise ValueError("must fall, from at most 1000 to above 0")
        return value

    @model_validator(mode="after")
    def _euler_alone(self) -> Numbers:
        if self.videoxfun_sigmas and "solver" in self.model_fields_set and self.solver != "euler":
            raise ValueError(
                f"videoxfun_sigmas belongs to solver euler, but solver is {self.solver}; leave one out"
            )
        return self


class SamplingConfig(Numbers):
    """Every number of one video, decided."""

    grid: Literal["official", "diffusers"] = "official"

    @property
    def needs_guidance(self) -> bool:
        """Whether any step asks the model about the negative prompt."""
        return self.guidance_scale != 1 or self.guidance_scale_2 != 1


class Sources(Config):
    """The texts and files of one video."""

    name: str | None = Field(
        default=None, pattern=r"^[^/\\.][^/\\]*$", description="name of the output files"
    )
    prompt: str | None = Field(default=None, description="what to generate; required")
    task: str | dict[str, Any] | None = Field(
        default=None,
        description=(
            "makes src_video, src_mask and references of plain sources: a task of `vace prepare`, or "
            '{"type": task} and its options'
        ),
    )
    negative_prompt: str | None = Field(
        default=None, description="what to avoid; an empty text is honoured (default: Wan's)"
    )
    window_prompts: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "a prompt for each window of a long video; the last holds for all that follow (default: prompt)"
        ),
    )
    video_path: str | None = Field(
        default=None, description="clip that is edited or that controls (src_video)"
    )
    mask_path: str | None = Field(
        default=None, description="clip, image or folder of images; white = generate, black = keep (src_mask)"
    )
    image_path: str | None = Field(default=None, description="one reference image")
    image_paths: tuple[str, ...] | None = Field(
        default=None, max_length=MAX_REFERENCES, description="several reference images, in order"
    )
    first_frame_path: str | None = Field(default=None, description="image or clip that the video begins with")
    last_frame_path: str | None = Field(default=None, description="image or clip that the video ends with")
    outpaint: tuple[float, float, float, float] | None = Field(
        default=None,
        description=(
            "left, top, right, bottom: how far the frame grows beyond video_path, in parts of its size"
        ),
    )

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, value: str | None) -> str | None:
        if value is not None and (problem := name_problem(value, max(OUTPUT_SUFFIXES, key=len))):
            raise ValueError(problem)
        return value

    @field_validator("task", mode="before")
    @classmethod
    def _may_be_json(cls, value: Any) -> Any:
        is_json = isinstance(value, str) and value.lstrip().startswith("{")
        return parse_json(value, "task") if is_json else value

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _can_be_written(cls, value: str | None) -> str | None:
        if value is not None and (problem := text_problem(value)):
            raise ValueError(f"{problem}; write the whole character")
        return value

    @field_validator("window_prompts")
    @classmethod
    def _can_all_be_written(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for number, text in enumerate(value or ()):
            if problem := "is empty" if not text.strip() else text_problem(text):
                raise ValueError(f"number {number + 1} {problem}")
        return value

    @field_validator("outpaint")
    @classmethod
    def _grows(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (min(value) < 0 or max(value) == 0 or max(value) > 4):
            raise ValueError("must be four numbers from 0 to 4, at least one above 0")
        return value

    @model_validator(mode="after")
    def _one_spelling(self) -> Sources:
        if self.image_path is not None and self.image_paths is not None:
            raise ValueError(
                "image_path and image_paths are both given here; put all images into image_paths"
            )
        return self


class RequestConfig(Numbers, Sources):
    """One video to generate. Null = not said here."""

    loras: tuple[LoraUse, ...] = Field(
        default=(),
        description=(
            "LoRAs, each an object with path, strength and on (high, low, both); on the command line PATH "
            "or PATH=STRENGTH"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, values: Any) -> Any:
        """So that `model_fields_set` holds what is said."""
        if not isinstance(values, Mapping):
            return values
        return {
            key: value
            for key, value in values.items()
            if value is not None or key not in RequestConfig.model_fields
        }


class RunConfig(Config):
    """How the run uses memory and devices, and where its results go."""

    output_path: str = Field(description="folder for videos, sheets and settings")
    prompts_file: str | None = Field(
        default=None, description="a text file with one prompt a line, or .jsonl with one task a line"
    )
    from_latents: str | None = Field(
        default=None, description="decode this latents.safetensors of an earlier run, and do nothing else"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="of the transformer's matrix products and the text encoder"
    )
    vae_dtype: Literal["bf16", "fp32"] = Field(default="fp32", description="of the VAE")
    quantize: Literal["int8", "fp8"] | None = Field(
        default=None,
        description="hold the linear layers of the transformer's blocks in 8 bits: half the memory of bf16",
    )
    offload: Offload = Field(
        default="none",
        description="keep models on the device, bring the active one there, or one block at a time",
    )
    tiled: Tiled = Field(default="auto", description="VAE in tiles: when memory asks for it, always or never")
    context_parallel_size: int | None = Field(
        default=None,
        gt=0,
        le=65536,
        description="processes that share the tokens of one video (default: all that guidance leaves)",
    )
    cfg_parallel: Literal["auto", "on", "off"] = Field(
        default="auto", description="prompt and negative prompt on two halves of the processes"
    )
    shard_weights: bool = Field(
        default=False, description="spread the transformer's weights over the processes (FSDP2)"
    )
    verify_checksums: bool = Field(
        default=True, description="compare the latents of from_latents with the checksums in their file"
    )
    data_parallel: bool = Field(
        default=False, description="every process makes videos of its own, instead of sharing each"
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "device": "the machine's accelerator is used; MINDSPEED_MM_DEVICE=cpu overrides",
        "torch_dtype": "dtype decides",
    }

    @field_validator("tiled", mode="before")
    @classmethod
    def _tiled_as_bool(cls, value: Any) -> Any:
        return {True: "always", False: "never"}[value] if isinstance(value, bool) else value

    @property
    def sharing(self) -> list[str]:
        """The keys by which processes share a video."""
        requested = {
            "shard_weights": self.shard_weights,
            "context_parallel_size": (self.context_parallel_size or 1) > 1,
            "cfg_parallel": self.cfg_parallel == "on",
        }
        return [key for key, wanted in requested.items() if wanted]

    @model_validator(mode="after")
    def _shared_or_not(self) -> RunConfig:
        if self.data_parallel and self.sharing:
            raise ValueError(
                f"data_parallel lets each process make videos of its own, but {' and '.join(self.sharing)} "
                "would let processes share one; keep one way"
            )
        return self


class InferenceConfig(RunConfig, RequestConfig):
    """The whole JSON. The keys of a request at the top hold for every task."""

    model: WeightPaths
    tasks: tuple[RequestConfig, ...] | None = Field(
        default=None, min_length=1, description="several videos; null in a task unsets a key of the top"
    )


def resolve_sampling(request: RequestConfig, *, experts: int) -> SamplingConfig:
    """Fill what `request` leaves open from its preset. `experts` is 1 or 2."""
    said = request.model_dump(include=set(Numbers.model_fields), exclude_unset=True)
    flow = {"solver": "euler"} if said.get("videoxfun_sigmas") else {}
    values = {**_preset(said, experts), **flow, **said}
    values.setdefault("guidance_scale_2", values.get("guidance_scale", SamplingConfig().guidance_scale))
    if values.get("timesteps") is not None:
        _follow_timesteps(values, said)
    sampling = SamplingConfig(**values)
    _check_windows(request, sampling)
    bounds = phase_bounds(sampling, experts)
    for number, lora in enumerate(request.loras):
        if lora.by_phase and len(lora.strengths) > len(bounds) + 1:
            raise ConfigError(
                f"{len(lora.strengths)} numbers for {len(bounds) + 1} phases",
                where=f"loras[{number}].strength",
                fix="give at most one for each; phases end at guidance_end and, of two experts, at boundary",
            )
        if not lora.by_phase and len(lora.strengths) not in (1, sampling.steps):
            raise ConfigError(
                f"{len(lora.strengths)} numbers for {sampling.steps} steps",
                where=f"loras[{number}].strength",
                fix="give one number, or one for each step",
            )
    return sampling


def _check_windows(request: RequestConfig, sampling: SamplingConfig) -> None:
    """Raises ConfigError for more prompts or lists of references than there are windows."""
    count = len(sampling.windows)
    for key, given in (
        ("window_prompts", request.window_prompts),
        ("window_references", sampling.window_references),
    ):
        if given is not None and (len(given) > count or sampling.window is None):
            lacks = ", because window is missing" if sampling.window is None else ""
            raise ConfigError(
                f"{len(given)} for {count} window{'s' * (count != 1)}{lacks}",
                where=key,
                fix="set window to 81" if lacks else "leave the others out, or raise num_frames",
            )


def phase_bounds(sampling: SamplingConfig, experts: int) -> tuple[float, ...]:
    """The timesteps below which the next phase begins: where guidance ends, where experts take turns."""
    found = {sampling.guidance_end} if sampling.guidance_end else set()
    return tuple(sorted(found | ({1000 * sampling.boundary} if experts == 2 else set()), reverse=True))


def _follow_timesteps(values: dict[str, Any], said: Mapping[str, Any]) -> None:
    """Set steps to the number of timesteps. Raises ConfigError where another key says otherwise."""
    count = len(values["timesteps"])
    origin = "timesteps" if "timesteps" in said else f"preset {values['preset']}"
    if said.get("steps", count) != count:
        raise ConfigError(
            f"got {said['steps']}, but {origin} has {count} timesteps", where="steps", fix="leave it out"
        )
    values["steps"] = count
    if "timesteps" in said and "solver" not in said:
        values["solver"] = "renoise" if values.get("solver") == "renoise" else "euler"
    if values["solver"] not in ("euler", "renoise") or values.get("videoxfun_sigmas"):
        raise ConfigError(
            f"{origin} needs solver euler or renoise, without videoxfun_sigmas",
            where="solver",
            fix="leave it out",
        )


def _preset(said: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """Solver, grid and shift of the preset.

    Of the official code, of DiffSynth, of diffusers (which leans by size).
    """
    name = said.get("preset", "wan")
    if name in FEW_STEPS:
        return dict(FEW_STEPS[name][0])
    if name == "diffsynth":
        return {"solver": "euler", "shift": 5.0}
    if name == "mindspeed":
        return {
            "solver": "euler",
            "shift": 5.0,
            "seed": 1,
            "fps": 15.0,
            "timing": "frames",
            "diffsynth_noise": True,
            "diffsynth_references": True,
        }
    if name == "diffusers":
        default = SamplingConfig()
        pixels = said.get("height", default.height) * said.get("width", default.width)
        return {"solver": "unipc", "grid": "diffusers", "shift": 3.0 if pixels <= 480 * 832 else 5.0}
    return {"solver": "unipc", "shift": 16.0 if experts == 1 else 12.0}
