"""latents.safetensors with settings or tensors that no run wrote.

One line that names the key, and nothing is decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.data.packed import write_packed
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import format_json
from mindspeed_mm.generation.stored import read_latents, write_latents
from tests.support.errors import raises

SAMPLING = {"num_frames": 5, "height": 32, "width": 48, "fps": 16.0, "guidance_scale": 5.0}
SETTINGS: dict[str, Any] = {"name": "ball", "prompt": "a ball", "num_refs": 1, "sampling": SAMPLING}
LATENTS = torch.zeros(16, 3, 4, 6)


def test_stored_latents_read_back_with_all_their_keys(tmp_path: Path) -> None:
    path = write_latents(
        tmp_path, LATENTS, 1, {**SETTINGS, "inputs": {"video": "a.mp4"}, "seconds": {"load": 1}}
    )
    found = read_latents(path)
    assert (found.num_refs, found.settings.name, found.settings.seconds) == (1, "ball", {"load": 1})
    said = found.settings.model_dump(mode="json")
    assert said["inputs"] == {"video": "a.mp4"}
    assert said["sampling"]["fps"] == 16


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"sampling": None}, ["sampling"]),
        ({"sampling": [1]}, ["sampling"]),
        ({"sampling": {}}, ["num_frames", "fps"]),
        ({"sampling": {**SAMPLING, "fps": 0}}, ["fps"]),
        ({"sampling": {**SAMPLING, "fps": "x"}}, ["fps"]),
        ({"sampling": {**SAMPLING, "fps": True}}, ["fps"]),
        ({"sampling": {**SAMPLING, "height": 0}}, ["height"]),
        ({"sampling": {**SAMPLING, "guidance_scale": None}}, ["guidance_scale"]),
        ({"sampling": {**SAMPLING, "num_frames": 9}}, [9]),
        ({"sampling": {**SAMPLING, "width": 64}}, ["32x64"]),
        ({"prompt": 7}, ["prompt"]),
        ({"prompt": None}, ["prompt"]),
        ({"seconds": {"load": "x"}}, ["seconds"]),
        ({"seconds": [1]}, ["seconds"]),
        ({"notes": [1]}, ["notes"]),
        ({"device": 1}, ["device"]),
        ({"name": "a/b"}, ["name"]),
        ({"name": 1}, ["name"]),
        ({"num_refs": 2}, ["num_refs", 2]),
    ],
)  # fmt: skip
def test_stored_settings_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], facts: list[object]
) -> None:
    path = write_latents(tmp_path, LATENTS, 1, {**SETTINGS, **changes})
    with raises(WeightsError, *facts, where=path):
        read_latents(path)


@pytest.mark.parametrize("missing", ["prompt", "sampling"])
def test_stored_settings_without_a_key_name_it(tmp_path: Path, missing: str) -> None:
    kept = {key: value for key, value in SETTINGS.items() if key != missing}
    with raises(WeightsError, missing):
        read_latents(write_latents(tmp_path, LATENTS, 1, kept))


@pytest.mark.parametrize(
    ("latents", "fact"),
    [
        (LATENTS.int(), "I32"),
        (LATENTS.bool(), "BOOL"),
        (LATENTS.to(torch.float8_e4m3fn), "F8_E4M3"),
        (LATENTS.to(torch.complex64), "C64"),
        (LATENTS[:8], 8),
        (LATENTS[:, :2], 2),
        (LATENTS[0], 3),
    ],
)
def test_stored_tensors_of_another_kind_are_rejected(
    tmp_path: Path, latents: torch.Tensor, fact: object
) -> None:
    path = tmp_path / "latents.safetensors"
    write_packed(path, {"latents": latents}, {"num_refs": "1", "settings": format_json(SETTINGS)})
    with raises(WeightsError, fact, where=path):
        read_latents(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"settings": format_json(SETTINGS)},
        {"num_refs": "1"},
        {"num_refs": "-1", "settings": format_json(SETTINGS)},
        {"num_refs": "1", "settings": "[]"},
        {"num_refs": "1", "settings": "{"},
        {"num_refs": "1", "settings": "[" * 100_000},
    ],
)
def test_stored_metadata_of_no_run_is_rejected(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "latents.safetensors"
    write_packed(path, {"latents": LATENTS}, metadata)
    with raises(WeightsError, where=path):
        read_latents(path)
