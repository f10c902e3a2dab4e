"""Damaged images, tables and folders: each is one clear error that names it, and leaves nothing half-written."""

from __future__ import annotations

import os
import shutil
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from dicom_files import BUNDLED, dataset
from dicom_files import write as write_dicom
from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.data.images import read_image
from fpt_lightning.data.manifest import Sample
from fpt_lightning.data.sources import list_images, read_manifest
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.errors import DataError, ImageError
from fpt_lightning.store.damage import check_present
from fpt_lightning.store.store import FeatureStore

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (32, 48, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (32, 48), np.uint16)


def refused(path: Path | str, *words: str) -> None:
    """The file is refused with one message, which holds its path and the words."""
    with pytest.raises(ImageError) as error:
        read_image(path)
    message = str(error.value)
    assert not [word for word in (str(path), *words) if word not in message], message


# Images cut off

PICTURES: dict[str, dict[str, Any]] = {
    "a.jpg": {"quality": 95},
    "progressive.jpg": {"quality": 95, "progressive": True},
    "a.png": {},
    "deep.png": {},
    "a.tif": {},
    "deep.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "a.bmp": {},
    "a.webp": {"lossless": True},
}


def picture(folder: Path, name: str) -> Path:
    Image.fromarray(DEEP if name.startswith("deep") else PIXELS).save(folder / name, **PICTURES[name])
    return folder / name


@pytest.mark.filterwarnings("ignore")  # Pillow's and pydicom's, before they give up
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_cut_off(tmp_path: Path, name: str, share: float) -> None:
    path = picture(tmp_path, name)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "cannot be read")


def dicom(folder: Path, name: str) -> Path:
    path = folder / "a.dcm"
    if name.endswith(".dcm"):
        return Path(shutil.copy(BUNDLED / name, path))
    file = dataset(DEEP)
    if name == "run-length":
        file.compress(RLELossless, encoding_plugin="pydicom")
    if name == "deflated":
        file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return write_dicom(path, file)


DICOM = ["plain", "run-length", "deflated", "MR_small_jp2klossless.dcm", "SC_rgb_dcmtk_+eb+cr.dcm"]


@pytest.mark.filterwarnings("ignore")  # Pillow's and pydicom's, before they give up
@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("name", DICOM)
def test_a_dicom_file_cut_off(tmp_path: Path, name: str, share: float) -> None:
    path = dicom(tmp_path, name)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path)


