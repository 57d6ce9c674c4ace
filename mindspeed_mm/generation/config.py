"""The inference JSON: weights, requests, and how the run uses memory and devices. No torch.

A value is looked up in the task, then at the top level of the JSON, then in the preset. A command-line flag
overrides the first two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mindspeed_mm.config.schema import Config
from mindspeed_mm.data.config import MAX_REFERENCES
from mindspeed_mm.files import parse_json
from mindspeed_mm.generation.loras_config import LoraUse
from mindspeed_mm.generation.sampling_config import Numbers
from mindspeed_mm.outputs import name_problem, text_problem

OUTPUT_SUFFIXES = (".mp4", ".png", ".json")  # suffixes of the output files, next to the folder NAME
Tiled = Literal["auto", "always", "never"]
Offload = Literal["none", "model", "block"]

# Constants of the memory estimate, shared by a run and its plan.
WORKSPACE = 24 << 30  # bytes that two experts on one device must leave for activations
# Bytes per token and hidden channel: residual streams, a norm, and the two wide tensors of the feed-forward.
TOKEN_BYTES = 48
# Feature maps of base_dim channels and output size that exist at once; 88 measured on a CPU, fp32, 192x256.
VAE_PLANES = 90

# Prompt of preset mindspeed. MindSpeed-MM's JSON has none; its inputs are a boxing clip and an image of cats.
MINDSPEED_PROMPT = "两只橘猫戴着红色拳击手套，在聚光灯下的拳击台上对打，镜头缓缓推近。"
# The default negative prompt of the official code.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class WeightPaths(Config):
    """`model`: the weights, each in any supported format."""

    transformer: tuple[str | tuple[str, ...], ...] = Field(
        min_length=1,
        description=(
            "one path, or [high, low] for two experts; an inner list contains the parts of one "
            "model: its shards, or a trunk and a VACE module"
        ),
    )
    model_id: str = Field(default="vace", description="type of the transformer (default: vace)")
    vae: str = Field(description="the official .pth or a diffusers folder")
    text_encoder: str = Field(description="the official .pth or a diffusers folder")
    tokenizer: str | None = Field(
        default=None, description="folder of the tokenizer (default: next to the text encoder)"
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
                f"lists {len(value)} models; use one, or [high, low]; shards of one model go into an inner "
                "list: [[…]]"
            )
        if any(not entry for entry in value):
            raise ValueError("has an empty entry")
        first, *rest = (entry if isinstance(entry, str) else entry[0] for entry in value)
        if "low_noise" in first and any("high_noise" in entry for entry in rest):
            raise ValueError("names the low-noise expert first; expected [high, low]")
        return value

    @property
    def experts(self) -> tuple[tuple[str, ...], ...]:
        """The files of each expert, high noise first."""
        return tuple((entry,) if isinstance(entry, str) else entry for entry in self.transformer)


class Sources(Config):
    """The prompts and input files of one video."""

    name: str | None = Field(
        default=None, pattern=r"^[^/\\.][^/\\]*$", description="name of the output files"
    )
    prompt: str | None = Field(default=None, description="what to generate; required")
    task: str | dict[str, Any] | None = Field(
        default=None,
        description=(
            "create src_video, src_mask and references from plain sources: the name of a task of "
            '`vace prepare`, or {"type": task} with its options'
        ),
    )
    negative_prompt: str | None = Field(
        default=None, description="what to avoid; an empty string is used unchanged (default: Wan's)"
    )
    window_prompts: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "one prompt per window of a long video; the last one also applies to all later "
            "windows (default: prompt)"
        ),
    )
    video_path: str | None = Field(
        default=None, description="the clip to edit, or the control clip (src_video)"
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
            "left, top, right, bottom: how far to extend the frame of video_path, as fractions of its size"
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
    """One video to generate. Null = not set here."""

    loras: tuple[LoraUse, ...] = Field(
        default=(),
        description=(
            "LoRAs, each an object with path, strength and on (high, low, both); on the command "
            "line, PATH or PATH=STRENGTH"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, values: Any) -> Any:
        """Drop null fields, so that `model_fields_set` lists only fields with a value."""
        if not isinstance(values, Mapping):
            return values
        return {
            key: value
            for key, value in values.items()
            if value is not None or key not in RequestConfig.model_fields
        }


class RunConfig(Config):
    """How the run uses memory and devices, and where it writes its results."""

    output_path: str = Field(description="folder for videos, contact sheets and settings")
    prompts_file: str | None = Field(
        default=None, description="a text file with one prompt per line, or a .jsonl with one task per line"
    )
    from_latents: str | None = Field(
        default=None, description="only decode this latents.safetensors of an earlier run"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="dtype of the transformer's matrix products and of the text encoder"
    )
    vae_dtype: Literal["bf16", "fp32"] = Field(default="fp32", description="dtype of the VAE")
    quantize: Literal["int8", "fp8"] | None = Field(
        default=None,
        description=(
            "store the linear layers of the transformer's blocks in 8 bits, which takes half the "
            "memory of bf16"
        ),
    )
    offload: Offload = Field(
        default="none",
        description=(
            "none: keep the models on the device; model: move only the active model there; block: "
            "move one block at a time"
        ),
    )
    tiled: Tiled = Field(
        default="auto", description="VAE tiling: auto uses tiles only if whole frames do not fit in memory"
    )
    context_parallel_size: int | None = Field(
        default=None,
        gt=0,
        le=65536,
        description=(
            "number of processes that share the tokens of one video (default: all that cfg_parallel leaves)"
        ),
    )
    cfg_parallel: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="compute the prompt and the negative prompt on different halves of the processes",
    )
    shard_weights: bool = Field(
        default=False, description="shard the transformer's weights over the processes (FSDP2)"
    )
    verify_checksums: bool = Field(
        default=True, description="verify the checksums of the file in from_latents"
    )
    data_parallel: bool = Field(
        default=False, description="each process generates its own videos, instead of sharing each video"
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "device": "the detected device is used; MINDSPEED_MM_DEVICE overrides it",
        "torch_dtype": "use dtype",
    }

    @field_validator("tiled", mode="before")
    @classmethod
    def _tiled_as_bool(cls, value: Any) -> Any:
        return {True: "always", False: "never"}[value] if isinstance(value, bool) else value

    @property
    def sharing(self) -> list[str]:
        """The keys that make processes share a video."""
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
                f"data_parallel generates a separate video in each process, but {' and '.join(self.sharing)} "
                "would share each video between processes; remove one or the other"
            )
        return self


class TaskConfig(RequestConfig):
    """One video to generate. Null = not set here."""

    @model_validator(mode="after")
    def _windows_fit(self) -> TaskConfig:
        return self  # checked after the top-level keys are merged in


class InferenceConfig(RunConfig, RequestConfig):
    """The whole JSON. Keys of a request at the top level apply to every task."""

    model: WeightPaths
    tasks: tuple[TaskConfig, ...] | None = Field(
        default=None, min_length=1, description="several videos; null in a task unsets a top-level key"
    )
