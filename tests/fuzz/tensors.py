"""Weights and features.

Headers that lie, values that are no numbers, names and shapes of another model, pickles with code.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.places import remove, replace
from tests.fuzz.structure import NONSENSE, ODD

Tensors = dict[str, torch.Tensor]


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(path: Path, header: str, body: bytes, length: int | None = None) -> None:
    text = header.encode("utf-8")
    replace(path, struct.pack("<Q", len(text) if length is None else length) + text + body)


def header_length(rng: Random, path: Path) -> None:
    header, body = _header(path)
    _write(
        path,
        json.dumps(header),
        body,
        rng.choice([0, 1, 2, 1 << 20, 1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1]),
    )


def header_value(rng: Random, path: Path) -> None:
    """dtype, shape or offsets of one tensor, or the whole entry, replaced."""
    header, body = _header(path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    key = rng.choice(["dtype", "shape", "data_offsets"])
    raw = rng.choice(
        [*NONSENSE.values(), *ODD.values(), "[0, 0]", "[9, 1]", "[-1, 4]", "[1.5]", '"I32"', '"F8_E4M3"']
    )
    entry[key] = "\x00hole\x00"
    _write(path, json.dumps(header).replace(json.dumps("\x00hole\x00"), raw), body)


def header_document(rng: Random, path: Path) -> None:
    _, body = _header(path)
    _write(
        path,
        rng.choice(["null", "[]", "{}", "3", '{"a": null}', '{"a": []}', "[" * 9000, '{"__metadata__": 3}']),
        body,
    )


def header_metadata(rng: Random, path: Path) -> None:
    """The metadata: strings in safetensors, anything here."""
    header, body = _header(path)
    known = header.get("__metadata__") or {"format": "pt"}
    header["__metadata__"] = {**known, rng.choice(list(known)): "\x00hole\x00"}
    raw = rng.choice([*NONSENSE.values(), *ODD.values()])
    _write(path, json.dumps(header).replace(json.dumps("\x00hole\x00"), raw), body)


def double_tensor(rng: Random, path: Path) -> None:
    """One tensor's name twice."""
    header, body = _header(path)
    names = [name for name in header if name != "__metadata__"]
    first, second = rng.sample(names, 2)
    _write(path, json.dumps(header).replace(json.dumps(first) + ":", json.dumps(second) + ":", 1), body)


def _edited(rng: Random, path: Path, edit: Callable[[Tensors, str], None]) -> None:
    """One tensor edited, the file written again with matching checksums."""
    if path.suffix == ".safetensors":
        header, _ = _header(path)
        tensors = load_file(path)
        edit(tensors, rng.choice(sorted(tensors)))
        remove(path)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, header.get("__metadata__")
        )
        return
    values = torch.load(path, weights_only=True)
    tensors = values.get("model", values)
    edit(tensors, rng.choice(sorted(name for name in tensors if isinstance(tensors[name], torch.Tensor))))
    remove(path)
    torch.save(values, path)


def not_finite(rng: Random, path: Path) -> None:
    def edit(tensors: Tensors, name: str) -> None:
        flat = tensors[name].clone().flatten()
        if flat.is_floating_point():
            flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), -float("inf")])
        tensors[name] = flat.reshape(tensors[name].shape)

    _edited(rng, path, edit)


def other_dtype(rng: Random, path: Path) -> None:
    def edit(tensors: Tensors, name: str) -> None:
        kinds = [torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.int16]
        tensors[name] = tensors[name].to(rng.choice([kind for kind in kinds if kind != tensors[name].dtype]))

    _edited(rng, path, edit)


def other_shape(rng: Random, path: Path) -> None:
    def edit(tensors: Tensors, name: str) -> None:
        tensor = tensors[name]
        changes = [tensor.flatten()[:-1], tensor[None], tensor[:0], tensor.sum(), torch.cat([tensor, tensor])]
        tensors[name] = rng.choice(changes).clone()

    _edited(rng, path, edit)


def other_name(rng: Random, path: Path) -> None:
    def edit(tensors: Tensors, name: str) -> None:
        tensors[rng.choice([name + "x", "", "a.b.c", name.upper(), "\u2028", "module." + name])] = (
            tensors.pop(name)
        )

    _edited(rng, path, edit)


def tensor_gone(rng: Random, path: Path) -> None:
    def edit(tensors: Tensors, name: str) -> None:
        del tensors[name]

    _edited(rng, path, edit)


SAFETENSORS = (header_length, header_value, header_document, double_tensor)
VALUES = (not_finite, other_dtype, other_shape, other_name, tensor_gone)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("pwned", "w")


def _records(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as source:
        return [(name, source.read(name)) for name in source.namelist()]


def _zipped(path: Path, records: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as target:
        for name, data in records:
            target.writestr(name, data)
    replace(path, stream.getvalue())


def pickle_code(rng: Random, path: Path) -> None:
    """A pickle that opens a file when it is read; the runner looks for that file."""
    body = pickle.dumps({"a": _Code(), "model": _Code()})
    if zipfile.is_zipfile(path) and rng.random() < 0.5:
        _zipped(path, [(name, body if name.endswith("data.pkl") else data) for name, data in _records(path)])
    else:
        replace(path, body)


def pickle_ops(rng: Random, path: Path) -> None:
    """Bytes of the pickle changed, its checksum set right."""

    def changed(body: bytes) -> bytes:
        data = bytearray(body)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b"cRbo.(}]tu0NIJKMXV"])
        return bytes(data)

    if zipfile.is_zipfile(path):
        _zipped(
            path,
            [(name, changed(data) if name.endswith("data.pkl") else data) for name, data in _records(path)],
        )
    else:
        replace(path, changed(path.read_bytes()))


def pickle_document(rng: Random, path: Path) -> None:
    """A sound file with something else in it."""
    values: Any = rng.choice(
        [
            None,
            [],
            {},
            3,
            "text",
            {("model"): None},
            {"model": {}},
            {"model": [1]},
            {1: torch.ones(2)},
            {"a": {"b": torch.ones(2)}},
            [torch.ones(2)],
            torch.ones(2),
            {"a": "b"},
        ]
    )
    remove(path)
    torch.save(values, path, _use_new_zipfile_serialization=rng.random() < 0.8)


def record_gone(rng: Random, path: Path) -> None:
    records = _records(path)
    records.pop(rng.randrange(len(records)))
    _zipped(path, records)


def record_short(rng: Random, path: Path) -> None:
    records = _records(path)
    place = rng.randrange(len(records))
    name, data = records[place]
    records[place] = (name, data[: len(data) // 2])
    _zipped(path, records)


def zip_bomb(rng: Random, path: Path) -> None:
    """A record of a few hundred kilobytes that grows to gigabytes."""
    records = [(name, data) for name, data in _records(path) if not name.endswith("data.pkl")]
    name = next(name for name, _ in _records(path) if name.endswith("data.pkl"))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        with target.open(name, "w", force_zip64=True) as record:
            for _ in range(20):
                record.write(bytes(64 << 20))
        for other, data in records[:4]:
            target.writestr(other, data)
    replace(path, stream.getvalue())


def legacy(rng: Random, path: Path) -> None:
    """The same values in torch's form from before 1.6."""
    values = torch.load(path, weights_only=True)
    remove(path)
    torch.save(values, path, _use_new_zipfile_serialization=False)


TORCH_FILE = (pickle_code, pickle_ops, pickle_document, record_gone, record_short, zip_bomb, legacy)
PICKLE = (pickle_code, pickle_ops)
