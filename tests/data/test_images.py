"""Reading, resizing and augmenting image files."""

from __future__ import annotations

import importlib
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fpt_lightning.data import transforms
from fpt_lightning.data.images import FULL_RANGE, ImageReader, bright_box, read_image
from fpt_lightning.data.statistics import SAMPLED, channel_statistics, deep_pictures, draw_sample, value_range
from fpt_lightning.data.transforms import ViewTransform, normalise, resize, stored_copy, unit_pixels
from fpt_lightning.errors import ConfigurationError, ImageError
from threads import at_once


def noise(height: int = 24, width: int = 32, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int = 96, width: int = 128) -> NDArray[np.uint8]:
    """Noise without jumps between neighbours."""
    coarse = Image.fromarray(noise(9, 12))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def refused(path: Path, *words: str) -> None:
    """The file is refused with a message that holds its path and all the words."""
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert not [word for word in (str(path), *words) if word not in str(error.value)], str(error.value)


# Formats


@pytest.mark.parametrize(
    "name", ["a.png", "a.bmp", "a.tif", "a.TIFF", "a.webp", "a.jpg", "a.jpeg"], ids=lambda name: name.split(".")[1]
)
def test_colour_files_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    pixels = smooth()
    options: dict[str, Any] = {"webp": {"lossless": True}, "jpg": {"quality": 95}, "jpeg": {"quality": 95}}
    path = save(tmp_path / name, pixels, **options.get(name.split(".")[1], {}))
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.shape == pixels.shape
    assert np.abs(image.astype(int) - pixels).mean() <= (3 if "j" in name else 0)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_grey_is_repeated(tmp_path: Path, suffix: str) -> None:
    pixels = noise(channels=1)
    image = read_image(save(tmp_path / f"a.{suffix}", pixels))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.repeat(pixels[..., None], 3, 2))


def test_a_grey_jpeg_has_three_equal_channels(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.jpg", smooth()[..., 0], quality=95))
    assert image.shape == (96, 128, 3)
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_kept(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (24, 32), dtype=np.uint16)
    pixels[0, :2] = 0, 65535
    path = save(tmp_path / f"a.{suffix}", pixels)
    image = read_image(path)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, np.repeat(pixels[..., None], 3, 2))
    np.testing.assert_allclose(unit_pixels(image, (24, 32))[0].numpy(), pixels / 65535, atol=1e-6)


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    pixels = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80
    Image.frombytes("I;16B", (32, 24), pixels.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[..., 0], pixels)


def tiff(
    data: bytes, size: tuple[int, int], bits: int, white: int = 1, order: str = "<", signed: bool = False
) -> bytes:
    """An uncompressed grey TIFF of (height, width), as scanners and microscopes write them.

    Args:
        data: of the pixels.
        size: of the image.
        bits: a pixel.
        white: 1 where 0 is black, 0 where 0 is white (PhotometricInterpretation).
        order: of bytes.
        signed: SampleFormat 2.
    """
    fields = {256: size[1], 257: size[0], 258: bits, 259: 1, 262: white, 277: 1, 278: size[0], 339: 1 + signed}
    tags = {**fields, 279: len(data), 273: 8 + 2 + 12 * (len(fields) + 2) + 4}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    entries = (struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return head + b"".join(entries) + bytes(4) + data


GREY = np.array([[0, 1000, 65535], [1, 30000, 40000]], np.uint16)


def test_zero_is_white_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for bits in (8, 16):
        pixels = (GREY >> (16 - bits)).astype(f"<u{bits // 8}")
        path.write_bytes(tiff(pixels.tobytes(), (2, 3), bits, white=1))
        plain = read_image(path)
        path.write_bytes(tiff(pixels.tobytes(), (2, 3), bits, white=0))
        np.testing.assert_array_equal(read_image(path), 2**bits - 1 - plain)


def test_twelve_packed_bits_fill_the_scale(tmp_path: Path) -> None:
    """Two pixels in three bytes."""
    for white, expected in ((1, [0, 43978, 65535, 4657]), (0, [65535, 21551, 0, 60878])):
        (tmp_path / "a.tif").write_bytes(tiff(bytes.fromhex("000ABCFFF123"), (1, 4), 12, white))
        if white:
            assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == expected
        else:  # Pillow reads none of those
            refused(tmp_path / "a.tif", "a form of TIFF that it does not read")


def test_what_pillow_does_not_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(GREY.astype(">u2").tobytes(), (2, 3), 16, white=0, order=">"))
    refused(tmp_path / "a.tif", "a form of TIFF that it does not read", "Save it as PNG")


