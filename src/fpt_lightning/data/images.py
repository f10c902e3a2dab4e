"""Reading image files of any kind, and framing them for the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from fpt_lightning.data.notices import tell
from fpt_lightning.data.pages import allow, file_and_page, largest, page_index, too_large
from fpt_lightning.data.windows import centre_and_width
from fpt_lightning.errors import ConfigurationError, ImageError

Fit = Literal["squash", "letterbox"]
FITS: tuple[str, ...] = get_args(Fit)
OnError = Literal["stop", "skip"]
DICOM_SUFFIXES = (".dcm", ".dicom")
INTERPOLATION = "bicubic, antialiased"  # of ``fpt_lightning.data.transforms.resize``
FULL_RANGE = (0.0, 65535.0)
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value of the second
_ORIENTATION = 274  # EXIF tag
_FEW_LEVELS = 32  # of 256, that an image of more levels is left with
_NEEDS_PYDICOM = "the image {} is DICOM: pip install 'fpt-lightning[dicom]' to read it."
_FEW_PIXELS = 0.01  # share that may lie outside a range without a word


def read_image(
    path: str | Path,
    notices: list[str] | None = None,
    window: str = "header",
    max_pixels: int | None = None,
    value_range: tuple[float, float] = FULL_RANGE,
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read an image file as RGB, upright.

    JPEG, PNG, TIFF, BMP, PGM and WebP; grey is repeated, palettes are looked up, transparency is dropped, the EXIF
    orientation is applied. 16-bit PNG and TIFF files keep their depth (the full scale is 65,535). DICOM, by its suffix
    or by its content: see ``fpt_lightning.data.dicom.read_dicom``.

    Args:
        path: of the file; ``scan.dcm#12`` is its page or frame 12, counted from 1.
        notices: takes what had to be left out of what a file asks for (``fpt_lightning.data.notices``); warned of where
            it is None.
        window: of grey DICOM values: ``header`` for what the file says, ``full`` for its whole range, or
            ``centre,width``.
        max_pixels: that images may have, in place of Pillow's limit of 179 million, which guards against small files
            that fill the memory; raised for this process.
        value_range: values of 16-bit pictures that become 0 and 65,535; DICOM has its own (``window``).

    Returns:
        (height, width, 3), uint8 or uint16.

    Raises:
        ImageError: the file is missing, damaged, not an image, of a kind without a known scale, of several pages of
            which none is asked for, or DICOM without pydicom being installed.
    """
    name, page = file_and_page(path)
    if max_pixels is not None:
        allow(max_pixels)
    try:
        with open(name, "rb") as file:  # opened by path, turned grey TIFFs are sheared
            dicom = is_dicom(file, name)
            if dicom:
                image = _read_dicom(file, name, page, notices, window)
            else:
                image = _read_picture(file, name, page, notices, value_range)
    except FileNotFoundError as error:
        raise ImageError(f"the image {path} does not exist.") from error
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"the image {path} has more than {largest():,} pixels: allow as many as you trust by data.max_pixels."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"the image {path} cannot be read: it is damaged, of no kind that Pillow knows, or a form of TIFF that it "
            "does not read. Save it as PNG, or leave it out."
        ) from error
    except Exception as error:  # Pillow's and pydicom's readers raise errors of many kinds on damaged files
        raise ImageError(f"the image {path} cannot be read: {type(error).__name__}: {error}.") from error
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"the image {path} is of the shape {image.shape} and {image.dtype}: its header is wrong.")
    return image


def is_dicom(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is DICOM, by its name or its first bytes."""
    head = file.read(132)
    file.seek(0)
    return path.suffix.lower() in DICOM_SUFFIXES or head[128:] == b"DICM"


def _read_dicom(
    file: BinaryIO, path: Path, page: int | None, notices: list[str] | None, window: str
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    try:
        from fpt_lightning.data.dicom import read_dicom
    except ModuleNotFoundError as error:
        if error.name != "pydicom":
            raise
        raise ImageError(_NEEDS_PYDICOM.format(path)) from error
    return read_dicom(file, path, page, notices, window)


def check_extras(paths: Iterable[Path]) -> None:
    """Refuse DICOM where pydicom is not installed, before anything is read for long.

    Raises:
        ImageError: naming the first such image and what to install.
    """
    if find_spec("pydicom") is not None:
        return
    for path in paths:
        name, _ = file_and_page(path)
        if name.is_file():
            with name.open("rb") as file:
                if is_dicom(file, name):
                    raise ImageError(_NEEDS_PYDICOM.format(path))


def _read_picture(
    file: BinaryIO, path: Path, page: int | None, notices: list[str] | None, value_range: tuple[float, float]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    with Image.open(file) as image:
        pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's JPEG with its preview
        image.seek(page_index(path, pages, page))
        tags = dict(image.tag_v2) if isinstance(image, TiffImageFile) else {}
        if _is_deep_colour(image):
            return _in_range(_read_deep_colour(file, image), value_range, path, notices)
        deep = _is_deep_grey(image)
        upright = ImageOps.exif_transpose(image)
        if deep:
            grey = _at_full_scale(np.asarray(upright).astype(np.uint16), tags)
            return np.repeat(_in_range(grey, value_range, path, notices)[..., None], 3, axis=2)
        if upright.mode in ("I", "F"):
            kind = "signed 16-bit" if tags.get(_BITS) == (16,) else "32-bit"
            raise ImageError(
                f"the image {path} has {kind} pixels, whose black and white are unknown: save it with 8 or 16 bits, "
                "unsigned."
            )
        if "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"), dtype=np.uint8)


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")  # which is scaled to 16 bits


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether Pillow would drop the lower 8 of 16 bits, as it does of all but grey pictures."""
    if image.format not in ("PNG", "TIFF") or image.mode not in ("RGB", "RGBA", "RGBX", "LA"):
        return False
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))


