"""The recipes on listings of the eight data sets: published names, tables and counts, at a share and at full size."""

from __future__ import annotations

import csv
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fpt_lightning.data.manifest import SPLITS, Manifest
from fpt_lightning.datasets import DATASETS
from fpt_lightning.datasets.preparation import LEFT_OUT, prepare
from listings import Listing, build

NAMES = 300  # about as many images a data set has in the fast test
USABLE = {
    "ddr": [6266, 630, 4477, 236, 913],
    "messidor2": [1017, 270, 347, 75, 35],
    "isic2018": [1305, 7734, 622, 378, 1338, 160, 180],  # without the synthetic image and two copies
    "isic2016": [1031, 248],
    "ddsm": [2408, 2684, 2716],
    "cmmd": [1112, 2632],
    "covid": [536, 668, 619],
    "chncxr": [326, 336],
}
GROUPS = {"messidor2": 874, "isic2018": 7470, "ddsm": 1952, "cmmd": 1775}
PARTS = {"ddr": [6260, 2503, 3759], "isic2018": [10_013, 193, 1511], "isic2016": [787, 113, 379]}


def needs(name: str) -> None:
    if name == "cmmd":
        pytest.importorskip("pydicom")


def check(listing: Listing, target: Path, manifest: Manifest) -> None:
    """What ``prepare`` wrote is what the listing has."""
    check_counts(manifest, listing)
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for sample in manifest.samples:
        if sample.group:
            groups[sample.group].add(sample.split)
    assert groups.keys() == listing.groups
    assert all(len(used) == 1 for used in groups.values())
    with target.with_name(LEFT_OUT).open(newline="", encoding="utf-8") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    begun = Counter(start for reason in reasons for start in listing.left_out if reason.startswith(start))
    assert begun == listing.left_out
    assert len(reasons) == begun.total()


def check_counts(manifest: Manifest, listing: Listing) -> None:
    """By official split and class; drawn validation images are of the training images."""
    official = {split for split, _ in listing.usable}
    found = Counter[tuple[str, str]]()
    for sample in manifest.samples:
        split = "train" if sample.split == "val" and "val" not in official else sample.split
        found["" if official == {""} else split, manifest.classes[sample.label]] += 1
    assert found == listing.usable
    for split, fraction in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        if official == {""}:  # drawn; a class may be off by half a group of four
            expected = pytest.approx(fraction * len(manifest.samples), abs=2 * len(manifest.classes))
            assert len(manifest.split(split)) == expected


@pytest.mark.parametrize("name", DATASETS)
def test_a_share_of_a_data_set_by_class_split_group_and_reason(name: str, tmp_path: Path) -> None:
    needs(name)
    target = tmp_path / "manifest.csv"
    listing = build(name, tmp_path / "data", NAMES / DATASETS[name].images, seed=1)
    manifest = prepare(name, listing.root, target)
    assert NAMES / 2 < listing.images < 2 * NAMES
    assert {label for _, label in listing.usable} == set(DATASETS[name].classes)
    check(listing, target, manifest)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_a_whole_data_set_has_the_published_counts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(name)
    target, recipe = tmp_path / "manifest.csv", DATASETS[name]
    begun = time.perf_counter()
    listing = build(name, tmp_path / "data")
    written = time.perf_counter()
    manifest = prepare(name, listing.root, target)
    done = time.perf_counter()
    check(listing, target, manifest)
    parts = {split: manifest.class_counts(split) for split in SPLITS}
    with capsys.disabled():
        splits = "; ".join(f"{split} {sum(counts):,} {list(counts)}" for split, counts in parts.items())
        print(
            f"\n{name}: {listing.images:,} images written in {written - begun:.1f} s, prepared in "
            f"{done - written:.1f} s: {splits}; left out {dict(listing.left_out)}"
        )
    assert listing.images == recipe.images
    assert [sum(counts) for counts in zip(*parts.values(), strict=True)] == USABLE[name]
    assert len(listing.groups) == GROUPS.get(name, 0)
    if name in PARTS:
        assert [sum(counts) for counts in parts.values()] == PARTS[name]
    shutil.rmtree(listing.root)
