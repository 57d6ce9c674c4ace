"""Parses a pickle into plain values. Names and calls are recorded; nothing is called or imported."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
}
DTYPES = {
    name: dtype
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
    if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
_NAMES = {
    **dict.fromkeys([METADATA], _CLASSES),
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *DTYPES},
    "builtins": {"getattr"},  # early releases of Python 3.11 pickle an enum member as a call of getattr
}
_PATHS = {"PosixPath", "PurePosixPath", "Path", "WindowsPath", "PureWindowsPath"}


class Name(NamedTuple):
    """A class or function that the pickle refers to. It is never imported."""

    module: str
    name: str


@dataclass(eq=False)
class Call:
    """An object that the pickle would create: its class, arguments and state. It is never created."""

    name: Name
    args: tuple[Any, ...]
    state: Any = None


class Problem(ValueError):
    """The reason why an index cannot be used."""


_Base: Any = pickle._Unpickler  # the pure Python version, whose opcode handlers can be replaced


class Parser(_Base):  # type: ignore[misc]
    """An unpickler that only builds tuples, lists, dicts, strings, integers, `Name` and `Call`."""

    def find_class(self, module: str, name: str) -> Name:
        known = name in _NAMES.get(module, ()) or (module.partition(".")[0] == "pathlib" and name in _PATHS)
        if not known:
            raise Problem(f"it names {module}.{name}, which no checkpoint index needs")
        return Name(module, name)

    def call(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise Problem("it calls something that is not a name")
        self.append(Call(name, args))

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, Call) or made.state is not None:
            raise Problem("it changes something that it did not make")
        made.state = state

    _KEPT = (
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "GLOBAL", "STACK_GLOBAL"),
        *("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"),
        *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS"),
        *(
            "EMPTY_DICT",
            "SETITEM",
            "SETITEMS",
            "MEMOIZE",
            "BINPUT",
            "LONG_BINPUT",
            "BINGET",
            "LONG_BINGET",
            "POP",
        ),
    )
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{getattr(pickle, name)[0]: _Base.dispatch[getattr(pickle, name)[0]] for name in _KEPT},
        **dict.fromkeys((pickle.REDUCE[0], pickle.NEWOBJ[0]), call),
        pickle.BUILD[0]: build,
    }
