"""Spreadsheets in place of CSV files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from fpt_lightning.data.sources import read_manifest
from fpt_lightning.data.xlsx import read_columns, read_sheet
from fpt_lightning.errors import DataError
from miniatures import LINKS, SHEET, write_xlsx
from small import write_images


def test_a_sheet_of_texts_numbers_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "sheet.xlsx"
    write_xlsx(path, [["id", "a & b", "last"], [1, "<x>", "y"], [2], ["", ""], [3.5, "z"]])
    assert read_columns(path, ("a & b", "id")) == [["<x>", "1"], ["", "2"], ["z", "3.5"]]
    assert [row.line for row in read_sheet(path, "manifest").rows] == [2, 3, 5]
    with pytest.raises(DataError, match="has no column none, but id, a & b, last"):
        read_columns(path, ("id", "none"))


def write_cells(path: Path, rows: str, shared: str = "", sheets: tuple[str, ...] = ("Data",)) -> None:
    """A spreadsheet of raw rows; of several sheets all are the same."""
    listed = "".join(f'<sheet name="{name}" sheetId="{i}" r:id="r1"/>' for i, name in enumerate(sheets, 1))
    with zipfile.ZipFile(path, "w") as archive:
        more = f' xmlns:r="{LINKS}"'
        archive.writestr("xl/workbook.xml", SHEET.format(tag="workbook", more=more, body=f"<sheets>{listed}</sheets>"))
        archive.writestr(
            "xl/_rels/workbook.xml.rels", '<Relationships><Relationship Id="r1" Target="/xl/one.xml"/></Relationships>'
        )
        archive.writestr("xl/one.xml", SHEET.format(tag="worksheet", more="", body=f"<sheetData>{rows}</sheetData>"))
        archive.writestr("xl/sharedStrings.xml", SHEET.format(tag="sst", more="", body=shared))


def test_what_writers_of_spreadsheets_do(tmp_path: Path) -> None:
    """Places left out, columns past Z, truths, errors, formulas with their values, runs and how texts are read out."""
    rows = (
        "<row/>"
        '<row><c t="s"><v>0</v></c><c t="inlineStr"><is><t>ill</t></is></c><c t="str"><v>age</v></c>'
        '<c r="AB2" t="inlineStr"><is><t>far</t></is></c></row>'
        '<row r="7"><c t="inlineStr"><is><r><t>1</t></r><r><t>.png</t></r><rPh><t>one</t></rPh></is></c>'
        '<c t="b"><v>1</v></c><c t="e"><v>#N/A</v></c><c r="AB7"><f>1+1</f><v>2</v></c></row>'
    )
    write_cells(tmp_path / "a.xlsx", rows, "<si><t>image</t><rPh><t>imeji</t></rPh></si>", ("Data", "Key"))
    sheet = read_sheet(tmp_path / "a.xlsx", "manifest")
    assert sheet.rows == [{"image": "1.png", "ill": "TRUE", "age": "#N/A", "far": "2"}]
    assert [row.line for row in sheet.rows] == [7]
    assert sheet.others == ["Key"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_spreadsheet_with_entities_or_none_at_all_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "sheet.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        bomb = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE w [<!ENTITY a "b">]><w>&a;</w>'
        archive.writestr("xl/workbook.xml", bomb.encode(encoding))
        archive.writestr("xl/_rels/workbook.xml.rels", "<Relationships/>")
    with pytest.raises(DataError, match=r"sheet.xlsx cannot be read as XLSX: .*has a DOCTYPE"):
        read_sheet(path, "manifest")
    path.write_bytes(b"ID1,LeftRight")
    with pytest.raises(DataError, match=r"the manifest .*sheet.xlsx cannot be read as XLSX: BadZipFile"):
        read_sheet(path, "manifest")
    with pytest.raises(DataError, match=r"the manifest .*none.xlsx does not exist"):
        read_sheet(tmp_path / "none.xlsx", "manifest")
    with pytest.raises(DataError, match=r"old.xls is a spreadsheet in another format than XLSX: save it as XLSX or"):
        read_sheet(tmp_path / "old.xls", "manifest")
    write_cells(path, "<row/>")
    with pytest.raises(DataError, match="holds no row below its header"):
        read_sheet(path, "manifest")


def test_a_manifest_is_a_spreadsheet(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"all": 20}, size=(8, 8))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    rows = [["image", "label", "group"], *([name, "ab"[i % 2], i // 2] for i, name in enumerate(names))]
    write_xlsx(root / "labels.xlsx", rows)
    (root / "labels.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    one, other = (read_manifest(root, f"labels.{suffix}") for suffix in ("csv", "xlsx"))
    assert one.samples == other.samples
    rows[3][1] = ""
    write_xlsx(root / "labels.xlsx", rows)
    with pytest.raises(DataError, match=r"labels.xlsx, line 4 \(nothing\): the label .* is empty"):
        read_manifest(root, "labels.xlsx")
