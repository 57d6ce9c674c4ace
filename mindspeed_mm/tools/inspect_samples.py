"""mm-inspect: shows a dataset or features as the model sees them.

It checks the whole dataset, and draws one sample.

mm-inspect data.txt
mm-inspect data.json --tokenizer Wan2.1-VACE-1.3B/google/umt5-xxl
mm-inspect data.txt --index 17 --out sheet.png --data-config examples/vace/feature_extract/data.json
mm-inspect features/data.jsonl --index 17 --vae Wan2.1-VACE-1.3B/Wan2.1_VAE.pth
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.overrides import OverrideConfig, Overrides
from mindspeed_mm.config.schema import parse
from mindspeed_mm.data.check import check_dataset
from mindspeed_mm.data.config import (
    DataSource,
    FeatureDatasetConfig,
    TokenizerConfig,
    VaceDatasetConfig,
    VideoConfig,
)
from mindspeed_mm.data.csv_rows import reject_table
from mindspeed_mm.data.foreign import find_list
from mindspeed_mm.data.manifest import list_problems, scan_manifest
from mindspeed_mm.data.registry import parse_data_config
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import LIST_BYTES, atomic_path, format_json, parse_json, read_json, read_text
from mindspeed_mm.leftovers import sweep
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.outputs import check_file

if TYPE_CHECKING:
    from PIL import Image

logger = get_logger(__name__)
PROG = "mm-inspect"
_CPU_FRAMES = 17  # one second of video, because decoding all of a large clip takes minutes
_LISTED = 10  # maximum number of long captions to list
_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


class InspectConfig(OverrideConfig):
    """What to inspect, and where to write the sheet."""

    dry_run: bool = Field(
        default=False, description="check arguments, files and the list, and stop; opens no clip"
    )
    print_config: bool = Field(default=False, description="print the settings as JSON and stop")

    index: int | None = Field(
        default=None,
        ge=0,
        description="row to draw; by default, the whole dataset is checked and its first usable row drawn",
    )
    out: str = Field(default="sheet.png", description="image file to write (.png, .jpg or .webp)")
    data_config: str | None = Field(
        default=None,
        description="data JSON whose preprocess_parameters determine frames and sizes; null = the defaults",
    )
    vae: str | None = Field(
        default=None, description="VAE (folder or .pth) to decode the latents of a feature"
    )
    tokenizer: str | None = Field(
        default=None,
        description="folder of the tokenizer (google/umt5-xxl), to count the tokens of captions; "
        "null = tokenizer_config of the data JSON",
    )
    decode_frames: int | None = Field(
        default=None,
        gt=0,
        description=(
            "number of frames of a feature that --vae decodes (default: the first 17 on a CPU, else all)"
        ),
    )
    skip_bad_samples: int = Field(default=1_000_000_000, ge=0, description="maximum number of unusable rows")
    no_verify_checksums: bool = Field(
        default=False,
        description="skip checksum verification of a feature; a damaged file may go unnoticed",
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description="number of processes that open clips (default: chosen by cores and memory)",
    )


@one_line_errors
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Write a contact sheet of one sample or feature."""
    arguments = job_parser(prog).parse_strict(sys.argv[1:] if argv is None else argv)
    config = parse(InspectConfig, given(arguments, InspectConfig), prog)
    path = Path(arguments.path)
    if config.print_config:
        logger.info(format_json({"path": str(path), **config.model_dump(mode="json")}, indent=2))
        return
    _check_out(config.out)
    path = locate(path)
    if config.dry_run:
        _check_list(path, config)
        return
    image, what = draw(path, config)
    _save(image, Path(config.out))
    logger.info("%s: %s", config.out, what)


def job_parser(prog: str = PROG) -> FlagParser:
    """Build the parser of mm-inspect and of `vace inspect`."""
    parser = FlagParser(prog, "Show a dataset or features as the model sees them.")
    parser.add_argument(
        "path", help="data.txt, data.json, .jsonl, a data config, a feature file, or a folder of these"
    )
    add_flags(parser, InspectConfig, "options")
    return parser