def _read_deep_colour(file: BinaryIO, image: Image.Image) -> NDArray[np.uint16]:
    """By OpenCV, which keeps 16 bits of colour; transparency is dropped.

    Raises:
        ImageError: a form that OpenCV does not read.
    """
    import cv2

    file.seek(0)
    content, page = np.frombuffer(file.read(), np.uint8), image.tell()
    _, pages = cv2.imdecodemulti(content, cv2.IMREAD_UNCHANGED, range=(page, page + 1))
    if not pages or pages[0].dtype != np.uint16:
        raise ImageError(f"the image {file.name} has colours of 16 bits in a form that is not read: save it as PNG.")
    pixels = pages[0] if pages[0].ndim == 3 else np.repeat(pages[0][..., None], 3, axis=2)
    orientation = image.getexif().get(_ORIENTATION, 1) if image.format == "PNG" else 1  # OpenCV turned the TIFF
    turned: NDArray[np.uint16] = np.ascontiguousarray(_upright(pixels[..., 2::-1], orientation))
    return turned


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Pixels (height, width, 3) as an EXIF orientation, 1 to 8, says that they are to be shown."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def is_deep(path: Path) -> bool:
    """Whether a file is a picture, not DICOM, of 16 bits; False of what cannot be read. Its header alone is read."""
    name, page = file_and_page(path)
    try:
        with open(name, "rb") as file:
            if is_dicom(file, name):
                return False
            with Image.open(file) as image:
                if page is not None:
                    image.seek(page - 1)
                return _is_deep_grey(image) or _is_deep_colour(image)
    except Exception:  # whatever it is, reading it will say
        return False


def stretched(image: NDArray[np.uint16], value_range: tuple[float, float]) -> NDArray[np.uint16]:
    """Values in a range at full scale, 0 to 65,535; those outside are cut off."""
    low, high = value_range
    if value_range == FULL_RANGE:
        return image
    table = np.rint(np.clip((np.arange(65536) - low) / (high - low), 0, 1) * 65535).astype(np.uint16)
    at_full_scale: NDArray[np.uint16] = table[image]
    return at_full_scale


def _in_range(
    image: NDArray[np.uint16], value_range: tuple[float, float], path: Path, notices: list[str] | None
) -> NDArray[np.uint16]:
    """Stretched, with a notice where the range cuts off much of an image, or leaves few grey levels of many."""
    low, high = value_range
    darkest, brightest = int(image.min()), int(image.max())
    if darkest < low or brightest > high:
        outside = float(((image < low) | (image > high)).mean())
        if outside > _FEW_PIXELS:
            tell(notices, f"{path}: {outside:.0%} of its values lie outside data.value_range [{low:g}, {high:g}].")
    levels = 255 * (min(brightest, high) - max(darkest, low)) / (high - low)
    if levels < _FEW_LEVELS <= brightest - darkest:
        tell(
            notices,
            f"{path}: its values, {darkest} to {brightest}, are {max(0, levels):.0f} of 256 grey levels of [{low:g}, "
            f"{high:g}]: say the range of the data set by data.value_range.",
        )
    return stretched(image, value_range)


