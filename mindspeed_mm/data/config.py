"""The data JSONs: `dataset_param` of raw clips and of features, and `dataloader_param`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, Field, field_validator

from mindspeed_mm.config.schema import Config
from mindspeed_mm.data.published_config import TrainPipeline

_ONE_SIZE = "each clip keeps its own shape; max_hxw alone bounds the size"
_BY_TIME = "frames are chosen by time: train_fps and num_frames decide"
_TEXT = "captions are always cleaned the way Wan's text encoder expects"
MAX_REFERENCES = 256  # images of one sample; each becomes a latent frame
_GROUPED = "clips of one shape are always grouped"
_AT_EXTRACTION = "it acts at feature extraction; features carry its result"


class ClipRow(Config):
    """One clip, what is given of it, and its caption."""

    video: str = Field(description="the clip that the model learns to make: a file, or a folder of images")
    cap: str | tuple[str, ...] = Field(
        description="a caption, or several, of which training picks one for every sample"
    )
    src_video: str | None = Field(
        default=None, description="the clip that is edited, or that controls; null = none"
    )
    src_ref_images: str | tuple[str, ...] | None = Field(
        default=None, description="images of who or what must appear"
    )
    src_video_mask: str | None = Field(
        default=None,
        description="where: white = generate, black = keep; a clip, a folder of images, or one image for "
        "all frames. Without src_video it masks video itself; null = everything is generated",
    )


class FeatureRow(Config):
    """One feature. Extraction repeats the keys of its clip beside these; training does not read them."""

    file: str = Field(
        description="from data_folder, from its `features` folder, or from the working directory"
    )
    shape: tuple[int, int, int] | None = Field(
        default=None,
        description=(
            "frames (references included), height and width of the latents; null = read from the file"
        ),
    )
    num_refs: int | None = Field(
        default=None, description="how many references come first; null = read from the file"
    )
    task: str | None = Field(
        default=None, description="what its conditions were made by: the loss is reported for each task"
    )


def _fits_vae(value: int) -> int:
    if value % 4 != 1:
        raise ValueError(
            f"must be 4k+1, as the VAE takes 1 frame and then 4 at a time; nearest: {value // 4 * 4 + 1}"
        )
    return value


class ClipPolicy(Config):
    """Which frames of a clip are taken, and what happens to a clip that does not fit.

    The rules are those of data and of generation.
    """

    num_frames: int = Field(default=81, gt=0, le=10001, description="frames of the video, 4k+1 (default: 81)")
    fps: float = Field(default=16.0, ge=0.001, le=1000, description="frames a second (default: 16)")
    short_clip: Literal["keep", "pad", "resample", "reject"] = "reject"
    long_clip: Literal["trim", "resample", "reject"] = Field(
        default="trim", description="a source with more frames than num_frames (default: trim)"
    )
    fit: Literal["crop", "reject"] = Field(
        default="crop",
        description="a source of another size: cover and crop the centre, or reject (default: crop)",
    )
    timing: Literal["seconds", "frames"] = Field(
        default="seconds",
        description=(
            "sample the source at fps, or take it frame by frame whatever its rate (default: seconds)"
        ),
    )
    soft_mask: bool = Field(
        default=False, description="keep grey mask values instead of cutting them at one half"
    )
    wan_frames: bool = Field(
        default=False,
        description=(
            "spread num_frames over the whole source clip, as Wan2.1's VACE does (keep_last; default: false)"
        ),
    )
    _num_frames = field_validator("num_frames")(_fits_vae)


class VideoConfig(Config):
    """`preprocess_parameters`: how a clip becomes frames of one size and one rate.

    A new field with another name in its dump would rename the features of datasets in other packages.
    """

    num_frames: int = Field(
        default=81,
        gt=0,
        le=10001,
        description="the most frames of a clip, 4k+1; reached when the clip is long enough",
    )
    max_hxw: int = Field(
        default=399360, ge=256, le=1 << 28, description="the most pixels of a frame (height x width)"
    )
    train_fps: float = Field(
        default=16.0,
        ge=0.001,
        le=1000,
        validation_alias=AliasChoices("train_fps", "fps"),
        description="frames a second that are sampled; Wan is a 16 fps model. Also spelt fps",
    )
    short_clip: Literal["keep", "pad", "resample", "reject"] = Field(
        default="keep",
        description=(
            "a clip with fewer than num_frames: keep the largest 4k+1, pad with the last frame, resample "
            "the whole clip, or reject it"
        ),
    )
    long_clip: Literal["trim", "resample", "reject"] = Field(
        default="trim",
        description=(
            "a clip with more than num_frames: take the first ones, resample the whole clip, or reject it"
        ),
    )
    wan_frames: bool = Field(
        default=False,
        description=(
            "spread num_frames over the whole clip, as Wan2.1's VACE does (keep_last); train_fps then has "
            "no part"
        ),
    )
    video_reader_type: Literal["DecordVideo", "AvVideo"] = Field(
        default="AvVideo",
        description=(
            "which library decodes; both give the same frames. decord gives way to PyAV for files it would "
            "read otherwise"
        ),
    )
    soft_mask: bool = Field(
        default=False, description="keep grey mask values instead of cutting them at one half"
    )
    vae_stride: tuple[int, int, int] = Field(
        default=(4, 8, 8), description="pixels of one latent cell (time, height, width)"
    )
    vae_patch_size: tuple[int, int, int] = Field(default=(1, 2, 2), description="latent cells of one token")
    train_pipeline: TrainPipeline | None = Field(
        default=None, description="published files' list of transforms; may only repeat what is done anyway"
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "video_processor_type": "VACE's processing is the only one",
        "image_reader_type": "images are read with Pillow",
        "image_processer_type": "references are letterboxed on white",
        "max_height": _ONE_SIZE,
        "max_width": _ONE_SIZE,
        "force_resolution": _ONE_SIZE,
        "frame_interval": _BY_TIME,
        "auto_interval": _BY_TIME,
        "speed_factor": _BY_TIME,
        "keep_last": _BY_TIME,
        "zero_start": _BY_TIME,
        "cfg": "caption dropout is a training setting (caption_dropout of the model JSON)",
    }

    _num_frames = field_validator("num_frames")(_fits_vae)

    @field_validator("vae_stride", "vae_patch_size")
    @classmethod
    def _is_wans(cls, value: tuple[int, int, int], info: Any) -> tuple[int, int, int]:
        wanted = {"vae_stride": (4, 8, 8), "vae_patch_size": (1, 2, 2)}[info.field_name]
        if value != wanted:
            raise ValueError(f"must be {list(wanted)} for VACE")
        return value

    @property
    def policy(self) -> ClipPolicy:
        """The same as generation says it."""
        return ClipPolicy(
            num_frames=self.num_frames,
            fps=self.train_fps,
            short_clip=self.short_clip,
            long_clip=self.long_clip,
            soft_mask=self.soft_mask,
            wan_frames=self.wan_frames,
        )

    @property
    def reader(self) -> Literal["decord", "av"]:
        """The short name of `video_reader_type`."""
        return "decord" if self.video_reader_type == "DecordVideo" else "av"


class TokenizerConfig(Config):
    """`tokenizer_config`: where the tokenizer is and how many tokens it gives."""

    from_pretrained: str | None = Field(
        default=None, description="folder of the tokenizer; null = beside the text encoder"
    )
    model_max_length: int = Field(default=512, gt=0, le=65536, description="tokens of a prompt after padding")
    UNUSED: ClassVar[Mapping[str, str]] = {
        "autotokenizer_name": "the folder decides",
        "hub_backend": "weights are local",
    }


class DataSource(Config):
    """`basic_parameters` of raw clips."""

    data_path: str = Field(
        min_length=1,
        description="data.txt (one `folder,path/to/data.json` a line), or a data.json / .jsonl itself",
    )
    data_folder: str | None = Field(
        default=None,
        description="folder that paths start from when data_path is a data.json; null = its own folder",
    )
    data_storage_mode: Literal["vace"] = "vace"


class FeatureSource(Config):
    """`basic_parameters` of features."""

    data_path: str = Field(min_length=1, description="data.jsonl that feature extraction wrote")
    data_folder: str | None = Field(
        default=None, description="folder of the features; null = the folder of data_path"
    )


class ValidationSource(FeatureSource):
    """`validation`: features on which the loss is evaluated, and prompts to look at."""

    prompts: str | None = Field(
        default=None,
        description=(
            "inference JSON (prompts, VAE, text encoder) whose videos are made with the model in training "
            "at every evaluation"
        ),
    )


class VaceDatasetConfig(Config):
    """`dataset_param` with dataset_type `vace`: raw clips."""

    dataset_type: Literal["vace"] = "vace"
    basic_parameters: DataSource
    preprocess_parameters: VideoConfig = VideoConfig()
    tokenizer_config: TokenizerConfig = TokenizerConfig()
    synthesis: str | None = Field(
        default=None,
        description=(
            "recipe (YAML) whose tasks are drawn for rows without src_video and mask; null = rows are taken "
            "as they are"
        ),
    )
    validation: ValidationSource | None = Field(
        default=None, description="in training on raw clips: held-out features, extracted before"
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "use_text_processer": _TEXT,
        "enable_text_preprocessing": _TEXT,
        "text_preprocess_methods": _TEXT,
        "support_chinese": _TEXT,
    }

    @field_validator("tokenizer_config", mode="before")
    @classmethod
    def _only_one(cls, value: Any) -> Any:
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"lists {len(value)} tokenizers; VACE has one text encoder, give one")
            return value[0]
        return value


class FeatureDatasetConfig(Config):
    """`dataset_param` with dataset_type `feature`: what feature extraction wrote."""

    dataset_type: Literal["feature"] = "feature"
    basic_parameters: FeatureSource
    validation: ValidationSource | None = Field(default=None, description="held-out features")
    verify_checksums: bool = Field(
        default=True,
        description="compare what is read with the checksums in the files; files without any are read too",
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "preprocess_parameters": _AT_EXTRACTION,
        "tokenizer_config": _AT_EXTRACTION,
        "use_text_processer": _AT_EXTRACTION,
        "enable_text_preprocessing": _AT_EXTRACTION,
        "text_preprocess_methods": _AT_EXTRACTION,
        "support_chinese": _AT_EXTRACTION,
    }


class LoaderConfig(Config):
    """`dataloader_param`: in which order and how samples are read."""

    dataloader_mode: Literal["sampler"] = "sampler"
    sampler_type: Literal["stateful_distributed_sampler"] = "stateful_distributed_sampler"
    shuffle: bool = Field(default=False, description="a new order every epoch, from the seed")
    drop_last: bool = Field(
        default=True, description="either way nothing is dropped: batches run on into the next epoch"
    )
    pin_memory: bool = Field(
        default=True, description="read into page-locked memory, so that copies overlap with compute"
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "group_frame": _GROUPED,
        "group_resolution": _GROUPED,
        "group_data": _GROUPED,
        "initial_global_step_for_sampler": "the sampler's place is in the checkpoint",
    }
