"""Reading DICOM files; the only importer of pydicom (extra ``dicom``).

Grey values go through the steps of the standard in its order (DICOM PS3.3, C.11.1, C.11.2 and C.7.6.3.1.2): modality
rescale or lookup table, VOI lookup table or window, then inversion where MONOCHROME1 says that low values are bright.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_color_lut, apply_windowing, get_decoder, pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from fpt_lightning.data.notices import tell
from fpt_lightning.data.pages import largest, page_index, too_large
from fpt_lightning.data.windows import centre_and_width
from fpt_lightning.errors import ImageError

_VOI = ("WindowCenter", "WindowWidth", "VOILUTFunction")
_OF_A_FRAME = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_DECODED_TO_RGB = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_GUESSED = {
    (True, True): ImplicitVRLittleEndian,
    (False, True): ExplicitVRLittleEndian,
    (False, False): ExplicitVRBigEndian,
}  # transfer syntaxes of files that name none, by implicit value representations and little-endian order


def read_dicom(
    file: BinaryIO, path: Path, page: int | None, notices: list[str] | None = None, window: str = "header"
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read one frame of a DICOM file as RGB; only that frame is decoded.

    Grey: the first VOI lookup table, else the first window, else the whole range: of the display (0 to 255) for
    unsigned pixels of up to 8 bits without rescale, of the frame's values, least to greatest, for others. Padding
    (``PixelPaddingValue``) does not count in that range and is black. Colour: RGB, YBR, palette. Entries of lookup
    tables are scaled by the bits that they use, whatever number is declared.

    Args:
        file: open for reading.
        path: its name, for errors.
        page: the frame, counted from 1; None for a file of one frame.
        notices: takes what had to be left out, such as a window without width; warned of where it is None.
        window: ``header`` for what is said above, ``full`` for the whole range, or ``centre,width`` in rescaled units.

    Returns:
        (height, width, 3) at full scale: uint8 for up to 8 stored bits (of a palette's entries), else uint16.

    Raises:
        ImageError: not DICOM, without pixels, of several frames, or of pixels that cannot be decoded. What pydicom
            raises on damaged headers passes through.
    """
    header = _header(file, path)
    if too_large(header.Rows, header.Columns):
        raise ImageError(
            f"the DICOM file {path} says that it has {header.Rows} x {header.Columns} pixels: too "
            "many. Allow as many as you trust by data.max_pixels."
        )
    index = page_index(path, int(header.get("NumberOfFrames") or 1), page)
    stored = _decoded(file, path, header, index)
    photometric = header.PhotometricInterpretation
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        if stored.ndim != 2:
            raise ImageError(
                f"the DICOM file {path} says {photometric}, which is grey, and has {stored.shape[-1]} samples a pixel: "
                "mend its header, or save it as RGB."
            )
        _take_frame_settings(header, index)
        grey: NDArray[Any] = _to_depth(_displayed(stored, header, path, notices, window), header.BitsStored)
        return np.repeat(grey[..., None], 3, axis=2)
    if photometric == "PALETTE COLOR":
        return _coloured(stored, header, path)
    if photometric in _DECODED_TO_RGB:
        return _to_depth(stored / (2**header.BitsStored - 1), header.BitsStored)
    raise ImageError(f"the DICOM file {path} has the colours {photometric!r}, which are not supported: save it as RGB.")


def described(path: Path, keywords: Sequence[str] = ("Modality", "BodyPartExamined", "PatientID")) -> dict[str, str]:
    """What a file's header says of it, by keyword; empty of what is no DICOM."""
    try:
        header = dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(keywords))
        return {keyword: str(header.get(keyword) or "") for keyword in keywords}
    except Exception:  # whatever is wrong with it, reading the image says
        return {}


# The file


def _header(file: BinaryIO, path: Path) -> Dataset:
    """All but the pixels; also of a file that lacks the preamble, or the group of elements that names its syntax."""
    _check_inflated(file, path)
    try:
        header: Dataset = dcmread(file, stop_before_pixels=True)
    except InvalidDicomError as error:
        file.seek(0)
        header = dcmread(file, stop_before_pixels=True, force=True)
        if not {"Rows", "Columns", "BitsAllocated"} <= set(header.dir()):  # what is not DICOM may look like elements
            raise ImageError(
                f"the image {path} is not DICOM, although named so: DICM is not at byte 128, and no elements of an "
                "image are in it."
            ) from error
    if "Rows" not in header:
        kind = header.SOPClassUID.name if "SOPClassUID" in header else "of no stated kind"
        raise ImageError(f"the DICOM file {path} ({kind}) holds no image, or is truncated: leave it out.")
    _name_syntax(header)
    return header


