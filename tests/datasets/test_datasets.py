"""The recipes on miniatures of the eight data sets: manifests line by line, what is left out, what people are told."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from fpt_lightning.cli import main
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.datasets import DATASETS
from fpt_lightning.datasets.preparation import prepare
from fpt_lightning.datasets.recipe import DR_GRADES
from fpt_lightning.errors import DataError
from miniatures import MINIATURES, Miniature, build, reads_dicom, write_xlsx
from small import ROOT

EXAMPLES = ROOT / "examples"
PIECES = [(name, piece) for name, recipe in DATASETS.items() for piece in recipe.layouts[0].wanted.pieces]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Miniature]:
    """The miniatures; nothing below them may be changed."""
    return {name: build(name, tmp_path_factory.mktemp(name) / "data") for name in MINIATURES}


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> bool:
    return reads_dicom(tmp_path_factory.mktemp("dicom"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where a manifest goes, as miniatures are shared."""
    return tmp_path / "manifest.csv"


def lines(path: Path) -> list[tuple[str, ...]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [tuple(row) for row in csv.reader(file)]


def located(root: Path, piece: str) -> Path:
    return next(path for path in sorted(root.rglob("*")) if f"{path}/".endswith(f"/{piece.rstrip('/')}/"))


# What is written


@pytest.mark.parametrize("name", DATASETS)
def test_the_manifest_line_by_line(
    name: str, built: dict[str, Miniature], target: Path, dicom: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "cmmd" and not dicom:
        pytest.skip("read_image does not read DICOM")
    miniature = built[name]
    manifest = prepare(name, miniature.root, target)
    header, *written = lines(target)
    assert header == ("image", "label", "split", "group")
    assert [row[0] for row in written] == [line[0] for line in miniature.lines]
    for row, expected in zip(written, miniature.lines, strict=True):
        assert (row[0], row[1], row[3]) == (expected[0], expected[1], expected[3])
        if name in ("ddr", "isic2018") or expected[2] == "test":
            assert row[2] == expected[2]
    header, *left_out = lines(target.with_name("left_out.csv"))
    assert header == ("image", "reason")
    assert [row[0] for row in left_out] == sorted(miniature.left_out)
    for image, reason in left_out:
        assert reason.startswith(miniature.left_out[image])
    assert manifest.classes == DATASETS[name].classes
    assert sorted(path.name for path in target.parent.iterdir()) == ["left_out.csv", "manifest.csv"]
    said = capsys.readouterr().out
    assert f"{DATASETS[name].images:,} published" in said
    assert manifest.summary() in said
    counted = Counter(reason.split(":")[0] for _, reason in left_out)
    assert all(f"{count} {reason}" in said for reason, count in counted.items())


def test_cmmd_is_labelled_by_the_sides_in_its_headers(built: dict[str, Miniature]) -> None:
    pytest.importorskip("pydicom")
    miniature, recipe = built["cmmd"], DATASETS["cmmd"]
    found, _ = recipe.samples(miniature.root)
    assert sorted((s.id, recipe.classes[s.label], s.split, s.group) for s in found.samples) == miniature.lines
    assert found.left_out.keys() == miniature.left_out.keys()
    assert all(reason.startswith(miniature.left_out[id]) for id, reason in found.left_out.items())


@pytest.mark.parametrize("name", ["messidor2", "ddsm", "covid", "chncxr"])
def test_without_an_official_split_70_10_20_are_drawn_and_groups_stay_whole(
    name: str, built: dict[str, Miniature], target: Path
) -> None:
    manifest = prepare(name, built[name].root, target, seed=3)
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for sample in manifest.samples:
        splits[sample.group or sample.id].add(sample.split)
    assert all(len(used) == 1 for used in splits.values())
    parts = [manifest.class_counts(split) for split in ("train", "val", "test")]
    total = np.sum(parts, axis=0)
    np.testing.assert_array_equal(parts, np.round(np.outer((0.7, 0.1, 0.2), total)))
    first = target.read_bytes()
    prepare(name, built[name].root, target, seed=4)
    assert target.read_bytes() != first


def test_missing_validation_images_are_an_eighth_of_the_training_images(
    built: dict[str, Miniature], target: Path
) -> None:
    manifest = prepare("isic2016", built["isic2016"].root, target)
    assert [manifest.class_counts(split) for split in ("train", "val", "test")] == [[10, 10], [2, 2], [5, 5]]
    assert all(("_Test_" in sample.id) == (sample.split == "test") for sample in manifest.samples)


def test_the_same_bytes_again_and_by_default_beside_the_images(built: dict[str, Miniature], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(built["covid"].root, root)
    written = []
    for _ in range(2):
        prepare("covid", root)
        written.append([(root / name).read_bytes() for name in ("manifest.csv", "left_out.csv")])
    assert written[0] == written[1]
    assert str(tmp_path).encode() not in b"".join(written[0])
    again = read_manifest(root, "manifest.csv", classes=DATASETS["covid"].classes)
    assert [sample.split for sample in again.samples] == [row[2] for row in lines(root / "manifest.csv")[1:]]


# What is refused


@pytest.mark.parametrize(("name", "piece"), PIECES)
def test_a_missing_piece(name: str, piece: str, built: dict[str, Miniature], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(built[name].root, root)
    path = located(root, piece.split("|")[0])
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError) as raised:
        prepare(name, root)
    message = str(raised.value)
    assert f"must hold {piece.replace('|', ' or ')}; " in message
    assert f"{root} holds {', '.join(sorted(p.name for p in root.iterdir())) or 'nothing'}." in message
    assert message.endswith(f"Get what is missing from {DATASETS[name].layouts[0].wanted.pieces[piece]}.")
    assert not (root / "manifest.csv").exists()


@pytest.mark.parametrize("name", DATASETS)
def test_the_folder_of_another_data_set(name: str, built: dict[str, Miniature], tmp_path: Path) -> None:
    for other, miniature in built.items():
        if other != name:
            with pytest.raises(DataError, match=rf"^{DATASETS[name].title}: .*must hold .* holds .*Get what"):
                DATASETS[name].samples(miniature.root)
    with pytest.raises(DataError, match=r"data of .* does not exist: get it from http"):
        prepare(name, tmp_path / "data")


def test_a_piece_that_is_there_twice(tmp_path: Path) -> None:
    for copy in ("first", "second"):
        build("chncxr", tmp_path / "data" / copy / "..")
        (tmp_path / "data" / "ChinaSet_AllFiles" / "ChinaSet_AllFiles").rename(tmp_path / "data" / copy)
        (tmp_path / "data" / "ChinaSet_AllFiles").rmdir()
    with pytest.raises(DataError, match=r"all of it is below .* more than once, as .*/first, .*/second: give"):
        prepare("chncxr", tmp_path / "data")


def test_a_split_that_nothing_usable_is_left_of_leaves_no_file(built: dict[str, Miniature], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(built["ddr"].root, root)
    (root / "manifest.csv").write_text("an older one")
    for path in (root / "DDR-dataset" / "DR_grading" / "valid").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"the split val without a usable image: .*unreadable.*; one by one in .*left_"):
        prepare("ddr", root)
    assert (root / "manifest.csv").read_text() == "an older one"
    assert sum(reason.startswith("unreadable") for _, reason in lines(root / "left_out.csv")) > 10
    assert sorted(path.name for path in root.iterdir()) == ["DDR-dataset", "__MACOSX", "left_out.csv", "manifest.csv"]


def test_a_split_without_a_file(built: dict[str, Miniature], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(built["ddr"].root, root)
    for path in (root / "DDR-dataset" / "DR_grading" / "valid").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"the split val without a usable image: .* a row in valid.txt, but no file"):
        prepare("ddr", root)


def test_a_class_without_a_file(tmp_path: Path) -> None:
    m = build("covid", tmp_path / "data")
    shutil.rmtree(m.root / "COVID_IEEE" / "virus")
    (m.root / "COVID_IEEE" / "virus").mkdir()
    with pytest.raises(DataError, match="leaves the class virus without a usable image"):
        prepare("covid", m.root)


def test_a_class_that_nothing_usable_is_left_of(tmp_path: Path) -> None:
    m = build("covid", tmp_path / "data")
    for path in (m.root / "COVID_IEEE" / "virus").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"COVID in .* leaves the class virus without a usable image: .*unreadable"):
        prepare("covid", m.root)


def test_nothing_usable_at_all(tmp_path: Path) -> None:
    for name in ("covid", "normal", "virus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"no image of COVID in .* is usable: 3 unreadable"):
        prepare("covid", tmp_path)


CHANGED_TABLES = [
    ("messidor2", "messidor_data.csv", "name,grade\nIM000001.JPG,0\n", "no column image_id or id_code, adjudicated_dr"),
    (
        "messidor2",
        "messidor_data.csv",
        "",
        "no column image_id or id_code, adjudicated_dr_grade or diagnosis, but nothing",
    ),
    ("messidor2", "messidor_data.csv", b"image_id\0\xff", "is no text"),
    ("messidor2", "messidor-2.csv", "left|right\na.png|b.png\n", "no column left, right, but left|right"),
    ("messidor2", "messidor-2.csv", "left;right\na.png\n", "line 2: 1 fields, but left, right are needed"),
    ("ddr", "train.txt", "007-0000-050.jpg 7\n", "the label of 007-0000-050.jpg is '7', not one of 0, 1, 2, 3, 4, 5"),
    ("ddr", "train.txt", "a.jpg 1\nA.JPG 2\n", "has 'A.JPG' more than once"),
    ("isic2016", "ISBI2016_ISIC_Part3_Test_GroundTruth.csv", "img_id,Label\n", "the label of img_id is 'Label'"),
    (
        "isic2018",
        "ISIC2018_Task3_Test_GroundTruth.csv",
        "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\nISIC_0024500,1,1,0,0,0,0,0\n",
        "ISIC_0024500 has 2 classes, not one",
    ),
]


@pytest.mark.parametrize(("name", "table", "content", "told"), CHANGED_TABLES)
def test_a_table_that_is_not_as_published(
    name: str, table: str, content: str | bytes, told: str, built: dict[str, Miniature], tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(built[name].root, root)
    path = located(root, table)
    if path.is_dir():
        path = located(path, table)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as raised:
        prepare(name, root)
    assert told in str(raised.value)
    assert path.name in str(raised.value)


def test_a_table_that_cannot_be_opened(built: dict[str, Miniature], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(built["ddr"].root, root)
    table = located(root, "train.txt")
    table.unlink()
    table.symlink_to(table)
    with pytest.raises(DataError, match=r"DDR: .*train.txt cannot be read: Too many levels of symbolic links"):
        DATASETS["ddr"].samples(root)


def test_cmmd_needs_pydicom(built: dict[str, Miniature], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install 'fpt-lightning\[dicom\]'"):
        DATASETS["cmmd"].samples(built["cmmd"].root)


def test_a_breast_with_two_diagnoses(built: dict[str, Miniature], tmp_path: Path) -> None:
    shutil.copytree(built["cmmd"].root, tmp_path / "data")
    rows = [["ID1", "LeftRight", "classification"], ["D1-0001", "L", "Benign"], ["D1-0001", "L", "Malignant"]]
    write_xlsx(tmp_path / "data" / "CMMD_clinicaldata_revision.xlsx", rows)
    with pytest.raises(DataError, match="the L breast of D1-0001 has two classifications"):
        DATASETS["cmmd"].samples(tmp_path / "data")


# Other places and copies


def label_of(name: str, root: Path, target: Path) -> dict[str, str]:
    """The manifest's labels by file name."""
    prepare(name, root, target)
    return {Path(row[0]).name: row[1] for row in lines(target)[1:]}


def test_the_classes_of_one_data_set_lie_in_one_folder(built: dict[str, Miniature], tmp_path: Path) -> None:
    """``data/covid`` is the folder that somebody unpacked into, not the class; a stray ``normal`` is another's."""
    alone = label_of("covid", built["covid"].root, tmp_path / "alone.csv")
    shutil.copytree(built["covid"].root, tmp_path / "data" / "covid")
    (tmp_path / "data" / "normal").mkdir()
    shutil.copy(next(built["covid"].root.rglob("*.PNG")), tmp_path / "data" / "normal" / "stray.png")
    assert label_of("covid", tmp_path / "data", tmp_path / "nested.csv") == alone
    assert set(Counter(alone.values())) == {"covid", "normal", "virus"}


def test_classes_in_several_folders_are_missing(built: dict[str, Miniature], tmp_path: Path) -> None:
    shutil.copytree(built["covid"].root, tmp_path / "data")
    shutil.move(tmp_path / "data" / "COVID_IEEE" / "virus", tmp_path / "data" / "virus")
    with pytest.raises(DataError, match="must hold virus/; "):
        prepare("covid", tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("ddr", "DDR-dataset/DR_grading"),
        ("messidor2", "IMAGES"),
        ("ddsm", "MINI-DDSM-Complete-JPEG-8"),
        ("chncxr", "ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png"),
        ("covid", "COVID_IEEE"),
    ],
)
def test_the_folder_may_be_the_unpacked_one_itself(
    name: str, inner: str, built: dict[str, Miniature], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = label_of(name, built[name].root, tmp_path / "outer.csv")
    assert label_of(name, built[name].root / inner, tmp_path / "inner.csv") == outer
    ids = [row[0] for row in lines(tmp_path / "inner.csv")[1:]]
    assert all((built[name].root / inner / id).is_file() for id in ids)
    monkeypatch.chdir(built[name].root / inner)
    assert label_of(name, Path(), tmp_path / "here.csv") == outer


@pytest.mark.parametrize(("separator", "encoding"), [(";", "utf-8"), ("\t", "utf-16"), (",", "cp1252")])
def test_tables_of_any_separator(
    separator: str, encoding: str, built: dict[str, Miniature], tmp_path: Path, target: Path
) -> None:
    """As spreadsheet programs save them again."""
    plain = label_of("messidor2", built["messidor2"].root, target)
    shutil.copytree(built["messidor2"].root, tmp_path / "data")
    for name, own in (("messidor_data.csv", ","), ("messidor-2.csv", ";")):
        path = tmp_path / "data" / name
        text = path.read_text("utf-8-sig").replace(own, separator)
        path.write_text(text, encoding)
    assert label_of("messidor2", tmp_path / "data", target) == plain
    shutil.copytree(built["ddr"].root, tmp_path / "ddr")
    for part in ("train", "valid", "test"):
        path = tmp_path / "ddr" / "DDR-dataset" / "DR_grading" / f"{part}.txt"
        path.write_text(path.read_text().replace(" ", separator), encoding)
    assert label_of("ddr", tmp_path / "ddr", target) == label_of("ddr", built["ddr"].root, tmp_path / "b.csv")


def test_cmmd_in_several_parts(built: dict[str, Miniature], tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    shutil.copytree(built["cmmd"].root, tmp_path / "data")
    first, second = (tmp_path / "data" / f"manifest-{number}" / "CMMD" for number in (1616439774456, 1616439774457))
    second.mkdir(parents=True)
    for patient in ("D1-0003", "D1-0004"):
        shutil.move(first / patient, second / patient)
    found, _ = DATASETS["cmmd"].samples(tmp_path / "data")
    assert len(found.samples) == len(built["cmmd"].lines)
    assert {sample.group for sample in found.samples} == {line[3] for line in built["cmmd"].lines}


@pytest.mark.parametrize("name", ["HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata"])
def test_lesions_from_the_metadata_of_ham10000(
    name: str, built: dict[str, Miniature], tmp_path: Path, target: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(built["isic2018"].root, root)
    table = root / "ISIC2018_Task3_Training_LesionGroupings.csv"
    rows = [row.split(",") for row in table.read_text().splitlines()[1:]]
    table.unlink()
    separator = "\t" if name.endswith(".tab") else ","
    listed = [["lesion_id", "image_id", "dx"], *([lesion, image, "nv"] for image, lesion, _ in rows)]
    (root / name).write_text("\n".join(separator.join(row) for row in listed))
    prepare("isic2018", root, target)
    assert [(row[0], row[3]) for row in lines(target)[1:]] == [(line[0], line[3]) for line in built["isic2018"].lines]
    assert f"no row in {name}" in target.with_name("left_out.csv").read_text()


def copied(
    plain: Mapping[str, str], images: Path, folder: Path, table: Path, more: Mapping[str, str] | None = None
) -> None:
    """Graded images in one folder and one table, as Kaggle's copies have them; ``more`` columns of one value."""
    folder.mkdir(parents=True)
    for path in images.rglob("*"):
        if path.name in plain:
            shutil.copy(path, folder)
    constant = more or {}
    rows = [(name, str(DR_GRADES.index(grade)), *constant.values()) for name, grade in plain.items()]
    table.write_text("\n".join(",".join(row) for row in [("id_code", "diagnosis", *constant), *rows]))


def test_the_copy_of_ddr_in_one_folder(
    built: dict[str, Miniature], tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = label_of("ddr", built["ddr"].root, target)
    images = built["ddr"].root / "DDR-dataset" / "DR_grading"
    copied(plain, images, tmp_path / "data" / "DR_grading" / "DR_grading", tmp_path / "data" / "DR_grading.csv")
    capsys.readouterr()
    manifest = prepare("ddr", tmp_path / "data", target)
    assert "this copy has neither the official split nor the ungradable images" in capsys.readouterr().out
    assert {Path(row[0]).name: row[1] for row in lines(target)[1:]} == plain
    shares = [sum(manifest.class_counts(split)) / len(plain) for split in ("train", "test")]
    np.testing.assert_allclose(shares, [0.7, 0.2], atol=0.05)


def test_the_copy_of_messidor2_without_pairs(
    built: dict[str, Miniature], tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = label_of("messidor2", built["messidor2"].root, target)
    folder, table = tmp_path / "data" / "messidor-2" / "preprocess", tmp_path / "data" / "messidor_data.csv"
    more = {"adjudicated_dme": "0", "adjudicated_gradable": "1"}
    copied(plain, built["messidor2"].root / "IMAGES", folder, table, more)
    capsys.readouterr()
    prepare("messidor2", tmp_path / "data", target)
    assert "both eyes of an examination may come into different splits" in capsys.readouterr().out
    assert {Path(row[0]).name: row[1] for row in lines(target)[1:]} == plain


@pytest.mark.parametrize(("name", "here", "usable"), [("covid", 33, 30), ("chncxr", 41, 40), ("ddr", 46, 40)])
def test_usable_images_are_counted_apart_from_those_that_are_here(
    name: str,
    here: int,
    usable: int,
    built: dict[str, Miniature],
    target: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A table's row without a file, other data sets' images, and what is no image are not here."""
    prepare(name, built[name].root, target)
    said = capsys.readouterr().out
    assert f": {here} images here, " in said
    assert f"\n{usable} are usable, and in " in said


# Recipes and examples


@pytest.mark.parametrize("name", DATASETS)
def test_a_recipe_is_complete_and_has_an_example(name: str) -> None:
    recipe = DATASETS[name]
    described = importlib.import_module(f"fpt_lightning.datasets.{name}").__doc__
    assert recipe.source in described
    assert recipe.url.startswith("https://")
    settings = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    assert settings["data"]["init_args"]["classes"] == list(recipe.classes)
    assert settings["data"]["init_args"]["manifest"] == "manifest.csv"
    assert settings["model"]["init_args"]["num_classes"] == len(recipe.classes)


# The command line


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_list_fits_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    main(["datasets", "list"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 120
    for recipe in DATASETS.values():
        for told in (recipe.name, f"{recipe.images:,}", recipe.modality, recipe.licence, recipe.url):
            assert told in said


def test_help_names_the_commands_without_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    for args, told in ((["--help"], "datasets"), (["datasets", "--help"], "prepare")):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert not stopped.value.code
        assert told in capsys.readouterr().out


def test_what_the_command_line_refuses(
    built: dict[str, Miniature], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no data set 'DDR': choose one of ddr, messidor2" in fails(
        capsys, "datasets", "prepare", "DDR", "."
    )
    told = fails(capsys, "datasets", "prepare", "ddr", built["covid"].root)
    assert told.startswith("fpt-lightning: DataError: DDR: ")
    assert told.count("\n") == 1
    nowhere = tmp_path / "nowhere" / "manifest.csv"
    told = fails(capsys, "datasets", "prepare", "chncxr", built["chncxr"].root, "--manifest", nowhere)
    assert f"nothing can be written in the folder {nowhere.parent}: give another --manifest" in told
    assert "prepare" in fails(capsys, "datasets")


def test_from_the_owners_folders_to_a_trained_model(built: dict[str, Miniature], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(built["chncxr"].root, root)
    main(["datasets", "prepare", "chncxr", str(root), "--seed", "1"])
    main(
        f"fit --config {EXAMPLES / 'chncxr.yaml'} --data.root {root} --data.store {tmp_path / 'store.zarr'}"
        f" --trainer.default_root_dir {tmp_path / 'run'} --trainer.max_epochs 1 --trainer.accelerator cpu"
        " --data.resolution 64 --data.image_size 48 --data.batch_size 8"
        " --model.encoder test_vit --model.pretrained false --model.side_resolution 32".split()
    )
    assert 0 <= json.loads((tmp_path / "run" / "metrics.json").read_text())["best"]["test_auc"] <= 1
    tested = {row[0] for row in lines(tmp_path / "run" / "predictions.csv")[1:]}
    assert tested == {row[0] for row in lines(root / "manifest.csv") if row[2] == "test"}


def test_a_piece_behind_a_link_is_found(built: dict[str, Miniature], tmp_path: Path) -> None:
    """As in data roots: archives often lie on another disk."""
    root, elsewhere = tmp_path / "data", tmp_path / "disk"
    shutil.copytree(built["ddr"].root, root)
    valid = root / "DDR-dataset" / "DR_grading" / "valid"
    shutil.move(valid, elsewhere)
    valid.symlink_to(elsewhere)
    (elsewhere / "deeper").mkdir()
    plain = prepare("ddr", built["ddr"].root, tmp_path / "plain.csv")
    linked = prepare("ddr", root)
    assert [sample.id for sample in linked.samples] == [sample.id for sample in plain.samples]
