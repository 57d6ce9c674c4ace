"""`vace init FOLDER`: copies this repository's scripts and JSON files to a new folder.

The commands of the guide can then be run there. No torch.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mindspeed_mm.config.flags import FlagParser
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import display_path
from mindspeed_mm.leftovers import temporary_name
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.outputs import check_folder

LOGGER = get_logger(__name__)
PROG = "vace init"
PACKAGE = Path(__file__).resolve().parents[1]
MODELS: Mapping[str, tuple[str, str]] = {  # name → its folder, and the suffixes of its inference JSONs
    "1.3B": ("1.3B", "_1.3b.json"),
    "14B": ("14B", "_14b.json"),
    "A14B": ("A14B_wan2.2", "_A14b.json"),
    "tiny": ("tiny", ""),
}
_SHARED = (
    "common.sh",
    "numbers.sh",
    "lora.sh",
    "pretrain.sh",
    "fsdp2_config.yaml",
    "README.md",
    "feature_extract",
    "inference",
)
_MAKERS = (
    "make",
    "make_weights.sh",
    "train_vae.py",
    "checkpoints.py",
    "draw_kinds.py",
)  # files that make the tiny weights
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_QUICKSTART = re.compile(r"\s[^.`]*`bash examples/vace/quickstart\.sh`[^.]*\.")  # the sentence on it
_DOOR = """\
\"\"\"Entry point of pre-training for torchrun: `torchrun … pretrain_vace.py --mm-model … --mm-data …`.\"\"\"

import sys

from mindspeed_mm.tasks.pretrain import main

if __name__ == "__main__":
    main(sys.argv[1:])
"""


def job_parser(prog: str = PROG) -> FlagParser:
    """Build the parser of `vace init`."""
    parser = FlagParser(
        prog, "Copy the scripts and settings of a model into a new folder, where the guide's commands run."
    )
    parser.add_argument("folder", metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--model",
        nargs="+",
        choices=[*MODELS, "all"],
        default=["all"],
        help="models to copy scripts for (default: all)",
    )
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Run the command."""
    given = job_parser(prog).parse_strict(sys.argv[1:] if argv is None else argv)
    models = list(MODELS) if "all" in given.model else list(dict.fromkeys(given.model))
    folder = Path(given.folder)
    create(folder, models)
    shown = display_path(folder)
    LOGGER.info(
        f"{shown}: scripts and settings of {', '.join(models)}. Next: cd {shown}, then "
        "examples/vace/README.md"
    )


def examples() -> Path:
    """Return the folder examples/vace of the checkout or the installed package. Raises ConfigError."""
    for place in (PACKAGE / "starter", PACKAGE.parent / "examples/vace"):
        if (place / "common.sh").is_file():
            return place
    raise ConfigError(
        "the scripts are missing from this installation", where=PACKAGE, fix="install the package again"
    )


def create(folder: Path, models: Sequence[str]) -> None:
    """Fill `folder` completely, or leave it unchanged. Raises ConfigError if it is not empty."""
    check_folder(folder, "FOLDER")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError("is not empty", where=folder, fix="choose a new folder")
    source = examples()
    draft = folder.resolve().parent / temporary_name(folder.resolve().name)
    try:
        (draft / "examples").mkdir(parents=True)
        (draft / "pretrain_vace.py").write_text(_DOOR, encoding="utf-8")
        for name in (*_SHARED, *(MODELS[model][0] for model in models)):
            _copy(source / name, draft / "examples/vace" / name, _left_out(models))
        _trim_guide(draft / "examples/vace/README.md")
        if folder.exists():  # keep the empty folder, which may be a shell's working directory
            for entry in draft.iterdir():
                os.replace(entry, folder / entry.name)
        else:
            os.replace(draft, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}",
            where=folder,
            fix="free disk space or choose another folder",
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _left_out(models: Sequence[str]) -> Callable[[str, list[str]], set[str]]:
    """Return copytree's `ignore`: caches, scripts for the tiny weights, inference JSONs of other models."""
    other = tuple(end for model, (_, end) in MODELS.items() if end and model not in models)

    def ignored(_: str, names: list[str]) -> set[str]:
        return {
            name
            for name in names
            if name in ("__pycache__", "__init__.py", *_MAKERS)
            or (name.endswith(other) and other and name.startswith("in"))
        }

    return ignored


def _trim_guide(guide: Path) -> None:
    """Adapt the guide to a project folder.

    Links to pages of the repository become plain text, and the quickstart is removed.
    """

    def text_or_link(link: re.Match[str]) -> str:
        return link[0] if link[2].startswith(("http", "#")) or (guide.parent / link[2]).exists() else link[1]

    text = _LINK.sub(text_or_link, guide.read_text(encoding="utf-8"))
    guide.write_text(_QUICKSTART.sub("", text), encoding="utf-8")


def _copy(source: Path, target: Path, ignored: Callable[[str, list[str]], set[str]]) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=ignored)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
