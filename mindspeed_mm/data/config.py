"""Schemas of data JSONs: `dataset_param` and `dataloader_param`. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, Field, field_validator

from mindspeed_mm.config.schema import Config
from mindspeed_mm.data.published_config import TrainPipeline
from mindspeed_mm.geometry import WAN

_ONE_SIZE = "each clip keeps its own shape; only max_hxw limits the size"
_BY_TIME = "frames are chosen by time; use train_fps and num_frames"
_TEXT = "captions are always cleaned as Wan's text encoder expects"
MAX_REFERENCES = 256  # images of one sample; each becomes a latent frame
_GROUPED = "clips of the same shape are always grouped"
_AT_EXTRACTION = "feature extraction applies it, and the features already contain the result"


class ClipRow(Config):
    """One clip with its conditions and captions."""

    video: str = Field(description="the clip that the model learns to generate: a file or a folder of images")
    cap: str | tuple[str, ...] = Field(
        description="a caption, or a list of captions from which training picks one per sample"
    )
    src_video: str | None = Field(
        default=None, description="the clip to edit, or the control clip; null = none"
    )
    src_ref_images: str | tuple[str, ...] | None = Field(
        default=None, description="images of the people or things that must appear"
    )
    src_video_mask: str | None = Field(
        default=None,
        description=(
            "white = generate, black = keep; a clip, a folder of images, or one image for all "
            "frames. Without src_video, the mask applies to video; null = everything is generated"
        ),
    )


class FeatureRow(Config):
    """One feature. Extraction also copies the keys of the clip, which training does not read."""

    file: str = Field(
        description=(
            "path of the file, relative to data_folder, its `features` folder or the working directory"
        )
    )
    shape: tuple[int, int, int] | None = Field(
        default=None,
        description=(
            "frames (references included), height and width of the latents; null = read from the file"
        ),
    )
    num_refs: int | None = Field(
        default=None, description="number of references, which come first; null = read from the file"
    )
    task: str | None = Field(
        default=None, description="task that created the conditions; the loss is reported per task"
    )


def _fits_vae(value: int) -> int:
    if not WAN.fits_frames(value):
        nearest = WAN.nearest_frames(value)
        raise ValueError(f"must be 4k+1, as the VAE takes 1 frame and then 4 at a time; nearest: {nearest}")
    return value


class ClipPolicy(Config):
    """Which frames of a clip are used, and what happens to a clip that does not fit.

    Datasets and generation follow the same rules.
    """

    num_frames: int = Field(default=81, gt=0, le=10001, description="frames of the video, 4k+1 (default: 81)")
    fps: float = Field(default=16.0, ge=0.001, le=1000, description="frames per second (default: 16)")
    short_clip: Literal["keep", "pad", "resample", "reject"] = "reject"
    long_clip: Literal["trim", "resample", "reject"] = Field(
        default="trim",
        description="what to do with a source that has more frames than num_frames (default: trim)",
    )
    fit: Literal["crop", "reject"] = Field(
        default="crop",
        description="what to do with a source of another size: scale and crop, or reject (default: crop)",
    )
    timing: Literal["seconds", "frames"] = Field(
        default="seconds",
        description="sample the source at fps, or use it frame by frame (default: seconds)",
    )
    soft_mask: bool = Field(
        default=False, description="keep gray mask values instead of thresholding them at one half"
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

    Datasets in other packages may hash a dump of this config. Adding a field then renames their features.
    """

    num_frames: int = Field(
        default=81,
        gt=0,
        le=10001,
        description=(
            "maximum number of frames of a clip, 4k+1; a clip that is long enough gets exactly this number"
        ),
    )
    max_hxw: int = Field(
        default=399360,
        ge=256,
        le=1 << 28,
        description="maximum number of pixels of a frame (height x width)",
    )
    train_fps: float = Field(
        default=16.0,
        ge=0.001,
        le=1000,
        validation_alias=AliasChoices("train_fps", "fps"),
        description="frame rate at which clips are sampled; Wan is a 16 fps model. Alias: fps",
    )
    short_clip: Literal["keep", "pad", "resample", "reject"] = Field(
        default="keep",
        description=(
            "for a clip with fewer than num_frames: keep the largest 4k+1 frames, pad with the "
            "last frame, resample the whole clip, or reject it"
        ),
    )
    long_clip: Literal["trim", "resample", "reject"] = Field(
        default="trim",
        description=(
            "for a clip with more than num_frames: trim to the first num_frames, resample the "
            "whole clip, or reject it"
        ),
    )
    wan_frames: bool = Field(
        default=False,
        description=(
            "spread num_frames over the whole clip, as Wan2.1's VACE does (keep_last); train_fps "
            "then has no effect"
        ),
    )
    video_reader_type: Literal["DecordVideo", "AvVideo"] = Field(
        default="AvVideo",
        description=(
            "decoder library; both give the same frames: PyAV also reads the files that decord "
            "would decode differently"
        ),
    )
    soft_mask: bool = Field(
        default=False, description="keep gray mask values instead of thresholding them at one half"
    )
    vae_stride: tuple[int, int, int] = Field(
        default=(4, 8, 8), description="pixels of one latent cell (time, height, width)"
    )
    vae_patch_size: tuple[int, int, int] = Field(default=(1, 2, 2), description="latent cells of one token")
    train_pipeline: TrainPipeline | None = Field(
        default=None,
        description=("transforms listed in published files; must be steps that are always performed"),
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "video_processor_type": "VACE's preprocessing is always used",
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
    def _check_geometry(cls, value: tuple[int, int, int], info: Any) -> tuple[int, int, int]:
        wanted = {"vae_stride": (4, 8, 8), "vae_patch_size": (1, 2, 2)}[info.field_name]
        if value != wanted:
            raise ValueError(f"must be {list(wanted)} for VACE")
        return value

    @property
    def policy(self) -> ClipPolicy:
        """The same settings in the form that generation uses."""
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
    """`tokenizer_config`: the tokenizer and the number of tokens."""

    from_pretrained: str | None = Field(
        default=None, description="folder of the tokenizer; null = next to the text encoder"
    )
    model_max_length: int = Field(
        default=512, gt=0, le=65536, description="number of tokens per caption, including padding"
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "autotokenizer_name": "the folder determines the tokenizer",
        "hub_backend": "weights are read from local files",
    }


class DataSource(Config):
    """`basic_parameters` of raw clips."""

    data_path: str = Field(
        min_length=1,
        description="data.txt (one `folder,path/to/data.json` per line), or a data.json or .jsonl",
    )
    data_folder: str | None = Field(
        default=None,
        description=(
            "folder that paths are relative to if data_path is a data.json; null = the folder of that file"
        ),
    )
    data_storage_mode: Literal["vace"] = "vace"


class FeatureSource(Config):
    """`basic_parameters` of features."""

    data_path: str = Field(min_length=1, description="data.jsonl that feature extraction wrote")
    data_folder: str | None = Field(
        default=None, description="folder of the features; null = the folder of data_path"
    )


class ValidationSource(FeatureSource):
    """`validation`: held-out features for the loss, and prompts for validation videos."""

    prompts: str | None = Field(
        default=None,
        description=(
            "inference JSON with prompts, VAE and text encoder; each evaluation generates its "
            "videos with the model in training"
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
            "recipe (YAML) with the tasks to sample for rows without src_video and mask; null = "
            "use the rows as they are"
        ),
    )
    validation: ValidationSource | None = Field(
        default=None,
        description="for training on raw clips: held-out features, which must be extracted first",
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
                raise ValueError(f"lists {len(value)} tokenizers; VACE has one text encoder, so give one")
            return value[0]
        return value


class FeatureDatasetConfig(Config):
    """`dataset_param` with dataset_type `feature`: the output of feature extraction."""

    dataset_type: Literal["feature"] = "feature"
    basic_parameters: FeatureSource
    validation: ValidationSource | None = Field(default=None, description="held-out features")
    verify_checksums: bool = Field(
        default=True,
        description="verify the checksums in the files; files without checksums are also read",
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
    """`dataloader_param`: the order of samples, and how they are read."""

    dataloader_mode: Literal["sampler"] = "sampler"
    sampler_type: Literal["stateful_distributed_sampler"] = "stateful_distributed_sampler"
    shuffle: bool = Field(default=False, description="use a new order in every epoch, determined by the seed")
    drop_last: bool = Field(
        default=True,
        description="no effect: no sample is dropped, because batches continue into the next epoch",
    )
    pin_memory: bool = Field(
        default=True, description="read into page-locked memory, so that copies overlap with computation"
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        "group_frame": _GROUPED,
        "group_resolution": _GROUPED,
        "group_data": _GROUPED,
        "initial_global_step_for_sampler": "the checkpoint stores the sampler's position",
    }