def _name_syntax(data: Dataset) -> None:
    """Give a file without a transfer syntax that which it was read by."""
    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = (bool(value) for value in data.original_encoding)
        data.file_meta.TransferSyntaxUID = _GUESSED[implicit, little]


def _check_inflated(file: BinaryIO, path: Path) -> None:
    """Refuse a deflated file that would fill the memory, before it is inflated.

    Raises:
        ImageError: more bytes than the largest image that is read has.
    """
    start = file.read(132)
    if start[128:] == b"DICM":
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            file.seek(144 + meta.FileMetaInformationGroupLength)  # the preamble, DICM, and the element of that length
            most = 8 * largest()  # three channels of 16 bits, and headers
            inflater, size, compressed = zlib.decompressobj(-zlib.MAX_WBITS), 0, file.read(2**16)
            while compressed and not inflater.eof and size <= most:
                size += len(inflater.decompress(compressed, 2**20))
                compressed = inflater.unconsumed_tail or file.read(2**16)
            if size > most:
                raise ImageError(
                    f"the DICOM file {path} inflates to more than {most:,} bytes: too many. Allow more by "
                    "data.max_pixels."
                )
    file.seek(0)


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
    try:
        stored = _frame(file, header, index)
    except Exception as error:  # pydicom and its plug-ins raise errors of many kinds
        remedy = f" If it is whole, install another decoder: {packages}." if packages else ""
        raise ImageError(
            f"{what} cannot be decoded, the file may be damaged or cut off: {type(error).__name__}: "
            f"{' '.join(str(error).split())}.{remedy}"
        ) from error
    if stored.dtype.kind == "f":
        raise ImageError(f"the DICOM file {path} has floating-point pixels, whose scale is unknown.")
    return stored


def _frame(file: BinaryIO, header: Dataset, index: int) -> NDArray[Any]:
    """One frame from where it lies in the file, or from all of the file where that is not found."""
    file.seek(0)
    if not header.file_meta.TransferSyntaxUID.is_deflated:  # whose frames cannot be found before it is inflated
        try:
            frame: NDArray[Any] = pixel_array(file, index=index)
            return frame
        except Exception as error:
            file.seek(0)
            try:
                return _of_all(file, index)
            except Exception:
                raise error from None  # the first is of the file as it says it is
    return _of_all(file, index)


def _of_all(file: BinaryIO, index: int) -> NDArray[Any]:
    data = dcmread(file, force=True)
    _name_syntax(data)
    stored: NDArray[Any] = pixel_array(data, index=index)
    return stored


def _take_frame_settings(header: Dataset, index: int) -> None:
    """Move what an enhanced multi-frame file says of all frames, or of this one, to where others say it."""
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])[:1]
    own = list(header.get("PerFrameFunctionalGroupsSequence") or [])[index : index + 1]
    for group in (*shared, *own):
        for keyword in _OF_A_FRAME:
            for settings in group.get(keyword) or []:
                header.update(settings)


# Grey values


def _displayed(
    stored: NDArray[Any], header: Dataset, path: Path, notices: list[str] | None, window: str
) -> NDArray[np.float64]:
    """Stored values (height, width) as a display would show them: 0 black to 1 white."""
    values, padding = _rescaled(stored.astype(np.int64), header, path), _padding(stored, header)
    unit = _as_headed(values, header, path, notices) if window == "header" else None
    if (given := centre_and_width(window)) is not None:
        unit = np.clip((values - given[0]) / given[1] + 0.5, 0, 1)
    if unit is None and header.BitsStored <= 8 and stored.dtype.kind == "u" and np.array_equal(values, stored):
        unit = values / (2**header.BitsStored - 1)
    if unit is None:
        unit = _stretched(values, ~padding)
    shown = stored[~padding]
    if shown.size and shown.min() < shown.max() and np.ptp(unit[~padding]) == 0:
        tell(
            notices,
            f"the DICOM file {path} is of one colour as its header asks, and its values are {shown.min()} to "
            f"{shown.max()}.",
        )
    if header.PhotometricInterpretation == "MONOCHROME1":
        unit = 1 - unit
    unit[padding] = 0
    return unit


def _as_headed(
    values: NDArray[Any], header: Dataset, path: Path, notices: list[str] | None
) -> NDArray[np.float64] | None:
    """By the first lookup table or window of the header; None where there is none."""
    unit, voi = _looked_up(values, header, path, notices), _part(header, _VOI)
    if unit is None and {"WindowCenter", "WindowWidth"} <= set(voi.dir()):
        unit = _windowed(values, voi, path, notices)
    return unit


def _part(header: Dataset, keywords: tuple[str, ...]) -> Dataset:
    """Those of the elements that have a value."""
    part = Dataset()
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


