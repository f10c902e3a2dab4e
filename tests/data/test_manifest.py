"""Which images there are: class folders, split folders, CSV files, and every refusal by name."""

from __future__ import annotations

import csv
import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fpt_lightning.cli.methods_paragraph import kept_apart
from fpt_lightning.data.folders import IMAGE_SUFFIXES
from fpt_lightning.data.images import read_image
from fpt_lightning.data.manifest import SPLITS, UNLABELLED, Manifest, Sample, check_classes
from fpt_lightning.data.sources import list_images, read_manifest
from fpt_lightning.data.splits import FRACTIONS, fold_split, random_split
from fpt_lightning.errors import ConfigurationError, DataError


def touch(root: Path, *names: str) -> Path:
    """Empty files: a manifest never opens an image."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def folders(root: Path, counts: dict[str, int]) -> Path:
    return touch(root, *(f"{name}/{i:03d}.png" for name, count in counts.items() for i in range(count)))


def write_table(path: Path, rows: Iterable[Sequence[str]], **options: Any) -> Path:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows(rows)
    return path


def table_of(root: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("image", "label", "split")) -> Path:
    """A table whose images all exist."""
    touch(root, *(row[0] for row in rows if row[0]))
    return write_table(root / "table.csv", [header, *rows])


GOOD = [("x/1.png", "a", "train"), ("x/2.png", "b", "val"), ("x/3.png", "a", "test")]


def refused(root: Path, *words: str, **arguments: Any) -> None:
    """The data set is refused with a message that holds all the words."""
    with pytest.raises(DataError) as error:
        read_manifest(root, **arguments)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


# Folders


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("train", "valid", "test"),
        ("train", "validation", "test"),
        ("train", "Val", "test"),
        ("Training", "dev", "Testing"),
        ("TRAIN", "Development", "TEST"),
        ("chest_train", "chest_val", "chest_test"),
        ("01 Training images", "02 Validation images", "03 Testing images"),
    ],
)
def test_split_folders(tmp_path: Path, train: str, val: str, test: str) -> None:
    files = [f"{train}/a/1.png", f"{train}/b/2.jpg", f"{val}/a/3.png", f"{val}/b/4.png", f"{test}/a/deep/5.TIFF"]
    manifest = read_manifest(touch(tmp_path, *files))
    assert manifest.classes == ("a", "b")
    assert [(s.id, s.label) for s in manifest.split("train")] == [(files[0], 0), (files[1], 1)]
    assert [s.label for s in manifest.split("val")] == [0, 1]
    assert [s.id for s in manifest.split("test")] == [files[4]]
    assert manifest.path(manifest.split("test")[0]) == tmp_path / files[4]
    assert manifest.notes == ()
    assert [sample.id for sample in manifest.samples] == sorted(sample.id for sample in manifest.samples)


def test_a_class_absent_from_a_split_is_a_class(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/a/1.png", "train/c/1.png", "val/a/1.png", "test/a/1.png", "test/b/1.png")
    manifest = read_manifest(root)
    assert manifest.classes == ("a", "b", "c")
    assert [manifest.class_counts(split) for split in SPLITS] == [[1, 0, 1], [1, 0, 0], [1, 1, 0]]
    assert manifest.summary().splitlines()[2].split() == ["b", "0", "0", "1"]


def test_the_same_stem_in_classes_and_splits_stays_apart(tmp_path: Path) -> None:
    names = [f"{split}/{name}/1.{suffix}" for split in SPLITS for name in "ab" for suffix in ("png", "jpg")]
    manifest = read_manifest(touch(tmp_path, *names))
    assert {sample.id for sample in manifest.samples} == set(names)
    assert all(sample.label == "ab".index(sample.id.split("/")[1]) for sample in manifest.samples)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "0"], ("0", "9", "10")),
        (["1", "01", "001"], ("001", "01", "1")),  # equal numbers: not the order of a set
        (["10", "9", "x"], ("10", "9", "x")),
        (["b", "C", "a"], ("C", "a", "b")),
    ],
)
def test_the_order_of_classes(tmp_path: Path, names: list[str], order: tuple[str, ...]) -> None:
    assert read_manifest(folders(tmp_path, dict.fromkeys(names, 10))).classes == order


def test_classes_can_be_given_in_order(tmp_path: Path) -> None:
    root = folders(tmp_path, {"mild": 10, "none": 10, "severe": 10})
    manifest = read_manifest(root, classes=["none", "mild", "moderate", "severe"])
    assert manifest.classes == ("none", "mild", "moderate", "severe")
    assert {s.label for s in manifest.samples if s.id.startswith("severe")} == {3}


@pytest.mark.parametrize("classes", [["a"], ["a", "a", "b"], ["a", "c"]])
def test_classes_that_do_not_fit_the_labels(tmp_path: Path, classes: list[str]) -> None:
    refused(folders(tmp_path, {"a": 10, "b": 10}), "data.classes", str(classes), "['a', 'b']", classes=classes)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        (["12.0", "0.0", "4.0"], ("0.0", "4.0", "12.0")),
        (["1", "-1", "0"], ("-1", "0", "1")),
        (["1e1", "2", "0.5"], ("0.5", "2", "1e1")),
        (["x", "2", "10"], ("10", "2", "x")),  # a word among them
    ],
)
def test_numbers_are_in_the_order_of_numbers(labels: list[str], expected: tuple[str, ...], tmp_path: Path) -> None:
    rows = [(f"{i}.png", label, split) for i, (label, split) in enumerate(product(labels, SPLITS))]
    assert read_manifest(tmp_path, table_of(tmp_path, rows)).classes == expected


# The random split


def test_class_folders_are_split_70_10_20_in_every_class(tmp_path: Path) -> None:
    manifest = read_manifest(folders(tmp_path, {"a": 100, "b": 10, "c": 50}))
    assert [manifest.class_counts(split) for split in SPLITS] == [[70, 7, 35], [10, 1, 5], [20, 2, 10]]


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    root = folders(tmp_path, {"a": 30, "b": 30})
    first, again, other = (read_manifest(root, split_seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert [s.split for s in first.samples] != [s.split for s in other.samples]


def test_the_split_does_not_depend_on_the_order_of_the_images(tmp_path: Path) -> None:
    groups = [f"patient {i}" for i in range(20)]
    samples = [Sample(f"{i:03d}.png", i % 3, group=groups[i * i % 20] if i % 2 else "") for i in range(90)]
    shuffled = random.Random(0).sample(samples, len(samples))
    assert {s.id: s.split for s in random_split(samples, 5)} == {s.id: s.split for s in random_split(shuffled, 5)}


def test_the_split_does_not_depend_on_the_rows_of_a_table(tmp_path: Path) -> None:
    rows = [(f"{i:03d}.png", "ab"[i % 2], f"p{i // 3}") for i in range(60)]
    header = ("image", "label", "group")
    first = read_manifest(tmp_path, table_of(tmp_path, rows, header))
    assert read_manifest(tmp_path, table_of(tmp_path, rows[::-1], header)) == first


def test_groups_stay_whole_and_the_shares_stay_near() -> None:
    draw = random.Random(3)
    samples = []
    for patient in range(120):
        label = int(draw.random() < 0.3)
        samples += [Sample(f"{patient}/{i}.png", label, group=f"p{patient}") for i in range(draw.randint(1, 9))]
    dealt = random_split(samples, 0)
    used = defaultdict(set)
    for sample in dealt:
        used[sample.group].add(sample.split)
    assert len(used) == 120
    assert all(len(splits) == 1 for splits in used.values())
    for label in (0, 1):
        counts = Counter(s.split for s in dealt if s.label == label)
        for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
            assert counts[split] / counts.total() == pytest.approx(fraction, abs=0.02)


@pytest.mark.parametrize(("classes", "images"), [(30, 4), (40, 3), (100, 2), (12, 5)])
def test_many_small_classes_fill_every_split(classes: int, images: int) -> None:
    """Each class alone would leave the validation split empty."""
    samples = [Sample(f"{i:04d}.png", i % classes) for i in range(classes * images)]
    counts = Counter(s.split for s in random_split(samples, 0))
    for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
        assert counts[split] == pytest.approx(fraction * len(samples), abs=1)
    tested = [[s.id for s in fold_split(samples, fold, 5, 0) if s.split == "test"] for fold in range(1, 6)]
    assert sorted(id for ids in tested for id in ids) == [sample.id for sample in samples]
    assert [len(ids) for ids in tested] == pytest.approx([len(samples) / 5] * 5, abs=1)


def test_small_classes_are_evened_out_by_whole_groups() -> None:
    samples = [Sample(f"{i:04d}.png", i // 4, group=f"p{i // 2}") for i in range(120)]
    dealt = random_split(samples, 0)
    counts = Counter(s.split for s in dealt)
    for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
        assert counts[split] == pytest.approx(fraction * 120, abs=2)
    assert len({(s.group, s.split) for s in dealt}) == 60


@pytest.mark.parametrize("given", ["folders", "table"])
def test_validation_images_are_drawn_where_there_are_none(given: str, tmp_path: Path) -> None:
    """An eighth of the training images, by group; test images stay."""
    table = None
    if given == "folders":
        root = folders(tmp_path, {"Training/a": 40, "Training/b": 40, "Testing/a": 10, "Testing/b": 10})
    else:
        rows = [(f"{i:03d}.png", "ab"[i % 2], "test" if i >= 80 else "train", f"p{i // 4}") for i in range(100)]
        root, table = tmp_path, table_of(tmp_path, rows, ("image", "label", "split", "group"))
    manifest = read_manifest(root, table)
    assert [len(manifest.split(split)) for split in SPLITS] == pytest.approx([70, 10, 20], abs=2)
    tests = {s.id for s in manifest.split("test")}
    assert all(id.startswith("Testing") if given == "folders" else int(id[:3]) >= 80 for id in tests)
    assert manifest.random
    drawn = len(manifest.split("val"))
    assert manifest.notes == (
        f"there are no validation images: {drawn} of the training images are drawn, whole groups.",
    )
    assert read_manifest(root, table, split_seed=1).split("val") != manifest.split("val")
    assert [len(read_manifest(root, table, fold=2).split(split)) for split in SPLITS] == [64, 16, 20]


def test_a_random_split_changes_nothing_but_the_split() -> None:
    samples = [Sample(f"{i}.png", i % 2, group=f"g{i // 2}") for i in range(20)]
    assert [replace(s, split="") for s in random_split(samples, 0)] == samples


# Tables


def test_a_table_with_splits_and_groups(tmp_path: Path) -> None:
    rows = [(*row, group) for row, group in zip(GOOD, ("p1", "p2", "p3"), strict=True)]
    manifest = read_manifest(tmp_path, table_of(tmp_path, rows, ("image", "label", "split", "group")))
    assert manifest.samples == (
        Sample("x/1.png", 0, split="train", group="p1"),
        Sample("x/2.png", 1, split="val", group="p2"),
        Sample("x/3.png", 0, split="test", group="p3"),
    )


def test_a_table_without_splits_is_split_by_group(tmp_path: Path) -> None:
    rows = [(f"{i:03d}.png", "ab"[i // 50], f"p{i // 5}") for i in range(100)]
    manifest = read_manifest(tmp_path, table_of(tmp_path, rows, ("image", "label", "patient")), group_column="patient")
    assert [manifest.class_counts(split) for split in SPLITS] == [[35, 35], [5, 5], [10, 10]]
    assert len({(s.group, s.split) for s in manifest.samples}) == 20


def test_cases_stay_whole_and_are_written(tmp_path: Path) -> None:
    rows = [(f"{i:03d}.png", "ab"[i // 50], f"e{i // 4}" if i < 96 else " NaN ") for i in range(100)]
    path = table_of(tmp_path, rows, ("image", "label", "exam"))
    manifest = read_manifest(tmp_path, path, case_column="exam")
    assert len({(s.case, s.split) for s in manifest.samples if s.case}) == 24
    assert [(s.case, s.group) for s in manifest.samples[94:98]] == [("e23", "e23"), ("e23", "e23"), ("", ""), ("", "")]
    assert not any(s.case for s in read_manifest(tmp_path, path).samples)
    manifest.write(tmp_path / "split.csv")
    again = read_manifest(tmp_path, "split.csv", case_column="case")
    assert again.samples == manifest.samples
    listed = list_images(tmp_path, table=path, case_column="exam")
    assert [(s.case, s.label) for s in listed.samples] == [(s.case, -1) for s in manifest.samples]
    assert not any(s.case for s in list_images(tmp_path, table="nowhere.csv").samples)


def test_cases_of_several_splits_or_groups_are_refused(tmp_path: Path) -> None:
    header = ("image", "label", "split", "patient", "exam")
    rows = [(f"{split}{i}.png", "ab"[i], split, f"{split}{i}", f"{split}{i}") for split in SPLITS for i in range(2)]
    asked: dict[str, Any] = {"case_column": "exam", "group_column": "patient"}
    path = table_of(tmp_path, [*rows[:-1], (*rows[-1][:3], "val1", "val1")], header)
    refused(tmp_path, "1 cases have images in more than one split: val1", table=path, **asked)
    with pytest.warns(UserWarning, match="1 cases have images in more than one split"):
        read_manifest(tmp_path, path, allow_overlap=True, **asked)
    path = table_of(tmp_path, [*rows[:-1], (*rows[-1][:4], "test0")], header)
    refused(tmp_path, "1 cases (column 'exam')", "images of several groups: test0", table=path, **asked)
    refused(tmp_path, "data.case_column is 'exam'", "give it as data.manifest", case_column="exam")
    twice = [*rows, ("train0.png", "a", "train", "train0", "train1")]
    own = [("image", "a", "split", "exam"), *((row[0], "1", row[2], row[4]) for row in twice)]
    path = write_table(tmp_path / "table.csv", own)
    asked = {"kind": "multi-label", "label_column": ["a"], "case_column": "exam"}
    refused(tmp_path, "train0.png have several splits, groups or cases", table=path, **asked)


def test_the_cases_of_predicted_images_are_all_known(tmp_path: Path) -> None:
    path = table_of(tmp_path, [("1.png", "e1")], ("image", "exam"))
    touch(tmp_path, "2.png")
    with pytest.raises(DataError, match=r"1 of 2 images are not in the column 'image' of the manifest .*: 2\.png"):
        list_images(tmp_path, table=path, case_column="exam")


def test_names_of_columns_can_be_given(tmp_path: Path) -> None:
    path = table_of(tmp_path, GOOD, ("file", "grade", "part"))
    manifest = read_manifest(tmp_path, path, image_column="file", label_column="grade", split_column="part")
    assert [(s.id, s.split) for s in manifest.samples] == [(id, split) for id, _, split in GOOD]


def test_the_table_may_be_named_relative_to_the_root(tmp_path: Path) -> None:
    table_of(tmp_path, GOOD)
    assert read_manifest(tmp_path, "table.csv") == read_manifest(str(tmp_path), str(tmp_path / "table.csv"))


def test_unusual_names_in_a_table(tmp_path: Path) -> None:
    names = ['comma, "quoted".png', "Zürich/naïve 眼底.png", "windows/sub folder/3.png"]
    touch(tmp_path, *names)
    written = [names[0], names[1], r"windows\sub folder\3.png"]
    rows = [(name, label, split) for name, label, split in zip(written, ("ä, b", "c", "c"), SPLITS, strict=True)]
    header = ("image", "label", "split")
    path = write_table(tmp_path / "table.csv", [header, *rows], encoding="utf-8-sig", quoting=csv.QUOTE_ALL)
    manifest = read_manifest(tmp_path, path)
    assert {s.id for s in manifest.samples} == set(names)
    assert manifest.classes == ("c", "ä, b")


def test_a_table_written_with_an_index_column(tmp_path: Path) -> None:
    """pandas' ``to_csv`` heads its index with an empty name."""
    table_of(tmp_path, GOOD)
    path = write_table(
        tmp_path / "t.csv", [("", "image", "label", "split"), *((str(i), *r) for i, r in enumerate(GOOD))]
    )
    assert [s.id for s in read_manifest(tmp_path, path).samples] == [row[0] for row in GOOD]