@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_pixels_have_no_known_black(tmp_path: Path, order: str) -> None:
    data = GREY.astype(f"{order}u2").tobytes()
    (tmp_path / "a.tif").write_bytes(tiff(data, (2, 3), 16, order=order, signed=True))
    refused(tmp_path / "a.tif", "signed 16-bit pixels, whose black and white are unknown")


@pytest.mark.parametrize("top", [65535, 4095])
def test_sixteen_bit_portable_graymaps(tmp_path: Path, top: int) -> None:
    pixels = (GREY // (65536 // (top + 1))).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 %d\n" % top + pixels.tobytes())
    image = read_image(tmp_path / "a.pgm")
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image[..., 0], np.rint(pixels.astype(float) * (65535 / top)))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 4), (0, 5, 3)])
def test_nothing_but_three_channels_leaves_the_reader(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpt_lightning.data.images._read_picture", lambda *_: np.zeros(shape, np.uint8))
    refused(save(tmp_path / "a.png", noise()), "its header is wrong")


def test_larger_images_are_allowed_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    path = save(tmp_path / "a.png", noise(30, 40))
    refused(path, "more than 600 pixels", "data.max_pixels")
    with pytest.raises(ImageError, match="more than 1,198 pixels"):
        ImageReader((1, 1), max_pixels=1198)(path)
    assert ImageReader((1, 1), max_pixels=1200)(path).shape == (30, 40, 3)
    with pytest.raises(ConfigurationError, match=r"data\.max_pixels is 0"):
        ImageReader((1, 1), max_pixels=0)


def colours(top: int = 60000) -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, top, (4, 6, 3)).astype(np.uint16)


def deep_tiff(pixels: NDArray[np.uint16], order: str, orientation: int = 1) -> bytes:
    """Colours of 16 bits, uncompressed, in one strip, as microscopes' and cameras' programs write them."""
    height, width = pixels.shape[:2]
    data = pixels.astype(f"{order}u2").tobytes()
    depth = 8 + 2 + 12 * 10 + 4  # where the three depths lie, and the data after them
    shorts = {256: width, 257: height, 259: 1, 262: 2, 274: orientation, 277: 3, 278: height}
    tags = {tag: struct.pack(f"{order}HHIHxx", tag, 3, 1, value) for tag, value in shorts.items()}
    longs = {258: (3, 3, depth), 273: (4, 1, depth + 6), 279: (4, 1, len(data))}
    tags |= {tag: struct.pack(f"{order}HHII", tag, *value) for tag, value in longs.items()}
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    listed = b"".join(tags[tag] for tag in sorted(tags)) + bytes(4)
    return head + listed + struct.pack(f"{order}3H", 16, 16, 16) + data


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """As the EXIF standard has it: which side of the picture the first row and the first column are."""
    by = {1: "", 2: "h", 3: "hv", 4: "v", 5: "t", 6: "th", 7: "thv", 8: "tv"}
    for step in by[orientation]:
        pixels = {"h": pixels[:, ::-1], "v": pixels[::-1], "t": pixels.transpose(1, 0, 2)}[step]
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "<", ">"])
def test_sixteen_bits_of_colour_are_kept_and_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    pixels, path = colours(), tmp_path / "a"
    if kind == "png":
        content = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
        exif = Image.Exif()
        exif[274] = orientation
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:33] + chunk + content[33:])  # after the header
    else:
        path.write_bytes(deep_tiff(pixels, kind, orientation))
    image = read_image(path)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, turned(pixels, orientation))


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_of_sixteen_bits_is_dropped(tmp_path: Path, channels: int) -> None:
    pixels = np.dstack([colours()[..., : channels - 1], np.full((4, 6), 9, np.uint16)])
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = {b"IHDR": struct.pack(">IIBBBBB", 6, 4, 16, {2: 4, 4: 6}[channels], 0, 0, 0)}
    parts |= {b"IDAT": zlib.compress(lines), b"IEND": b""}
    chunks = [struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in parts.items()]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    expected = pixels[..., [0, 0, 0]] if channels == 2 else pixels[..., :3]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


