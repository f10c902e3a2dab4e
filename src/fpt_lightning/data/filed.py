"""How images were filed: what their files' names, sizes and headers say, whatever they show."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from PIL import Image

from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.data.images import is_dicom
from fpt_lightning.data.pages import file_and_page, named_page

_DICOM = {"Modality": "modality", "Manufacturer": "manufacturer", "ManufacturerModelName": "device model"}
_SIZE = ("Rows", "Columns", "PhotometricInterpretation", "BitsStored")


def filed(files: ImageFiles, ids: Sequence[str]) -> dict[str, list[str]]:
    """What is known of the files of N images, by name, as text; empty where it is not. Headers alone are read."""
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(lambda name: _header(files.root / name), ids))
    sizes = files.of(ids).sizes
    known = {
        "file type": [PurePosixPath(named_page(id)[0]).suffix.lower() or "no suffix" for id in ids],
        "file size (bytes)": [str(size) if size >= 0 else "" for size in sizes.tolist()],
    }
    for name in dict.fromkeys(name for header in headers for name in header):
        known[name] = [header.get(name, "") for header in headers]
    return known


def _header(path: Path) -> dict[str, str]:
    """What the header of an image says; nothing of one that cannot be read."""
    name, page = file_and_page(path)
    try:
        with name.open("rb") as file:
            if is_dicom(file, name):
                return _dicom_header(name)
            with Image.open(file) as image:
                if page is not None:
                    image.seek(page - 1)
                return _shape(image.height, image.width, image.mode)
    except Exception:  # whatever it is, the store has the image, or left it out and says why
        return {}


def _dicom_header(path: Path) -> dict[str, str]:
    from fpt_lightning.data.dicom import described

    found = described(path, [*_DICOM, *_SIZE])
    height, width, colours, bits = (found[keyword] for keyword in _SIZE)
    return {name: found[keyword] for keyword, name in _DICOM.items()} | _shape(
        int(height), int(width), f"{colours}, {bits} bits"
    )


def _shape(height: int, width: int, mode: str) -> dict[str, str]:
    return {
        "image size": f"{height} x {width}",
        "pixels": str(height * width),
        "aspect ratio": f"{width / height:.4g}",
        "colour mode": mode,
    }
