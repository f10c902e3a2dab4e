"""Tables as people have them, each form with what it must be read as, and what is refused by name."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fpt_lightning.data.manifest import Manifest
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.data.tables import fields_of
from fpt_lightning.errors import DataError

PARTS = ("train", "val", "test")
ROWS = [(f"{i}.png", "ab"[i // 3], PARTS[i % 3]) for i in range(6)]
HEADER = ("image", "label", "split")


def write(root: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER, **options: Any) -> str:
    """A table, and empty files for its images where they have names of files."""
    encoding = options.pop("encoding", "utf-8")
    for name in {row[0] for row in rows if row[0].endswith(".png") and not row[0].startswith("/")}:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    with (root / "table.csv").open("w", newline="", encoding=encoding) as file:
        csv.writer(file, **options).writerows([header, *rows])
    return "table.csv"


def read(root: Path, table: str = "table.csv", **options: Any) -> Manifest:
    return read_manifest(root, table, **options)


def refused(root: Path, *words: str, **options: Any) -> None:
    with pytest.raises(DataError) as error:
        read(root, **options)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def labels(manifest: Manifest) -> dict[str, str]:
    return {sample.id: manifest.classes[sample.label] for sample in manifest.samples}


EXPECTED = {name: label for name, label, _ in ROWS}


# Encodings and separators


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_encodings_and_separators(encoding: str, separator: str, tmp_path: Path) -> None:
    rows = [(name, label.replace("b", "b\u00e9nin"), split) for name, label, split in ROWS]
    write(tmp_path, rows, encoding=encoding, delimiter=separator)
    manifest = read(tmp_path)
    assert labels(manifest) == {name: label for name, label, _ in rows}
    said = " ".join(manifest.notes)
    assert ("Windows-1252" in said) == (encoding == "cp1252")
    assert ("semicolons" in said, "tabs" in said) == (separator == ";", separator == "\t")


def test_a_comma_in_a_name_of_a_semicolon_table(tmp_path: Path) -> None:
    write(tmp_path, [(*row, "1,5") for row in ROWS], (*HEADER, "size, cm"), delimiter=";")
    assert labels(read(tmp_path)) == EXPECTED


def test_a_separator_that_cannot_be_told(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("image,label;image;split\n1,2;3;4\n")
    refused(tmp_path, "table.csv", "commas and semicolons")


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(bytes(range(0x80, 0x100)))
    refused(tmp_path, "no text in UTF-8, UTF-16 or Windows-1252")


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, [("0", *row, "9") for row in ROWS], ("", *HEADER, ""))
    for name, *_ in ROWS:
        (tmp_path / name).touch()
    assert labels(read(tmp_path)) == EXPECTED


# Names of images


def test_names_without_suffixes_and_folders(tmp_path: Path) -> None:
    """Found where one file is called so, and said."""
    for name, *_ in ROWS:
        (tmp_path / "deep" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "deep" / name).touch()
    for given in (lambda name: name, lambda name: name[:-4], lambda name: f"deep/{name[:-4]}"):
        rows = [(given(name), *rest) for name, *rest in ROWS]
        with (tmp_path / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *rows])
        manifest = read(tmp_path)
        assert labels(manifest) == {f"deep/{name}": label for name, label in EXPECTED.items()}
        assert manifest.notes == (f"6 images are found by their names: {rows[0][0]} is deep/0.png, for one.",)


def test_a_name_of_several_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [("5", "a", "test"), *ROWS[:5]])
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "5.png").touch()
    refused(tmp_path, "1 images may each be one of several files, such as 5: x/5.png, y/5.png")


def test_another_folder_is_not_searched(tmp_path: Path) -> None:
    """What is named with its folder is there, or nowhere."""
    write(tmp_path, ROWS)
    (tmp_path / "y").mkdir()
    (tmp_path / "y/gone.png").touch()
    with (tmp_path / "table.csv").open("a", newline="") as file:
        csv.writer(file).writerow(("x/gone.png", "a", "train"))
    refused(tmp_path, "1 of 7 images", "do not exist below", "x/gone.png")


def test_absolute_paths_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    write(root, ROWS)
    write(root, [(str(root / name), *rest) for name, *rest in ROWS])
    assert labels(read(root)) == EXPECTED
    (tmp_path / "link").symlink_to(root)
    assert labels(read(tmp_path / "link")) == EXPECTED  # written before the folder was linked
    write(root, [("/elsewhere/1.png", *ROWS[0][1:]), *ROWS])
    refused(root, "line 2", "'/elsewhere/1.png'", f"not a path below the data root {root}")


# Labels


@pytest.mark.parametrize("missing", ["", "nan", "NA", "N/A", "None", "null"])
def test_missing_labels_are_named_by_their_lines(missing: str, tmp_path: Path) -> None:
    rows = [(name, missing if i in (1, 4) else label, split) for i, (name, label, split) in enumerate(ROWS)]
    write(tmp_path, rows)
    refused(tmp_path, f"line 3 ({missing or 'nothing'}), 6 ({missing or 'nothing'})", "'label'", "data.classes")
    if missing:
        assert read(tmp_path, classes=["a", missing, "b"]).classes == ("a", missing, "b")
    several = [(*row, "1", "0") for row in ROWS[:-1]] + [(*ROWS[-1], missing, "0")]
    write(tmp_path, several, (*HEADER, "x", "y"))
    manifest = read(tmp_path, label_column=["x", "y"], kind="multi-label")
    assert math.isnan(manifest.samples[-1].targets[0])


def test_true_and_false(tmp_path: Path) -> None:
    values = [("True", "FALSE"), ("false", "true"), ("1", "0"), ("0.0", "1.0"), ("-1", ""), ("TRUE", "1")]
    write(tmp_path, [(*row, *value) for row, value in zip(ROWS, values, strict=True)], (*HEADER, "x", "y"))
    manifest = read(
        tmp_path, label_column=["x", "y"], kind="multi-label", missing_labels="zeros", uncertain_labels="ones"
    )
    found = [sample.targets for sample in manifest.samples]
    assert found[:4] == [(1, 0), (0, 1), (1, 0), (0, 1)]
    assert math.isnan(found[4][0])  # uncertain, in validation
    assert found[4][1] == 0
    assert found[5] == (1, 1)


def test_columns_of_which_one_is_true(tmp_path: Path) -> None:
    """ISIC's tables: ``MEL,NV,BCC`` of 1.0 and 0.0."""
    names = ["NV", "MEL"]
    values = {"a": ("1.0", "0.0"), "b": ("0.0", "1.0")}
    write(tmp_path, [(name, split, *values[label]) for name, label, split in ROWS], ("image", "split", *names))
    manifest = read(tmp_path, label_column=names)
    assert manifest.classes == ("NV", "MEL")  # in the order of the columns
    assert labels(manifest) == {name: {"a": "NV", "b": "MEL"}[label] for name, label in EXPECTED.items()}
    wrong = [("0", "0"), ("1", "1"), *[("1", "0")] * 4]
    rows = [(name, split, *value) for (name, _, split), value in zip(ROWS, wrong, strict=True)]
    write(tmp_path, rows, ("image", "split", *names))
    refused(tmp_path, "not one of NV, MEL is true in each row", "line 2, 3", "'multilabel'", label_column=names)


