"""`vace eval`: scores generated videos by task, and compares two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import Field

from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import ConfigError, DataError, WeightsError
from mindspeed_mm.evaluation.measured import Measured, absolute, files_checksum
from mindspeed_mm.evaluation.metrics.catalog import all_metrics
from mindspeed_mm.evaluation.page import write_page
from mindspeed_mm.evaluation.report import (
    FILE_NAME,
    Difference,
    Report,
    compare,
    read_report,
    score_folder,
    write_report,
)
from mindspeed_mm.evaluation.results import find_results
from mindspeed_mm.evaluation.sources import EvalData
from mindspeed_mm.evaluation.spec import Metric
from mindspeed_mm.evaluation.text import comparison_table, score_table
from mindspeed_mm.files import format_json, stat_path
from mindspeed_mm.imports import quick_imports
from mindspeed_mm.leftovers import sweep
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.outputs import check_file

logger = get_logger(__name__)
PROG = "vace eval"


class EvalFlags(Config):
    """What to measure, what to compare with, and where to write the page."""

    data: str | None = Field(
        default=None,
        description=(
            "dataset with the true clips (data.json, .jsonl, .csv, data.txt), or the folder of VACE-Benchmark"
        ),
    )
    task: str | None = Field(
        default=None, description="task of videos whose settings name none, for example canny"
    )
    metrics: tuple[str, ...] = Field(default=(), description="metrics to compute (default: all; see --list)")
    compare: bool = Field(
        default=False, description="compare two folders, reusing the eval.json files that are current"
    )
    encoder: str | None = Field(
        default=None,
        description=(
            "folder of a CLIP or DINO model of transformers, which also compares references and frames"
        ),
    )
    annotators: str | None = Field(
        default=None, description="folder of the networks for depth and pose (default: that of the settings)"
    )
    page: str | None = Field(
        default=None,
        description="HTML page with the videos side by side (default: eval.html in the first folder)",
    )
    list: bool = Field(default=False, description="list all metrics and stop")
    dry_run: bool = Field(default=False, description="check everything and stop")
    print_config: bool = Field(default=False, description="print the settings as JSON and stop")


@one_line_errors
def main(argv: Sequence[str], prog: str = PROG) -> None:
    """Score every folder, store the scores with the videos, print a table and write a page."""
    arguments = job_parser(prog).parse_strict(argv)
    flags = parse(EvalFlags, given(arguments, EvalFlags), prog)
    folders = [Path(folder) for folder in arguments.results]
    if flags.print_config:
        logger.info(format_json({"results": arguments.results, **flags.model_dump(mode="json")}, indent=2))
        return
    metrics = all_metrics(flags.metrics)
    if flags.list:
        logger.info("\n".join(f"{one.name:<18}{one.unit:<8}{one.summary}" for one in metrics))
        return
    names = _check(folders, flags, prog)
    page = Path(flags.page) if flags.page else folders[0] / "eval.html"
    for path in (page, *(folder / FILE_NAME for folder in folders)):
        check_file(path, "--page" if path == page else str(path.parent))
    data = EvalData.open(flags.data) if flags.data else None
    if flags.dry_run:
        return
    sweep(folders)
    metrics += _of_encoder(flags.encoder)
    reports = [_report(folder, metrics, data, flags) for folder in folders]
    _write_page(page, names, reports)
    for name, report in zip(names, reports, strict=True):
        for note in report.notes:
            logger.warning(f"{name}: {note}")
    first, second = reports[0].measured, reports[-1].measured
    if flags.compare and first.settings != second.settings:
        logger.warning(
            f"{names[0]} was scored with {first.settings}, {names[1]} with {second.settings}; "
            "pass the flags again to score both with the same settings"
        )
    if flags.compare:
        _log_differences(names, compare(*reports), as_json=arguments.json)
    elif arguments.json:
        logger.info(format_json([report.model_dump(mode="json") for report in reports], indent=2))
    else:
        logger.info(score_table(names, reports))
    if not arguments.json:
        logger.info(f"scores in {', '.join(str(folder / FILE_NAME) for folder in folders)}; page {page}")


def job_parser(prog: str = PROG) -> FlagParser:
    """Build the parser for the results folders and the flags."""
    parser = FlagParser(prog, "Score generated videos by task, and compare runs.")
    parser.add_argument("results", nargs="*", metavar="RESULTS", help="folders of generated videos")
    add_flags(parser, EvalFlags, "evaluation")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _check(folders: Sequence[Path], flags: EvalFlags, prog: str) -> list[str]:
    """Check that the folders exist and differ, and that a comparison has two of them.

    Returns the names of the folders for the table.
    """
    if not folders:
        raise ConfigError(
            "got no folders", where=prog, expected="RESULTS, the output_path of a generation run"
        )
    if flags.compare and len(folders) != 2:
        raise ConfigError(
            f"got {len(folders)} folders", where=f"{prog}: --compare", expected="two folders of results"
        )
    for folder in folders:
        stat_path(folder, DataError)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("got the same folder twice", where=prog, fix="pass each folder once")
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _report(folder: Path, metrics: Sequence[Metric], data: EvalData | None, flags: EvalFlags) -> Report:
    path = folder / FILE_NAME
    measured = Measured(
        files=files_checksum(find_results(folder)),
        task=flags.task or "",
        annotators=absolute(flags.annotators),
        encoder=absolute(flags.encoder),
        data=absolute(flags.data),
    )
    if flags.compare and data is None and path.is_file():
        known = read_report(path)
        wanted = set(flags.metrics or known.metrics)
        if known.measured.holds(measured) and wanted <= set(known.metrics):
            logger.info(f"scores read from {path}, because the files have not changed")
            kept = {name: info for name, info in known.metrics.items() if name in wanted}
            return known.model_copy(update={"metrics": kept, "folder": str(folder)})
    options = {"annotators": flags.annotators} if flags.annotators else {}
    report = score_folder(folder, metrics, data=data, task=flags.task or "", options=options, progress=True)
    report = report.model_copy(update={"measured": measured})
    try:
        write_report(report, path)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", where=path, fix="free disk space") from None
    return report


def _of_encoder(folder: str | None) -> list[Metric]:
    if folder is None:
        return []
    stat_path(folder, WeightsError)
    with quick_imports():
        from mindspeed_mm.accelerator import Accelerator
        from mindspeed_mm.evaluation.metrics.encoder import Encoder, encoder_metrics

    return encoder_metrics(Encoder(Path(folder), Accelerator.detect().device))


def _write_page(path: Path, names: Sequence[str], reports: Sequence[Report]) -> None:
    try:
        write_page(path, names, reports)
    except OSError as error:
        raise DataError(
            f"cannot be written: {error.strerror}", where=path, fix="choose another --page"
        ) from None


def _log_differences(names: Sequence[str], found: Sequence[Difference], *, as_json: bool) -> None:
    if as_json:
        rows = [{**asdict(one), "verdict": one.verdict} for one in found]
        logger.info(format_json({"first": names[0], "second": names[1], "differences": rows}, indent=2))
        return
    logger.info(comparison_table(names[0], names[1], found))
