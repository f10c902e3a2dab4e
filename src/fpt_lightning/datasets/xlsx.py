"""Reading the first sheet of a spreadsheet; one sheet of texts and numbers is not worth a dependency."""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from fpt_lightning.errors import DataError

_LARGEST = 2**26  # bytes of one unpacked part, against archives that unpack without end


def read_sheet(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Columns of the first sheet, by the names in its first row; rows that are empty in all of them are dropped.

    Raises:
        DataError: not an XLSX file, or without such columns.
    """
    try:
        rows = _rows(path)
    except Exception as error:  # a damaged archive fails in many ways
        raise DataError(f"the spreadsheet {path} cannot be read as XLSX: {type(error).__name__}: {error}.") from error
    names = {name: column for column, name in rows[0].items()} if rows else {}
    missing = [column for column in columns if column not in names]
    if missing:
        raise DataError(f"the spreadsheet {path} has no column {', '.join(missing)}, but {', '.join(names) or 'none'}.")
    fields = [[row.get(names[column], "") for column in columns] for row in rows[1:]]
    return [row for row in fields if any(row)]


def _rows(path: Path) -> list[dict[str, str]]:
    """The cells of each row, by the letters of their column."""
    with zipfile.ZipFile(path) as archive:
        sheet = _part(archive, "xl/workbook.xml").findall(".//{*}sheet")[0]
        relation = next(value for name, value in sheet.items() if name.endswith("}id"))
        relations = _part(archive, "xl/_rels/workbook.xml.rels")
        target = next(str(item.get("Target")) for item in relations if item.get("Id") == relation)
        shared = []
        if "xl/sharedStrings.xml" in archive.namelist():
            shared = [_text(item) for item in _part(archive, "xl/sharedStrings.xml")]
        rows = _part(archive, posixpath.join("/xl", target).removeprefix("/")).findall(".//{*}row")
        return [{_column(cell): _value(cell, shared) for cell in row.findall("{*}c")} for row in rows]


def _part(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    with archive.open(name) as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST or b"<!DOCTYPE" in content.replace(b"\0", b""):  # its entities may unpack without end
        raise ValueError(f"{name} is larger than {_LARGEST} bytes, or has a DOCTYPE")
    return ElementTree.fromstring(content)


def _column(cell: ElementTree.Element) -> str:
    return re.sub(r"\d", "", cell.attrib["r"])


def _value(cell: ElementTree.Element, shared: Sequence[str]) -> str:
    value = cell.findtext("{*}v", "")
    if cell.get("t") == "inlineStr":
        value = _text(cell)
    return (shared[int(value)] if cell.get("t") == "s" else value).strip()


def _text(element: ElementTree.Element) -> str:
    return "".join(part.text or "" for part in element.findall(".//{*}t"))