@pytest.mark.parametrize("name", ["a.png", "deep.png", "lzw.tif"])
def test_a_picture_with_a_hole(tmp_path: Path, name: str) -> None:
    path = picture(tmp_path, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    path.write_bytes(content)
    refused(path, "cannot be read")


# Files of another kind

OTHER_KINDS = {
    "empty": b"",
    "one zero": b"\0",
    "zeros": bytes(4096),
    "noise": RNG.bytes(4096),
    "text": b"patient,grade\n1,2\n",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "json": b'{"error": "rate limit exceeded"}',
    "zip": b"PK\3\4\x14\0\0\0\x08\0" + RNG.bytes(500),
    "gzip": b"\x1f\x8b\x08\0" + RNG.bytes(500),
    "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< >>\nendobj\n",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "nifti": struct.pack("<i", 348) + bytes(344),
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".webp", ".dcm"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_of_another_kind(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(OTHER_KINDS[kind])
    refused(path, "not DICOM" if suffix == ".dcm" else "cannot be read")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".webp", ".PNG", ""])
@pytest.mark.parametrize("name", ["a.png", "deep.tif", "a.webp"])
def test_a_picture_named_as_another_kind_is_read(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"renamed{suffix}"
    shutil.move(picture(tmp_path, name), path)
    expected = np.repeat(DEEP[..., None], 3, 2) if name.startswith("deep") else PIXELS
    np.testing.assert_array_equal(read_image(path), expected)


def test_a_picture_named_as_dicom(tmp_path: Path) -> None:
    refused(Path(shutil.move(picture(tmp_path, "a.png"), tmp_path / "b.dcm")), "not DICOM")


# Sizes that would fill the memory

SIDE = 60_000


def huge_png(path: Path) -> None:
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def huge_bmp(path: Path) -> None:
    content = bytearray(picture(path.parent, "a.bmp").read_bytes())
    content[18:26] = struct.pack("<ii", SIDE, SIDE)
    path.write_bytes(content)


def huge_jpg(path: Path) -> None:
    content = bytearray(picture(path.parent, "a.jpg").read_bytes())
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", SIDE, SIDE)
    path.write_bytes(content)


def huge_tif(path: Path) -> None:
    Image.new("L", (SIDE, 1)).save(path)
    path.write_bytes(
        path.read_bytes().replace(struct.pack("<HHII", 257, 4, 1, 1), struct.pack("<HHII", 257, 4, 1, SIDE))
    )


def huge_dcm(path: Path) -> None:
    file = dataset(DEEP)
    file.Rows = file.Columns = SIDE
    write_dicom(path, file)


def huge_run_length_dcm(path: Path) -> None:
    file = dataset(DEEP)
    file.compress(RLELossless, encoding_plugin="pydicom")
    file.Rows = file.Columns = SIDE
    write_dicom(path, file)


@pytest.mark.parametrize("make", [huge_png, huge_bmp, huge_jpg, huge_tif, huge_dcm, huge_run_length_dcm])
def test_a_small_file_that_says_it_is_huge(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / f"huge.{make.__name__.rpartition('_')[2]}"
    make(path)
    refused(path, f"{SIDE} x {SIDE} pixels: too many" if path.suffix == ".dcm" else "data.max_pixels")


# Headers of DICOM files

FAULTS: dict[str, dict[str, Any]] = {
    "no rows": {"Rows": None},
    "fewer pixels than said": {"Rows": 64},
    "no bits allocated": {"BitsAllocated": None},
    "more bits stored than allocated": {"BitsStored": 20},
    "odd bits allocated": {"BitsAllocated": 12},
    "two samples": {"SamplesPerPixel": 2},
    "three samples of grey": {"SamplesPerPixel": 3},
    "unknown photometric": {"PhotometricInterpretation": "GREY"},
    "no photometric": {"PhotometricInterpretation": None},
    "unknown window": {"WindowCenter": 10, "WindowWidth": 5, "VOILUTFunction": "CUBIC"},
    "no pixels": {"PixelData": None},
    "empty pixels": {"PixelData": b""},
    "more frames than there are": {"NumberOfFrames": 9},
    "palette without a table": {"PhotometricInterpretation": "PALETTE COLOR"},
}


@pytest.mark.filterwarnings("ignore")  # pydicom's, of what it writes here
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_dicom_header(tmp_path: Path, fault: str) -> None:
    file = dataset(DEEP)
    for keyword, value in FAULTS[fault].items():
        if value is None:
            delattr(file, keyword)
        else:
            setattr(file, keyword, value)
    refused(write_dicom(tmp_path / "a.dcm", file))


# What a path may be


def missing(path: Path) -> None:
    """Nothing is there."""


def folder(path: Path) -> None:
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def links_in_a_circle(path: Path) -> None:
    path.symlink_to("other.png")
    (path.parent / "other.png").symlink_to(path.name)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere.png")


def link_to_a_folder(path: Path) -> None:
    path.symlink_to(".")


PLACES = [missing, folder, link_to_itself, links_in_a_circle, link_to_nothing, link_to_a_folder]


@pytest.mark.parametrize("suffix", [".png", ".dcm", ".dcm#2"])
@pytest.mark.parametrize("make", PLACES)
def test_a_path_without_a_readable_file(tmp_path: Path, make: Callable[[Path], None], suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    make(Path(str(path).partition("#")[0]))
    refused(path)


@pytest.mark.parametrize("name", ["x" * 400 + ".png", "a\0b.png", "#", "#3", "a.png#"])
def test_a_name_that_no_file_has(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = picture(tmp_path, "a.png")
    path.chmod(0)
    refused(path, "PermissionError")


NAMES = [
    "ü.png",
    "é.jpg",
    "図.png",
    "😀.png",
    "a b.png",
    "a#2.png",
    "100%.png",
    "a,b.png",
    'say "a".png',
    "a.b.PNG",
    "-a.png",
]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", NAMES)
def test_unusual_names_are_read_and_listed(tmp_path: Path, name: str, form: Any) -> None:
    name = unicodedata.normalize(form, name)
    Image.fromarray(PIXELS).save(tmp_path / name, format="png")
    assert list_images(tmp_path).samples == (Sample(name),)
    np.testing.assert_array_equal(read_image(tmp_path / name), PIXELS)


# Tables

HEADER = "image,label,split\n"
ROWS = "1.png,a,train\n2.png,b,train\n3.png,a,val\n4.png,b,val\n5.png,a,test\n6.png,b,test\n"
TABLE = HEADER + ROWS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six files of images, as far as a manifest looks, and a folder."""
    for number in range(1, 7):
        (tmp_path / f"{number}.png").touch()
    (tmp_path / "folder.png").mkdir()
    return tmp_path


FINE = {
    "byte order mark": ("\ufeff" + TABLE).encode(),
    "carriage returns": TABLE.replace("\n", "\r\n").encode(),
    "old carriage returns": TABLE.replace("\n", "\r").encode(),
    "blank lines": TABLE.replace("3.png", "\n\n3.png").encode(),
    "no newline at the end": TABLE.strip().encode(),
    "semicolons": TABLE.replace(",", ";").encode(),
    "tabs": TABLE.replace(",", "\t").encode(),
    "UTF-16": TABLE.encode("utf-16"),
    "UTF-16 without mark": TABLE.encode("utf-16-le"),
    "quotes": TABLE.replace("1.png", '"1.png"').encode(),
    "mixed case of splits": TABLE.replace("train", "TRAIN").replace("val", "Valid").replace("test", "Test").encode(),
    "spaces around values": TABLE.replace("1.png,a,train", " 1.png , a , train ").encode(),
    "backslashes": TABLE.replace("1.png", ".\\1.png").encode(),
    "another column": TABLE.replace("\n", ",x\n").encode(),
}


@pytest.mark.parametrize("case", FINE)
def test_a_table_that_is_fine(root: Path, case: str) -> None:
    (root / "table.csv").write_bytes(FINE[case])
    manifest = read_manifest(root, "table.csv")
    assert [sample.id for sample in manifest.samples] == [f"{number}.png" for number in range(1, 7)]
    assert [sample.split for sample in manifest.samples] == ["train", "train", "val", "val", "test", "test"]
    assert [sample.label for sample in manifest.samples] == [0, 1] * 3


NO_UTF8 = "not a CSV file in UTF-8"
TABLES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("no row",)),
    "a newline": (b"\n", ("no row",)),
    "zeros": (bytes(300), (NO_UTF8, "NUL")),
    "header alone": (HEADER.encode(), ("no row",)),
    "header of two columns": (TABLE.replace(",split", "").encode(), ("line 2", "number of fields")),
    "UTF-32": (TABLE.encode("utf-32"), (NO_UTF8,)),
    "NUL in a cell": (TABLE.replace("3.png", "3\0.png").encode(), (NO_UTF8, "NUL")),
    "NUL in the header": (TABLE.replace("label", "la\0bel").encode(), (NO_UTF8, "NUL")),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", (NO_UTF8,)),
    "a spreadsheet": (OTHER_KINDS["zip"], ("no text in UTF-8, UTF-16 or Windows-1252",)),
    "a web page": (b"<html>\n<body>404, Not Found</body>\n</html>\n", ("line 2", "number of fields")),
    "a pointer": (OTHER_KINDS["pointer"], ("no column 'image'", "git-lfs")),
    "an open quote": (TABLE.replace("6.png", '"6.png').encode(), (NO_UTF8, "unexpected end")),
    "a stray quote": (TABLE.replace("3.png", '"3"x.png').encode(), (NO_UTF8, "expected after")),
    "an endless cell": (TABLE.replace("3.png", "x" * 200_000).encode(), (NO_UTF8, "field larger")),
    "a short row": (TABLE.replace("3.png,a,val", "3.png,a").encode(), ("line 4", "number of fields")),
    "a long row": (TABLE.replace("3.png,a,val", "3.png,a,val,x").encode(), ("line 4", "number of fields")),
    "a short row after blank lines": (
        TABLE.replace("3.png,a,val", "\n\n3.png,a").encode(),
        ("line 6", "number of fields"),
    ),
    "no header": (ROWS.encode(), ("no column 'image'", "1.png")),
    "header in capitals": (TABLE.replace("image", "Image").encode(), ("no column 'image'", "Image")),
    "header with spaces": (TABLE.replace(",label", ", label").encode(), ("no column 'label'",)),
    "no image column": (TABLE.replace("image", "file").encode(), ("no column 'image'", "file, label, split")),
    "no label column": (TABLE.replace("label", "grade").encode(), ("no column 'label'", "image, grade, split")),
    "a column twice": (TABLE.replace("split", "label").encode(), ("several columns named label",)),
    "an image twice": (TABLE.replace("2.png", "1.png").encode(), ("1 images more than once", "1.png")),
    "an image twice by another path": (TABLE.replace("2.png", "./1.png").encode(), ("more than once", "1.png")),
    "an absolute path": (TABLE.replace("3.png", "/data/3.png").encode(), ("line 4", "'/data/3.png'", "below")),
    "a path upwards": (TABLE.replace("3.png", "../3.png").encode(), ("line 4", "'../3.png'", "below")),
    "a path upwards inside": (TABLE.replace("3.png", "x/../../3.png").encode(), ("line 4", "below")),
    "a drive": (TABLE.replace("3.png", "C:\\3.png").encode(), ("1 of 6", "do not exist", "C:/3.png")),
    "an address": (TABLE.replace("3.png", "https://x.org/3.png").encode(), ("1 of 6", "x.org/3.png")),
    "no path": (TABLE.replace("3.png", "").encode(), ("line 4", "''", "below")),
    "the folder itself": (TABLE.replace("3.png", ".").encode(), ("line 4", "'.'", "below")),
    "a folder": (TABLE.replace("3.png", "folder.png").encode(), ("1 of 6", "do not exist", "folder.png")),
    "a missing image": (TABLE.replace("3.png", "9.png").encode(), ("1 of 6", "do not exist", "9.png")),
    "a name in capitals": (TABLE.replace("3.png", "3.PNG").encode(), ("1 of 6", "do not exist", "3.PNG")),
    "a missing file of a page": (TABLE.replace("3.png", "9.dcm#3").encode(), ("1 of 6", "9.dcm#3")),
    "an endless name": (TABLE.replace("3.png", "x" * 5000).encode(), ("1 of 6", "do not exist")),
    "an endless page": (TABLE.replace("3.png", "3.png#" + "9" * 5000).encode(), ("1 of 6", "do not exist")),
    "no label": (TABLE.replace("3.png,a", "3.png,").encode(), ("line 4", "'label'", "empty")),
    "an unknown split": (TABLE.replace("3.png,a,val", "3.png,a,held").encode(), ("line 4", "'held'")),
    "no split": (TABLE.replace("3.png,a,val", "3.png,a,").encode(), ("line 4", "''", "train, val or test")),
    "a split without images": (TABLE.replace("test", "train").encode(), ("test", "empty")),
    "one class": (TABLE.replace(",b,", ",a,").encode(), ("one class only", "'a'")),
    "labels in capitals": (TABLE.replace("5.png,a", "5.png,A").encode(), ("upper and lower case", "A, a")),
    "labels in two Unicode forms": (
        TABLE.replace(",a,", ",e\u0301,").replace(",b,", ",\u00e9,").encode(),
        ("Unicode form",),
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_cannot_be_used(root: Path, case: str) -> None:
    content, words = TABLES[case]
    (root / "table.csv").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_manifest(root, "table.csv")
    message = str(error.value)
    about_the_data = case in ("a split without images", "one class") or case.startswith("labels")
    assert not [word for word in words if word not in message], message
    assert about_the_data or str(root / "table.csv") in message, message


@pytest.mark.parametrize("labels", [["a"], ["a", "c"], ["a", "a", "b"], []])
def test_classes_that_are_not_those_of_the_table(root: Path, labels: list[str]) -> None:
    (root / "table.csv").write_text(TABLE)
    with pytest.raises(DataError, match=r"data\.classes is .* but the labels are \['a', 'b'\]"):
        read_manifest(root, "table.csv", classes=labels)


@pytest.mark.parametrize("make", PLACES)
def test_a_table_that_is_no_file(root: Path, make: Callable[[Path], None]) -> None:
    make(root / "table.csv")
    with pytest.raises(DataError, match=r"table\.csv does not exist"):
        read_manifest(root, "table.csv")


@pytest.mark.parametrize("name", ["x" * 400, "a\0b"])
def test_a_table_of_an_impossible_name(root: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_manifest(root, name)


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_table_in_another_unicode_form_than_the_files(root: Path, written: Any, stored: Any) -> None:
    (root / unicodedata.normalize(stored, "é.png")).touch()
    table = TABLE.replace("3.png", unicodedata.normalize(written, "é.png"))
    (root / "table.csv").write_text(table, encoding="utf-8")
    with pytest.raises(DataError, match=r"1 of 6 .* another Unicode form"):
        read_manifest(root, "table.csv")


# Folders


@pytest.mark.parametrize("read", [read_manifest, list_images])
@pytest.mark.parametrize("name", ["nowhere", "x" * 400, "a\0b", "file.png", "loop", "~nobody-of-that-name/x"])
def test_a_root_that_is_no_folder(tmp_path: Path, name: str, read: Callable[[Path | str], Any]) -> None:
    (tmp_path / "file.png").touch()
    (tmp_path / "loop").symlink_to("loop")
    given = name if name.startswith("~") else str(tmp_path / name)
    with pytest.raises(DataError) as error:
        read(given)
    assert repr(given) in str(error.value)


def class_folders(root: Path) -> Path:
    for name in "ab":
        (root / name).mkdir()
        for number in range(8):
            (root / name / f"{number}.png").touch()
    return root


@pytest.mark.parametrize("target", [".", "..", "../..", "../b"])
def test_links_between_folders_never_end_in_a_circle(tmp_path: Path, target: str) -> None:
    root = class_folders(tmp_path)
    (root / "a" / "link").symlink_to(target)
    if target == "../b":
        (root / "b" / "link").symlink_to("../a")
    for read in (read_manifest, list_images):
        with pytest.raises(DataError, match=r"link is a link to a folder that it lies in"):
            read(root)


def test_linked_folders_are_read(tmp_path: Path) -> None:
    real = class_folders(tmp_path)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in "ab":
        (linked / name).symlink_to(real / name)
    assert len(read_manifest(linked).samples) == len(list_images(linked).samples) == 16


def test_folders_named_like_images_are_folders(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    (root / "a" / "more.png").mkdir()
    (root / "a" / "more.png" / "9.png").touch()
    assert "a/more.png/9.png" in {sample.id for sample in read_manifest(root).samples}


def test_a_class_without_an_image(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"without an image: empty"):
        read_manifest(root)


def test_classes_in_mixed_case(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    (root / "b").rename(root / "A")
    with pytest.raises(DataError, match="upper and lower case"):
        read_manifest(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    (root / "a").chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            read_manifest(root)
    finally:
        (root / "a").chmod(0o755)


# Nothing half-written

ENCODER = EncoderConfig("test_vit", pretrained=False)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def turned_to_text(path: Path) -> None:
    path.write_text("404 Not Found")


def turned_to_dicom_without_pixels(path: Path) -> None:
    shutil.copy(BUNDLED / "test-SR.dcm", path)


def turned_to_a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("statistics", ["auto", [0.4]])
@pytest.mark.parametrize(
    "damage",
    [cut_off, emptied, turned_to_text, turned_to_dicom_without_pixels, huge_png, turned_to_a_link_to_itself],
)
def test_a_damaged_image_leaves_no_store_or_one_that_the_next_preload_completes(
    image_root: Path,
    tiny_data: Callable[..., PreloadedFeatureDataModule],
    damage: Callable[[Path], None],
    statistics: Any,
) -> None:
    data = tiny_data(mean=statistics, std=statistics if statistics == "auto" else [0.2])
    path = image_root / data.read_manifest().split("train")[-1].id
    content = path.read_bytes()
    damage(path)
    with pytest.raises(ImageError, match=str(path)):
        data.preload(ENCODER)
    assert FeatureStore.exists(data.url) == (statistics != "auto")
    path.unlink()
    path.write_bytes(content)
    store = data.preload(ENCODER)
    assert store.missing([sample.id for sample in data.labelled.samples]) == []
    check_present(store)