def test_a_range_of_values_fills_the_scale(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 100, 2100, 4100, 5000]], np.uint16))
    found = read_image(path, [], value_range=(100, 4100))
    assert found[0, :, 0].tolist() == [0, 0, 32768, 65535, 65535]
    copy = stored_copy(np.repeat(found, 5, axis=0), 5)
    assert copy[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert read_image(path, [])[0, 3, 0] == 4100
    assert ImageReader((1, 1), value_range=(100, 4100))(path, [])[0, 2, 0] == 32768
    eight = save(tmp_path / "b.png", np.array([[0, 100, 200]], np.uint8))
    assert read_image(eight, [], value_range=(100, 4100))[0, :, 0].tolist() == [0, 100, 200]


@pytest.mark.parametrize(
    ("values", "value_range", "words"),
    [
        ([0, 4095], (0, 65535), r"0 to 4095, are 16 of 256 grey levels of \[0, 65535\]: say the range"),
        ([0, 65535], (0, 65535), None),
        ([0, 4095], (0, 4095), None),
        ([7, 7], (0, 65535), None),  # one colour has no levels to lose
        ([5, 20], (0, 65535), None),  # nor have sixteen
        ([0, 4095], (0, 2000), r"50% of its values lie outside data.value_range \[0, 2000\]"),
        ([0] * 199 + [4095], (0, 2000), None),  # less than one in a hundred
        ([9000, 12000], (0, 4095), r"100% of its values.*0 of 256 grey levels"),
    ],
)
def test_a_range_that_loses_much_is_said(
    tmp_path: Path, values: list[int], value_range: tuple[float, float], words: str | None
) -> None:
    path, notices = save(tmp_path / "a.png", np.array([values], np.uint16)), list[str]()
    read_image(path, notices, value_range=value_range)
    if words is None:
        assert not notices
    else:
        assert re.search(words, " ".join(notices)), notices
        assert all(str(path) in notice for notice in notices)


@pytest.mark.parametrize("value_range", [(5, 5), (9, 3), (-1, 9), (0, 70000), (float("nan"), 3)])
def test_a_range_without_width(value_range: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"data.value_range is \[.*two numbers from 0 to 65535"):
        ImageReader((1, 1), value_range=value_range)


def test_the_range_is_that_of_all_sixteen_bit_pictures(tmp_path: Path) -> None:
    listed = {"a.png": [30, 900], "b.tif": [12, 400], "c.png": [7, 7]}
    paths = [save(tmp_path / name, np.array([values], np.uint16)) for name, values in listed.items()]
    paths.append(save(tmp_path / "eight.png", noise()))
    (tmp_path / "colours.tif").write_bytes(deep_tiff(colours(4000), "<"))
    broken = save(tmp_path / "broken.png", noise(64, 64, 1).astype(np.uint16) * 7)
    broken.write_bytes(broken.read_bytes()[:2000])
    assert deep_pictures(paths) == paths[:3]
    assert value_range(paths[:2]) == (12, 900)
    assert value_range([*paths, tmp_path / "colours.tif"]) == (7, colours(4000).max())
    assert value_range(paths[2:]) == FULL_RANGE  # of one value
    with pytest.raises(ImageError, match="1 of 4 images that are measured cannot be read"):
        value_range([*paths, tmp_path / "broken.png"])
    assert value_range([*paths, tmp_path / "broken.png"], on_error="skip") == (7, 900)


def test_dim_sixteen_bit_images_do_not_turn_black(tmp_path: Path) -> None:
    """A 12-bit scan in a 16-bit file: 8 bits would leave 16 levels."""
    pixels = np.linspace(0, 4095, 24 * 32).astype(np.uint16).reshape(24, 32)
    image = read_image(save(tmp_path / "a.png", pixels))
    assert len(np.unique(unit_pixels(image, (24, 32)).numpy())) > 700


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped(tmp_path: Path, mode: str) -> None:
    colour, alpha = noise(channels=3 if mode == "RGBA" else 1), noise(channels=1, seed=1)
    image = read_image(save(tmp_path / "a.png", np.dstack([colour, alpha])))
    np.testing.assert_array_equal(image, colour if mode == "RGBA" else np.repeat(colour[..., None], 3, 2))


@pytest.mark.parametrize("options", [{}, {"transparency": 0}, {"transparency": bytes(range(0, 256, 2))}])
def test_palettes_are_looked_up(tmp_path: Path, options: dict[str, Any]) -> None:
    palette = Image.fromarray(noise()).quantize(200)
    palette.save(tmp_path / "a.png", **options)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_one_bit_is_black_and_white(tmp_path: Path, suffix: str) -> None:
    bits = noise(channels=1) > 127
    image = read_image(save(tmp_path / f"a.{suffix}", bits))
    np.testing.assert_array_equal(image, np.repeat(bits[..., None] * np.uint8(255), 3, 2))


def test_a_cmyk_jpeg_is_converted(tmp_path: Path) -> None:
    pixels = smooth()
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - pixels).mean() < 3


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", smooth(), exif=exif)
    image = read_image(path)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(image, np.asarray(ImageOps.exif_transpose(opened).convert("RGB")))
    assert image.shape[:2] == ((96, 128) if orientation < 5 else (128, 96))


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_images_are_turned_upright(tmp_path: Path, orientation: int, turns: int, dtype: type, suffix: str) -> None:
    """Pillow (13.0) maps uncompressed grey TIFF files into memory, and then turns them wrongly if opened by path."""
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (24, 32), dtype=dtype)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(save(tmp_path / f"a.{suffix}", pixels, exif=exif))
    np.testing.assert_array_equal(image[..., 0], np.rot90(pixels, turns))


