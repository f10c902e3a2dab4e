"""DICOM files: those that pydicom brings, and generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels import set_pixel_data
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"


def dataset(pixels: NDArray[Any], photometric: str = "MONOCHROME2", bits: int = 0, **elements: Any) -> FileDataset:
    """A file of (frames, height, width) or (height, width[, 3]) pixels."""
    file = FileDataset(None, {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, generate_uid()
    set_pixel_data(file, pixels, photometric, bits or 8 * pixels.dtype.itemsize)
    for keyword, value in elements.items():
        setattr(file, keyword, value)
    return file


def write(path: Path, file: FileDataset) -> Path:
    file.save_as(path, enforce_file_format=True)
    return path
