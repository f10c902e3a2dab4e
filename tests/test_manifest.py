"""Which images there are: class folders, split folders, CSV files, and every refusal by name."""

from __future__ import annotations

import csv
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.manifest import (
    FRACTIONS,
    IMAGE_SUFFIXES,
    SPLITS,
    UNLABELLED,
    Manifest,
    Sample,
    check_classes,
    list_images,
    random_split,
    read_manifest,
)


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


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    root = touch(tmp_path, "train/a/1.png", "train/b/2.jpg", f"{val}/a/3.png", f"{val}/b/4.png", "test/a/deep/5.TIFF")
    manifest = read_manifest(root)
    assert manifest.classes == ("a", "b")
    assert [(s.id, s.label) for s in manifest.split("train")] == [("train/a/1.png", 0), ("train/b/2.jpg", 1)]
    assert [s.label for s in manifest.split("val")] == [0, 1]
    assert [s.id for s in manifest.split("test")] == ["test/a/deep/5.TIFF"]
    assert manifest.path(manifest.split("test")[0]) == tmp_path / "test/a/deep/5.TIFF"
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


def test_a_random_split_changes_nothing_but_the_split() -> None:
    samples = [Sample(f"{i}.png", i % 2, group=f"g{i // 2}") for i in range(20)]
    assert [replace(s, split="") for s in random_split(samples, 0)] == samples


# Tables


def test_a_table_with_splits_and_groups(tmp_path: Path) -> None:
    rows = [(*row, group) for row, group in zip(GOOD, ("p1", "p2", "p3"), strict=True)]
    manifest = read_manifest(tmp_path, table_of(tmp_path, rows, ("image", "label", "split", "group")))
    assert manifest.samples == (
        Sample("x/1.png", 0, "train", "p1"),
        Sample("x/2.png", 1, "val", "p2"),
        Sample("x/3.png", 0, "test", "p3"),
    )


def test_a_table_without_splits_is_split_by_group(tmp_path: Path) -> None:
    rows = [(f"{i:03d}.png", "ab"[i // 50], f"p{i // 5}") for i in range(100)]
    manifest = read_manifest(tmp_path, table_of(tmp_path, rows, ("image", "label", "patient")), group_column="patient")
    assert [manifest.class_counts(split) for split in SPLITS] == [[35, 35], [5, 5], [10, 10]]
    assert len({(s.group, s.split) for s in manifest.samples}) == 20


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
    [("train", "test"), ("train", "val"), ("train", "val", "test", "extra"), ("train", "val", "valid", "test")],
)
def test_other_folders_than_the_three_splits(tmp_path: Path, given: tuple[str, ...]) -> None:
    root = folders(tmp_path, {f"{split}/{name}": 1 for split in given for name in "ab"})
    refused(root, str(root), *given, "train, val and test", "data.manifest")


def test_one_class_only(tmp_path: Path) -> None:
    refused(folders(tmp_path, {"alone": 10}), "one class only", "'alone'", "at least two")


@pytest.mark.parametrize(("counts", "empty"), [({"a": 2, "b": 2}, "val"), ({"a": 1, "b": 1}, "val, test")])
def test_an_empty_split(tmp_path: Path, counts: dict[str, int], empty: str) -> None:
    root = folders(tmp_path, counts)
    refused(root, str(root), f"{sum(counts.values())} images", f"leaves the split {empty} empty")


def test_an_empty_split_of_a_table(tmp_path: Path) -> None:
    path = table_of(tmp_path, [("1.png", "a", "train"), ("2.png", "b", "train"), ("3.png", "b", "test")])
    refused(tmp_path, "leaves the split val empty", table=path)


def test_no_table(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path / "nowhere.csv"), "does not exist", table="nowhere.csv")


@pytest.mark.parametrize("argument", ["image_column", "label_column", "split_column", "group_column"])
def test_no_such_column(tmp_path: Path, argument: str) -> None:
    path = table_of(tmp_path, GOOD)
    refused(tmp_path, str(path), "'wanted'", "image, label, split", table=path, **{argument: "wanted"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("x/4.png", "a", "training"), ("line 5", "'training'", "train, val or test")),
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
    ["image,label\nü.png,a\n".encode("latin-1"), "image,label\n1.png,a\n".encode("utf-16"), b'image,label\n"1"x,a\n'],
)
def test_a_table_that_is_no_csv_in_utf8(tmp_path: Path, content: bytes) -> None:
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
