"""CHNCXR: chest X-rays of tuberculosis and of none, from Shenzhen (Jaeger et al. 2014).

::

    CXR_png/CHNCXR_0001_0.png ... CHNCXR_0662_1.png

The label is the last digit of the name: 1 is tuberculosis. Most files have a palette. Masks beside them do not count,
and other files (the Montgomery images of merged copies, ``MCUCXR_0001_0.png``) are left out by name. There is no
official split; every image has its own number, and patients are not published.

Sources: https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets/Shenzhen-Hospital-CXR-Set/index.html;
names and labels as in https://github.com/mlmed/torchxrayvision; not held against the archive itself.
"""

from __future__ import annotations

import re

from fpt_lightning.datasets.pieces import Pieces, Wanted
from fpt_lightning.datasets.recipe import Found, Layout, Recipe, images, is_mask

URL = "https://data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets/Shenzhen-Hospital-CXR-Set/index.html"
_NAME = re.compile(r"CHNCXR_\d{4}_([01])", re.IGNORECASE)


def _read(found: Found, pieces: Pieces) -> None:
    for path in images(pieces["CXR_png/"]):
        name = _NAME.fullmatch(path.stem)
        if name:
            found.add(path, int(name[1]))
        elif not is_mask(path):
            found.leave_out(path, "not named as an X-ray of this data set", foreign=True)


RECIPE = Recipe(
    name="chncxr",
    title="CHNCXR",
    classes=("normal", "tuberculosis"),
    images=662,
    modality="chest X-ray",
    licence="public; cite NLM and the papers",
    url=URL,
    source="https://github.com/mlmed/torchxrayvision",
    layouts=(Layout(Wanted({"CXR_png/": URL}), _read),),
)
