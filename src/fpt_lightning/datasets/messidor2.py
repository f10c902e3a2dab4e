"""Messidor-2: fundus photographs of both eyes, with adjudicated grades of diabetic retinopathy (Krause et al. 2018).

Images and pairs come from ADCIS (four parts, to be joined before unpacking), the grades from Kaggle::

    IMAGES/20051020_43808_0100_PP.png, IMAGES/IM000012.JPG
    messidor-2.csv          left;right                     one examination a row, its two images
    messidor_data.csv       image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable

The grades' ``IM002385.jpg`` is the file ``IM002385.JPG``. Four images have no grade, being ungradable, and are left
out: 1,744 stay. There is no official split. The group is the examination, a row of ``messidor-2.csv``; the numbers in
file names differ between the eyes of one examination. Whether a patient was examined twice is not published.

A copy of ``messidor_data.csv`` with other columns goes with preprocessed images on Kaggle, and is refused.

Sources: https://www.adcis.net/en/third-party/messidor2/ and
https://www.kaggle.com/datasets/google-brain/messidor2-dr-grades; names and columns as public readers of them have
them, such as https://github.com/rajpurkarlab/BenchMD; the wording of the licence is not verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fpt_lightning.datasets.recipe import DR_GRADES, Found, Recipe, label_of, read_table

URL = "https://www.adcis.net/en/third-party/messidor2/"
GRADES_URL = "https://www.kaggle.com/datasets/google-brain/messidor2-dr-grades"
_GRADES = {"": -1, **{f"{grade}{end}": grade for grade in range(len(DR_GRADES)) for end in ("", ".0")}}


def _read(found: Found, pieces: Mapping[str, Path]) -> None:
    pairs = read_table(pieces["messidor-2.csv"], ("left", "right"), delimiter=";")
    examinations = {image.lower(): left for left, right in pairs for image in (left, right)}
    table = pieces["messidor_data.csv"]
    rows = read_table(table, ("image_id", "adjudicated_dr_grade"))
    grades = [(image, label_of(grade, _GRADES, table, image)) for image, grade in rows]
    for path, grade in found.join(pieces["IMAGES/"], grades, table):
        if grade < 0:
            found.leave_out(path, "ungradable (no adjudicated grade)")
        elif path.name.lower() not in examinations:
            found.leave_out(path, "no row in messidor-2.csv, so of an unknown examination")
        else:
            found.add(path, grade, group=examinations[path.name.lower()])


RECIPE = Recipe(
    name="messidor2",
    title="Messidor-2",
    classes=DR_GRADES,
    images=1_748,
    modality="fundus photograph",
    licence="images not to be passed on; grades CC0",
    url=URL,
    source="https://github.com/rajpurkarlab/BenchMD",
    pieces={"IMAGES/": URL, "messidor-2.csv": URL, "messidor_data.csv": GRADES_URL},
    read=_read,
)
