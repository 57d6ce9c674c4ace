"""Reads the header of a safetensors file."""

from __future__ import annotations

import os
from typing import Any

from mindspeed_mm.files import (
    ErrorType,
    PathLike,
    display_path,
    json_type,
    parse_json,
    path_problem,
    regular_file,
)

HEADER_BYTES = 100_000_000  # maximum size, as in the reference reader


def read_safetensors_header(path: PathLike, error: ErrorType) -> tuple[dict[str, Any], int, int]:
    """Return the JSON header of a safetensors file, the offset of its values, and the file size.

    Reads no values. Raises `error`.
    """
    where = display_path(regular_file(path, error))
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_BYTES, size - 8):
                raise error(
                    f"is damaged or not a safetensors file: {size} bytes",
                    where=where,
                    fix="copy the file again",
                )
            text = file.read(length)
    except OSError as problem:
        raise error(path_problem(path, problem), where=where) from None
    try:
        header = parse_json(text.decode(), "header", error, lone_surrogates=True)
    except (UnicodeDecodeError, error) as problem:
        raise error(
            f"is damaged or not a safetensors file: {str(problem)[:100]}",
            where=where,
            fix="copy the file again",
        ) from None
    if not isinstance(header, dict):
        raise error(
            f"is damaged: its header is {json_type(header)}, not an object",
            where=where,
            fix="copy the file again",
        )
    return header, 8 + length, size
