"""ONNX plug-ins run on tiny networks built by hand.

What goes in, what comes out, and the sha256 of the file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mindspeed_mm.conditioning.annotate.networks import Networks
from mindspeed_mm.errors import ConfigError
from tests.support.errors import raises

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from tests.support.networks import save_face, save_pose, save_red, save_segment

RED = np.zeros((48, 64, 3), np.uint8)
RED[12:36, 16:48, 0] = 255


def test_depth_matches_the_network_output(tmp_path: Path) -> None:
    save_red(tmp_path / "depth.onnx", [1, 3, "height", "width"])
    networks = Networks(tmp_path)
    found = networks.open("depth")(RED)
    assert found.shape == (48, 64)
    assert found[24, 32] == pytest.approx((1 - 0.485) / 0.229, abs=0.01)
    assert found[2, 2] == pytest.approx(-0.485 / 0.229, abs=0.01)
    digest = hashlib.sha256((tmp_path / "depth.onnx").read_bytes()).hexdigest()
    assert networks.used == {"depth.onnx": digest}


def test_salient_subject_is_white(tmp_path: Path) -> None:
    save_red(tmp_path / "salient.onnx", [1, 3, 64, 64])
    mask = Networks(tmp_path).open("salient")(RED)
    expected = RED[..., 0] > 0
    assert set(np.unique(mask)) == {0, 255}
    assert ((mask > 0) != expected).mean() < 0.02


def test_largest_likely_face_is_taken(tmp_path: Path) -> None:
    save_face(tmp_path)
    assert Networks(tmp_path).open("face")(RED) == pytest.approx((16, 12, 48, 24))


def test_damaged_network_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "depth.onnx").write_bytes(b"no network at all")
    with raises(ConfigError, "depth.onnx", where=None):
        Networks(tmp_path).open("depth")


def test_poses_are_drawn_where_the_networks_see_them(tmp_path: Path) -> None:
    save_pose(tmp_path)
    pose = Networks(tmp_path).open("pose")
    (box,) = pose.people(RED)
    assert box == pytest.approx((16, 8, 48, 40))
    points = pose.points(RED, box)
    assert points.shape == (133, 3)
    assert points[:100, 0] == pytest.approx(32, abs=0.01)
    # the box grows by 1.25, and to the 3 : 4 of the network: 53.3 pixels high around row 24
    assert points[0, 1] == pytest.approx(24 - 53.33 * (0.5 - 12 / 96), abs=0.1)
    assert points[99, 2] == 1
    assert points[120, 2] == 0
    body, face = pose(RED, "body"), pose(RED, "body_face")
    assert body.any()
    assert (face == 255).all(axis=-1).sum() > (body == 255).all(axis=-1).sum()


def test_best_segment_of_a_box_is_taken(tmp_path: Path) -> None:
    save_segment(tmp_path)
    networks = Networks(tmp_path)
    mask = networks.open("segment")(RED, (16, 12, 48, 36))
    assert ((mask > 0) != (RED[..., 0] > 0)).mean() < 0.02
    assert set(networks.used) == {"segment_encoder.onnx", "segment_decoder.onnx"}
