"""Tiny ONNX networks in the place of the real annotators, built by hand. Needs the package onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx


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


def save_face(folder: Path) -> None:
    """The largest likely face is a box in the middle."""
    scores = np.array([[[0.1, 0.9], [0.1, 0.9], [0.8, 0.2]]], np.float32)
    boxes = np.array([[[0, 0, 0.1, 0.1], [0.25, 0.25, 0.75, 0.5], [0, 0, 1, 1]]], np.float32)
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("scores", "boxes")]
    shape, outputs = [1, 3, 240, 320], ["scores_out", "boxes_out"]
    save(folder / "face.onnx", nodes, shape, outputs, {"scores": scores, "boxes": boxes})


def save_segment(folder: Path) -> None:
    """What is red, whatever the box."""
    save_red(folder / "segment_encoder.onnx", [1, 3, 64, 64])
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
    onnx.save(model, str(folder / "segment_decoder.onnx"))


def write_networks(folder: Path) -> Path:
    """One of each kind. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_red(folder / "depth.onnx", [1, 3, "height", "width"])
    save_red(folder / "salient.onnx", [1, 3, 64, 64])
    save_face(folder)
    save_pose(folder)
    save_segment(folder)
    return folder
