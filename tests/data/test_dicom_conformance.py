"""Every DICOM file that pydicom brings: read as pydicom's functions have it, or refused for the reason given here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, get_decoder, pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicom_files import BUNDLED
from fpt_lightning.data.images import read_image
from fpt_lightning.errors import ImageError

REFUSED = {
    "holds no image": (
        "UN_sequence",
        "DICOMDIR-empty",
        "empty_charset_LEI",
        "meta_missing_tsyntax",
        "nested_priv_SQ",
        "no_meta_group_length",
        "priv_SQ",
        "reportsi",
        "reportsi_with_empty_number_tags",
        "rtplan",
        "rtplan_truncated",
        "test-SR",
        "waveform_ecg",
    ),
    "no elements of an image": ("ExplVR_BigEndNoMeta", "ExplVR_LitEndNoMeta", "no_meta", "rtstruct"),
    "need another package": (
        "JPEGLSNearLossless_08",
        "JPEGLSNearLossless_16",
        "MR_small_jpeg_ls_lossless",
        "SC_rgb_jls_lossy_line",
        "SC_rgb_jls_lossy_sample",
        "SC_rgb_jpeg_gdcm",
    ),
    "install another decoder": (  # Pillow decodes neither 12 bits of JPEG, nor these of JPEG 2000
        "GDCMJ2K_TextGBR",
        "JPEG-lossy",
        "JPEG2000-embedded-sequence-delimiter",
        "JPGExtended",
    ),
    "may be damaged or cut off": ("MR_truncated",),
    "invalid literal": ("badVR",),  # a number of frames that is none
}
"""What the reason says: of which files."""
REASONS = {name: reason for reason, names in REFUSED.items() for name in names}
DECODERS = ("need another package", "install another decoder")
FILES = {path.stem: path for path in sorted(BUNDLED.rglob("*.dcm"))}
READ = [name for name in FILES if name not in REASONS]


def whole(path: Path) -> pydicom.FileDataset:
    data = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return data


def expected(data: pydicom.FileDataset, index: int) -> NDArray[Any]:
    """By pydicom: (height, width, 3), from 0 to 1."""
    stored, photometric = pixel_array(data, index=index), data.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        colour = apply_color_lut(stored, data)[..., :3]
        return np.asarray(colour / np.iinfo(colour.dtype).max)
    if not photometric.startswith("MONOCHROME"):
        return np.asarray(stored / (2**data.BitsStored - 1))
    values = apply_modality_lut(stored, data)
    shown = apply_voi_lut(values, data)
    if data.get("VOILUTSequence") or "WindowWidth" in data:
        low, high = apply_voi_lut(np.array([-1e9, 1e9]), data)  # what is beside the window
    elif data.BitsStored <= 8 and np.array_equal(values, stored):
        low, high = 0, 2**data.BitsStored - 1
    else:
        low, high = shown.min(), shown.max()
    unit = (shown - low) / max(high - low, 1e-12)
    return np.repeat((1 - unit if photometric == "MONOCHROME1" else unit)[..., None], 3, 2)


def test_every_file_is_named() -> None:
    assert set(REASONS) <= set(FILES)
    assert len(READ) >= 50


@pytest.mark.filterwarnings("ignore")  # of pydicom, and notices
@pytest.mark.parametrize("name", READ)
def test_read_as_pydicom_shows_it(name: str) -> None:
    data = whole(FILES[name])
    frames = int(data.get("NumberOfFrames") or 1)
    for index in {0, frames - 1}:
        image = read_image(FILES[name] if frames == 1 else f"{FILES[name]}#{index + 1}")
        levels = np.iinfo(image.dtype).max
        difference = np.abs(image - expected(data, index).clip(0, 1) * levels)
        assert difference.max() <= 0.5 + 1e-6 * levels


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REASONS)
def test_refused_for_this_reason(name: str) -> None:
    if REASONS[name] in DECODERS:
        plugins = get_decoder(whole(FILES[name]).file_meta.TransferSyntaxUID).available_plugins
        if set(plugins) - {"pillow"}:
            pytest.skip(f"read by {', '.join(plugins)}")
    with pytest.raises(ImageError, match=f"{re.escape(FILES[name].name)}.*{REASONS[name]}"):
        read_image(FILES[name])
