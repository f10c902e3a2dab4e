"""DDR: fundus photographs with grades of diabetic retinopathy (Li et al. 2019, Information Sciences 501).

The archive is in parts, to be joined before unpacking (``cat DDR-dataset.zip.* > DDR-dataset.zip``)::

    DR_grading/{train,valid,test}/007-0004-000.jpg
    DR_grading/{train,valid,test}.txt                   007-0004-000.jpg 0

Lines are ``name grade`` without a header. The split is the official one. Grade 5 is ungradable (1,151 images) and left
out, which leaves 12,522, the largest data set of the paper (section 4.1). 9,598 patients are published, but not which
images are whose, so groups are unknown, and so is whether the official splits share patients.

Sources: the owners' repository https://github.com/nkicsl/DDR-dataset (archive, number of images); the tree and the
files of grades from several public readers of them, such as
https://github.com/lucasmsobrinho/dr-pytorch-training-pipelines; not held against the archive itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fpt_lightning.datasets.recipe import DR_GRADES, Found, Recipe, label_of, read_table

URL = "https://github.com/nkicsl/DDR-dataset"
_SPLITS = {"train": "train", "valid": "val", "test": "test"}
_GRADES = {str(grade): grade for grade in range(6)}
_UNGRADABLE = 5


def _read(found: Found, pieces: Mapping[str, Path]) -> None:
    for folder, split in _SPLITS.items():
        table = pieces[f"DR_grading/{folder}.txt"]
        rows = read_table(table, ("image", "grade"), delimiter=" ", header=False)
        grades = [(image, label_of(grade, _GRADES, table, image)) for image, grade in rows]
        for path, grade in found.join(pieces[f"DR_grading/{folder}/"], grades, table):
            if grade == _UNGRADABLE:
                found.leave_out(path, "ungradable (grade 5)")
            else:
                found.add(path, grade, split)


RECIPE = Recipe(
    name="ddr",
    title="DDR",
    classes=DR_GRADES,
    images=13_673,
    modality="fundus photograph",
    licence="MIT (repository); images unstated",
    url=URL,
    source="https://github.com/lucasmsobrinho/dr-pytorch-training-pipelines",
    pieces=dict.fromkeys((f"DR_grading/{name}{end}" for name in _SPLITS for end in ("/", ".txt")), URL),
    read=_read,
)