def test_spaces_around_values_and_other_spellings_of_a_split(tmp_path: Path) -> None:
    touch(tmp_path, *(row[0] for row in GOOD))
    rows = [("x/1.png ", " a", "Train "), ("./x/2.png", "b", "VALIDATION"), ("x//3.png", "a ", "test")]
    manifest = read_manifest(tmp_path, write_table(tmp_path / "t.csv", [("image", "label", "split"), *rows]))
    assert [(s.id, s.label, s.split) for s in manifest.samples] == [
        ("x/1.png", 0, "train"),
        ("x/2.png", 1, "val"),
        ("x/3.png", 0, "test"),
    ]


# What is ignored


def dicom_like(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + path.name.encode())


IGNORED = ["a/notes.txt", "a/.hidden.png", "__MACOSX/a/._1.png", "a/__MACOSX/2.png", "b/x.npy", ".cache/3.png"]


def test_what_is_ignored_is_counted_and_named(tmp_path: Path) -> None:
    root = touch(folders(tmp_path, {"a": 10, "b": 10}), *IGNORED, "readme.md")
    dicom_like(root / "a/IM-0001")
    dicom_like(root / "b/1.2.840.7")
    manifest = read_manifest(root)
    assert [s.id for s in manifest.samples if not s.id.endswith(".png")] == ["a/IM-0001", "b/1.2.840.7"]
    assert len(manifest.samples) == 22
    told = "7 files are ignored, being hidden or no images: .cache, __MACOSX, a/.hidden.png and 4 more."
    assert manifest.notes == (told,)
    assert list_images(root).notes == (told,)
    assert len(list_images(root).samples) == 22