def _check_list(path: Path, config: InspectConfig) -> None:
    """Log what a run would draw.

    Raises ConfigError or DataError for a data JSON or list that cannot be read.
    """
    if not _is_feature(path):
        source = _source(path, config)
        if source.features is None:
            manifest = scan_manifest(source.rows.data_path, source.rows.data_folder)
            if manifest.problems:
                logger.warning(list_problems(manifest.problems, manifest.rows))
            logger.info(
                f"{len(manifest.records)} of {manifest.rows} clips of {source.rows.data_path} are listed "
                "correctly"
            )
    logger.info(f"{config.out} would be drawn from {path}")


def _is_feature(path: Path) -> bool:
    return path.suffix in (".safetensors", ".pt")


def locate(path: Path) -> Path:
    """Return the list in a folder, or the folder itself if it contains clips with captions."""
    if not os.path.exists(path):
        raise DataError(f"no such file (working directory {Path.cwd()})", where=path)
    if path.is_dir():
        names = ("data.jsonl", "data.txt", "data.json")
        listed = next((path / name for name in names if (path / name).is_file()), None)
        return listed or find_list(path) or path  # a folder of clips with captions is its own list
    return path


def draw(path: Path, config: InspectConfig) -> tuple[Image.Image, str]:
    """Return the contact sheet of a path from `locate`, and a line that describes it.

    Raises ConfigError and DataError.
    """
    if _is_feature(path):
        return _draw_feature(path, config)
    source = _source(path, config)
    if source.features is not None:
        return _draw_feature(_feature_file(source.features, config.index or 0), config)
    return _draw_sample(_record(source, config), source.video)


