"""Reads CSV datasets: tables of DiffSynth-Studio or VideoX-Fun, or tables with the keys of a data.json.

Does not import torch.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_mm.data.foreign import COLUMNS
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import LIST_BYTES, parse_json, read_text

SUFFIXES = (".csv", ".tsv")


def read_csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table with the keys of a data.json. Raises DataError.

    Empty cells are omitted. A cell of src_ref_images is one path or a JSON list of paths. Columns may be
    separated by commas, semicolons or tabs.
    """
    for number, cells in _read_table(path):
        row: dict[str, Any] = {}
        for column, cell in cells.items():
            key = COLUMNS.get(column, column)
            if not cell.strip():
                continue
            if key in row:
                raise DataError(
                    f"columns {column!r} and {key!r} have the same meaning",
                    where=f"{path}:{number}",
                    fix="keep one",
                )
            is_list = key == "src_ref_images" and cell.lstrip().startswith("[")
            row[key] = parse_json(cell, f"{path}:{number}:{column}", DataError) if is_list else cell
        yield row


def reject_table(text: str, path: Path) -> None:
    """Raise DataError if the text is a CSV table, for a file without the suffix of a table."""
    header = re.split("[\r\n]", text[:10_000].strip(), maxsplit=1)[0]
    cells = next(csv.reader([header], delimiter=_delimiter(header)), [])
    columns = [cell.strip() for cell in cells]
    clips = {"video", "file_path"}
    if clips & {*columns} and ({*COLUMNS, *COLUMNS.values()} - clips) & {*columns}:
        raise DataError(
            f"contains CSV (columns {', '.join(columns)[:80]})",
            where=path,
            fix=f"rename it to {path.stem}.csv",
        )


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, column → cell) for each row below the header that is not empty."""
    text = read_text(path, DataError, max_bytes=LIST_BYTES)
    header = text.partition("\n")[0]
    delimiter = _delimiter(header)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [column.strip() for column in next(reader, [])]
        for column in columns:
            if columns.count(column) > 1:
                raise DataError(f"column {column!r} occurs twice", where=f"{path}:1", fix="keep one")
        for cells in reader:
            if len(cells) > len(columns):
                raise DataError(
                    f"got {len(cells)}",
                    where=f"{path}:{reader.line_num}",
                    expected=f"{len(columns)} cells",
                    fix=f"put text that contains {delimiter!r} in double quotes",
                )
            if any(cell.strip() for cell in cells):
                yield reader.line_num, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise DataError(f"not valid CSV: {error}", where=f"{path}:{reader.line_num}") from None