FINDINGS = ["Mass|Nodule", "No Finding", "Nodule", "", "Mass", "no finding"]


def test_several_labels_in_one_field(tmp_path: Path) -> None:
    """NIH ChestX-ray14: ``Mass|Nodule``, and ``No Finding`` for none."""
    write(tmp_path, [(name, found, split) for (name, _, split), found in zip(ROWS, FINDINGS, strict=True)])
    options: dict[str, Any] = {"label_separator": "|", "kind": "multi-label"}
    manifest = read(tmp_path, **options)
    assert manifest.classes == ("Mass", "Nodule")
    assert [s.targets for s in manifest.samples] == [(1, 1), (0, 0), (0, 1), (0, 0), (1, 0), (0, 0)]
    assert read(tmp_path, classes=["Nodule", "Edema", "Mass"], **options).samples[0].targets == (1, 0, 1)
    refused(tmp_path, "data.classes is ['Mass']", "['Mass', 'Nodule']", classes=["Mass"], **options)
    refused(tmp_path, "data.label_separator is '|'", "'multilabel'", label_separator="|")


def test_several_labels_are_not_taken_for_a_class(tmp_path: Path) -> None:
    write(tmp_path, [(name, found or "Mass", split) for (name, _, split), found in zip(ROWS, FINDINGS, strict=True)])
    refused(tmp_path, "1 classes have a |", "Mass|Nodule", "data.label_separator '|'")
    write(tmp_path, ROWS)
    refused(tmp_path, "1 classes have a |", "x|y", classes=["a", "b", "c", "x|y"])


