"""ONNX plug-ins run on tiny networks built by hand.

What goes in, what comes out, and the sha256 of the file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspeed_mm.conditioning.annotate.networks import Networks
from mindspeed_mm.errors import ConfigError
from tests.support.errors import raises

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
RED = np.zeros((48, 64, 3), np.uint8)
RED[12:36, 16:48, 0] = 255


def save(
    path: Path, nodes: list[Any], shape: list[Any], outputs: list[str], constants: dict[str, Any]
) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))


def save_red(path: Path, shape: list[Any]) -> None:
    """The red channel as the answer."""
    take = onnx.helper.make_node("Gather", ["image", "first"], ["red"], axis=1)
    save(path, [take], shape, ["red"], {"first": np.array([0], np.int64)})


def test_depth_is_what_the_network_answers(tmp_path: Path) -> None:
    save_red(tmp_path / "depth.onnx", [1, 3, "height", "width"])
    networks = Networks(tmp_path)
    found = networks.open("depth")(RED)
    assert found.shape == (48, 64)
    assert found[24, 32] == pytest.approx((1 - 0.485) / 0.229, abs=0.01)
    assert found[2, 2] == pytest.approx(-0.485 / 0.229, abs=0.01)
    digest = hashlib.sha256((tmp_path / "depth.onnx").read_bytes()).hexdigest()
    assert networks.used == {"depth.onnx": digest}


def test_the_salient_subject_is_white(tmp_path: Path) -> None:
    save_red(tmp_path / "salient.onnx", [1, 3, 64, 64])
    mask = Networks(tmp_path).open("salient")(RED)
    expected = RED[..., 0] > 0
    assert set(np.unique(mask)) == {0, 255}
    assert ((mask > 0) != expected).mean() < 0.02


def test_the_largest_likely_face_is_taken(tmp_path: Path) -> None:
    scores = np.array([[[0.1, 0.9], [0.1, 0.9], [0.8, 0.2]]], np.float32)
    boxes = np.array([[[0, 0, 0.1, 0.1], [0.25, 0.25, 0.75, 0.5], [0, 0, 1, 1]]], np.float32)
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("scores", "boxes")]
    shape, outputs = [1, 3, 240, 320], ["scores_out", "boxes_out"]
    save(tmp_path / "face.onnx", nodes, shape, outputs, {"scores": scores, "boxes": boxes})
    assert Networks(tmp_path).open("face")(RED) == pytest.approx((16, 12, 48, 24))


def test_a_damaged_network_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "depth.onnx").write_bytes(b"no network at all")
    with raises(ConfigError, "depth.onnx", where=None):
        Networks(tmp_path).open("depth")


def constants(path: Path, shape: list[Any], **values: np.ndarray) -> None:
    """A network whose answers are always `values`."""
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}_out"]) for name in values]
    save(path, nodes, shape, [f"{name}_out" for name in values], values)


def save_pose(folder: Path) -> None:
    """One person in the middle of a 64 x 48 frame, its points on a line from the box's top to its bottom."""
    found = np.full((1, 84, 85), -9, np.float32)
    found[..., 4:] = 0
    found[0, 80, :6] = (1, 0.75, 0, 0, 1, 1)  # the first cell of stride 32: centre (32, 24), 32 wide and high
    constants(folder / "pose_det.onnx", [1, 3, 64, 64], found=found)
    x, y = np.zeros((1, 133, 72), np.float32), np.zeros((1, 133, 96), np.float32)
    for point in range(133):
        x[0, point, 36] = y[0, point, 12 + point % 72] = 1
    x[0, 100:] = 0  # points that the network does not see
    constants(folder / "pose.onnx", [1, 3, 48, 36], x=x, y=y)


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


def test_the_best_segment_of_a_box_is_taken(tmp_path: Path) -> None:
    save_red(tmp_path / "segment_encoder.onnx", [1, 3, 64, 64])
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Neg", ["red"], ["other"]),
        helper.make_node("Concat", ["other", "red"], ["masks"], axis=1),
        helper.make_node("ReduceMax", ["point_coords"], ["corner"], keepdims=0),
        helper.make_node("Mul", ["corner", "order"], ["scores"]),  # the second, whatever the box
    ]
    inputs = [
        helper.make_tensor_value_info("red", kind, [1, 1, 64, 64]),
        helper.make_tensor_value_info("point_coords", kind, [1, 2, 2]),
    ]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in ("masks", "scores")]
    order = onnx.numpy_helper.from_array(np.array([[0, 1]], np.float32), "order")
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, [order])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(tmp_path / "segment_decoder.onnx"))
    networks = Networks(tmp_path)
    mask = networks.open("segment")(RED, (16, 12, 48, 36))
    assert ((mask > 0) != (RED[..., 0] > 0)).mean() < 0.02
    assert set(networks.used) == {"segment_encoder.onnx", "segment_decoder.onnx"}
