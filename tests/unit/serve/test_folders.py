"""What a client reads of errors that name files of the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.serve.folders import translate_error


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("/srv/models/wan/model.safetensors: is cut", "model.safetensors: is cut"),
        ("got '/srv/models/wan/vae.pth' twice", "got 'vae.pth' twice"),
        ("see /v1/videos/abc", "see /v1/videos/abc"),
        ("fps 30000/1001, frames 1/2", "fps 30000/1001, frames 1/2"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_folders_of_the_server_are_not_disclosed(tmp_path: Path, ours: str, theirs: str) -> None:
    error = translate_error(WeightsError(ours, where=ours, expected=ours, fix=ours), tmp_path)
    assert {error.problem, error.where, error.expected, error.fix} == {theirs}


def test_input_is_named_by_its_slot(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    path = tmp_path / "inputs" / "src_video_0.mp4"
    path.touch()
    assert translate_error(WeightsError("is cut", where=str(path)), tmp_path).where == "src_video"
