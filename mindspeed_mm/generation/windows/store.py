"""Stores the latents of finished windows on disk, so that a stopped run resumes with the next one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mindspeed_mm.errors import DataError, MindSpeedMMError
from mindspeed_mm.files import format_json
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.generation.stored import latent_shape, read_latents, write_latents
from mindspeed_mm.generation.windows_config import window_latents
from mindspeed_mm.log import get_logger, on_every_rank
from mindspeed_mm.models.finite import count_nonfinite

LOGGER = get_logger(__name__)
_KEY = "window_key"


class WindowStore:
    """The files `FOLDER/window_00/latents.safetensors` …, each with a key of everything it depends on."""

    def __init__(self, folder: Path, made_by: str) -> None:
        """`made_by` identifies everything else that determines the latents, such as the weights."""
        self.folder, self.made_by = folder, made_by

    def path(self, index: int) -> Path:
        """Return the file of a window. `from_latents` can also read it."""
        return window_latents(self.folder, index)

    def key(self, request: GenerationRequest, pixels: Sequence[Tensor | None]) -> str:
        """Return a hash of `made_by`, the request of a window and its input pixels."""
        digest = hashlib.sha256(self.made_by.encode())
        digest.update(format_json({**request.to_json(), "name": ""}).encode())
        for tensor in pixels:
            digest.update(b"-" if tensor is None else repr(tuple(tensor.shape)).encode())
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def read(self, index: int, key: str, request: GenerationRequest, num_refs: int) -> Tensor | None:
        """Return the stored fp32 latents [16, R+F, h, w] of a window if their key matches, else None.

        Logs a warning if the file is damaged or does not fit the window.
        """
        path = self.path(index)
        if not path.is_file():
            return None
        try:
            latents, found_refs, settings = read_latents(path)
            if (settings.model_extra or {}).get(_KEY) != key:
                return None
            _check_window(latents, found_refs, latent_shape(request.sampling, num_refs), num_refs)
        except MindSpeedMMError as error:
            named = error if error.where else error.at(path)
            LOGGER.warning("%s; generating the window again", named, extra=on_every_rank())
            return None
        LOGGER.info("  window %d: taken from %s", index + 1, path, extra=on_every_rank())
        return latents

    def write(self, index: int, key: str, request: GenerationRequest, latents: Tensor, num_refs: int) -> None:
        """Store the latents of a window. Raises DataError if they cannot be written."""
        settings: dict[str, Any] = {
            "name": f"{self.folder.name}_window_{index:02d}",
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "sampling": request.sampling.model_dump(mode="json"),
            _KEY: key,
        }
        write_latents(self.path(index).parent, latents, num_refs, settings)


def _check_window(latents: Tensor, found_refs: int, shape: tuple[int, ...], num_refs: int) -> None:
    """Raise DataError for latents that do not fit the window or are not finite."""
    found = f"{str(latents.dtype).removeprefix('torch.')} {list(latents.shape)} with {found_refs} references"
    expected = f"float32 {list(shape)} with {num_refs} references"
    if found != expected:
        raise DataError(f"got latents of {found}", expected=expected)
    if bad := count_nonfinite(latents):
        raise DataError(f"{bad} of {latents.numel()} latents are NaN or Inf", expected="finite numbers")


def identity(paths: Sequence[str | Path], settings: dict[str, Any]) -> str:
    """Return a string that identifies weights by file names, sizes and times, and `settings`."""

    files: list[tuple[str, int, int]] = []
    for path in map(Path, paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                state = file.stat()
                files.append((str(file.absolute()), state.st_size, state.st_mtime_ns))
    return format_json({"files": files, **settings})