@dataclass(frozen=True)
class _Source:
    """The rows, the settings for clips and captions, and the features if the path names features."""

    rows: DataSource
    video: VideoConfig = field(default_factory=VideoConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    features: FeatureDatasetConfig | None = None


def _source(path: Path, config: InspectConfig) -> _Source:
    video, tokenizer = VideoConfig(), TokenizerConfig()
    overrides = Overrides.parse(config.set, ("data",))
    if config.data_config is not None:
        values = overrides.apply(read_json(config.data_config), "data")
        dataset = parse_data_config(values, config.data_config).dataset_param
        if not isinstance(dataset, VaceDatasetConfig):
            raise ConfigError(
                "dataset_type is not 'vace'",
                where=config.data_config,
                fix="set --data-config to a data JSON of raw clips",
            )
        video, tokenizer = dataset.preprocess_parameters, dataset.tokenizer_config
    if path.suffix == ".json" and _is_config(path):
        dataset = parse_data_config(overrides.apply(read_json(path), "data"), str(path)).dataset_param
        if isinstance(dataset, VaceDatasetConfig):
            return _Source(dataset.basic_parameters, dataset.preprocess_parameters, dataset.tokenizer_config)
        if isinstance(dataset, FeatureDatasetConfig):
            return _Source(DataSource(data_path=dataset.basic_parameters.data_path), features=dataset)
        raise ConfigError(
            "is unknown to mm-inspect",
            where=f"{path}:dataset_param.dataset_type",
            expected="'vace' or 'feature'",
        )
    if config.set and config.data_config is None:
        raise ConfigError(
            f"{path} is not a data JSON",
            where=f"--set {config.set[0][:80]}",
            fix="set one with --data-config FILE",
        )
    rows = DataSource(data_path=str(path))
    if (
        path.suffix == ".jsonl"
        and '"file"' in read_text(path, DataError, max_bytes=LIST_BYTES).partition("\n")[0]
    ):
        features = parse(FeatureDatasetConfig, {"basic_parameters": {"data_path": str(path)}}, PROG)
        return _Source(rows, features=features)
    return _Source(rows, video, tokenizer)


def _is_config(path: Path) -> bool:
    """Return whether a .json file is a data config and not a list of clips."""
    text = read_text(path, max_bytes=LIST_BYTES)
    reject_table(text, path)
    first, _, rest = text.strip().partition("\n")
    if rest and first.startswith("{") and first.rstrip().endswith("}"):
        return False  # JSON lines
    values = parse_json(text, str(path))
    return isinstance(values, Mapping) and "video" not in values


def _record(source: _Source, config: InspectConfig) -> SampleRecord:
    path, folder = source.rows.data_path, source.rows.data_folder
    if config.index is None:
        report = check_dataset(
            path,
            source.video,
            data_folder=folder,
            skip_bad_samples=config.skip_bad_samples,
            or_else="skip them: --skip-bad-samples N",
            workers=config.workers,
        )
        _report_long_captions(report.records, source.tokenizer, config.tokenizer)
        return report.records[0]
    manifest = scan_manifest(path, folder)
    record = next((record for record in manifest.records if record.row == config.index), None)
    if record is None:
        about = [problem for problem in manifest.problems if problem.row == config.index]
        if about:
            raise DataError(list_problems(about, 1), fix="correct it")
        raise ConfigError(f"{path} has rows 0..{manifest.rows - 1}", where=f"--index {config.index}")
    _report_long_captions([record], source.tokenizer, config.tokenizer)
    return record


def _report_long_captions(
    records: Sequence[SampleRecord], settings: TokenizerConfig, folder: str | None
) -> None:
    """Report the captions that are longer than the model reads.

    Without a tokenizer, which may not be downloaded yet, reports only very long captions.
    """
    limit = settings.model_max_length
    if folder is None:
        folder = settings.from_pretrained
        if folder is None or not Path(folder).is_dir():
            long = [r.address for r in records for text in r.captions if _may_be_cut(text, limit)]
            if long:
                more = f" and {len(long) - _LISTED} more" if len(long) > _LISTED else ""
                logger.warning(
                    f"{len(long)} captions may have more than {limit} tokens, which would be truncated: "
                    f"{', '.join(long[:_LISTED])}{more}; --tokenizer FOLDER counts them"
                )
            return
    from mindspeed_mm.models.umt5.tokenizer import Tokenizer

    tokenizer = Tokenizer(Path(folder), limit)
    tokenizer.report_long((record.address, caption) for record in records for caption in record.captions)


def _may_be_cut(caption: str, tokens: int) -> bool:
    """Estimate whether a caption is cut. A UMT5 token has about four bytes, in English and in Chinese."""
    return len(caption.encode()) > 4 * tokens


def _draw_sample(record: SampleRecord, video: VideoConfig) -> tuple[Image.Image, str]:
    from mindspeed_mm.data.transforms import load_sample
    from mindspeed_mm.tools.sheets import sample_sheet

    sample = load_sample(record, video)
    return sample_sheet(
        record, sample
    ), f"{record.address}, {len(sample.frame_indices)} frames ({sample.frame_policy})"


def _feature_file(config: FeatureDatasetConfig, index: int) -> Path:
    from mindspeed_mm.data.dataset import FeatureDataset

    dataset = FeatureDataset(config)
    if index >= len(dataset):
        raise ConfigError(
            f"{config.basic_parameters.data_path} has rows 0..{len(dataset) - 1}", where=f"--index {index}"
        )
    return dataset.path(index)


def _draw_feature(path: Path, config: InspectConfig) -> tuple[Image.Image, str]:
    from mindspeed_mm.tools.sheets import feature_sheet

    verify = not config.no_verify_checksums
    if config.vae is None:
        return feature_sheet(path, verify=verify), f"{path} (pass --vae to see its latents decoded)"
    from mindspeed_mm.accelerator import Accelerator
    from mindspeed_mm.models.wan.vae import load_vae

    accelerator = Accelerator.detect()
    accelerator.activate()
    frames = config.decode_frames or (_CPU_FRAMES if accelerator.device.type == "cpu" else None)
    vae = load_vae(Path(config.vae), device=accelerator.device)
    return feature_sheet(path, vae, decode_frames=frames, verify=verify), str(path)


def _check_out(path: str) -> None:
    """Raise ConfigError if the sheet cannot be written, before anything is read or drawn."""
    if Path(path).suffix.lower() not in _KINDS:
        raise ConfigError("is not an image name", where=f"--out {path}", expected=".png, .jpg or .webp")
    check_file(path, "--out")


def _save(image: Image.Image, path: Path) -> None:
    sweep([path.parent])
    with atomic_path(path) as draft:
        image.save(draft, format=_KINDS[path.suffix.lower()], optimize=True)


if __name__ == "__main__":
    main()