def _rescaled(stored: NDArray[np.int64], header: Dataset, path: Path) -> NDArray[Any]:
    """By the modality lookup table, or slope and intercept (PS3.3, C.11.1)."""
    tables = _filled(header, "ModalityLUTSequence")
    if tables:
        return _Table.read(tables[0], "LUTDescriptor", "LUTData", header, path)(stored)
    line = _part(header, ("RescaleSlope", "RescaleIntercept"))
    if len(line) < 2:
        return stored
    return np.asarray(stored * float(line.RescaleSlope) + float(line.RescaleIntercept))


def _looked_up(
    values: NDArray[Any], header: Dataset, path: Path, notices: list[str] | None
) -> NDArray[np.float64] | None:
    """By the first VOI lookup table (PS3.3, C.11.2.1.1); None where there is none."""
    tables = _filled(header, "VOILUTSequence")
    if tables:
        table = _Table.read(tables[0], "LUTDescriptor", "LUTData", header, path)
        return np.asarray(table(values) / (2**table.bits - 1))
    if header.get("VOILUTSequence"):
        tell(notices, f"the VOI lookup table of the DICOM file {path} is empty: it is shown as if it had none.")
    return None


def _windowed(values: NDArray[Any], voi: Dataset, path: Path, notices: list[str] | None) -> NDArray[np.float64] | None:
    """By the first window (PS3.3, C.11.2.1.2); None where it has no width."""
    width = float(np.atleast_1d(voi.WindowWidth)[0])
    linear = voi.get("VOILUTFunction", "LINEAR").upper() == "LINEAR"
    if not width >= 1 if linear else not width > 0:
        tell(notices, f"the window of the DICOM file {path} is {width:g} wide: its whole range is shown.")
        return None
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


# Lookup tables


class _Table(NamedTuple):
    """A lookup table.

    Attributes:
        first: the value that the first entry is for; what is below takes it too.
        entries: unsigned.
    """

    first: int
    entries: NDArray[np.int64]

    @classmethod
    def read(cls, holder: Dataset, descriptor: str, data: str, header: Dataset, path: Path) -> _Table:
        """Of two elements, in the file's byte order.

        Raises:
            ImageError: fewer entries than the descriptor says.
        """
        count, first, _ = (int(number) for number in holder[descriptor].value)
        count = count or 2**16
        if first >= 2**15 and header.PixelRepresentation == 1:
            first -= 2**16  # a negative number in an unsigned element
        entries = _entries(holder[data], count, little=bool(header.original_encoding[1]))
        if len(entries) < count:
            raise ImageError(f"the DICOM file {path} has a lookup table of {len(entries)} of {count} entries.")
        return cls(first, entries[:count])

    @property
    def bits(self) -> int:
        """That the entries use, at least 8: what is declared is often the size of the words that hold them."""
        return max(8, int(self.entries.max()).bit_length())

    def __call__(self, values: NDArray[Any]) -> NDArray[np.int64]:
        positions = np.rint(values).astype(np.int64) - self.first
        found: NDArray[np.int64] = self.entries[positions.clip(0, len(self.entries) - 1)]
        return found


def _entries(element: Any, count: int, little: bool) -> NDArray[np.int64]:
    """As whole numbers: of words, or of bytes, two in a word, the lower one first (PS3.3, C.7.6.3.1.6)."""
    if isinstance(element.value, bytes):
        words = np.frombuffer(
            element.value[: len(element.value) // 2 * 2], "<u2" if little or element.VR == "OB" else ">u2"
        )
    else:
        words = np.atleast_1d(np.asarray(element.value, np.int64) & 0xFFFF).astype("<u2")
    numbers: NDArray[Any] = words if len(words) >= count else words.astype("<u2").view(np.uint8)
    return numbers.astype(np.int64)


def _filled(header: Dataset, sequence: str) -> list[Dataset]:
    """Items with a table in them."""
    return [item for item in header.get(sequence) or [] if {"LUTDescriptor", "LUTData"} <= set(item.dir())]


def _coloured(stored: NDArray[Any], header: Dataset, path: Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """By the palette (PS3.3, C.7.9)."""
    if "SegmentedRedPaletteColorLookupTableData" in header:
        colour: NDArray[np.uint8] | NDArray[np.uint16] = apply_color_lut(stored, header)
        return colour[..., :3]
    start = "PaletteColorLookupTable"
    tables = [
        _Table.read(header, f"{name}{start}Descriptor", f"{name}{start}Data", header, path)
        for name in ("Red", "Green", "Blue")
    ]
    bits = max(table.bits for table in tables)
    return _to_depth(np.stack([table(stored) for table in tables], -1) / (2**bits - 1), bits)
