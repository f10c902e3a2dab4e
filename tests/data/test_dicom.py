"""DICOM files: generated ones with what each rule must give, worked out by hand, and those that pydicom brings."""

from __future__ import annotations

import builtins
import csv
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from dicom_files import BUNDLED, dataset, write
from fpt_lightning import ImageDataModule, Predictor, PreloadedFeatureDataModule
from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.data.images import ImageReader, read_image
from fpt_lightning.data.notices import ImageNotice
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.data.statistics import channel_statistics
from fpt_lightning.data.transforms import stored_copy
from fpt_lightning.errors import CheckpointError, ConfigurationError, ImageError, StaleStoreError
from small import quiet_trainer, tiny_model

FULL = 65535


def values(tmp_path: Path, pixels: NDArray[Any], **options: Any) -> list[int]:
    """What the first row of grey pixels is read as."""
    image = read_image(write(tmp_path / "a.dcm", dataset(pixels, **options)))
    assert image.shape == (*pixels.shape[:2], 3)
    assert (image == image[..., :1]).all()
    row: list[int] = image[0, :, 0].tolist()
    return row


def lookup(first: int, bits: int, entries: list[int]) -> list[Dataset]:
    table = Dataset()
    table.LUTDescriptor = [len(entries), first, bits]
    table.add_new("LUTData", "US", entries)
    return [table]


def refused(path: Path | str, *words: str) -> None:
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert not [word for word in (str(path).partition("#")[0], *words) if word not in str(error.value)], error.value


# Modality


def test_eight_bits_without_rescale_and_window_are_shown_as_they_are(tmp_path: Path) -> None:
    assert values(tmp_path, np.array([[10, 20, 200]], np.uint8)) == [10, 20, 200]


def test_six_of_eight_bits_fill_the_scale(tmp_path: Path) -> None:
    assert values(tmp_path, np.array([[0, 21, 63]], np.uint8), bits=6) == [0, 85, 255]


def test_more_bits_fill_the_scale_from_least_to_greatest(tmp_path: Path) -> None:
    assert values(tmp_path, np.array([[100, 200, 1100]], np.uint16), bits=12) == [0, 6554, FULL]


def test_a_constant_image_is_black(tmp_path: Path) -> None:
    assert values(tmp_path, np.full((1, 3), 700, np.uint16)) == [0, 0, 0]


def test_the_window_is_in_rescaled_units(tmp_path: Path) -> None:
    """-1024 is 0 Hounsfield units off: stored 1024 to 1124 is 0 to 100, the window."""
    pixels = np.array([[0, 1024, 1049, 1074, 1124, 3000]], np.uint16)
    window = {"WindowCenter": 50, "WindowWidth": 100, "VOILUTFunction": "LINEAR_EXACT"}
    assert values(tmp_path, pixels, RescaleSlope=1, RescaleIntercept=-1024, **window) == [
        0, 0, 16384, 32768, FULL, FULL
    ]  # fmt: skip


def test_a_negative_slope_turns_the_scale(tmp_path: Path) -> None:
    pixels = np.array([[0, 50, 100]], np.uint16)
    assert values(tmp_path, pixels, RescaleSlope=-2, RescaleIntercept=10) == [FULL, 32768, 0]
    window = {"WindowCenter": -90, "WindowWidth": 200, "VOILUTFunction": "LINEAR_EXACT"}
    assert values(tmp_path, pixels, RescaleSlope=-2, RescaleIntercept=10, **window) == [FULL, 32768, 0]


def test_a_modality_table(tmp_path: Path) -> None:
    """Values below the first entry and above the last one take those."""
    pixels = np.array([[0, 2, 3, 4, 255]], np.uint8)
    table = lookup(2, 16, [0, 1000, 4000])
    assert values(tmp_path, pixels, ModalityLUTSequence=table) == [0, 0, 64, 255, 255]


def test_signed_pixels(tmp_path: Path) -> None:
    assert values(tmp_path, np.array([[-1000, 0, 1000]], np.int16)) == [0, 32768, FULL]
    assert values(tmp_path, np.array([[-100, 0, 100]], np.int8)) == [0, 128, 255]


