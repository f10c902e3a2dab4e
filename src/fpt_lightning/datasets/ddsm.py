"""DDSM: scanned film mammograms (Mini-DDSM; Lekamlage et al. 2020, arXiv 2010.00494).

The paper cites DDSM, and its published code links Mini-DDSM. This is the second release, cheddad/miniddsm2::

    MINI-DDSM-Complete-JPEG-8/{Benign,Cancer,Normal}/0029/C_0029_1.LEFT_CC.jpg
                                                          C_0029_1.LEFT_CC_Mask.jpg

The label is the class folder's, of a whole case: in a case of cancer the other breast may be normal. Images whose name
has the word Mask (in any case, with or without a number) are contours of lesions, not mammograms. The group is the
case, ``C_0029``. There is no official split. The spreadsheets and the 16-bit PNG copies are not needed.

Sources: https://ardisdataset.github.io/MiniDDSM/ and https://www.kaggle.com/datasets/cheddad/miniddsm2; names as public
readers have them, such as https://github.com/dangnh0611/kaggle_rsna_breast_cancer. Not verified: the licence; which
release the paper has (the older one has 9,684 images); that a patient has one case only.
"""

from __future__ import annotations

import re

from fpt_lightning.datasets.pieces import Pieces, Wanted
from fpt_lightning.datasets.recipe import Found, Layout, Recipe, images, is_mask

URL = "https://www.kaggle.com/datasets/cheddad/miniddsm2"
CLASSES = ("Normal", "Benign", "Cancer")
_FOLDER = "MINI-DDSM-Complete-JPEG-8"
_VIEW = re.compile(r"([A-D]_\d+)_\d+\.(LEFT|RIGHT)_(CC|MLO)", re.IGNORECASE)


def _read(found: Found, pieces: Pieces) -> None:
    for label, name in enumerate(CLASSES):
        for path in images(pieces[f"{_FOLDER}/{name}/"]):
            view = _VIEW.fullmatch(path.stem)
            if view:
                found.add(path, label, group=view[1].upper())
            elif not is_mask(path):
                found.leave_out(path, "not named as a mammogram", foreign=True)


RECIPE = Recipe(
    name="ddsm",
    title="Mini-DDSM",
    classes=CLASSES,
    images=7_808,
    modality="film mammogram",
    licence="unverified; cite the papers",
    url=URL,
    source="https://github.com/dangnh0611/kaggle_rsna_breast_cancer",
    layouts=(Layout(Wanted(dict.fromkeys((f"{_FOLDER}/{name}/" for name in CLASSES), URL)), _read),),
)