def test_every_kind_of_image_is_found(tmp_path: Path) -> None:
    """By suffixes in any case that Pillow writes, and by what it reads again."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in (".dcm", ".dicom"):
            continue
        path = tmp_path / f"a{suffix.upper()}"
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3).save(
            path, Image.registered_extensions()[suffix]
        )
        assert read_image(path).shape == (8, 8, 3)
    assert len(list_images(tmp_path).samples) == len(IMAGE_SUFFIXES) - 2


# Refusals


def test_no_root(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", repr(str(tmp_path / "nowhere")), "not a folder")
    refused(touch(tmp_path, "file") / "file", "not a folder")


def test_an_empty_root(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "one folder of images a class", "it holds no folder")


def test_an_empty_class_folder(tmp_path: Path) -> None:
    root = folders(tmp_path, {"a": 10, "b": 10})
    touch(root, "empty/notes.txt", "empty/.hidden.png")
    refused(root, str(root), "without an image: empty")


def test_an_empty_class_folder_within_a_split(tmp_path: Path) -> None:
    root = folders(tmp_path, {f"{split}/{name}": 1 for split in SPLITS for name in "ab"})
    (root / "val/c").mkdir()
    refused(root, str(root / "val"), "without an image: c")


@pytest.mark.parametrize(
    "given",
    [("train", "val"), ("val", "test"), ("train", "val", "test", "extra"), ("train", "val", "valid", "test")],
)
def test_other_folders_than_the_three_splits(tmp_path: Path, given: tuple[str, ...]) -> None:
    root = folders(tmp_path, {f"{split}/{name}": 1 for split in given for name in "ab"})
    refused(root, str(root), *given, "train, val and test", "data.manifest")


@pytest.mark.parametrize("upper", [("set1", "set2"), ("positive_test", "negative_test"), ("train set", "other")])
def test_folders_that_hold_the_same_folders(tmp_path: Path, upper: tuple[str, str]) -> None:
    """Either could be the classes, and nobody is asked after a frozen pass."""
    root = folders(tmp_path, {f"{above}/{name}": 10 for above in upper for name in ("sick", "well")})
    refused(root, str(root), *upper, "sick", "well", "which are the classes", "data.manifest")


def test_folders_below_classes_that_differ_or_are_one_are_of_the_class(tmp_path: Path) -> None:
    several = folders(tmp_path / "several", {"a/p1": 10, "a/p2": 10, "b/p1": 10, "b/p3": 10})
    one = folders(tmp_path / "one", {"a/images": 20, "b/images": 20})
    assert [read_manifest(root).classes for root in (several, one)] == [("a", "b")] * 2


def test_one_class_only(tmp_path: Path) -> None:
    refused(folders(tmp_path, {"alone": 10}), "one class only", "'alone'", "at least two")


@pytest.mark.parametrize(("counts", "empty"), [({"a": 2, "b": 2}, "val"), ({"a": 1, "b": 1}, "val, test")])
def test_an_empty_split(tmp_path: Path, counts: dict[str, int], empty: str) -> None:
    root = folders(tmp_path, counts)
    refused(root, str(root), f"{sum(counts.values())} images", f"leaves the split {empty} empty")


def test_an_empty_split_of_a_table(tmp_path: Path) -> None:
    path = table_of(tmp_path, [("1.png", "a", "train"), ("2.png", "b", "train"), ("3.png", "b", "val")])
    refused(tmp_path, "leaves the split test empty", table=path)


def test_one_patient_cannot_be_split(tmp_path: Path) -> None:
    rows = [(f"{i:02d}.png", "ab"[i % 2], "Jane") for i in range(40)]
    path = table_of(tmp_path, rows, ("image", "label", "group"))
    refused(tmp_path, "40 images of 1 groups (Jane), kept whole", "give it more groups", table=path)


def test_no_table(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path / "nowhere.csv"), "does not exist", table="nowhere.csv")


@pytest.mark.parametrize("argument", ["image_column", "label_column", "split_column", "group_column", "case_column"])
def test_no_such_column(tmp_path: Path, argument: str) -> None:
    path = table_of(tmp_path, GOOD)
    refused(tmp_path, str(path), "'wanted'", "image, label, split", table=path, **{argument: "wanted"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("x/4.png", "a", "holdout"), ("line 5", "'holdout'", "train, val or test")),
        (("x/4.png", "a", ""), ("line 5", "''", "train, val or test")),
        (("x/4.png", " ", "train"), ("line 5", "'label'", "empty")),
        (("x/4.png", "a"), ("line 5", "number of fields")),
        (("x/4.png", "a", "train", "more"), ("line 5", "number of fields")),
        (("", "a", "train"), ("line 5", "''", "below the data root")),
        (("../4.png", "a", "train"), ("line 5", "'../4.png'", "below the data root")),
        ((r"x\..\..\4.png", "a", "train"), ("line 5", "below the data root")),
        (("/x/4.png", "a", "train"), ("line 5", "'/x/4.png'", "below the data root")),
        (("x/1.png", "a", "train"), ("1 images more than once", "x/1.png")),
        ((r"x\1.png", "a", "train"), ("1 images more than once", "x/1.png")),
        (("./x/1.png", "b", "test"), ("1 images more than once", "x/1.png")),
        (("x/gone.png", "a", "train"), ("1 of 4 images", "do not exist", "x/gone.png")),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path: Path, row: tuple[str, ...], words: tuple[str, ...]) -> None:
    touch(tmp_path, *(good[0] for good in GOOD), "x/4.png")
    path = write_table(tmp_path / "table.csv", [("image", "label", "split"), *GOOD, row])
    refused(tmp_path, str(path), *words, table=path)


def test_long_lists_of_names_are_cut(tmp_path: Path) -> None:
    rows = [(f"gone{i}.png", "a", "train") for i in range(9)]
    path = write_table(tmp_path / "table.csv", [("image", "label", "split"), *rows])
    refused(tmp_path, "9 of 9 images", "gone4.png and 4 more", str(tmp_path), table=path)


def test_a_group_across_splits(tmp_path: Path) -> None:
    rows = [(*row, "p1" if row[2] != "val" else "p2") for row in GOOD]
    path = table_of(tmp_path, rows, ("image", "label", "split", "group"))
    refused(tmp_path, "1 groups", "more than one split", "p1", table=path)


@pytest.mark.parametrize("content", [b"image,label\n", b"image,label\n\n\n", b""])
def test_a_table_without_rows(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    refused(tmp_path, str(tmp_path / "table.csv"), "no row", table="table.csv")


@pytest.mark.parametrize(
    "content",
    [b'image,label\n"1"x,a\n', b"image,label\n\0\0,a\n"],
)
def test_a_table_that_is_no_csv(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    refused(tmp_path, str(tmp_path / "table.csv"), "not a CSV file in UTF-8", table="table.csv")


# Prediction, and the model's number of classes


def test_images_are_listed_recursively(tmp_path: Path) -> None:
    wanted = [f"b/{i}{suffix}" for i, suffix in enumerate(IMAGE_SUFFIXES)] + ["a.PNG", "c/d/e/f.png"]
    touch(tmp_path, *wanted, "table.csv", "b/notes.txt", "b/.hidden.png", ".cache/1.png", "png")
    manifest = list_images(tmp_path)
    assert manifest.samples == tuple(Sample(id) for id in sorted(wanted))
    assert {sample.label for sample in manifest.samples} == {UNLABELLED}
    assert manifest.classes == ()


def test_nothing_to_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image below .*\.jpg, .*\.webp"):
        list_images(touch(tmp_path, "notes.txt"))
    with pytest.raises(DataError, match="'/nowhere/at/all' is not a folder"):
        list_images("/nowhere/at/all")


def test_a_number_of_classes_is_held_against_the_data() -> None:
    manifest = Manifest(Path("/data"), (), ("a", "b", "c"))
    check_classes("model.num_classes", 3, manifest)
    with pytest.raises(ConfigurationError, match=r"model.num_classes is 5.*/data has 3 classes \(a, b, c\).*to 3"):
        check_classes("model.num_classes", 5, manifest)


# Several labels, and numbers


def labels_table(root: Path, rows: Sequence[Sequence[str]], splits: Sequence[str] = SPLITS) -> Path:
    """Rows (a, b) of labels, each in every one of the splits."""
    lines = [(f"{split}{i}.png", *row, split) for split in splits for i, row in enumerate(rows)]
    return table_of(root, lines, ("image", "a", "b", "split"))


def targets(root: Path, rows: Sequence[Sequence[str]], **arguments: Any) -> dict[str, list[tuple[float, ...]]]:
    manifest = read_manifest(root, labels_table(root, rows), label_column=["a", "b"], kind="multi-label", **arguments)
    assert manifest.classes == ("a", "b")
    return {split: [sample.targets for sample in manifest.split(split)] for split in SPLITS}


def equal(found: Sequence[tuple[float, ...]], expected: Sequence[tuple[float, ...]]) -> bool:
    return [[-9.0 if math.isnan(t) else t for t in row] for row in found] == [
        [-9.0 if math.isnan(t) else t for t in row] for row in expected
    ]


NAN = math.nan


@pytest.mark.parametrize(
    ("fills", "train", "test"),
    [
        ({}, [(1, 0), (NAN, NAN), (NAN, 1)], [(1, 0), (NAN, NAN), (NAN, 1)]),
        ({"missing_labels": "zeros"}, [(1, 0), (0, NAN), (NAN, 1)], [(1, 0), (0, NAN), (NAN, 1)]),
        ({"uncertain_labels": "ones"}, [(1, 0), (NAN, 1), (NAN, 1)], [(1, 0), (NAN, NAN), (NAN, 1)]),
        ({"uncertain_labels": "zeros"}, [(1, 0), (NAN, 0), (NAN, 1)], [(1, 0), (NAN, NAN), (NAN, 1)]),
    ],
)
def test_what_missing_and_uncertain_labels_stand_for(
    tmp_path: Path, fills: dict[str, str], train: list[tuple[float, ...]], test: list[tuple[float, ...]]
) -> None:
    """Evaluation never takes an uncertain label for a true one; ``nan`` is unknown whatever is asked."""
    found = targets(tmp_path, [("1", "0.0"), ("", "-1"), ("nan", "1.0")], **fills)
    assert equal(found["train"], train)
    assert equal(found["val"], test)
    assert equal(found["test"], test)


@pytest.mark.parametrize("value", ["2", "yes", "0.5", "-2", "inf"])
def test_labels_that_are_neither_true_nor_false(tmp_path: Path, value: str) -> None:
    path = labels_table(tmp_path, [("1", "0"), ("0", value)])
    asked: dict[str, Any] = {"label_column": ["a", "b"], "kind": "multi-label"}
    refused(tmp_path, "line 3", "'b'", repr(value), "1, 0, -1 (uncertain), True, False or nothing", table=path, **asked)


@pytest.mark.parametrize("value", ["", "old", "nan", "inf"])
def test_numbers_that_are_none(tmp_path: Path, value: str) -> None:
    path = labels_table(tmp_path, [("1.5", "0"), (value, "0")])
    refused(tmp_path, "line 3", "'a'", repr(value), "not a number", table=path, label_column="a", kind="regression")


def test_numbers(tmp_path: Path) -> None:
    path = labels_table(tmp_path, [("61.5", ""), ("-1", ""), ("0", "")])
    manifest = read_manifest(tmp_path, path, label_column="a", kind="regression")
    assert [sample.targets for sample in manifest.split("test")] == [(61.5,), (-1,), (0,)]
    assert (manifest.classes, manifest.class_counts("val")) == (("a",), [3])


def test_counts_of_labels_are_of_positive_images(tmp_path: Path) -> None:
    path = labels_table(tmp_path, [("1", "0"), ("1", "-1"), ("", "1")])
    manifest = read_manifest(tmp_path, path, label_column=["a", "b"], kind="multi-label")
    assert manifest.class_counts("test") == [2, 1]
    assert manifest.summary().splitlines()[1].split() == ["images", "3", "3", "3"]


def test_what_several_columns_and_folders_are_not_for(tmp_path: Path) -> None:
    path = labels_table(tmp_path, [("1", "0")])
    refused(tmp_path, "names 2 columns", "'multilabel'", table=path, label_column=["a", "b"], kind="regression")
    refused(tmp_path, "data.classes", table=path, label_column=["a"], kind="multi-label", classes=["x"])
    refused(tmp_path, "multi-label data set needs a CSV manifest", kind="multi-label")


def shares(manifest: Manifest, column: int) -> list[float]:
    return [manifest.class_counts(split)[column] / len(manifest.split(split)) for split in SPLITS]


def test_random_splits_have_each_labels_share(tmp_path: Path) -> None:
    generator = random.Random(0)
    rows = [(f"{i}.png", str(int(generator.random() < 0.1)), str(int(generator.random() < 0.4))) for i in range(600)]
    path = table_of(tmp_path, rows, ("image", "a", "b"))
    manifest = read_manifest(tmp_path, path, label_column=["a", "b"], kind="multi-label")
    assert [len(manifest.split(split)) for split in SPLITS] == pytest.approx([420, 60, 120], abs=12)
    for column in (0, 1):
        assert max(shares(manifest, column)) - min(shares(manifest, column)) < 0.03


def test_random_splits_of_numbers_have_the_same_range(tmp_path: Path) -> None:
    rows = [(f"{i:03d}.png", str(i)) for i in range(200)]
    manifest = read_manifest(tmp_path, table_of(tmp_path, rows, ("image", "label")), kind="regression")
    fifths = [Counter(int(s.targets[0]) // 40 for s in manifest.split(split)) for split in SPLITS]
    assert [set(counts.values()) for counts in fifths] == [{28}, {4}, {8}]


# Cross-validation


@pytest.mark.parametrize("given", [False, True])
def test_each_image_is_held_out_once(tmp_path: Path, given: bool) -> None:
    rows = [(f"{i:03d}.png", "ab"[i % 2], f"p{i // 4}", "test" if i >= 80 else "train") for i in range(100)]
    header = ("image", "label", "group", "split" if given else "site")
    path = table_of(tmp_path, rows, header)
    held = "val" if given else "test"
    folds = [read_manifest(tmp_path, path, fold=fold, folds=4) for fold in (1, 2, 3, 4)]
    out = [sample.id for manifest in folds for sample in manifest.split(held)]
    assert sorted(out) == [f"{i:03d}.png" for i in range(80 if given else 100)]
    for fold, manifest in enumerate(folds):
        assert len({(s.group, s.split) for s in manifest.samples}) == 25
        assert all(abs(a - b) <= 2 for a, b in [manifest.class_counts(held)])
        assert manifest.random
        if given:
            assert [s.id for s in manifest.split("test")] == [f"{i:03d}.png" for i in range(80, 100)]
        else:
            following = folds[(fold + 1) % 4].split("test")
            assert [s.id for s in manifest.split("val")] == [s.id for s in following]


@pytest.mark.parametrize(("fold", "folds"), [(0, 5), (6, 5), (1, 2), (1, 1)])
def test_there_is_no_such_fold(tmp_path: Path, fold: int, folds: int) -> None:
    folder = tmp_path / "images"
    folders(folder, {"a": 10, "b": 10})
    with pytest.raises(ConfigurationError, match=f"data.fold is {fold} of data.folds {folds}: give a fold from 1"):
        read_manifest(folder, fold=fold, folds=folds)


# The split that was used, given back


def test_a_drawn_split_can_be_given_back(tmp_path: Path) -> None:
    rows = [(f"{i:03d}.png", "ab"[i % 2], f"p{i // 3}") for i in range(60)]
    drawn = read_manifest(tmp_path, table_of(tmp_path, rows, ("image", "label", "group")), split_seed=3)
    drawn.write(tmp_path / "split.csv")
    again = read_manifest(tmp_path, tmp_path / "split.csv")
    assert (again.samples, again.classes) == (drawn.samples, drawn.classes)
    assert again.split_digest() == drawn.split_digest()
    assert (drawn.random, again.random) == (True, False)
    assert read_manifest(tmp_path, tmp_path / "table.csv", split_seed=4).split_digest() != drawn.split_digest()


def test_ignored_labels_stay_ignored_when_given_back(tmp_path: Path) -> None:
    path = labels_table(tmp_path, [("1", "0"), ("", "-1"), ("0", "1")])
    asked: dict[str, Any] = {"label_column": ["a", "b"], "kind": "multi-label"}
    first = read_manifest(tmp_path, path, **asked)
    first.write(tmp_path / "split.csv")
    again = read_manifest(tmp_path, "split.csv", missing_labels="ones", uncertain_labels="zeros", **asked)
    assert equal([s.targets for s in again.samples], [s.targets for s in first.samples])
    assert not list(tmp_path.glob("*.partial"))


# Overlap of splits


def test_an_identical_file_in_another_split(tmp_path: Path) -> None:
    path = table_of(tmp_path, GOOD)
    for name, content in {"1": b"same" * 50_000, "2": b"samE" * 50_000, "3": b"same" * 50_000}.items():
        (tmp_path / f"x/{name}.png").write_bytes(content)
    refused(tmp_path, "1 images are also in another split", "x/1.png = x/3.png", "data.allow_overlap", table=path)
    with pytest.warns(UserWarning, match=r"x/1.png = x/3.png: test figures are too good"):
        read_manifest(tmp_path, path, allow_overlap=True)


def test_files_that_differ_in_the_middle_alone_are_not_identical(tmp_path: Path) -> None:
    path = table_of(tmp_path, GOOD)
    for middle, name in zip(b"abc", "123", strict=True):
        content = bytearray(400_000)
        content[200_000] = middle
        (tmp_path / f"x/{name}.png").write_bytes(content)
    assert len(read_manifest(tmp_path, path).samples) == 3


def test_identical_files_within_a_split_are_no_overlap(tmp_path: Path) -> None:
    rows = [*GOOD, ("x/4.png", "b", "train")]
    path = table_of(tmp_path, rows)
    for name in "14":
        (tmp_path / f"x/{name}.png").write_bytes(b"same")
    assert len(read_manifest(tmp_path, path).samples) == 4


def test_groups_across_splits_can_be_allowed(tmp_path: Path) -> None:
    rows = [(*row, "p1") for row in GOOD]
    path = table_of(tmp_path, rows, ("image", "label", "split", "group"))
    with pytest.warns(UserWarning, match="1 groups have images in more than one split: p1: test figures"):
        read_manifest(tmp_path, path, allow_overlap=True)


def test_all_that_is_in_several_splits_is_listed(tmp_path: Path) -> None:
    """The message names a few; a list of before is replaced, and taken away once the splits are mended."""
    rows = [(f"{split}{i}.png", "ab"[i % 2], split, f"p{i}") for split in SPLITS for i in range(7)]
    path = table_of(tmp_path, rows, ("image", "label", "split", "group"))
    for name in ("train0", "train1", "test0", "val5"):
        (tmp_path / f"{name}.png").write_bytes(b"same")
    listing = tmp_path / "run" / "overlaps.csv"
    told = "p0, p1, p2, p3, p4 and 2 more", "train0.png = val5.png: mend", f"; {listing} lists all."
    refused(tmp_path, *told, table=path, overlaps=listing)
    header, *found = csv.reader(listing.read_text().splitlines())
    assert header == ["kind", "split", "image", "other_split", "other_image", "shared"]
    assert [row for row in found if row[0] == "group"] == [
        ["group", "train", f"train{i}.png", split, f"{split}{i}.png", f"p{i}"] for i in range(7) for split in SPLITS[1:]
    ]
    digest = hashlib.sha256(b"same").hexdigest()[:16]
    assert [row for row in found if row[0] == "file"] == [
        ["file", *pair, digest]
        for pair in (
            ("train", "train0.png", "val", "val5.png"),
            ("train", "train1.png", "val", "val5.png"),
            ("train", "train0.png", "test", "test0.png"),
        )
    ]
    path = table_of(tmp_path, [row[:3] for row in rows])
    with pytest.warns(UserWarning, match=r"test figures are too good; .*overlaps\.csv lists all\."):
        read_manifest(tmp_path, path, allow_overlap=True, overlaps=listing)
    assert {line.split(",")[0] for line in listing.read_text().splitlines()[1:]} == {"file"}
    for name in ("train0", "train1", "test0"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    read_manifest(tmp_path, path, overlaps=listing)
    assert not listing.exists()


def test_the_list_of_overlaps_takes_the_place_of_no_other_file(tmp_path: Path) -> None:
    grouped = [(*row, "p1") for row in GOOD], ("image", "label", "split", "group")
    path, mine = table_of(tmp_path, *grouped), tmp_path / "overlaps.csv"
    mine.write_text("image,label\n")
    for _ in range(2):
        refused(tmp_path, "p1", f"{tmp_path / 'overlaps-1.csv'} lists all", table=path, overlaps=mine)
    assert sorted(each.name for each in tmp_path.glob("overlaps*")) == ["overlaps-1.csv", "overlaps.csv"]
    refused(tmp_path, "p1", "cannot be listed", table=path, overlaps=mine / "run" / "overlaps.csv")
    table_of(tmp_path, GOOD)
    read_manifest(tmp_path, path, overlaps=mine)
    assert mine.read_text() == "image,label\n"


# Images of elsewhere


@pytest.mark.parametrize("header", [("image", "label", "split"), ("image", "label", "site")])
def test_all_images_of_elsewhere_are_test_images(tmp_path: Path, header: tuple[str, ...]) -> None:
    path = table_of(tmp_path, [(image, "a", split) for image, _, split in GOOD], header)
    manifest = read_manifest(tmp_path, path, external=True)
    assert {sample.split for sample in manifest.samples} == {"test"}
    assert (manifest.classes, manifest.random) == (("a",), False)


# What reports say of the splits


def test_how_images_came_to_their_splits_is_said(tmp_path: Path) -> None:
    at_random = "drawn at random with seed 3, stratified, groups whole"
    root = folders(tmp_path / "drawn", {"a": 20, "b": 20})
    asked: list[tuple[dict[str, Any], str]] = [
        ({}, f"70% training, 10% validation and 20% test images, {at_random}"),
        ({"fold": 2, "folds": 4}, f"fold 2 of 4, {at_random}"),
        ({"external": True}, "all are test images, of a model that was trained on others"),
    ]
    assert [read_manifest(root, split_seed=3, **given).origin for given, _ in asked] == [said for _, said in asked]
    rows = [(f"{i}.png", "ab"[i % 2], "train" if i < 16 else "test") for i in range(20)]
    table = table_of(tmp_path, rows)
    some = read_manifest(tmp_path, table, split_seed=3).origin
    assert some == f"test images as given with the data set, an eighth of the others for validation, {at_random}"
    folded = read_manifest(tmp_path, table, split_seed=3, fold=1, folds=4).origin
    assert folded == f"fold 1 of 4 of what is not for test, {at_random}"
    (tmp_path / "given").mkdir()
    assert read_manifest(tmp_path / "given", table_of(tmp_path / "given", GOOD)).origin == "as given with the data set"


def test_what_is_in_several_splits_is_counted(tmp_path: Path) -> None:
    header = ("image", "label", "split", "group", "exam")
    rows = [
        ("1.png", "a", "train", "p", "p-left"),
        ("2.png", "b", "val", "p", "p-right"),
        ("3.png", "a", "test", "q", "q"),
        ("4.png", "b", "test", "r", ""),
    ]
    table = table_of(tmp_path, rows, header)
    for name in ("1.png", "4.png"):
        (tmp_path / name).write_bytes(b"the same")
    with pytest.warns(UserWarning, match="too good"):
        found = read_manifest(tmp_path, table, case_column="exam", allow_overlap=True)
    assert found.overlaps == {"case": 0, "group": 1, "file": 1}
    assert kept_apart(found) == [
        "1 of 2 groups, such as patients, have images in more than one split: test figures are too good.",
        "None of 3 cases have images in more than one split.",
        "1 of 4 image files are, by their bytes, in more than one split: test figures are too good.",
    ]
    alone = read_manifest(folders(tmp_path / "alone", {"a": 9, "b": 9}))
    assert kept_apart(alone)[0] == "No groups, such as patients, are known: one may have images in several splits."
    assert kept_apart(read_manifest(tmp_path / "alone", external=True)) == []
