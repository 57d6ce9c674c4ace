"""The work of an extraction's reading processes: hash a row's files, and decode rows without a feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_mm.data.conditions import PixelSample
from mindspeed_mm.data.content import (
    Signature,
    digest_of_values,
    signed_content,
)
from mindspeed_mm.data.features import SCHEMA_VERSION, FeatureInfo, read_info
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.data.traits import content_in_slot
from mindspeed_mm.errors import DataError
from mindspeed_mm.processes import reading

_SYNTHESIS = 1  # version; incremented when a task produces different pixels from the same options
Contents = dict[Path, tuple[Signature, str]]  # file → its signature and hash


@dataclass(frozen=True, kw_only=True)
class FeatureKeys:
    """The parts of a feature's key other than its captions and the contents of its files."""

    pixels: Mapping[str, Any]  # settings of the dataset
    vae: Mapping[str, Any]  # fingerprint, dtype, tiling
    text: Mapping[str, Any]  # fingerprint, dtype, tokens

    def key(self, record: SampleRecord, digests: Mapping[Path, str]) -> str:
        """Return the name of the row's feature. Rows share a name only if their features are equal."""
        return digest_of_values(
            {**self._seen(record, digests), "captions": record.captions, "text": self.text}
        )

    def latents_key(self, record: SampleRecord, digests: Mapping[Path, str]) -> str:
        """Return the key of rows with bit-identical latents and vace_context, whatever their captions."""
        return digest_of_values(self._seen(record, digests))

    def prompts_key(self, record: SampleRecord) -> str:
        """Return the key of rows with bit-identical prompt embeddings, whatever their clips."""
        return digest_of_values({"schema": SCHEMA_VERSION, "captions": record.captions, "text": self.text})

    def _seen(self, record: SampleRecord, digests: Mapping[Path, str]) -> dict[str, Any]:
        """Return all values that determine the latents."""
        drawn = record.synthesis
        return {
            **({} if drawn is None else {"synthesis": [_SYNTHESIS, drawn.task, drawn.options]}),
            "schema": SCHEMA_VERSION,
            "files": [[slot, content_in_slot(slot, digests[path])] for slot, path in record.files],
            "pixels": {
                name: value for name, value in self.pixels.items() if name != "soft_mask" or record.src_mask
            },
            "vae": self.vae,
        }


@dataclass(frozen=True)
class ReadTask:
    """A row to read, with the cached hashes of its files."""

    record: SampleRecord
    known: Mapping[Path, str]
    is_known: bool = False  # the hashes of all files are cached
    redo: bool = False  # the feature on disk is damaged


@dataclass(frozen=True)
class ReadResult:
    """A row that was read. `pixels` is None if its feature exists."""

    key: str
    latents_key: str
    contents: Contents
    pixels: PixelSample | None


@dataclass(frozen=True)
class ReadRow:
    """The function that the reading processes run. Picklable."""

    load: Callable[[SampleRecord], PixelSample]
    keys: FeatureKeys
    features: Path

    def __call__(self, task: ReadTask) -> ReadResult:
        """Hash the files with no cached hash, and decode the row if it has no feature. Raises DataError."""
        contents: Contents = {}
        digests = dict(task.known)
        for _, path in task.record.files:
            if path not in digests:
                with reading(path):
                    contents[path] = signed_content(path)
                digests[path] = contents[path][1]
        key = self.keys.key(task.record, digests)
        done = not task.redo and stored_info(self.features / f"{key}.safetensors") is not None
        latents_key = self.keys.latents_key(task.record, digests)
        with reading(task.record.video):
            return ReadResult(key, latents_key, contents, None if done else self.load(task.record))


def stored_info(path: Path) -> FeatureInfo | None:
    """Return the header of a feature if it is complete on disk, else None."""
    try:
        return read_info(path)
    except DataError:
        return None
