"""latents.safetensors: denoised latents and the settings that made them.

Everything read from the file is validated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.packed import read_header, read_packed, write_packed
from mindspeed_mm.errors import ConfigError, DataError, WeightsError
from mindspeed_mm.files import format_json, json_type, parse_json
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.windows_config import LATENTS_FILE
from mindspeed_mm.geometry import WAN
from mindspeed_mm.outputs import explain_disk, name_problem

FILE_NAME = LATENTS_FILE
_DTYPES = ("F32", "BF16", "F16")
_EXPECTED = "a latents.safetensors of an earlier run"
_REQUIRED = {"height", "width", "num_frames", "fps"}  # required keys of `sampling`; the others have defaults


class LatentsSettings(Config):
    """The settings stored with latents that decoding needs. Other keys are kept unchanged."""

    model_config = ConfigDict(extra="allow")

    name: str
    prompt: str
    sampling: SamplingConfig
    num_refs: int = Field(ge=0)
    notes: tuple[str, ...] = ()
    device: str = ""
    seconds: dict[str, Annotated[float, Field(ge=0, le=1e9)]] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        if problem := name_problem(value, ".json"):
            raise ValueError(problem)
        return value

    @field_validator("sampling", mode="before")
    @classmethod
    def _is_complete(cls, values: Any) -> Any:
        missing = sorted(_REQUIRED - values.keys()) if isinstance(values, dict) else None
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        return values

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the latents, [16, R+F, h, w]."""
        return latent_shape(self.sampling, self.num_refs)


def latent_shape(sampling: SamplingConfig, num_refs: int) -> tuple[int, int, int, int]:
    """Return the shape of a video's latents, [16, R+F, h, w]."""
    return WAN.channels, *WAN.grid(sampling.num_frames, sampling.height, sampling.width, num_refs)


class StoredLatents(NamedTuple):
    """The contents of a latents.safetensors."""

    latents: Tensor  # [16, R+F, h, w] floats, references first
    num_refs: int
    settings: LatentsSettings


def write_latents(folder: Path, latents: Tensor, num_refs: int, settings: dict[str, Any]) -> Path:
    """Write latents [16, R+F, h, w] as fp32 to `folder`/latents.safetensors, with the settings.

    Returns the path.
    """
    path = folder / FILE_NAME
    metadata = {"num_refs": str(num_refs), "settings": format_json(settings)}
    with explain_disk(path):
        write_packed(path, {"latents": latents.float()}, metadata)
    return path


def read_latents(path: Path, *, verify: bool = True) -> StoredLatents:
    """Read the latents.safetensors of an earlier run.

    Raises WeightsError if the file, settings and tensor do not match.
    """
    try:
        header = read_header(path, verify=verify)
        settings = _read_settings(path, header.get("__metadata__", {}))
        _check_tensor(path, header.get("latents"), settings)
        latents = read_packed(path, ("latents",), verify=verify)["latents"]
    except RecursionError:
        raise WeightsError("its settings are nested too deeply", where=path) from None
    except (DataError, ConfigError) as error:
        address = "" if error.where in ("", str(path)) else f"{error.where}: "
        problem = address + " ".join(error.problem.removeprefix(f"{path}: ").split())
        raise WeightsError(problem, where=path, expected=error.expected, fix=error.fix) from None
    return StoredLatents(latents, settings.num_refs, settings)


def _read_settings(path: Path, metadata: dict[str, str]) -> LatentsSettings:
    missing = [key for key in ("num_refs", "settings") if not isinstance(metadata.get(key), str)]
    if missing:
        raise DataError(f"has no {' or '.join(missing)} in its metadata", expected=_EXPECTED)
    values = parse_json(metadata["settings"], "settings", DataError)
    if not isinstance(values, dict):
        raise DataError(f"its settings are {json_type(values)}", expected=_EXPECTED)
    refs = metadata["num_refs"]
    if not (refs.isascii() and refs.isdigit() and len(refs) < 10) or values.get("num_refs", int(refs)) != int(
        refs
    ):
        raise DataError(
            f"num_refs is {refs!r:.20} in its metadata and {values.get('num_refs')!r:.20} in its settings",
            expected="one number in both",
        )
    name = path.resolve().parent.name
    return parse(LatentsSettings, {"name": name, "num_refs": int(refs), **values}, "settings")


def _check_tensor(path: Path, entry: Any, settings: LatentsSettings) -> None:
    if not isinstance(entry, dict):
        raise DataError("contains no tensor latents", expected=_EXPECTED)
    if entry.get("dtype") not in _DTYPES:
        raise DataError(f"latents are {entry.get('dtype')}", expected=f"one of {', '.join(_DTYPES)}")
    if list(entry["shape"]) != list(settings.shape):
        sampling = settings.sampling
        raise DataError(
            f"latents have shape {entry['shape']}, but {sampling.num_frames} frames of {sampling.height}x"
            f"{sampling.width} with {settings.num_refs} references have {list(settings.shape)}",
            fix="generate the video again",
        )
