"""Messidor-2: fundus photographs of both eyes, with adjudicated grades of diabetic retinopathy (Krause et al. 2018).

Images and pairs come from ADCIS (four parts, to be joined before unpacking), the grades from Kaggle::

    IMAGES/20051020_43808_0100_PP.png, IMAGES/IM000012.JPG
    messidor-2.csv          left;right                     one examination a row, its two images
    messidor_data.csv       image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable

The grades' ``IM002385.jpg`` is the file ``IM002385.JPG``. Four images have no grade, being ungradable, and are left
out: 1,744 stay. There is no official split. The group is the examination, a row of ``messidor-2.csv``; the numbers in
file names differ between the eyes of one examination. Whether a patient was examined twice is not published.

A copy on Kaggle has preprocessed images and other columns, and lacks the pairs::

    preprocess/20051020_43808_0100_PP.png
    messidor_data.csv       id_code,diagnosis,adjudicated_dme,adjudicated_gradable

Sources: https://www.adcis.net/en/third-party/messidor2/ and
https://www.kaggle.com/datasets/google-brain/messidor2-dr-grades; the copy is
https://www.kaggle.com/datasets/mariaherrerot/messidor2preprocess; names and columns as public readers of them have
them, such as https://github.com/rajpurkarlab/BenchMD; the wording of the licence is not verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fpt_lightning.datasets.pieces import Pieces, Wanted
from fpt_lightning.datasets.recipe import DR_GRADES, Found, Layout, Recipe, label_of, read_table

URL = "https://www.adcis.net/en/third-party/messidor2/"
GRADES_URL = "https://www.kaggle.com/datasets/google-brain/messidor2-dr-grades"
COPY_URL = "https://www.kaggle.com/datasets/mariaherrerot/messidor2preprocess"
_GRADES = {"": -1, **{f"{grade}{end}": grade for grade in range(len(DR_GRADES)) for end in ("", ".0")}}


def _read(found: Found, pieces: Pieces) -> None:
    pairs = read_table(pieces["messidor-2.csv"], ("left", "right"))
    examinations = {image.lower(): left for left, right in pairs for image in (left, right)}
    for path, grade in _graded(found, pieces["IMAGES/"], pieces["messidor_data.csv"]):
        if path.name.lower() not in examinations:
            found.leave_out(path, "no row in messidor-2.csv, so of an unknown examination")
        else:
            found.add(path, grade, group=examinations[path.name.lower()])


def _read_copy(found: Found, pieces: Pieces) -> None:
    for path, grade in _graded(found, pieces["preprocess/"], pieces["messidor_data.csv"]):
        found.add(path, grade)


def _graded(found: Found, folder: Path, table: Path) -> Iterator[tuple[Path, int]]:
    """The images with a grade; others are left out."""
    rows = read_table(table, ("image_id|id_code", "adjudicated_dr_grade|diagnosis"))
    grades = [(image, label_of(grade, _GRADES, table, image)) for image, grade in rows]
    for path, grade in found.join(folder, grades, table):
        if grade < 0:
            found.leave_out(path, "ungradable (no adjudicated grade)")
        else:
            yield path, grade


RECIPE = Recipe(
    name="messidor2",
    title="Messidor-2",
    classes=DR_GRADES,
    images=1_748,
    modality="fundus photograph",
    licence="images not to be passed on; grades CC0",
    url=URL,
    source="https://github.com/rajpurkarlab/BenchMD",
    layouts=(
        Layout(Wanted({"IMAGES/": URL, "messidor-2.csv": URL, "messidor_data.csv": GRADES_URL}, apart=True), _read),
        Layout(
            Wanted(dict.fromkeys(("preprocess/", "messidor_data.csv"), COPY_URL), apart=True),
            _read_copy,
            loss="this copy has preprocessed images and no messidor-2.csv: both eyes of an examination may come into "
            "different splits",
        ),
    ),
)
