"""Text files and tables: read with their damage named, written whole or not at all, aligned for people."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fpt_lightning.errors import DataError


def read_rows(path: Path, kind: str) -> list[dict[str, str]]:
    """The rows of a CSV file, by column; the first of them is line 2.

    Args:
        path: of the file, in UTF-8.
        kind: what it is called in errors, such as ``manifest``.

    Raises:
        DataError: no such file, no CSV, no row, a column twice, or a row with more or fewer fields than the header.
    """
    if not path.is_file():
        raise DataError(f"the {kind} {path} does not exist.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names, rows = list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the {kind} {path} is not a CSV file in UTF-8: {error}.") from error
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"the {kind} {path} has the column {twice[0]!r} more than once.")
    if not rows:
        raise DataError(f"the {kind} {path} holds no row below its header.")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():  # more fields, or fewer
            raise DataError(f"{path}, line {number}: the number of fields differs from the header's.")
    return rows


def write_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, its header first."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 under a partial name, which becomes its own once all is there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of columns, the first on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
