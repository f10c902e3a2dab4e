"""Reading the first sheet of a spreadsheet; texts and numbers of one sheet are not worth a dependency."""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from fpt_lightning.errors import DataError
from fpt_lightning.files import Row, named_rows, read_bytes

SHEETS = (".xlsx", ".xls", ".ods")
"""Suffixes of spreadsheets, of which the first is read."""

_LARGEST = 2**26  # bytes of one unpacked part, against archives that unpack without end


class Sheet(NamedTuple):
    """The first sheet of a file.

    Attributes:
        rows: without those that are empty; numbers as Excel keeps them, TRUE and FALSE, dates in days since 1900.
        others: names of the other sheets, which are not read.
    """

    rows: list[Row]
    others: list[str]


def read_sheet(path: Path, kind: str) -> Sheet:
    """The rows of the first sheet, whose columns are named by its first row.

    Args:
        path: of the XLSX file.
        kind: what it is called in errors, such as ``manifest``.

    Raises:
        DataError: no such file, another format, no row, or a column twice.
    """
    if path.suffix.lower() != SHEETS[0]:
        raise DataError(f"the {kind} {path} is a spreadsheet in another format than XLSX: save it as XLSX or CSV.")
    read_bytes(path, kind)  # or its refusal
    try:
        with zipfile.ZipFile(path) as archive:
            (_, target), *others = _sheets(archive)
            cells = _cells(archive, target)
    except Exception as error:  # a damaged archive fails in many ways
        raise DataError(f"the {kind} {path} cannot be read as XLSX: {type(error).__name__}: {error}.") from error
    filled = [(line, row) for line, row in cells if any(row.values())]
    width = 1 + max((max(row) for _, row in filled), default=-1)
    lines = [([row.get(column, "") for column in range(width)], line) for line, row in filled]
    return Sheet(named_rows(lines[0][0] if lines else [], lines[1:], path, kind), [name for name, _ in others])


def read_columns(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Columns of the first sheet; rows that are empty in all of them are dropped.

    Raises:
        DataError: as ``read_sheet``, or a column that is not there.
    """
    rows = read_sheet(path, "spreadsheet").rows
    if missing := [column for column in columns if column not in rows[0]]:
        raise DataError(f"the spreadsheet {path} has no column {', '.join(missing)}, but {', '.join(rows[0])}.")
    fields = [[row[column] for column in columns] for row in rows]
    return [row for row in fields if any(row)]


def _sheets(archive: zipfile.ZipFile) -> list[tuple[str, str]]:
    """Name and part of each sheet."""
    relations = {item.get("Id"): item.get("Target", "") for item in _part(archive, "xl/_rels/workbook.xml.rels")}
    found = []
    for sheet in _part(archive, "xl/workbook.xml").findall(".//{*}sheet"):
        relation = next(value for name, value in sheet.items() if name.endswith("}id"))
        found.append((sheet.get("name", ""), posixpath.join("/xl", relations[relation]).removeprefix("/")))
    return found


def _cells(archive: zipfile.ZipFile, part: str) -> list[tuple[int, dict[int, str]]]:
    """The cells of each row by their columns from 0, with the row's number; writers may leave out both."""
    shared = []
    if "xl/sharedStrings.xml" in archive.namelist():
        shared = [_text(item) for item in _part(archive, "xl/sharedStrings.xml")]
    found, line = list[tuple[int, dict[int, str]]](), 0
    for row in _part(archive, part).findall(".//{*}row"):
        line, column, values = int(row.get("r", line + 1)), -1, dict[int, str]()
        for cell in row.findall("{*}c"):
            column = _column(cell.get("r", ""), column + 1)
            values[column] = _value(cell, shared)
        found.append((line, values))
    return found


def _part(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    with archive.open(name) as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST or b"<!DOCTYPE" in content.replace(b"\0", b""):  # its entities may unpack without end
        raise ValueError(f"{name} is larger than {_LARGEST} bytes, or has a DOCTYPE (save it as CSV)")
    return ElementTree.fromstring(content)


def _column(place: str, following: int) -> int:
    """The column from 0 of a place such as AB12."""
    letters = re.sub(r"[^A-Z]", "", place)
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1 if letters else following


def _value(cell: ElementTree.Element, shared: Sequence[str]) -> str:
    value, kind = cell.findtext("{*}v", ""), cell.get("t")
    if kind == "inlineStr":
        return "".join(_text(part) for part in cell.findall("{*}is")).strip()
    if kind == "b":
        return "TRUE" if value == "1" else "FALSE"
    return (shared[int(value)] if kind == "s" else value).strip()


def _text(element: ElementTree.Element) -> str:
    """Of a string, whole or in runs; how it is read out (phonetic runs) is no part of it."""
    return "".join(part.text or "" for part in [*element.findall("{*}t"), *element.findall("{*}r/{*}t")])
