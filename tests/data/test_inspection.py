"""What a folder or a table of images is taken to hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dicom_files import dataset, write
from fpt_lightning.data.inspection import Inspection, inspect_data
from fpt_lightning.errors import DataError, FPTError, ImageError
from miniatures import write_xlsx
from small import write_images

COUNT = 36
Row = Callable[[int], tuple[Any, ...]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """36 small images in one folder, which names no class."""
    return write_images(tmp_path / "data", {"all": COUNT}, size=(12, 16))


def with_table(root: Path, header: str, row: Row, name: str = "some.csv") -> Inspection:
    """A table of all images is written, and the folder looked at."""
    rows = [",".join(map(str, (f"all/{i:03d}.png", *row(i)))) for i in range(COUNT)]
    (root / name).write_text("\n".join([header, *rows]))
    return inspect_data(root)


@pytest.mark.parametrize(
    ("header", "row", "kind", "reading"),
    [
        (  # as HAM10000's
            "image_id,lesion_id,dx,dx_type,age,sex",
            lambda i: (
                f"HAM_{i // 2}",
                ("mel", "nv", "bkl")[i % 3],
                ("histo", "consensus")[i % 2],
                20 + i,
                "mf"[i % 2],
            ),
            "single-label",
            {"image_column": "image_id", "label_column": "dx", "group_column": "lesion_id", "case_column": "lesion_id"},
        ),
        (  # as NIH's
            "Image Index,Finding Labels,Patient ID,Patient Age",
            lambda i: (("Mass", "Mass|Nodule", "No Finding")[i % 3], i // 2, 50),
            "multi-label",
            {
                "image_column": "Image Index",
                "label_column": "Finding Labels",
                "label_separator": "|",
                "group_column": "Patient ID",
            },
        ),
        (  # as CheXpert's
            "Path,Sex,Edema,Effusion,AP/PA",
            lambda i: ("FM"[i % 2], i % 2, ("1", "0", "", "-1")[i // 2 % 4], "AP"),
            "multi-label",
            {"image_column": "Path", "label_column": ["Edema", "Effusion"]},
        ),
        (
            "file,benign,malignant,Subset",
            lambda i: (i % 2, 1 - i % 2, ("training", "valid", "test")[i % 3]),
            "single-label",
            {"image_column": "file", "label_column": ["benign", "malignant"], "split_column": "Subset"},
        ),
        ("scan,age", lambda i: (30 + i,), "regression", {"image_column": "scan", "label_column": "age"}),
        ("id,tumour", lambda i: (i % 2,), "single-label", {"image_column": "id", "label_column": "tumour"}),
    ],
    ids=[
        "one of several",
        "several in a field",
        "a column each",
        "one-hot",
        "a number",
        "a column without a known name",
    ],
)
def test_columns(root: Path, header: str, row: Row, kind: str, reading: dict[str, Any]) -> None:
    found = with_table(root, header, row)
    assert found.manifest.kind == kind
    assert found.reading == {"manifest": "some.csv", **reading}


@pytest.mark.parametrize(
    ("names", "column", "order"),
    [
        (("no DR", "PDR", "mild NPDR", "severe NPDR", "moderate NPDR"), "label", (0, 2, 4, 3, 1)),
        (("none", "high", "low"), "label", (0, 2, 1)),  # of which one stands for nothing elsewhere
        (("0", "1", "2"), "grade", (0, 1, 2)),
        (("10", "9", "8"), "KL grade", (2, 1, 0)),
        (("0", "2", "5"), "grade", None),
        (("normal", "pneumonia", "covid"), "label", None),
        (("normal", "severe"), "grade", None),  # two are as well told apart without an order
        (("mild fibrosis", "mild oedema", "normal"), "label", None),
    ],
)
def test_grades(root: Path, names: tuple[str, ...], column: str, order: tuple[int, ...] | None) -> None:
    found = with_table(root, f"image,{column}", lambda i: (names[i % len(names)],))
    assert found.grades == (order is not None)
    if order is not None:
        assert found.manifest.classes == tuple(names[i] for i in order)


@pytest.mark.parametrize(
    ("header", "row", "case"),
    [
        ("image,label,patient,eye", lambda i: ("ab"[i % 2], f"p{i // 4}", f"{i // 2}"), "eye"),
        ("image,label,patient,ExamID", lambda i: ("ab"[i % 2], f"p{i // 4}", f"e{i // 2}"), "ExamID"),
        ("image,label,patient,study", lambda i: ("ab"[i % 2], f"p{i // 4}", "" if i else "s"), None),  # one is named
        ("image,label,patient,eye", lambda i: ("ab"[i % 2], f"p{i // 4}", "LR"[i % 2]), None),  # of several patients
        ("image,label,patient,visit", lambda i: ("ab"[i % 2], f"p{i // 4}", i), None),  # nothing is together
        ("image,label,eye", lambda i: ("ab"[i % 2], "LR"[i % 2]), None),  # a side
        ("image,label,lesion_id", lambda i: ("ab"[i % 2], i // 3), "lesion_id"),
    ],
)
def test_cases(root: Path, header: str, row: Row, case: str | None) -> None:
    found = with_table(root, header, row)
    assert found.reading.get("case_column") == case
    assert found.labels == ("label",)


def test_a_spreadsheet(root: Path) -> None:
    rows = [["image", "label"], *([f"all/{i:03d}.png", "ab"[i % 2]] for i in range(COUNT))]
    write_xlsx(root / "mine.xlsx", rows)
    for path in (root, root / "mine.xlsx"):
        found = inspect_data(path)
        assert found.reading["manifest"] == "mine.xlsx"
        assert found.manifest.classes == ("a", "b")


def test_grades_of_folders_in_splits(tmp_path: Path) -> None:
    """Also where one split lacks a grade."""
    for seed, (split, names) in enumerate({"Testing": "013", "Training": "0123"}.items()):
        write_images(tmp_path / "severity" / split, dict.fromkeys(names, 8), size=(8, 8), seed=seed)
    found = inspect_data(tmp_path / "severity")
    assert found.reading == {"classes": ["0", "1", "2", "3"]}
    assert found.given


def test_numbers_that_may_be_grades_are_a_question(root: Path) -> None:
    found = with_table(root, "image,label", lambda i: (i % 4,))
    assert not found.grades
    assert "whether 0 to 3 are grades from low to high (model.task: ordinal)." in found.undecided


def test_what_people_have_to_decide(root: Path) -> None:
    (root / "notes.xlsx").touch()
    (root / "old.xls").touch()
    (root / "broken.csv").write_text("a,b\n1\n")
    (root / "extra").mkdir()
    (root / "extra" / "second.csv").write_text("image,label\n" + "".join(f"all/00{i}.png,{i % 2}\n" for i in range(8)))
    found = with_table(root, "image,label,original_class,edema", lambda i: ("ab"[i % 2], i % 3, i % 2))
    assert found.table == root / "some.csv"
    told = "\n".join(found.undecided)
    for words in (
        "columns that may be labels too: original_class, edema",
        "notes.xlsx is not read: ",
        "old.xls is not read: ",
        "broken.csv is not read: ",
        "second.csv may have them too",
        "which images are of one patient",
    ):
        assert words in told
    found = with_table(root, "image,a,b", lambda i: (i % 2, ("1", "0", "", "-1")[i % 4]))
    told = "\n".join(found.undecided)
    assert "9 labels are empty and ignored" in told
    assert "9 labels are -1 (uncertain)" in told


def test_images_that_the_table_does_not_name(root: Path) -> None:
    assert with_table(root, "image,label", lambda i: ("ab"[i % 2],)).unnamed == 0
    Image.new("RGB", (9, 9)).save(root / "more.png")
    assert inspect_data(root / "some.csv").unnamed == 1


def test_what_pictures_are_like(tmp_path: Path) -> None:
    """Grey of 16 bits with a dark border beside what cannot be read."""
    for i in range(12):
        pixels = np.zeros((40, 80), np.uint16)
        pixels[:, 20:60] = 3000 + i
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "data/a/broken.jpg").write_bytes(b"no image")
    pictures = inspect_data(tmp_path / "data").pictures
    assert pictures.suffixes == {".png": 12, ".jpg": 1}
    assert {(look.grey, look.bits) for look in pictures.looks} == {(True, 16)}
    assert (pictures.size, pictures.bright) == ((40, 80), (40, 40))
    assert (pictures.border, pictures.aspect, pictures.deep) == (0.5, 1, True)
    assert list(pictures.broken) == ["a/broken.jpg"]


@pytest.mark.parametrize(
    ("patients", "known"),
    [
        (lambda i: f"p{i // 2}", True),
        (lambda i: f"p{i}", False),  # nobody is twice
        (lambda i: "ANONYMOUS", False),
        (lambda i: "", False),
    ],
)
def test_patients_of_headers(tmp_path: Path, patients: Callable[[int], str], known: bool) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "scans" / "ab"[i // 6]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 4096, (20, 20)).astype(np.uint16)
        write(folder / f"{i}.dcm", dataset(pixels, bits=12, Modality="MG", PatientID=patients(i)))
    found = inspect_data(tmp_path / "scans")
    assert found.topic == "mammograms"
    assert found.pictures.of_header("Modality") == {"MG": 12}
    assert bool(found.patients) == known
    assert any("of one patient" in question for question in found.undecided) != known
    rows = [f"{'ab'[i // 6]}/{i}.dcm,{'xy'[i % 2]}" for i in range(12)]
    (tmp_path / "scans/labels.csv").write_text("\n".join(["image,label", *rows]))
    assert any("of one patient" in question for question in inspect_data(tmp_path / "scans").undecided)


@pytest.mark.parametrize(
    ("names", "topic"),
    [
        (("no_finding", "pneumonia"), "chest X-rays"),
        (("DR", "no DR"), "fundus photographs"),
        (("cats", "dogs"), ""),
    ],
)
def test_what_images_are_of(tmp_path: Path, names: tuple[str, ...], topic: str) -> None:
    write_images(tmp_path / "mine", dict.fromkeys(names, 10), size=(8, 8))
    assert inspect_data(tmp_path / "mine").topic == topic


def test_what_cannot_be_used(root: Path, tmp_path: Path) -> None:
    def refused(path: Path, words: str, kind: type[FPTError] = DataError) -> None:
        with pytest.raises(kind) as error:
            inspect_data(path)
        assert words in str(error.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "none", "there is no folder and no table")
    (tmp_path / "old.ods").touch()
    refused(tmp_path / "old.ods", "is a spreadsheet in another format than XLSX: save it as XLSX or CSV")
    refused(tmp_path / "empty", "there is no image below")
    refused(root, "the data set has one class only, 'all'")
    table = root / "table.csv"
    table.write_text("image,label\nother/1.png,a\n")
    refused(table, "no column of")
    table.write_text("image,note\n" + "".join(f"{i:03d}.png,note {i}\n" for i in range(COUNT)))
    refused(table, "looks like labels")
    for path in sorted(root.glob("all/*.png")):
        (root / "b").mkdir(exist_ok=True)
        path.write_bytes(b"no image" + path.name.encode())
        if path.stem > "017":
            path.rename(root / "b" / path.name)
    refused(root, "none of the 32 images that were opened can be read", ImageError)