def test_a_row_for_each_finding(tmp_path: Path) -> None:
    """VinDr and RSNA list each finding in a row of its own."""
    rows = [
        (name, finding, split)
        for (name, _, split), found in zip(ROWS, FINDINGS, strict=True)
        for finding in found.split("|")
    ]
    write(tmp_path, rows)
    manifest = read(tmp_path, label_separator="|", kind="multi-label")
    assert [s.targets for s in manifest.samples] == [(1, 1), (0, 0), (0, 1), (0, 0), (1, 0), (0, 0)]
    assert "1 images have several rows, which are merged: 0.png." in manifest.notes
    refused(tmp_path, "1 images more than once", "0.png")  # of a single label


def test_rows_that_contradict_each_other(tmp_path: Path) -> None:
    header, options = (*HEADER, "x", "y"), {"label_column": ["x", "y"], "kind": "multi-label"}
    rows = [(*row, "1", "0") for row in ROWS]
    write(tmp_path, [*rows, (*ROWS[0], "1", ""), (*ROWS[1], "", "0")], header)
    manifest = read(tmp_path, **options)
    assert [s.targets for s in manifest.samples] == [(1, 0)] * 6
    write(tmp_path, [*rows, (*ROWS[0], "0", "0")], header)
    refused(tmp_path, "the image 0.png contradict each other", **options)
    write(tmp_path, [*rows, ("0.png", "a", "test", "1", "0")], header)
    refused(tmp_path, "the image 0.png have several splits", **options)
    write(tmp_path, [(*row, "1") for row in [*ROWS, ROWS[0]]], (*HEADER, "x"))
    refused(tmp_path, "1 images more than once", label_column="x", kind="regression")


# Lists of splits


def test_lists_of_the_images_of_each_split(tmp_path: Path) -> None:
    """NIH's train_val_list.txt and test_list.txt, whose names are without folders; validation is drawn by patient."""
    rows = [(f"images_{i % 3}/{i:03d}.png", "ab"[i % 2], f"p{i // 4}") for i in range(100)]
    write(tmp_path, rows, ("image", "label", "patient"))
    (tmp_path / "train.txt").write_text("".join(f"{i:03d}.png\n" for i in range(80)))
    (tmp_path / "test.txt").write_text("".join(f"{i:03d}.png\n" for i in range(80, 100)) + "not_here.png\n\n")
    lists = {"train": "train.txt", "test": "test.txt"}
    manifest = read(tmp_path, split_lists=lists, group_column="patient")
    assert {int(Path(s.id).stem) for s in manifest.split("test")} == set(range(80, 100))
    assert len(manifest.split("val")) == pytest.approx(10, abs=3)
    (tmp_path / "test.txt").write_text("".join(f"{i:03d}.png\n" for i in range(79, 99)))
    refused(tmp_path, "079.png is in the lists of train and of test", split_lists=lists)
    (tmp_path / "test.txt").write_text("080.png\n")
    refused(tmp_path, "19 images are in none of the lists", split_lists=lists)
    refused(tmp_path, "'holdout'", "not train, val or test", split_lists={"holdout": "test.txt"})
    refused(tmp_path, "list of images", "gone.txt does not exist", split_lists={"train": "gone.txt"})


# What a table says of images that are listed elsewhere


def test_fields_of_images_by_the_names_that_a_table_gives_them(tmp_path: Path) -> None:
    path, header = tmp_path / "table.csv", ("file", "sex", "age")
    ids = ("a/1.png", "a/2.png", "b/3.png", "b/4.png", "5.png")
    names = ("2", "a\\1.png", "/data/of/others/b/3.png", "b/4", "./5.png", "a/5.png", "/data/of/others/6.png")
    write(tmp_path, [(name, "FM"[i % 2], f" {i} ") for i, name in enumerate(names)], header, delimiter=";")
    assert fields_of(path, "file", ids, ["age", "sex"]) == {"age": ["1", "0", "2", "3", "4"], "sex": [*"MFFMF"]}

    write(tmp_path, [("1.png", "F", "3"), ("1.png", "F", "4"), ("2.png", "M", "5")], header)
    assert fields_of(path, "file", ("2.png", "1.png"), ["sex"]) == {"sex": ["M", "F"]}
    for ids, column, message in (
        (("1.png",), "age", r"line 3: the image has several values of 'age': 3, 4"),
        (("a/2.png", "b/2.png"), "sex", r"table\.csv: 2\.png may each be one of several images"),
        (("1.png", "9.png"), "sex", r"1 of 2 images are not in the column 'file' of the manifest .*table\.csv: 9\.png"),
        (("1.png",), "site", r"no column 'site'; it has file, sex, age"),
    ):
        with pytest.raises(DataError, match=message):
            fields_of(path, "file", ids, [column])