# Values of interest


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR", [0, 0, 33098, FULL]),  # ((x - 99.5) / 99 + 0.5) from 50 up to 149
        ("LINEAR_EXACT", [0, 0, 32768, FULL]),  # (x - 50) / 100
        ("SIGMOID", [1179, 7812, 32768, 64356]),  # 1 / (1 + exp(-4 (x - 100) / 100))
        (None, [0, 0, 33098, FULL]),
    ],
)
def test_windows(tmp_path: Path, function: str | None, expected: list[int]) -> None:
    elements = {} if function is None else {"VOILUTFunction": function}
    pixels = np.array([[0, 50, 100, 200]], np.uint16)
    assert values(tmp_path, pixels, WindowCenter=100, WindowWidth=100, **elements) == expected


def test_a_window_on_eight_bits_stays_eight_bits(tmp_path: Path) -> None:
    window = {"WindowCenter": 100, "WindowWidth": 100, "VOILUTFunction": "LINEAR_EXACT"}
    assert values(tmp_path, np.array([[0, 75, 125, 200]], np.uint8), **window) == [0, 64, 191, 255]


def test_the_first_of_several_windows(tmp_path: Path) -> None:
    pixels = np.array([[0, 50, 100, 200]], np.uint16)
    windows = {"WindowCenter": [100, 500], "WindowWidth": [100, 900], "VOILUTFunction": "LINEAR_EXACT"}
    assert values(tmp_path, pixels, **windows) == [0, 0, 32768, FULL]


def test_an_empty_window_is_none(tmp_path: Path) -> None:
    empty = {"WindowCenter": None, "WindowWidth": None, "RescaleSlope": None, "RescaleIntercept": None}
    assert values(tmp_path, np.array([[0, 50, 100]], np.uint16), **empty) == [0, 32768, FULL]


