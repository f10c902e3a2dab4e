"""Reading DICOM files; the only importer of pydicom (extra ``dicom``).

Grey values go through the steps of the standard in its order (DICOM PS3.3, C.11.1, C.11.2 and C.7.6.3.1.2): modality
rescale or lookup table, VOI lookup table or window, then inversion where MONOCHROME1 says that low values are bright.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing, get_decoder, pixel_array

from fpt_lightning.data.pages import page_index, too_large
from fpt_lightning.errors import ImageError

_MODALITY = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept")
_VOI = ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction")
_OF_A_FRAME = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_DECODED_TO_RGB = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def read_dicom(file: BinaryIO, path: Path, page: int | None) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read one frame of a DICOM file as RGB; only that frame is decoded.

    Grey: the first VOI lookup table, else the first window, else the whole range: of the display (0 to 255) for
    unsigned pixels of up to 8 bits without rescale, of the frame's values, least to greatest, for others. Padding
    (``PixelPaddingValue``) does not count in that range and is black. Colour: RGB, YBR, palette.

    Args:
        file: open for reading.
        path: its name, for errors.
        page: the frame, counted from 1; None for a file of one frame.

    Returns:
        (height, width, 3) at full scale: uint8 for up to 8 stored bits (of a palette's entries), else uint16.

    Raises:
        ImageError: not DICOM, without pixels, of several frames, or of pixels that cannot be decoded. What pydicom
            raises on damaged headers passes through.
    """
    try:
        header: Dataset = dcmread(file, stop_before_pixels=True)
    except InvalidDicomError as error:
        raise ImageError(f"the image {path} is not DICOM, although named so: DICM is not at byte 128.") from error
    if "Rows" not in header:
        kind = header.SOPClassUID.name if "SOPClassUID" in header else "of no stated kind"
        raise ImageError(f"the DICOM file {path} ({kind}) holds no image, or is truncated: leave it out.")
    if too_large(header.Rows, header.Columns):
        raise ImageError(f"the DICOM file {path} says that it has {header.Rows} x {header.Columns} pixels: too many.")
    index = page_index(path, int(header.get("NumberOfFrames") or 1), page)
    stored = _decoded(file, path, header, index)
    photometric = header.PhotometricInterpretation
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        _take_frame_settings(header, index)
        grey: NDArray[Any] = _to_depth(_displayed(stored, header), header.BitsStored)
        return np.repeat(grey[..., None], 3, axis=2)
    if photometric == "PALETTE COLOR":
        colour: NDArray[np.uint8] | NDArray[np.uint16] = apply_color_lut(stored, header)
        return colour[..., :3]
    if photometric in _DECODED_TO_RGB:
        return _to_depth(stored / (2**header.BitsStored - 1), header.BitsStored)
    raise ImageError(f"the DICOM file {path} has the colours {photometric!r}, which are not supported: save it as RGB.")


def _decoded(file: BinaryIO, path: Path, header: Dataset, index: int) -> NDArray[Any]:
    """The stored values of a frame: (height, width), or (height, width, 3) in RGB."""
    syntax = header.file_meta.TransferSyntaxUID
    what = f"the pixels of the DICOM file {path} (transfer syntax {syntax.name})"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise ImageError(f"{what} are in a form that pydicom does not decode: save them in another.") from error
    packages = "; ".join(line.partition(" requires ")[2] for line in decoder.missing_dependencies)
    if not decoder.is_available:
        raise ImageError(f"{what} need another package to be decoded: install one of {packages}.")
    file.seek(0)
    try:  # frames of a deflated file cannot be found before it is inflated
        stored: NDArray[Any] = pixel_array(dcmread(file) if syntax.is_deflated else file, index=index)
    except Exception as error:  # pydicom and its plug-ins raise errors of many kinds
        remedy = f" If it is whole, install another decoder: {packages}." if packages else ""
        raise ImageError(
            f"{what} cannot be decoded, the file may be damaged or cut off: {type(error).__name__}: "
            f"{' '.join(str(error).split())}.{remedy}"
        ) from error
    if stored.dtype.kind == "f":
        raise ImageError(f"the DICOM file {path} has floating-point pixels, whose scale is unknown.")
    return stored


def _take_frame_settings(header: Dataset, index: int) -> None:
    """Move what an enhanced multi-frame file says of all frames, or of this one, to where others say it."""
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])[:1]
    own = list(header.get("PerFrameFunctionalGroupsSequence") or [])[index : index + 1]
    for group in (*shared, *own):
        for keyword in _OF_A_FRAME:
            for settings in group.get(keyword) or []:
                header.update(settings)


def _displayed(stored: NDArray[Any], header: Dataset) -> NDArray[np.float64]:
    """Stored values (height, width) as a display would show them: 0 black to 1 white."""
    values = apply_modality_lut(stored.astype(np.int64), _part(header, _MODALITY))
    voi, padding = _part(header, _VOI), _padding(stored, header)
    if voi.get("VOILUTSequence"):
        unit = _looked_up(values, voi)
    elif "WindowCenter" in voi and "WindowWidth" in voi:
        unit = _windowed(values, voi)
    elif header.BitsStored <= 8 and stored.dtype.kind == "u" and np.array_equal(values, stored):
        unit = values / (2**header.BitsStored - 1)
    else:
        unit = _stretched(values, ~padding)
    if header.PhotometricInterpretation == "MONOCHROME1":
        unit = 1 - unit
    unit[padding] = 0
    return unit


def _part(header: Dataset, keywords: tuple[str, ...]) -> Dataset:
    """Those of the elements that have a value."""
    part = Dataset()
    part.file_meta = header.file_meta  # says the byte order of lookup tables
    for keyword in keywords:
        if keyword in header and not header[keyword].is_empty:
            part.add(header[keyword])
    return part


def _padding(stored: NDArray[Any], header: Dataset) -> NDArray[np.bool_]:
    part = _part(header, ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if "PixelPaddingValue" not in part:
        return np.zeros(stored.shape, bool)
    ends = np.asarray([element.value for element in part]).astype(stored.dtype)  # unsigned ones may stand for signed
    padding: NDArray[np.bool_] = (stored >= ends.min()) & (stored <= ends.max())
    return padding


def _looked_up(values: NDArray[Any], voi: Dataset) -> NDArray[np.float64]:
    table = voi.VOILUTSequence[0]
    entries, first, bits = table.LUTDescriptor
    table.LUTDescriptor = [entries, first, 16]  # pydicom wraps positions at the depth of the entries
    positions = np.rint(values).astype(np.int64).clip(first, first + 65535)
    return np.asarray(apply_voi(positions, voi) / (2**bits - 1))


def _windowed(values: NDArray[Any], voi: Dataset) -> NDArray[np.float64]:
    voi.PhotometricInterpretation, voi.BitsStored, voi.PixelRepresentation = "MONOCHROME2", 16, 0
    return apply_windowing(values, voi) / 65535  # the range of what those three describe


def _stretched(values: NDArray[Any], counts: NDArray[np.bool_]) -> NDArray[np.float64]:
    low, high = (values[counts].min(), values[counts].max()) if counts.any() else (0, 0)
    return np.asarray((values - low) / max(high - low, 1e-12))


def _to_depth(unit: NDArray[np.float64], bits: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """From 0 to 1 to the full scale of uint8 for up to 8 bits, else of uint16."""
    dtype: type[np.unsignedinteger[Any]] = np.uint8 if bits <= 8 else np.uint16
    levels: NDArray[Any] = np.rint(unit.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)
    return levels