def _at_full_scale(grey: NDArray[np.uint16], tags: Mapping[int, Any]) -> NDArray[np.uint16]:
    """What Pillow leaves undone at more than 8 bits: values of fewer than 16, and those of which 0 is white."""
    (bits,) = tags.get(_BITS, (16,))
    top = 2**bits - 1
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = top - grey
    if bits == 16:
        return grey
    scaled: NDArray[np.uint16] = np.rint(grey * (65535 / top)).astype(np.uint16)
    return scaled


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of a data set, for the encoder and for the side network alike.

    Args:
        aspect: (height, width) of the encoder's images; their ratio counts.
        fit: ``squash`` leaves an image as it is, so that resizing changes its aspect; ``letterbox`` pads it with black,
            evenly on two sides, to the encoder's.
        crop_border: whether the dark border is cut off first (``bright_box``).
        window: of grey DICOM values (``read_image``).
        max_pixels: that images may have (``read_image``).
        value_range: of 16-bit pictures (``read_image``).

    Raises:
        ConfigurationError: an unknown fit, a window or range without width, or fewer than one pixel.
    """

    aspect: tuple[int, int]
    fit: str = "squash"
    crop_border: bool = False
    window: str = "header"
    max_pixels: int | None = None
    value_range: tuple[float, float] = FULL_RANGE

    def __post_init__(self) -> None:
        low, high = self.value_range
        if not 0 <= low < high <= 65535:
            raise ConfigurationError(
                f"data.value_range is [{low:g}, {high:g}]: give two numbers from 0 to 65535, the smaller first."
            )
        centre_and_width(self.window)
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ConfigurationError(f"data.max_pixels is {self.max_pixels}: give at least 1.")
        if self.fit not in FITS:
            raise ConfigurationError(f"data.fit is {self.fit!r}: choose one of {', '.join(FITS)}.")

    def __call__(self, path: str | Path, notices: list[str] | None = None) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """(height, width, 3), uint8 or uint16, as ``read_image`` gives it and raises.

        Raises:
            ImageError: also an image so thin that padding would make it larger than Pillow reads any.
        """
        return self.framed(read_image(path, notices, self.window, self.max_pixels, self.value_range), str(path))

    def framed(
        self, image: NDArray[np.uint8] | NDArray[np.uint16], name: str
    ) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """The same of an image (height, width, 3) that has been read, whose name is for errors."""
        if self.crop_border:
            image = image[bright_box(image)]
        if self.fit == "squash":
            return image
        rows, columns = _padding(image.shape[:2], self.aspect)
        height, width = image.shape[:2]
        if too_large(height + sum(rows), width + sum(columns)):
            raise ImageError(f"the image {name} of {height} x {width} pixels is too thin to letterbox.")
        padded: NDArray[Any] = np.pad(image, (rows, columns, (0, 0)))
        return padded


def _padding(shape: tuple[int, ...], aspect: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows (above, below) and columns (left, right) that give (height, width) an aspect."""
    (height, width), (tall, wide) = shape, aspect
    rows, columns = max(0, round(width * tall / wide) - height), max(0, round(height * wide / tall) - width)
    return (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)


def bright_box(image: NDArray[np.uint8] | NDArray[np.uint16]) -> tuple[slice, slice]:
    """The rows and columns of an image without its dark border, such as those of fundus images and mammograms.

    They bound the pixels whose brightest channel exceeds a tenth of the way from the image's darkest level to its 99th
    percentile, which noise, JPEG ringing and not quite black backgrounds stay below. Connected parts of less than a
    tenth of the largest one's area, such as burnt-in letters, do not count. Found on a copy of at most 512 pixels a
    side. An image where less than a twentieth of the area would be left is taken to be dark as a whole and stays as it
    is.

    Args:
        image: (height, width, 3).
    """
    import cv2

    height, width = image.shape[:2]
    scale = min(1, 512 / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).max(axis=2)
    darkest = float(small.min())
    bright = (small > darkest + (np.percentile(small, 99) - darkest) / 10).astype(np.uint8)
    _, _, parts, _ = cv2.connectedComponentsWithStats(bright)
    parts = parts[1:]  # the first is the background
    parts = parts[10 * parts[:, cv2.CC_STAT_AREA] >= parts[:, cv2.CC_STAT_AREA].max(initial=0)]
    starts = parts[:, [cv2.CC_STAT_TOP, cv2.CC_STAT_LEFT]]
    stops = starts + parts[:, [cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH]]
    if not len(parts):
        return slice(0, height), slice(0, width)
    (top, left), (bottom, right) = starts.min(axis=0), stops.max(axis=0)
    if 20 * (bottom - top) * (right - left) < small.size:
        return slice(0, height), slice(0, width)
    rows, columns = height / size[1], width / size[0]
    return (
        slice(int(top * rows), min(height, int(np.ceil(bottom * rows)))),
        slice(int(left * columns), min(width, int(np.ceil(right * columns)))),
    )


def unreadable(paths: Mapping[str, Path], reader: ImageReader) -> dict[str, str]:
    """Those of the images that cannot be read, and why; each is read and decoded."""

    def reason(path: Path) -> str | None:
        try:
            reader(path, [])  # its notices come when the image is used
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        reasons = zip(paths, pool.map(reason, paths.values()), strict=True)
        return {name: why for name, why in reasons if why is not None}