@pytest.mark.parametrize("bits", [8, 12])
def test_a_table_goes_before_a_window(tmp_path: Path, bits: int) -> None:
    """300 is beyond what positions of 8 bits, the depth of the entries, could hold."""
    top = 2**bits - 1
    table = lookup(100, bits, [0] * 200 + [top // 5] * 1 + [top])
    pixels = np.array([[0, 299, 300, 301, 4000]], np.uint16)
    elements = {"VOILUTSequence": table, "WindowCenter": 1, "WindowWidth": 2}
    assert values(tmp_path, pixels, **elements) == [0, 0, 13107, FULL, FULL]


@pytest.mark.parametrize(
    ("declared", "top"),
    [(16, 4095), (16, 255), (12, 4095), (8, 4095), (8, 65535), (10, 1023), (16, 65535)],
    ids=["12 of 16", "8 of 16", "12", "12 of 8", "16 of 8", "10", "16"],
)
def test_entries_are_scaled_by_the_bits_that_they_use(tmp_path: Path, declared: int, top: int) -> None:
    """What is declared is often the size of the words: 12 bits of 16 would be nearly black."""
    table = lookup(0, declared, [0, (top + 1) // 2, top])
    found = values(tmp_path, np.array([[0, 1, 2]], np.uint16), VOILUTSequence=table)
    assert found == [0, round((top + 1) // 2 / top * FULL), FULL]


@pytest.mark.parametrize("big", [False, True], ids=["little", "big"])
@pytest.mark.parametrize("size", [1, 2])
def test_tables_as_bytes_in_the_order_of_the_file(tmp_path: Path, size: int, big: bool) -> None:
    """Of bytes, two are in a word, the lower one first."""
    entries = np.array([0, 51, 255, 102], np.uint8).astype(f"<u{size}") * (257 if size == 2 else 1)
    item = Dataset()
    item.LUTDescriptor = [4, 0, 8 * size]
    words = np.frombuffer(entries.tobytes(), "<u2")
    item.add_new("LUTData", "OW", words.astype(">u2" if big else "<u2").tobytes())
    pixels = np.array([[0, 1, 2, 3]], np.uint16)
    file = dataset(pixels, VOILUTSequence=[item])
    if big:
        file.PixelData = pixels.astype(">u2").tobytes()
        as_big_endian(file)
    image = read_image(write(tmp_path / "a.dcm", file))
    assert image[0, :, 0].tolist() == [0, 51 * 257, FULL, 102 * 257]


def test_a_modality_table_of_twelve_bits(tmp_path: Path) -> None:
    table = lookup(0, 12, [0, 1024, 4096])
    assert values(tmp_path, np.array([[0, 1, 2]], np.uint16), ModalityLUTSequence=table) == [0, 16384, FULL]


def test_a_table_that_starts_below_zero(tmp_path: Path) -> None:
    """-2 in an element for unsigned numbers is 65534."""
    pixels = np.array([[-3, -2, -1, 0, 9]], np.int16)
    table = lookup(0, 16, [0, 30000, FULL])
    table[0].add_new("LUTDescriptor", "US", [3, 65534, 16])
    assert values(tmp_path, pixels, VOILUTSequence=table) == [0, 0, 30000, FULL, FULL]


def test_a_table_that_is_too_short(tmp_path: Path) -> None:
    table = lookup(0, 16, [0, 30000, FULL])
    table[0].LUTDescriptor = [9, 0, 16]
    refused(write(tmp_path / "a.dcm", dataset(GREY, VOILUTSequence=table)), "a lookup table of 6 of 9 entries")


def noticed(tmp_path: Path, **elements: Any) -> tuple[list[int], list[str]]:
    """The first row of 0, 50 and 100, and what was said of it: alike collected and warned of."""
    path = write(tmp_path / "a.dcm", dataset(np.array([[0, 50, 100]], np.uint16), **elements))
    notices: list[str] = []
    row: list[int] = read_image(path, notices)[0, :, 0].tolist()
    with pytest.warns(ImageNotice) as warned:
        read_image(path)
    assert [str(warning.message) for warning in warned] == notices
    assert all(str(path) in notice for notice in notices)
    return row, notices


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("width", [0, -100])
def test_a_window_without_width_is_the_whole_range(tmp_path: Path, width: int, function: str | None) -> None:
    elements = {} if function is None else {"VOILUTFunction": function}
    row, notices = noticed(tmp_path, WindowCenter=50, WindowWidth=width, **elements)
    assert row == [0, 32768, FULL]
    assert len(notices) == 1
    assert f"is {width} wide" in notices[0]


def test_an_empty_table_is_none(tmp_path: Path) -> None:
    row, notices = noticed(tmp_path, VOILUTSequence=[Dataset()])
    assert row == [0, 32768, FULL]
    assert "lookup table" in notices[0]
    window = {"WindowCenter": 25, "WindowWidth": 50, "VOILUTFunction": "LINEAR_EXACT"}
    assert noticed(tmp_path, VOILUTSequence=[Dataset()], **window)[0] == [0, FULL, FULL]


@pytest.mark.parametrize(
    "elements",
    [{"RescaleSlope": 0, "RescaleIntercept": 5}, {"WindowCenter": 5000, "WindowWidth": 10}],
    ids=["slope 0", "a window beside the values"],
)
def test_what_leaves_one_colour_is_said(tmp_path: Path, elements: dict[str, int]) -> None:
    row, notices = noticed(tmp_path, **elements)
    assert row == [0, 0, 0]
    assert "one colour as its header asks, and its values are 0 to 100" in notices[0]


def test_a_table_after_rescale(tmp_path: Path) -> None:
    pixels = np.array([[1000, 1001, 1002]], np.uint16)
    table = lookup(0, 16, [0, 30000, FULL])
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1000}
    assert values(tmp_path, pixels, VOILUTSequence=table, **rescale) == [0, 30000, FULL]


PICTURE = {"WindowCenter": 60, "WindowWidth": 20, "VOILUTFunction": "SIGMOID"}


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("full", [0, 32768, FULL]),
        ("50,100", [0, 32768, FULL]),
        ("25,50", [0, FULL, FULL]),
        ("100,400", [16384, 24576, 32768]),
    ],
)
def test_a_window_for_the_whole_data_set(window: str, expected: list[int], tmp_path: Path) -> None:
    """In place of the header's, whatever that is."""
    for elements in (PICTURE, {"VOILUTSequence": lookup(0, 16, [0, FULL])}, {}):
        path = write(tmp_path / "a.dcm", dataset(np.array([[0, 50, 100]], np.uint16), **elements))
        assert read_image(path, window=window)[0, :, 0].tolist() == expected
        assert ImageReader((1, 1), window=window)(path)[0, :, 0].tolist() == expected
    rescaled = dataset(np.array([[1024, 1074, 1124]], np.uint16), RescaleSlope=1, RescaleIntercept=-1024, **PICTURE)
    assert read_image(write(tmp_path / "b.dcm", rescaled), window=window)[0, :, 0].tolist() == expected
    eight = write(tmp_path / "c.dcm", dataset(np.array([[0, 50, 100]], np.uint8), **PICTURE))
    if window == "full":
        assert read_image(eight, window=window)[0, :, 0].tolist() == [0, 50, 100]


@pytest.mark.parametrize("window", ["half", "50", "50,0", "50,-1", "nan,5", "50,inf", "1,2,3", ""])
def test_windows_that_are_none(window: str) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.window is '.*': give header, full, or"):
        ImageReader((1, 1), window=window)


def test_the_border_of_what_a_sigmoid_lifts_is_cut_off(tmp_path: Path) -> None:
    """CMMD's headers: black becomes 0.12 of white, which is above a tenth of it."""
    pixels = np.zeros((200, 200), np.uint8)
    pixels[50:150, 20:120] = 200
    window = {"WindowCenter": 128, "WindowWidth": 256, "VOILUTFunction": "SIGMOID"}
    path = write(tmp_path / "a.dcm", dataset(pixels, **window))
    assert read_image(path).min() == 30
    assert ImageReader((1, 1), crop_border=True)(path).shape == (100, 100, 3)


def test_a_window_is_part_of_what_a_store_is(
    dicom_root: Path, tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path
) -> None:
    model, settings = tiny_model(num_classes=2), {"root": str(dicom_root), "manifest": "labels.csv"}
    data = tiny_data(**settings, window=[1000, 3000])
    assert data.preload(model).specification.window == "1000,3000"
    trainer = quiet_trainer(tmp_path)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    with pytest.raises(StaleStoreError, match="window: '1000,3000', asked for 'full'"):
        tiny_data(**settings, window="full").preload(model)
    live = ImageDataModule(**settings, resolution=64, mean=[0.4], std=[0.2], image_size=48, window="full")
    with pytest.raises(CheckpointError, match="window: '1000,3000', asked for 'full'"):
        quiet_trainer(tmp_path).test(tiny_model(num_classes=2), live, ckpt_path=str(tmp_path / "m.ckpt"))
    assert Predictor(tmp_path / "m.ckpt").specification.reader.window == "1000,3000"


def test_monochrome1_is_inverted_after_the_window(tmp_path: Path) -> None:
    pixels = np.array([[0, 75, 100, 200]], np.uint16)
    window = {"WindowCenter": 100, "WindowWidth": 100, "VOILUTFunction": "LINEAR_EXACT"}
    assert values(tmp_path, pixels, photometric="MONOCHROME1", **window) == [FULL, 49151, 32768, 0]
    assert values(tmp_path, np.array([[10, 255]], np.uint8), photometric="MONOCHROME1") == [245, 0]


# Padding


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [-2000, 63536], ids=["signed", "as unsigned"])
def test_padding_is_black_and_sets_no_range(tmp_path: Path, photometric: str, padding: int) -> None:
    file = dataset(np.array([[-2000, 0, 25, 100]], np.int16), photometric)
    file.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
    path = write(tmp_path / "a.dcm", file)
    expected = [0, 0, 16384, FULL] if photometric == "MONOCHROME2" else [0, FULL, 49151, 0]
    assert read_image(path)[0, :, 0].tolist() == expected


def test_a_range_of_padding(tmp_path: Path) -> None:
    pixels = np.array([[0, 10, 20, 120]], np.uint16)
    assert values(tmp_path, pixels, PixelPaddingValue=10, PixelPaddingRangeLimit=0) == [0, 0, 0, FULL]


def test_nothing_but_padding(tmp_path: Path) -> None:
    assert values(tmp_path, np.full((1, 2), 9, np.uint16), PixelPaddingValue=9) == [0, 0]


# Colour

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


@pytest.mark.parametrize("planar", [0, 1])
def test_colour_by_pixel_and_by_plane(tmp_path: Path, planar: int) -> None:
    file = dataset(COLOURS, "RGB")
    if planar:
        file.PlanarConfiguration, file.PixelData = 1, COLOURS.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.dcm", file)), COLOURS)


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    deep = COLOURS.astype(np.uint16) * 16
    image = read_image(write(tmp_path / "a.dcm", dataset(deep, "RGB", bits=12)))
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, np.rint(deep * (65535 / 4095)))


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    ybr = np.array(Image.fromarray(COLOURS).convert("YCbCr"))
    image = read_image(write(tmp_path / "a.dcm", dataset(ybr, "YBR_FULL")))
    assert np.abs(image.astype(int) - COLOURS).max() <= 2


def palette(entries: NDArray[Any], declared: int, big: bool = False) -> pydicom.FileDataset:
    """Pixels 0, 1 and 2 of a palette whose entries are by channel (3, count)."""
    file = dataset(np.array([[0, 1, 2]], np.uint8))
    file.PhotometricInterpretation = "PALETTE COLOR"
    for colour, own in zip(("Red", "Green", "Blue"), entries, strict=True):
        setattr(file, f"{colour}PaletteColorLookupTableDescriptor", [len(own), 0, declared])
        data = own.astype(own.dtype.newbyteorder(">" if big else "<")).tobytes()
        if big and own.itemsize == 1:  # two entries in a word, the lower one first
            data = np.frombuffer(data, "<u2").astype(">u2").tobytes()
        setattr(file, f"{colour}PaletteColorLookupTableData", data)
    return as_big_endian(file) if big else file


def as_big_endian(file: pydicom.FileDataset) -> pydicom.FileDataset:
    file.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    file.set_original_encoding(False, False)
    return file


@pytest.mark.parametrize("big", [False, True], ids=["little", "big"])
@pytest.mark.parametrize(
    ("dtype", "declared", "factor", "expected"),
    [
        (np.uint8, 8, 1, np.uint8([[0, 0, 0], [10, 20, 30], [20, 40, 60]])),
        (np.uint16, 16, 1000, np.uint16([[0, 0, 0], [10000, 20000, 30000], [20000, 40000, 60000]])),
        (np.uint16, 8, 1, np.uint8([[0, 0, 0], [10, 20, 30], [20, 40, 60]])),  # in words of 16 bits
        (np.uint16, 16, 1, np.uint8([[0, 0, 0], [10, 20, 30], [20, 40, 60]])),  # and so declared
    ],
)
def test_palettes_are_looked_up(
    tmp_path: Path, dtype: Any, declared: int, factor: int, expected: NDArray[Any], big: bool
) -> None:
    entries = np.outer([1, 2, 3], [0, 10, 20, 20]).astype(dtype) * dtype(factor)
    image = read_image(write(tmp_path / "a.dcm", palette(entries, declared, big)))
    assert image.dtype == expected.dtype
    np.testing.assert_array_equal(image[0], expected)


def test_unsupported_colours_are_named(tmp_path: Path) -> None:
    file = dataset(COLOURS, "RGB")
    file.PhotometricInterpretation = "HSV"
    refused(write(tmp_path / "a.dcm", file), "'HSV'", "save it as RGB")


def test_grey_of_three_samples_is_refused(tmp_path: Path) -> None:
    file = dataset(COLOURS, "RGB")
    file.PhotometricInterpretation = "MONOCHROME2"
    refused(write(tmp_path / "a.dcm", file), "says MONOCHROME2, which is grey, and has 3 samples a pixel")


# Transfer syntaxes

GREY = np.random.default_rng(1).integers(0, 4096, (8, 10), np.uint16)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_every_way_of_writing_gives_the_same(tmp_path: Path, syntax: str) -> None:
    expected = read_image(write(tmp_path / "plain.dcm", dataset(GREY, bits=12)))
    file = dataset(GREY, bits=12)
    file.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        file.PixelData = GREY.astype(">u2").tobytes()
        as_big_endian(file)
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.dcm", file)), expected)


def test_run_length_encoding(tmp_path: Path) -> None:
    expected = read_image(write(tmp_path / "plain.dcm", dataset(GREY, bits=12)))
    file = dataset(GREY, bits=12)
    file.compress(RLELossless, encoding_plugin="pydicom")
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.dcm", file)), expected)


@pytest.mark.parametrize("name", ["MR_small_RLE", "MR_small_jp2klossless", "MR_small_bigendian", "MR_small_implicit"])
def test_compressed_and_plain_siblings_are_equal(name: str) -> None:
    np.testing.assert_array_equal(read_image(BUNDLED / f"{name}.dcm"), read_image(BUNDLED / "MR_small.dcm"))


@pytest.mark.parametrize("form", ["no preamble", "no file meta", "implicit", "big-endian"])
def test_files_without_preamble_or_syntax(tmp_path: Path, form: str) -> None:
    """As scanners and old archives write them: the data set begins at byte 0."""
    file = dataset(GREY, bits=12)
    expected = read_image(write(tmp_path / "whole.dcm", file))
    path = tmp_path / "a.dcm"
    if form == "no preamble":
        path.write_bytes((tmp_path / "whole.dcm").read_bytes()[132:])
    else:
        big = form == "big-endian"
        if big:
            file.PixelData = GREY.astype(">u2").tobytes()
            file.set_original_encoding(False, False)
        del file.file_meta
        file.preamble = None
        file.save_as(path, implicit_vr=form == "implicit", little_endian=not big)
    np.testing.assert_array_equal(read_image(path), expected)


def test_implicit_elements_under_an_explicit_syntax(tmp_path: Path) -> None:
    path = write(tmp_path / "whole.dcm", dataset(GREY, bits=12))
    expected, file = read_image(path), pydicom.dcmread(path)
    file.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    write(path, file)
    named = path.read_bytes().replace(
        ImplicitVRLittleEndian.encode() + b"\0", ExplicitVRLittleEndian.encode()[:-2].ljust(18, b"\0"), 1
    )
    path.write_bytes(named)
    np.testing.assert_array_equal(read_image(path), expected)


def test_a_jpeg_that_is_found_by_its_data_set_alone() -> None:
    """Its elements are implicit, where the syntax says that they are explicit."""
    image = read_image(BUNDLED / "SC_rgb_jpeg.dcm")
    np.testing.assert_array_equal(image, pydicom.dcmread(BUNDLED / "SC_rgb_jpeg.dcm").pixel_array)


def test_what_would_fill_the_memory_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deflated file of 40 KB and 40 MB, whose image is small."""
    file = dataset(GREY, bits=12)
    file.add_new(0x00091001, "OB", bytes(40_000_000))
    file.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = write(tmp_path / "a.dcm", file)
    assert path.stat().st_size < 50_000
    assert read_image(path).shape == (8, 10, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    tracemalloc.start()
    refused(path, "inflates to more than 16,000,000 bytes")
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["SC_rgb_dcmtk_+eb+cr", "SC_rgb_dcmtk_+eb+cy+np", "SC_rgb_jpeg_lossy_gdcm"])
def test_jpeg_in_rgb_and_ybr_is_the_uncompressed_picture(name: str) -> None:
    plain = read_image(BUNDLED / "SC_ybr_full_422_uncompressed.dcm").astype(int)
    assert np.abs(read_image(BUNDLED / f"{name}.dcm") - plain).mean() < 4


@pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless", "SC_rgb_jpeg_gdcm"])
def test_a_missing_plug_in_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = BUNDLED / f"{name}.dcm"
    syntax = pydicom.dcmread(path).file_meta.TransferSyntaxUID
    decoder = pydicom.pixels.get_decoder(syntax)
    monkeypatch.setattr(decoder, "_available", {})
    monkeypatch.setattr(decoder, "_unavailable", {"pylibjpeg": ("pylibjpeg>=2.0", "pylibjpeg-libjpeg>=2.1")})
    refused(path, syntax.name, "install one of pylibjpeg>=2.0 and pylibjpeg-libjpeg>=2.1")


def test_pydicom_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.dcm", dataset(GREY))
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "fpt_lightning.data.dicom":
            raise ModuleNotFoundError("No module named 'pydicom'", name="pydicom")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(path, "pip install 'fpt-lightning[dicom]'")


# Frames

VOLUME = np.stack([np.full((4, 6), 100 * number, np.uint16) for number in (1, 2, 3)])
VOLUME[:, 0, 0] = 0


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Three frames of which the window shows 100 to 300."""
    window = {"WindowCenter": 200, "WindowWidth": 200, "VOILUTFunction": "LINEAR_EXACT"}
    return write(tmp_path / "scan.dcm", dataset(VOLUME, **window))


def test_one_frame_is_asked_for(volume: Path) -> None:
    assert [read_image(f"{volume}#{frame}")[1, 1, 0] for frame in (1, 2, 3)] == [0, 32768, FULL]


def test_no_frame_is_asked_for(volume: Path) -> None:
    refused(volume, "3 pages or frames", "scan.dcm#1", "counted from 1")


@pytest.mark.parametrize("frame", [0, 4])
def test_a_frame_that_is_not_there(volume: Path, frame: int) -> None:
    refused(f"{volume}#{frame}", "3 pages or frames", f"no {frame}.")


def test_only_the_frame_is_decoded(volume: Path) -> None:
    """The frames after it may be gone."""
    volume.write_bytes(volume.read_bytes()[:-40])
    assert read_image(f"{volume}#2")[1, 1, 0] == 32768
    refused(f"{volume}#3", "damaged or cut off")


def test_a_file_of_that_very_name_is_itself(volume: Path) -> None:
    literal = volume.with_name("scan.dcm#2")
    write(literal, dataset(np.array([[7, 9]], np.uint8)))
    assert read_image(literal)[0, :, 0].tolist() == [7, 9]


def test_each_frame_has_its_own_rescale_and_window(tmp_path: Path) -> None:
    file = dataset(VOLUME)

    def group(keyword: str, **elements: Any) -> Dataset:
        macro, holder = Dataset(), Dataset()
        for name, value in elements.items():
            setattr(macro, name, value)
        setattr(holder, keyword, [macro])
        return holder

    file.SharedFunctionalGroupsSequence = [
        group("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=0)
    ]
    file.PerFrameFunctionalGroupsSequence = [
        group("FrameVOILUTSequence", WindowCenter=center, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
        for center in (200, 300, 700)
    ]
    path = write(tmp_path / "a.dcm", file)
    assert [read_image(f"{path}#{frame}")[1, 1, 0] for frame in (1, 2, 3)] == [32768, 49151, 16384]


def test_pages_of_a_tiff(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((4, 6), level, np.uint8)) for level in (10, 20, 30)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert [read_image(f"{tmp_path / 'a.tif'}#{page}")[0, 0, 0] for page in (1, 2, 3)] == [10, 20, 30]
    refused(f"{tmp_path / 'a.tif'}#4", "3 pages", "no 4.")


# Refusals


def test_dicom_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("1-01", "a.png", "b.DICOM"):
        assert read_image(write(tmp_path / name, dataset(np.array([[7, 9]], np.uint8))))[0, :, 0].tolist() == [7, 9]


@pytest.mark.parametrize("name", ["test-SR", "waveform_ecg", "rtplan"])
def test_a_file_without_pixels(name: str) -> None:
    refused(BUNDLED / f"{name}.dcm", "holds no image")


def test_a_picture_named_dicom(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.dcm", format="png")
    refused(tmp_path / "a.dcm", "not DICOM")


def test_floating_point_pixels(tmp_path: Path) -> None:
    file = dataset(np.zeros((2, 2), np.uint16))
    del file.PixelData, file.PixelRepresentation, file.BitsStored, file.HighBit
    file.BitsAllocated = 32
    file.FloatPixelData = np.zeros((2, 2), np.float32).tobytes()
    refused(write(tmp_path / "a.dcm", file), "floating-point")


def test_an_unknown_transfer_syntax(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", dataset(GREY))
    path.write_bytes(path.read_bytes().replace(ExplicitVRLittleEndian.encode(), b"1.2.840.10008.1.2.9"))
    refused(path, "1.2.840.10008.1.2.9", "not decode")


# A data set of DICOM files, end to end


@pytest.fixture
def dicom_root(tmp_path: Path) -> Path:
    """24 frames of 2 classes in 8 files of 12 bits; the classes differ in brightness. ``labels.csv`` lists them."""
    root, rng = tmp_path / "dicom", np.random.default_rng(0)
    root.mkdir()
    rows = [("image", "label", "split")]
    for number in range(8):
        label = "bright" if number % 2 else "dark"
        frames = rng.integers(0, 2000, (3, 40, 56), np.uint16) + (2000 if number % 2 else 0)
        window = {"WindowCenter": 2048, "WindowWidth": 4096}
        write(root / f"{number}.dcm", dataset(frames, bits=12, **window))
        split = ("train", "train", "val", "test")[number // 2]
        rows += [(f"{number}.dcm#{frame}", label, split) for frame in (1, 2, 3)]
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


@pytest.mark.parametrize("fit", ["squash", "letterbox"])
def test_dicom_files_are_preloaded_and_fitted(
    dicom_root: Path, tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path, fit: str
) -> None:
    data = tiny_data(
        root=str(dicom_root),
        manifest="labels.csv",
        mean="auto",
        std="auto",
        fit=fit,
        crop_border=True,
        decoding_threads=2,
    )
    model = tiny_model(num_classes=2)
    store = data.preload(model)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(model, data)
    assert store.ids == tuple(f"{number}.dcm#{frame}" for number in range(8) for frame in (1, 2, 3))
    for row, id in enumerate(store.ids):
        image = ImageReader((64, 64), fit, crop_border=True)(dicom_root / id)
        assert image.shape[:2] == ((40, 56) if fit == "squash" else (56, 56))
        np.testing.assert_array_equal(store.read([row], "images")[0], stored_copy(image, 48))
    train = [dicom_root / id for id in store.ids[:12]]
    specification = store.specification
    assert (specification.mean, specification.std) == channel_statistics(
        train, (64, 64), reader=ImageReader((64, 64), crop_border=True)
    )
    assert store.changed(ImageFiles.look(dicom_root, store.ids)) == []
    assert (specification.fit, specification.crop_border) == (fit, True)
    other = tiny_data(root=str(dicom_root), manifest="labels.csv", mean="auto", std="auto", fit=fit)
    with pytest.raises(StaleStoreError, match="crop_border: True, asked for False"):
        other.preload(model)
    (dicom_root / "0.dcm").write_bytes((dicom_root / "0.dcm").read_bytes() + b"\0\0")
    assert store.changed(ImageFiles.look(dicom_root, store.ids)) == ["0.dcm#1", "0.dcm#2", "0.dcm#3"]


def test_frames_are_samples_and_missing_files_are_named(dicom_root: Path) -> None:
    assert len(read_manifest(dicom_root, "labels.csv").samples) == 24
    (dicom_root / "3.dcm").unlink()
    with pytest.raises(Exception, match=r"3 of 24 images .* do not exist .*3\.dcm#1"):
        read_manifest(dicom_root, "labels.csv")
