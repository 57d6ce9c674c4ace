"""The `ANNOTATORS` registry of annotators that run networks from local ONNX files.

Other packages can register annotators through an entry point.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import display_path, regular_file
from mindspeed_mm.registry import Registry, resolve


@dataclass(frozen=True)
class Annotator:
    """A kind of annotator: its files, where to download them, and the code that runs them."""

    files: tuple[str, ...]  # file names in the annotators folder
    get: str  # which file to download, and from where
    entry: str  # "module:function"; takes the opened networks and returns a callable


@dataclass
class Networks:
    """The annotators folder. Opens each annotator once and records the sha256 of every file used."""

    folder: Path
    used: dict[str, str] = field(default_factory=dict)
    _opened: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def open(self, kind: str) -> Callable[..., Any]:
        """Open the annotator of a kind. Raises ConfigError with the path of a file that is missing."""
        if kind not in self._opened:
            annotator = ANNOTATORS.get(kind)
            paths = [self.folder / name for name in annotator.files]
            for path in paths:
                if not path.exists():
                    raise ConfigError(
                        "no such file",
                        where=display_path(path),
                        fix=(
                            f"download {annotator.get}; save it under this name, or name its folder with "
                            "--annotators"
                        ),
                    )
                regular_file(path, ConfigError)
            self.used.update({path.name: _digest(path) for path in paths})
            self._opened[kind] = resolve(annotator.entry)(*map(Network, paths))
        return self._opened[kind]


class Network:
    """An ONNX network that takes and returns arrays."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError(
                "onnxruntime is not installed", where=display_path(path), fix="pip install onnxruntime"
            ) from None
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        settings.intra_op_num_threads = (
            0 if "CPUExecutionProvider" not in onnxruntime.get_available_providers() else 1
        )
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), settings, providers=onnxruntime.get_available_providers()
            )
        except Exception as error:  # onnxruntime has an exception class for each error code
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"cannot be opened as an ONNX network: {reason}",
                where=display_path(path),
                fix="download it again",
            ) from None
        self.path = path
        self.inputs: Mapping[str, tuple[Any, ...]] = {
            item.name: tuple(item.shape) for item in self._session.get_inputs()
        }
        self.outputs: tuple[str, ...] = tuple(item.name for item in self._session.get_outputs())

    def run(self, values: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the network and return its outputs. Raises ConfigError if it does not accept these inputs."""
        try:
            found: list[NDArray[Any]] = self._session.run(None, dict(values))
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"does not take these inputs: {reason}",
                where=display_path(self.path),
                fix="download the network that this annotator expects",
            ) from None
        return found

    def __call__(self, value: NDArray[Any]) -> list[NDArray[Any]]:
        """Run a network that has a single input, and return its outputs."""
        return self.run({next(iter(self.inputs)): value})

    def side(self, axis: int, default: int) -> int:
        """Return the size of an axis of the first input, or `default` if the axis is dynamic."""
        found = next(iter(self.inputs.values()))[axis]
        return found if isinstance(found, int) else default


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


ANNOTATORS: Registry[Annotator] = Registry("annotator", "mindspeed_mm.annotators")
_HERE = "mindspeed_mm.conditioning.annotate"
ANNOTATORS.add(
    "depth",
    Annotator(
        ("depth.onnx",),
        "an ONNX export of Depth-Anything-V2 (image [1, 3, H, W] to disparity [1, H, W])",
        f"{_HERE}.dense:Depth",
    ),
)
ANNOTATORS.add(
    "salient",
    Annotator(("salient.onnx",), "u2net.onnx of the rembg project (320 x 320)", f"{_HERE}.dense:Salient"),
)
ANNOTATORS.add(
    "face",
    Annotator(
        ("face.onnx",),
        "version-RFB-320.onnx of Ultra-Light-Fast-Generic-Face-Detector",
        f"{_HERE}.detect:Face",
    ),
)
ANNOTATORS.add(
    "pose",
    Annotator(
        ("pose_det.onnx", "pose.onnx"),
        "yolox_l.onnx and dw-ll_ucoco_384.onnx of the DWPose project",
        f"{_HERE}.detect:Pose",
    ),
)
ANNOTATORS.add(
    "segment",
    Annotator(
        ("segment_encoder.onnx", "segment_decoder.onnx"),
        "an ONNX export of SAM 2 (image encoder, and decoder with points)",
        f"{_HERE}.dense:Segment",
    ),
)
