"""Find the weight files of a model in an MM, DCP, diffusers or original folder, or in a single file."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.mm.layout import RELEASE, latest_folder, parse_iteration, saved_iterations, stage_files
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import read_json_object, regular_file, stat_path

Kind = Literal["safetensors", "torch", "gguf", "mm", "dcp"]
EXPERTS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin|pt|pth)")
_TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
_NOT_THE_TRANSFORMER = re.compile(r"(?i)vae|t5|umt5|clip")


@dataclass(frozen=True)
class Files:
    """The weight files of one model."""

    kind: Kind
    paths: tuple[Path, ...]  # one file, shards, pipeline stages in order, or one DCP folder
    what: str  # description for messages, such as "one safetensors file"
    config_dirs: tuple[Path, ...]  # folders that may contain its config.json
    note: str = ""  # a message about other weights that were found and not used


def find_files(path: Path, *, original: bool = False) -> Files:
    """Find the model at `path`.

    With `original`, an MM checkpoint next to original files is ignored.

    Raises WeightsError if there is no model, more than one, or a file of it is missing. For the two experts
    of A14B, the error names both folders.
    """
    if not stat.S_ISDIR(stat_path(path, WeightsError).st_mode):
        return _one_file(path)
    mm = _megatron(path)
    if mm is not None and not (original and _has_weights(path)):
        return mm
    plain = _plain_folder(path)
    if plain is None:
        if mm is not None:
            return mm
        raise WeightsError(f"contains no known weights; {_present(path)}", where=path)
    return plain


def shards(paths: Sequence[Path]) -> Files:
    """Return the listed shards of one model. Raises WeightsError if one is not a regular file."""
    for path in paths:
        regular_file(path, WeightsError)
    return Files("safetensors", tuple(paths), f"{len(paths)} safetensors shards", (paths[0].parent,))


def _one_file(path: Path) -> Files:
    if path.name.endswith(".index.json"):
        return _indexed(path)
    with open(regular_file(path, WeightsError), "rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and path.suffix not in _TORCH_ENDINGS):
        return Files("safetensors", (path,), "one safetensors file", (path.parent,))
    if start[:4] == b"GGUF":
        return Files("gguf", (path,), "one GGUF file", (path.parent,))
    if path.suffix in _TORCH_ENDINGS or start[:2] == b"PK":
        return Files("torch", (path,), "one torch file", (path.parent, path.parent.parent))
    raise WeightsError(
        "is not a weights file", where=path, fix="use a .safetensors, .gguf, .pt or .pth file, or a folder"
    )


def _megatron(path: Path) -> Files | None:
    """Find an MM root (tracker, `release`, `iter_*`), one iteration folder, or a DCP folder."""
    if (path / ".metadata").is_file():
        return Files("dcp", (path,), "a DCP folder", (path, path.parent))
    files = stage_files(path)
    if files:
        stages = "" if len(files) == 1 else f" in {len(files)} pipeline stages"
        return Files("mm", tuple(files), f"an MM folder{stages}", (path, path.parent))
    if any(path.glob("*.distcp")):
        raise WeightsError(
            "has no .metadata; the save did not finish", where=path, fix="use an earlier iteration"
        )
    folder = latest_folder(path)
    if folder is None and (path / RELEASE).is_dir():
        folder = path / RELEASE
    if folder is None and parse_iteration(path.name) is None:
        iterations = saved_iterations(path)
        if len(iterations) > 1:
            raise WeightsError(
                f"has {len(iterations)} iterations and no tracker file",
                where=path,
                fix="choose one iter_ folder",
            )
        folder = path / f"iter_{iterations[0]:07d}" if iterations else None
    if folder is None:
        return None
    inner = _megatron(folder)
    if inner is None:
        raise WeightsError("is empty; the save or conversion did not finish", where=folder)
    note = (
        f"{path}: reading {folder.name}/, not the original weights next to it" if _has_weights(path) else ""
    )
    return Files(inner.kind, inner.paths, f"{inner.what} ({folder.name})", (*inner.config_dirs, path), note)


def _plain_folder(path: Path) -> Files | None:
    for name in (name for pair in EXPERTS for name in pair):
        if (path / name).is_symlink():
            # a dangling link is an error, not a reason to use other files
            stat_path(path / name, WeightsError)
    for pair in EXPERTS:
        if all((path / name).is_dir() for name in pair):
            raise WeightsError(
                "contains two models, the experts of A14B",
                where=path,
                fix=f"choose {path / pair[0]} or {path / pair[1]}",
            )
    if (path / "transformer").is_dir():
        inner = _plain_folder(path / "transformer")
        if inner is None:
            raise WeightsError(
                f"contains no weights; {_present(path / 'transformer')}", where=path / "transformer"
            )
        return Files(
            inner.kind, inner.paths, f"a diffusers folder, its transformer/ ({inner.what})", inner.config_dirs
        )
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise WeightsError(
            f"has {len(indices)} index files ({indices[0].name}, {indices[1].name}, …)",
            where=path,
            fix="choose one of them",
        )
    if indices:
        return _indexed(indices[0])
    for ending in ("safetensors", "pth", "pt", "bin", "gguf"):
        found = sorted(p for p in path.glob(f"*.{ending}") if not _NOT_THE_TRANSFORMER.search(p.name))
        if found:
            return _unindexed(path, found)
    return None


def _indexed(index: Path) -> Files:
    names = shard_names(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing and (index.parent / missing[0]).is_symlink():
        regular_file(index.parent / missing[0], WeightsError)  # its error names the link's target
    if missing:
        raise WeightsError(
            f"is missing {len(missing)} of {len(names)} shards ({missing[0]}{', …' if missing[1:] else ''})",
            where=index.parent,
            fix="download them too",
        )
    paths = tuple(index.parent / name for name in names)
    return Files("safetensors", paths, f"a folder of {len(paths)} safetensors shards", (index.parent,))


def shard_names(index: Path) -> list[str]:
    """Return the file names in an index.json, sorted. Raises WeightsError if it has no valid weight_map."""
    weight_map = read_json_object(index, WeightsError).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise WeightsError("is damaged: no weight_map with file names", where=index, fix="copy it again")
    return sorted(set(names))


def _unindexed(folder: Path, found: list[Path]) -> Files:
    matches = [SHARD.fullmatch(path.name) for path in found]
    first = matches[0]
    if first is not None and all(m is not None and (m[1], m[3]) == (first[1], first[3]) for m in matches):
        if len(found) != int(first[3]):
            raise WeightsError(
                f"has {len(found)} of {int(first[3])} shards", where=folder, fix="download the rest"
            )
        if first[4] == "safetensors":
            return Files(
                "safetensors", tuple(found), f"a folder of {len(found)} safetensors shards", (folder,)
            )
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise WeightsError(
            f"contains {len(found)} weight files and no index ({names})",
            where=folder,
            fix="choose one of them",
        )
    inner = _one_file(found[0])
    return Files(inner.kind, inner.paths, f"a folder with {found[0].name}", inner.config_dirs)


def _has_weights(path: Path) -> bool:
    return any(path.glob("*.safetensors")) or any(path.glob("diffusion_pytorch_model*"))


def _present(path: Path) -> str:
    for entry in sorted(path.iterdir()):
        stat_path(entry, WeightsError)  # its error names a dangling link
    names = sorted(entry.name for entry in path.iterdir())
    return f"found {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else "it is empty"
