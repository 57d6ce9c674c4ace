"""ExtractJob: the settings of a feature extraction, frozen and checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron.mm.arguments import build_parser, parse_arguments
from mindspeed_mm.config.flags import FlagParser, flag_name
from mindspeed_mm.config.overrides import OverrideConfig, Overrides
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.config import VaceDatasetConfig
from mindspeed_mm.data.registry import DataConfig, parse_data_config
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.files import format_json, read_json, regular_file
from mindspeed_mm.locks import check_unlocked
from mindspeed_mm.log import rank
from mindspeed_mm.outputs import check_folder
from mindspeed_mm.training.tools_config import ToolsConfig

PROG = "get_vace_feature.py"
OVERRIDDEN = ("model", "data", "tools")  # names of the files in `--set`
_MODEL_FILES = (".json", ".model", ".safetensors", ".pth", ".pt")
_ALONE = "each sample is encoded separately"
_WAN = "the value is the same in every Wan VAE"


class ExtractFiles(Config):
    """The files that a job reads."""

    mm_data: str | None = Field(
        default=None, description="data JSON: the clips and how to preprocess them (required)"
    )
    mm_model: str | None = Field(default=None, description="model JSON: VAE and text encoder (required)")
    mm_tool: str | None = Field(
        default=None, description="tools.json: sorafeature.save_path is the folder for the features"
    )
    dry_run: bool = Field(
        default=False, description="check files, settings and every clip, then stop; uses no device"
    )
    print_config: bool = Field(default=False, description="print the whole job as JSON, then stop")


class ExtractConfig(Config):
    """How to run the extraction. These settings do not change the features."""

    save_path: str | None = Field(
        default=None, description="folder for the features (default: the one in tools.json)"
    )
    num_workers: int = Field(
        default=2,
        ge=0,
        le=1024,
        description="processes per rank that prefetch clips; 0 = none, and no timeout for reading",
    )
    sample_timeout: float = Field(
        default=600.0,
        gt=0,
        le=1000000.0,
        description="time limit in seconds for reading, and for encoding, one sample",
    )
    skip_bad_samples: int = Field(
        default=0,
        ge=0,
        description="maximum number of unusable samples to skip; failed.jsonl lists them",
    )
    encode_batch: int | None = Field(
        default=None,
        gt=0,
        le=65536,
        description=(
            "clips of one sample that the VAE encodes in one batch (default: chosen for the device)"
        ),
    )
    no_check_clips: bool = Field(
        default=False, description="do not open every clip before the start, and do not print the table"
    )


class TrainingFlags(Config):
    """Flags that published scripts pass. Only values without an effect are accepted."""

    tensor_model_parallel_size: Literal[1] = Field(default=1, description="each rank has whole models")
    pipeline_model_parallel_size: Literal[1] = Field(default=1, description="each rank has whole models")
    context_parallel_size: Literal[1] = Field(default=1, description="each rank has whole models")
    micro_batch_size: int = Field(default=1, description=_ALONE)
    global_batch_size: int | None = Field(default=None, description=_ALONE)
    seed: int | None = Field(default=None, description="nothing in extraction is random")
    distributed_backend: str | None = Field(default=None, description="ranks only meet at the end, over gloo")
    distributed_timeout_minutes: int | None = Field(default=None, description="ranks only meet at the end")
    bf16: bool = Field(default=False, description="use ae.dtype and text_encoder.dtype")


SCHEMAS: Sequence[tuple[type[Config], str]] = (
    (ExtractFiles, "files"),
    (OverrideConfig, "keys of the files"),
    (ExtractConfig, "extraction"),
    (TrainingFlags, "accepted from training scripts, unused"),
)


class AeConfig(Config):
    """`ae`: the VAE."""

    model_id: Literal["wan_video_vae"] = "wan_video_vae"
    from_pretrained: str = Field(description="Wan2.1_VAE.pth, or the `vae` folder of a diffusers checkpoint")
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="dtype of the VAE's computation; latents are normalized in fp32"
    )
    enable_tiling: bool = Field(
        default=False, description="encode in tiles: needs less memory, gives slightly different latents"
    )
    norm_latents: Literal[True] = Field(default=True, description="latents are normalized per channel")
    norm_mode: Literal["channel_specified_shift_scale"] = "channel_specified_shift_scale"
    do_sample: Literal[False] = Field(default=False, description="latents are the mean of the posterior")
    UNUSED: ClassVar[Mapping[str, str]] = {
        "tiling_param": "diffusers' tile size is used",
        "hub_backend": "weights are local",
        "z_dim": _WAN,
        "dim": _WAN,
        "dim_mult": _WAN,
    }


class TextEncoderConfig(Config):
    """`text_encoder`: the text encoder."""

    model_id: Literal["UMT5"] = "UMT5"
    from_pretrained: str = Field(
        description="models_t5_umt5-xxl-enc-bf16.pth, or the `text_encoder` folder of a diffusers checkpoint"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="dtype of the text encoder's computation"
    )
    dropout_rate: float = Field(default=0.0, ge=0, le=0, description="extraction uses no dropout")
    UNUSED: ClassVar[Mapping[str, str]] = {"hub_backend": "weights are local"}


class ExtractModelConfig(Config):
    """The whole model JSON of feature extraction."""

    ae: AeConfig
    text_encoder: TextEncoderConfig
    UNUSED: ClassVar[Mapping[str, str]] = {
        "frames": "use num_frames of the data JSON",
        "weight_dtype": "use ae.dtype and text_encoder.dtype",
        "task": "the task is always VACE",
        "patch": "nothing is patched",
    }


class ExtractJob(Config):
    """A feature extraction: its files, their content, and how it runs."""

    files: ExtractFiles
    data: DataConfig
    model: ExtractModelConfig
    extract: ExtractConfig
    save_path: str
    notes: tuple[str, ...] = ()

    @classmethod
    def from_argv(cls, argv: Sequence[str], prog: str = PROG) -> ExtractJob:
        """Parse the flags and the files that they name.

        Raises ConfigError with the file and key of the first problem.
        """
        given, notes = parse_arguments(job_parser(prog), argv, SCHEMAS)
        files = parse(ExtractFiles, given[ExtractFiles], prog)
        overrides = Overrides.parse(parse(OverrideConfig, given[OverrideConfig], prog).set, OVERRIDDEN)
        for name in ("mm_data", "mm_model"):
            if getattr(files, name) is None:
                raise ConfigError(
                    f"{flag_name(name)} is missing", where=prog, fix="set it to the path of a JSON file"
                )
        extract = parse(ExtractConfig, given[ExtractConfig], prog)
        leftover = parse(TrainingFlags, given[TrainingFlags], prog)
        notes += [
            f"{flag_name(name)}: accepted, unused: {_reason(name)}" for name in leftover.model_fields_set
        ]
        data_path, model_path = str(files.mm_data), str(files.mm_model)
        data = parse_data_config(overrides.apply(read_json(data_path), "data"), data_path, notes)
        if data.dataset_type == "feature":
            raise ConfigError(
                "'feature' means extracted features",
                where=f"{files.mm_data}:dataset_param.dataset_type",
                fix="use raw clips",
            )
        model = parse(ExtractModelConfig, overrides.apply(read_json(model_path), "model"), model_path, notes)
        tools_values = overrides.apply(read_json(files.mm_tool) if files.mm_tool else {}, "tools")
        tools = parse(ToolsConfig, tools_values, files.mm_tool or "tools.json", notes)
        save_path = tools.sorafeature.save_path if extract.save_path is None else extract.save_path
        return cls(
            files=files, data=data, model=model, extract=extract, save_path=save_path, notes=tuple(notes)
        )

    def check_inputs(self) -> None:
        """Raise WeightsError if the VAE, text encoder or tokenizer is missing, or is a FIFO or a device."""
        check_encoders(
            self.model.ae,
            self.model.text_encoder,
            self.tokenizer_path,
            mm_model=str(self.files.mm_model),
            mm_data=str(self.files.mm_data),
        )

    def check_outputs(self) -> None:
        """Check on rank 0 that the features can be written.

        Raises ConfigError if the folder is not writable, and LaunchError if another run writes to it.
        """
        if rank() == 0:
            by_flag = self.extract.save_path is not None
            check_folder(
                self.save_path, "--save-path" if by_flag else f"{self.files.mm_tool}:sorafeature.save_path"
            )
            check_unlocked(Path(self.save_path), choose="--save-path")

    @property
    def tokenizer_path(self) -> str | None:
        """The tokenizer that the data JSON names, or None to use the one next to the text encoder."""
        config = getattr(self.data.dataset_param, "tokenizer_config", None)
        return getattr(config, "from_pretrained", None)

    @property
    def text_len(self) -> int:
        """The maximum number of tokens of a caption."""
        config = getattr(self.data.dataset_param, "tokenizer_config", None)
        return int(getattr(config, "model_max_length", 512))

    @property
    def raw_clips(self) -> VaceDatasetConfig | None:
        """The config of the built-in dataset, whose list can be checked without torch, or None."""
        param = self.data.dataset_param
        return param if isinstance(param, VaceDatasetConfig) else None

    def to_json(self) -> str:
        """Return the content of job.json."""
        return format_json(self.model_dump(mode="json"), indent=2)


def job_parser(prog: str = PROG) -> FlagParser:
    """Build the parser of get_vace_feature.py and of `vace extract`."""
    return build_parser(prog, "Encode clips, conditions and captions into features for training.", SCHEMAS)


def check_encoders(
    ae: AeConfig, text: TextEncoderConfig, tokenizer: str | None, *, mm_model: str, mm_data: str
) -> None:
    """Raise WeightsError if the VAE, text encoder or tokenizer is missing, or is a FIFO or a device."""
    paths = {
        f"{mm_model}:ae.from_pretrained": ae.from_pretrained,
        f"{mm_model}:text_encoder.from_pretrained": text.from_pretrained,
    }
    if tokenizer:
        paths[f"{mm_data}:dataset_param.tokenizer_config.from_pretrained"] = tokenizer
    for where, path in paths.items():
        try:
            for file in [Path(path), *_inside(Path(path))]:
                regular_file(file, WeightsError, or_folder=True)
        except WeightsError as error:
            raise error.at(where) from None


def _inside(folder: Path) -> list[Path]:
    """Return the model files in a weights or tokenizer folder, or [] if `folder` is a file."""
    if not folder.is_dir():
        return []
    return [file for file in folder.iterdir() if file.suffix in _MODEL_FILES and file.exists()]


def _reason(name: str) -> Any:
    return TrainingFlags.model_fields[name].description