# Refusals


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "gone.png", "does not exist")


@pytest.mark.parametrize("content", [b"", b"patient,grade\n1,2\n", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "head"])
def test_a_file_that_is_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", "cannot be read", "of no kind that Pillow knows")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "bmp", "webp"])
def test_a_truncated_file(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", noise(64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "cannot be read")


def test_a_folder_of_that_name(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("suffix", ["tif", "webp"])
def test_several_pages(tmp_path: Path, suffix: str) -> None:
    pages = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    pages[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pages[1:])
    refused(tmp_path / f"a.{suffix}", "3 pages", f"a.{suffix}#1", "save the one wanted alone")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pixels(tmp_path: Path, dtype: type) -> None:
    refused(save(tmp_path / "a.tif", noise(channels=1).astype(dtype)), "32-bit", "save it with 8 or 16")


# Resizing


@pytest.mark.parametrize("size", [(48, 64), (17, 40), (40, 17), (150, 200), (96, 128)])
def test_resizing_is_pillows_bicubic(size: tuple[int, int]) -> None:
    pixels = smooth()
    wanted = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
    resized = resize(pixels, size)
    assert resized.dtype == torch.uint8
    assert resized.shape == (3, *size)
    assert np.abs(resized.permute(1, 2, 0).numpy().astype(int) - np.asarray(wanted)).max() <= 1


def test_sixteen_bits_are_resized_in_their_own_scale() -> None:
    grey = smooth()[..., :1].astype(np.uint16) * 257
    pixels = np.repeat(grey, 3, 2)
    wanted = Image.fromarray(grey[..., 0].astype(np.float32)).resize((40, 17), Image.Resampling.BICUBIC)
    resized = resize(pixels, (17, 40))
    assert resized.dtype == torch.float32
    np.testing.assert_allclose(resized[0].numpy(), np.asarray(wanted).clip(0, 65535), atol=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_unit_pixels_stay_between_0_and_1(dtype: type) -> None:
    """Black and white stripes, where bicubic interpolation overshoots."""
    stripes = np.zeros((24, 32, 3), dtype)
    stripes[:, ::4] = stripes[:, 1::4] = np.iinfo(dtype).max
    for size in ((24, 32), (48, 80), (10, 10)):
        pixels = unit_pixels(stripes, size)
        assert pixels.dtype == torch.float32
        assert pixels.min() >= 0
        assert pixels.max() <= 1
    assert unit_pixels(stripes, (24, 32)).max() == 1


def test_stored_copies() -> None:
    pixels = smooth()
    copy = stored_copy(pixels, 40)
    assert copy.dtype == np.uint8
    np.testing.assert_array_equal(copy, resize(pixels, (40, 40)).permute(1, 2, 0).numpy())
    deep = stored_copy(pixels.astype(np.uint16) * 257, 40)
    assert deep.dtype == np.uint8
    assert np.abs(deep.astype(int) - copy).max() <= 1


def test_normalise() -> None:
    pixels = torch.rand(2, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)
    for channel in range(3):
        wanted = (pixels[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(normalise(pixels, mean, std)[:, channel], wanted)


# Letterbox


@pytest.mark.parametrize(
    ("shape", "aspect", "rows", "columns"),
    [
        ((40, 60), (64, 64), (10, 10), (0, 0)),
        ((60, 40), (64, 64), (0, 0), (10, 10)),
        ((41, 60), (64, 64), (9, 10), (0, 0)),  # an odd row goes below
        ((40, 60), (64, 128), (0, 0), (10, 10)),
        ((40, 60), (20, 30), (0, 0), (0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_letterbox_pads_to_the_aspect_with_black(
    tmp_path: Path,
    shape: tuple[int, int],
    aspect: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
    dtype: type,
) -> None:
    path = save(tmp_path / "a.png", np.full(shape, 200, dtype))
    image = ImageReader(aspect, "letterbox")(path)
    assert image.dtype == dtype
    np.testing.assert_array_equal(image, np.pad(read_image(path), (rows, columns, (0, 0))))


def test_squashing_leaves_an_image_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", smooth())
    np.testing.assert_array_equal(ImageReader((64, 64))(path), smooth())


def test_a_letterbox_keeps_circles_round(tmp_path: Path) -> None:
    circle = np.zeros((60, 120, 3), np.uint8)
    cv2.circle(circle, (60, 30), 20, (255, 255, 255), -1)
    path = save(tmp_path / "a.png", circle)
    heights = {}
    for fit in ("squash", "letterbox"):
        seen = stored_copy(ImageReader((64, 64), fit)(path), 64)[..., 0] > 127
        heights[fit] = seen.any(1).sum() / seen.any(0).sum()
    assert heights["letterbox"] == pytest.approx(1, abs=0.1)
    assert heights["squash"] == pytest.approx(2, abs=0.2)


def test_an_unknown_fit() -> None:
    with pytest.raises(ConfigurationError, match=r"data.fit is 'stretch': choose one of squash, letterbox"):
        ImageReader((64, 64), "stretch")


def test_an_image_too_thin_to_letterbox(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.zeros((1, 20000), np.uint8))
    assert ImageReader((64, 64))(path).shape == (1, 20000, 3)
    with pytest.raises(ImageError, match=r"a.png of 1 x 20000 pixels is too thin to letterbox"):
        ImageReader((64, 64), "letterbox")(path)


# Dark border


def fundus(height: int = 300, width: int = 420, dark: int = 6, noise_of: float = 3, radius: int = 120) -> NDArray[Any]:
    """A disc that fades to a quarter at its rim, on a background that is not quite black."""
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - height // 2, columns - width // 2) / radius
    disc = (distance < 1) * (1 - 0.75 * distance**2)
    colour = disc[..., None] * [190, 90, 40] + dark
    return (colour + np.random.default_rng(0).normal(0, noise_of, colour.shape)).clip(0, 255).astype(np.uint8)


def assert_box(image: NDArray[Any], top: int, bottom: int, left: int, right: int, within: int = 3) -> None:
    rows, columns = bright_box(image)
    found = np.asarray([rows.start, rows.stop, columns.start, columns.stop])
    assert np.abs(found - [top, bottom, left, right]).max() <= within, found


def test_the_border_of_a_fundus_image_is_cut_off(tmp_path: Path) -> None:
    assert_box(fundus(), 30, 270, 90, 330)
    assert_box(fundus(dark=0, noise_of=0), 30, 270, 90, 330, within=1)
    assert_box(fundus().astype(np.uint16) * 16, 30, 270, 90, 330)  # 12 bits in 16
    path = save(tmp_path / "a.jpg", fundus(), quality=30)  # ringing
    assert_box(read_image(path), 30, 270, 90, 330, within=8)
    assert ImageReader((64, 64), crop_border=True)(path).shape[0] == pytest.approx(240, abs=16)


def test_the_border_of_a_large_image_is_found_on_a_small_copy() -> None:
    assert_box(fundus(1500, 2100, noise_of=6, radius=600), 150, 1350, 450, 1650, within=8)


def test_burnt_in_letters_do_not_count() -> None:
    image = fundus()
    cv2.putText(image, "R CC", (20, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 2)
    assert_box(image, 30, 270, 90, 330)


def test_two_large_parts_are_kept() -> None:
    image = np.zeros((200, 400, 3), np.uint8)
    image[50:150, 30:130] = image[60:140, 300:380] = 150
    assert_box(image, 50, 150, 30, 380, within=0)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((60, 80, 3), np.uint8),
        np.full((60, 80, 3), 9, np.uint16),
        np.random.default_rng(0).integers(60, 200, (60, 80, 3), np.uint8),
        np.pad(np.full((4, 4, 3), 255, np.uint8), ((20, 36), (20, 56), (0, 0))),  # a label alone
        np.full((1, 9000, 3), 100, np.uint8),
    ],
    ids=["black", "one grey", "no border", "all but black", "thin"],
)
def test_an_image_without_a_dark_border_stays_as_it_is(image: NDArray[Any]) -> None:
    assert image[bright_box(image)].shape == image.shape


def test_the_border_is_cut_off_before_the_letterbox(tmp_path: Path) -> None:
    image = ImageReader((64, 128), "letterbox", crop_border=True)(save(tmp_path / "a.png", fundus()))
    assert image.shape[1] == 2 * image.shape[0]
    assert image.shape[0] == pytest.approx(240, abs=6)
    assert not image[:, :100].any()


# Mean and std


def test_channel_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    arrays = [noise(24, 32, seed=seed) // (seed + 1) // np.asarray([1, 2, 3], np.uint8) for seed in range(4)]
    paths = [save(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate(arrays)]
    mean, std = channel_statistics(paths, (24, 32))
    everything = np.concatenate([pixels.reshape(-1, 3) for pixels in arrays]) / 255
    np.testing.assert_allclose(mean, everything.mean(0), atol=6e-5)
    np.testing.assert_allclose(std, everything.std(0), atol=6e-5)
    assert (*mean, *std) == tuple(round(value, 4) for value in (*mean, *std))


def test_channel_statistics_of_sixteen_bits(tmp_path: Path) -> None:
    arrays = [noise(24, 32, 1, seed=seed)[..., 0].astype(np.uint16) * 257 // (seed + 1) for seed in range(3)]
    mean, std = channel_statistics([save(tmp_path / f"{i}.png", a) for i, a in enumerate(arrays)], (24, 32))
    np.testing.assert_allclose(mean, [np.mean(arrays) / 65535] * 3, atol=6e-5)
    np.testing.assert_allclose(std, [np.std(arrays) / 65535] * 3, atol=6e-5)


def test_a_sample_of_images_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [Path(f"/data/{number % 7}/{number:04d}.png") for number in range(3000)]
    drawn = draw_sample(paths, Path("/data"))
    assert len(drawn) == len(set(drawn)) == SAMPLED
    assert drawn == sorted(drawn, key=paths.index)
    assert set(draw_sample(paths[::-1], Path("/data"))) == set(drawn)
    moved = [Path("/mnt/x") / path.relative_to("/data") for path in paths]
    assert draw_sample(moved, Path("/mnt/x")) == [Path("/mnt/x") / path.relative_to("/data") for path in drawn]
    assert (
        len(set(draw_sample([*paths, *(Path(f"/data/new/{i}.png") for i in range(30))], Path("/data"))) & set(drawn))
        > 970
    )
    assert draw_sample(paths[:SAMPLED], Path("/data")) == paths[:SAMPLED]


def test_the_dark_border_counts_unless_it_is_cropped(tmp_path: Path) -> None:
    image = np.pad(noise(40, 40), ((0, 0), (20, 20), (0, 0)))
    path = save(tmp_path / "a.png", image)
    assert channel_statistics([path], (40, 80))[0] == pytest.approx(image.mean((0, 1)) / 255, abs=6e-5)
    cropped = channel_statistics([path], (40, 40), reader=ImageReader((40, 40), crop_border=True))[0]
    assert cropped == pytest.approx(noise(40, 40).mean((0, 1)) / 255, abs=6e-5)


def test_channel_statistics_are_taken_at_the_resolution(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(64, 64))
    assert channel_statistics([path], (8, 8))[1][0] < 0.5 * channel_statistics([path], (64, 64))[1][0]


@pytest.mark.parametrize("level", [0, 90, 255])
def test_images_of_one_colour_have_no_statistics(tmp_path: Path, level: int) -> None:
    paths = [save(tmp_path / f"{i}.png", np.full((8, 8, 3), level, np.uint8)) for i in range(2)]
    with pytest.raises(ConfigurationError, match="never varies"):
        channel_statistics(paths, (8, 8))


# Views


@pytest.mark.parametrize("augmentation", ["default", "strong", "none"])
@pytest.mark.parametrize("size", [24, 64, 80])
def test_a_view_has_its_size_and_is_drawn_by_its_seed(augmentation: str, size: int) -> None:
    pixels, transform = smooth(64, 64), ViewTransform(size, augmentation)
    before = pixels.copy()
    views = [transform(pixels, seed) for seed in (1, 2, 3, 1)]
    assert all(view.shape == (3, size, size) and view.dtype == torch.float32 for view in views)
    assert all(0 <= view.min() < view.max() <= 1 for view in views)
    assert torch.equal(views[0], views[3])
    assert torch.equal(views[0], ViewTransform(size, augmentation)(pixels, 1))
    np.testing.assert_array_equal(pixels, before)
    assert (len({view.numpy().tobytes() for view in views}) == 1) == (augmentation == "none")


@pytest.mark.parametrize("augmentation", ["default", "strong", "none"])
def test_a_16_bit_view_is_the_8_bit_one_in_finer_steps(augmentation: str) -> None:
    pixels, transform = smooth(64, 64), ViewTransform((48, 32), augmentation)
    coarse, fine = transform(pixels, 1), transform(pixels.astype(np.uint16) * 257, 1)
    assert fine.shape == (3, 48, 32)
    torch.testing.assert_close(coarse, fine, rtol=0, atol=3 / 255)
    assert len(fine.unique()) > 2 * len(coarse.unique())


def test_each_thread_draws_from_generators_of_its_own() -> None:
    """As the seed of a view is kept in them."""
    transform, both = ViewTransform(24), threading.Barrier(2)

    def drawing(_: int) -> transforms._Steps:
        both.wait(10)  # else one thread could do the work of both
        return transform._drawing((64, 64, 3))

    first, second = at_once(drawing, [1, 2])
    assert first is not second
    assert first.random is not second.random
    assert not {id(step) for step in first.steps} & {id(step) for step in second.steps}


def test_views_do_not_depend_on_or_change_global_generators() -> None:
    pixels, transform = smooth(64, 64), ViewTransform(32)
    np.random.seed(0)
    torch.manual_seed(0)
    first, drawn = transform(pixels, 5), (np.random.rand(), torch.rand(1))
    np.random.seed(0)
    torch.manual_seed(0)
    assert (np.random.rand(), torch.rand(1)) == drawn
    assert torch.equal(transform(pixels, 5), first)


def test_no_augmentation_is_a_plain_resize() -> None:
    pixels = smooth(64, 64)
    assert torch.equal(ViewTransform(32, "none")(pixels, 0), unit_pixels(pixels, (32, 32)))


def ramps() -> NDArray[np.uint8]:
    """Red rises to the right and green downwards, so that a view shows where it was cut out; blue is constant."""
    rise = np.tile(np.arange(50, 178, dtype=np.uint8), (128, 1))
    return np.dstack([rise, rise.T, np.full_like(rise, 100)])


def shown(view: Tensor) -> NDArray[np.uint8]:
    """(height, width, 3) from (3, height, width)."""
    return (view.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def spans(view: NDArray[np.uint8]) -> tuple[float, float, bool, float]:
    """Width and height of the crop as shares of the image, times the gain of the jitter; mirrored or not; brightness.

    Jitter is affine as no ramp reaches the ends of the scale, and the spans share its gain.
    """
    across = float(view[..., 0].astype(float).mean(0)[-1] - view[..., 0].astype(float).mean(0)[0])
    down = float(view[..., 1].astype(float).mean(1)[-1] - view[..., 1].astype(float).mean(1)[0])
    return abs(across) / 127, down / 127, across < 0, float(view[..., 2].mean() / 100)


def test_default_views_are_the_published_ones() -> None:
    transform = ViewTransform(64)
    drawn = [spans(shown(transform(ramps(), seed))) for seed in range(200)]
    ratios = np.array([width / height for width, height, _, _ in drawn])
    gains = np.array([brightness for *_, brightness in drawn])
    assert 0.75 < ratios.min() < 0.85
    assert 1.15 < ratios.max() < 1.3
    assert 0.4 < np.mean([mirrored for _, _, mirrored, _ in drawn]) < 0.6
    assert 0.6 < gains.min() < 0.85
    assert 1.15 < gains.max() < 1.5


def test_views_of_what_is_mirrored_elsewhere_are_never_flipped() -> None:
    assert {spans(shown(ViewTransform(64, mirror=False)(ramps(), seed)))[2] for seed in range(20)} == {False}
    assert {spans(shown(ViewTransform(64)(ramps(), seed)))[2] for seed in range(20)} == {False, True}


def test_bilinear_shrinks_to_half_as_area_does() -> None:
    assert transforms._shrinking((256, 200, 3), (128, 128)) == cv2.INTER_LINEAR
    assert transforms._shrinking((256, 258, 3), (128, 128)) == cv2.INTER_AREA
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    linear, area = (cv2.resize(noise, (128, 128), interpolation=i) for i in (cv2.INTER_LINEAR, cv2.INTER_AREA))
    assert np.abs(linear.astype(int) - area).max() <= 1


def test_default_crops_cover_at_least_four_fifths() -> None:
    """Without jitter, the share of the image in a view; 3 % is lost between the centres of the outermost pixels."""
    *steps, _ = transforms._albumentations((64, 64), "default", True, cv2.INTER_AREA)
    drawing, areas = transforms._Steps(steps), []
    for seed in range(200):
        width, height, _, _ = spans(drawing(ramps(), seed))
        areas.append(width * height)
    assert 0.76 < min(areas) < 0.8
    assert 0.9 < max(areas) <= 1.0
    assert 0.84 < np.mean(areas) < 0.9


@pytest.mark.parametrize("augmentation", ["default", "strong"])
def test_steps_do_what_composing_them_does(augmentation: str) -> None:
    """With the same generators, to the last bit."""
    albumentations: Any = importlib.import_module("albumentations")
    pixels = smooth(64, 64)
    ours, theirs = (transforms._albumentations((32, 32), augmentation, True, cv2.INTER_LINEAR) for _ in range(2))
    drawing, compose = transforms._Steps(ours), albumentations.Compose(theirs)
    for seed in range(30):
        generator, python = np.random.Generator(np.random.PCG64(seed)), random.Random(seed)
        for step in theirs:
            step.set_random_state(generator, python)
        np.testing.assert_array_equal(drawing(pixels, seed), compose(image=pixels)["image"])


def test_views_of_a_batch_are_those_of_its_images() -> None:
    """Of 8 and of 16 bits, drawn in several threads at once."""
    images: list[NDArray[Any]] = [smooth(64, 64), smooth(64, 64).astype(np.uint16) * 257, smooth(32, 48)] * 5
    transform, seeds = ViewTransform(24, "strong"), range(len(images))
    expected = torch.stack([transform(image, seed) for image, seed in zip(images, seeds, strict=True)])
    with ThreadPoolExecutor(4) as pool:
        for views in pool.map(lambda _: transform.draw(images, seeds), range(8)):
            torch.testing.assert_close(views, expected, rtol=0, atol=1e-6)  # NumPy's last bit depends on addresses


def test_strong_views_are_also_turned() -> None:
    downs = [spans(shown(ViewTransform(64, "strong")(ramps(), seed)))[1] for seed in range(40)]
    assert 0.25 < np.mean([down < 0 for down in downs]) < 0.75


def test_an_unknown_augmentation() -> None:
    with pytest.raises(ConfigurationError, match="augmentation is 'weak': choose one of default, strong, none"):
        ViewTransform(32, "weak")


def test_a_used_transform_pickles() -> None:
    pixels, transform = smooth(64, 64), ViewTransform(32)
    view = transform(pixels, 3)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(pixels, 3), view)


# Imports


def test_albumentations_never_asks_the_network() -> None:
    """It is imported when the first view is drawn, with its search for a newer version switched off."""
    code = """
import socket, sys, urllib.request
import fpt_lightning, fpt_lightning.cli.training
assert "albumentations" not in sys.modules and "cv2" not in sys.modules
def refuse(*args, **kwargs):
    raise SystemExit("the network was asked")
urllib.request.urlopen = socket.create_connection = socket.socket.connect = socket.getaddrinfo = refuse
import numpy, os
fpt_lightning.data.transforms.ViewTransform(8)(numpy.zeros((16, 16, 3), numpy.uint8), 0)
assert "albumentations" in sys.modules
assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
"""
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
