"""Drawn fundus photographs whose class only the full resolution shows: data for examples and tests, offline.

Every image is a retina of its own (position, colour, lighting, optic disc, macula, vessels, camera noise). The class is
a fine texture over parts of the retina, 128 periods across the image and nothing slower: a copy
of 128 pixels keeps a trace of it (about 0.5 grey levels rms).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fpt_lightning.data.manifest import Kind, Manifest
from fpt_lightning.datamodules.preloaded import PreloadedFeatureDataModule
from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.files import PARTIAL, whole_file, write_json
from fpt_lightning.progress import track

CLASSES: tuple[str, ...] = ("healthy", "granular", "striated")

_MARKER = "synthetic.json"
_VERSION = 1  # part of the marker: raise it whenever the pixels of an image change
_PERIODS = 128  # of both textures across the image: one a pixel of a 128-pixel copy, which averages it away
_BANDWIDTH = 14  # periods across the image, standard deviation
_SMALLEST = 320  # pixels: below, the texture's period of size / 128 pixels cannot be drawn
_CONTRAST = 0.20  # of both textures, standard deviation as a share of the local brightness
_CAMERA_NOISE = 2.5  # grey levels, standard deviation

_Array = NDArray[np.float32]


@dataclass(frozen=True)
class _Retina:
    """Where things lie in one eye; lengths in units of the radius of the field of view, colours in grey levels.

    Attributes:
        radius: of the field of view, as a share of the image's side.
        centre: (x, y) of the field of view, as shares of the image's side.
        side: +1 with the optic disc on the right, -1 on the left.
        tilt: rotation of the eye in radians.
        disc: (x, y) of the optic disc before the rotation, for ``side`` +1.
        disc_radius: of the optic disc.
        colour: of the fundus, RGB.
    """

    radius: float
    centre: tuple[float, float]
    side: int
    tilt: float
    disc: tuple[float, float]
    disc_radius: float
    colour: _Array

    def place(self, points: NDArray[np.float64], size: int) -> NDArray[np.float64]:
        """Points (P, 2) of the eye's own frame in pixels (x, y)."""
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        x, y = points[:, 0] * self.side, points[:, 1]
        turned = np.stack([x * cos - y * sin, x * sin + y * cos], 1)
        placed: NDArray[np.float64] = size * (np.asarray(self.centre) + self.radius * turned)
        return placed


def fundus_image(label: int, seed: int, size: int = 512) -> NDArray[np.uint8]:
    """Draw one fundus photograph; the same ``seed`` gives the same eye in every class.

    Args:
        label: position in ``CLASSES``: 0 no texture, 1 fine speckle, 2 fine streaks.
        seed: decides everything else, 0 or more.
        size: side of the image in pixels, 320 or more; the texture's period is size / 128 pixels.

    Returns:
        RGB (size, size, 3), uint8.

    Raises:
        ConfigurationError: a label, seed or size outside these ranges.
    """
    _check(label, seed, size)
    rng = np.random.default_rng([seed, 0])
    retina = _draw_retina(rng)
    x, y = _eye_coordinates(retina, size)
    image = _background(rng, retina, x, y)
    image = _add_disc(rng, retina, image, x, y)
    vessels = _vessels(rng, retina, size)
    image = image * (1 - vessels[..., None] * np.asarray([0.38, 0.62, 0.55], np.float32))
    inside = _soft_step((1 - np.hypot(x, y)) * retina.radius * size / 1.5)
    outside_disc = _soft_step((np.hypot(x - retina.disc[0], y - retina.disc[1]) / retina.disc_radius - 1.3) * 8)
    where = inside * outside_disc * (1 - vessels) * _patches(rng, size)
    texture = _texture(np.random.default_rng([seed, 1]), label, retina, size)
    image = image * (1 + (_CONTRAST * where * texture)[..., None])
    image = image * inside[..., None] + rng.uniform(2, 7)
    image += rng.standard_normal((size, size, 3), dtype=np.float32) * _CAMERA_NOISE
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _check(label: int, seed: int, size: int) -> None:
    if not 0 <= label < len(CLASSES):
        raise ConfigurationError(f"label is {label}: give 0 to {len(CLASSES) - 1}, a position in {CLASSES}.")
    if seed < 0:
        raise ConfigurationError(f"seed is {seed}: give 0 or more.")
    if size < _SMALLEST:
        raise ConfigurationError(f"size is {size} pixels: the textures need at least {_SMALLEST}.")


def write_fundus_images(root: str | Path, count: int = 300, seed: int = 0, size: int = 512) -> None:
    """Write a balanced set as ``root/{class}/{number}.png``; images of this set that already lie there are kept.

    Args:
        root: folder, created where it is missing.
        count: images of all classes together.
        seed: of the whole set; sets of different seeds share no eye.
        size: side of the images in pixels.

    Raises:
        ConfigurationError: a count below the number of classes, or a seed or size that ``fundus_image`` refuses.
        DataError: ``root`` holds anything else: another set or foreign files.
    """
    root = Path(root)
    if count < len(CLASSES):
        raise ConfigurationError(f"count is {count}: give at least one image a class, {len(CLASSES)}.")
    _check(0, seed, size)
    parameters = {"version": _VERSION, "classes": list(CLASSES), "count": count, "seed": seed, "size": size}
    labels = {f"{CLASSES[i % len(CLASSES)]}/{i // len(CLASSES):04d}.png": i for i in range(count)}
    present = _present(root, parameters, set(labels))
    missing = {name: index for name, index in labels.items() if name not in present}
    if not missing:
        return
    write_json(root / _MARKER, parameters)
    for name, index in track(missing.items(), "drawing fundus images", len(missing)):
        image = fundus_image(index % len(CLASSES), seed * 1_000_000 + index, size)
        with whole_file(root / name) as partial:
            Image.fromarray(image).save(partial, format="png", compress_level=1)


def _present(root: Path, parameters: dict[str, Any], names: set[str]) -> set[str]:
    """Images of exactly this set that are complete."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file: name a folder for the synthetic images.")
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    present = {name for name in files if not name.endswith(PARTIAL)}
    if not present:
        return present
    found = _read_marker(root / _MARKER)
    differing = [f"{k} {found.get(k)!r} instead of {v!r}" for k, v in parameters.items() if found.get(k) != v]
    if not found:
        reason = f"files, but no readable {_MARKER}"
    elif differing:
        reason = f"another synthetic set ({', '.join(differing)})"
    elif foreign := sorted(present - names - {_MARKER}):
        reason = f"files that are not of this set, such as {foreign[0]}"
    else:
        return present
    raise DataError(f"{root} already holds {reason}. Delete that folder, or name another one.")


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _draw_retina(rng: np.random.Generator) -> _Retina:
    return _Retina(
        radius=rng.uniform(0.44, 0.48),
        centre=(rng.uniform(0.48, 0.52), rng.uniform(0.48, 0.52)),
        side=int(rng.choice([-1, 1])),
        tilt=rng.uniform(-0.3, 0.3),
        disc=(rng.uniform(0.42, 0.62), rng.uniform(-0.12, 0.08)),
        disc_radius=rng.uniform(0.12, 0.16),
        colour=np.asarray([rng.uniform(145, 175), rng.uniform(66, 92), rng.uniform(28, 48)], np.float32),
    )


def _eye_coordinates(retina: _Retina, size: int) -> tuple[_Array, _Array]:
    """The eye's own frame, x and y of every pixel, both (size, size): the inverse of ``_Retina.place``."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    x = (columns / size - retina.centre[0]) / retina.radius
    y = (rows / size - retina.centre[1]) / retina.radius
    cos, sin = np.float32(np.cos(retina.tilt)), np.float32(np.sin(retina.tilt))
    return np.asarray((x * cos + y * sin) * retina.side, np.float32), np.asarray(y * cos - x * sin, np.float32)


def _background(rng: np.random.Generator, retina: _Retina, x: _Array, y: _Array) -> _Array:
    """Fundus colour under uneven light, with choroidal mottling and the macula: (size, size, 3)."""
    size = len(x)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.2)
    light = 1.08 - rng.uniform(0.25, 0.45) * (x * x + y * y) + slope * (np.cos(angle) * x + np.sin(angle) * y)
    mottling = 0.05 * _smooth_noise(rng, size, 6) + 0.04 * _smooth_noise(rng, size, 14)
    mottling += 0.03 * _smooth_noise(rng, size, 30)
    fovea = (retina.disc[0] - rng.uniform(0.62, 0.74), retina.disc[1] + rng.uniform(0.02, 0.12))
    distance = (x - fovea[0]) ** 2 + (y - fovea[1]) ** 2
    macula = rng.uniform(0.2, 0.32) * np.exp(-distance / 0.05) + rng.uniform(0.1, 0.2) * np.exp(-distance / 0.006)
    brightness = np.asarray(light * (1 + mottling) * (1 - macula), np.float32)
    # red saturates in the bright parts and lasts in the dark ones, green and blue fall off faster
    image = retina.colour * np.maximum(brightness, 0.05)[..., None] ** np.asarray([0.75, 1.1, 1.2], np.float32)
    return np.asarray(image, np.float32)


def _add_disc(rng: np.random.Generator, retina: _Retina, image: _Array, x: _Array, y: _Array) -> _Array:
    """The bright optic disc with its cup and a soft halo."""
    stretch = rng.uniform(0.84, 0.98)
    distance = np.hypot((x - retina.disc[0]) / stretch, y - retina.disc[1]) / retina.disc_radius
    cup = np.hypot((x - retina.disc[0]) / stretch - 0.02, y - retina.disc[1]) / retina.disc_radius
    rim = _soft_step((1 - distance) * 9)[..., None]
    inner = _soft_step((rng.uniform(0.35, 0.55) - cup) * 9)[..., None]
    halo = 0.14 * np.exp(-(np.maximum(distance - 1, 0) ** 2) / 0.5)[..., None]
    bright = np.asarray([rng.uniform(222, 238), rng.uniform(160, 188), rng.uniform(88, 118)], np.float32)
    pale = np.asarray([240, 214, 160], np.float32)
    disc = bright + inner * (pale - bright) * 0.8
    return np.asarray(image * (1 - rim) * (1 + halo) + disc * rim, np.float32)


def _vessels(rng: np.random.Generator, retina: _Retina, size: int) -> _Array:
    """How much vessels darken every pixel, (size, size) in [0, 1]: an artery and a vein along each of four arcades."""
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = _Pen(rng, retina, ImageDraw.Draw(canvas), 2 * size)
    for vertical in (-1, 1):
        for darkness, width in ((150, 0.018), (215, 0.025)):
            start = np.asarray(retina.disc) + rng.normal(0, 0.02, 2)
            # the temporal arcade leaves steeply and bends around the macula, the nasal one runs off
            steep, flat = rng.uniform(1.25, 1.6), rng.uniform(0.5, 1.1)
            thick = width * rng.uniform(0.85, 1.15)
            pen.grow(start, np.pi - vertical * steep, vertical * steep * rng.uniform(0.8, 1.1), thick, 1.8, darkness)
            pen.grow(start, vertical * flat, -vertical * flat * rng.uniform(0, 0.8), 0.8 * thick, 0.8, darkness)
    blurred = canvas.filter(ImageFilter.GaussianBlur(size / 512)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(np.asarray(blurred) / 255, np.float32)


@dataclass(frozen=True)
class _Pen:
    """Draws vessels of one eye on a square canvas of ``size`` pixels."""

    rng: np.random.Generator
    retina: _Retina
    draw: ImageDraw.ImageDraw
    size: int

    def grow(
        self, start: NDArray[np.float64], heading: float, turn: float, width: float, length: float, darkness: int
    ) -> None:
        """Draw a vessel that bends by ``turn``, wavers and tapers, and its branches; in radii and radians."""
        step = 0.025
        steps = max(3, int(length / step))
        wander = 0.06 * np.cumsum(self.rng.standard_normal(steps))
        headings = heading + turn * (1 - np.exp(-np.arange(steps) * step / 0.4)) + wander
        points = start + step * np.cumsum(np.stack([np.cos(headings), np.sin(headings)], 1), 0)
        widths = width * np.linspace(1, 0.45, steps)
        _stroke(self.draw, self.retina.place(points, self.size), self.size * self.retina.radius * widths, darkness)
        if width < 0.006:
            return
        for at in np.flatnonzero(self.rng.random(steps) < 0.09):
            rest = (steps - at) * step * self.rng.uniform(0.3, 0.7)
            if rest > 0.12:
                aside = self.rng.choice([-1, 1]) * self.rng.uniform(0.5, 1.0)
                thin = widths[at] * self.rng.uniform(0.4, 0.65)
                self.grow(points[at], headings[at] + aside, -0.6 * aside, thin, rest, darkness)


def _stroke(draw: ImageDraw.ImageDraw, points: NDArray[np.float64], widths: NDArray[np.float64], shade: int) -> None:
    for (x0, y0), (x1, y1), width in zip(points[:-1], points[1:], widths[1:], strict=True):
        draw.line((x0, y0, x1, y1), fill=shade, width=max(1, round(width)))
        if width > 3:  # round joints, which PIL's lines lack
            draw.ellipse((x1 - width / 2, y1 - width / 2, x1 + width / 2, y1 + width / 2), fill=shade)


def _patches(rng: np.random.Generator, size: int) -> _Array:
    """Which parts of the retina carry the texture, (size, size) in [0, 1]: about five sixths, with soft borders."""
    return _soft_step((_smooth_noise(rng, size, 6) + 1.0) * 4)


def _texture(rng: np.random.Generator, label: int, retina: _Retina, size: int) -> _Array:
    """The texture of a class, (size, size), mean 0 and (but for ``healthy``) standard deviation 1.

    Noise in a ring of frequencies (speckle), or where that ring meets one direction (streaks).
    """
    noise = rng.standard_normal((size, size), dtype=np.float32)
    if CLASSES[label] == "healthy":
        return np.zeros_like(noise)
    down, across = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    band = np.exp(-0.5 * ((size * np.hypot(down, across) - _PERIODS) / _BANDWIDTH) ** 2)
    if CLASSES[label] == "striated":
        angle = np.pi / 2 + retina.tilt + rng.uniform(-0.2, 0.2)
        turned = (np.arctan2(down, across) - angle + np.pi / 2) % np.pi - np.pi / 2
        band = band * np.exp(-0.5 * (turned / 0.12) ** 2)
    texture = np.fft.irfft2(np.fft.rfft2(noise) * band, (size, size))
    return np.asarray(np.clip(texture / texture.std(), -2.5, 2.5), np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> _Array:
    """Noise of about unit variance with ``cells`` blobs along a side: (size, size)."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    return np.asarray(smooth / smooth.std(), np.float32)


def _soft_step(x: NDArray[Any]) -> _Array:
    """0 below -0.5, 1 above 0.5, a ramp between."""
    return np.clip(x + 0.5, 0, 1).astype(np.float32)


class SyntheticFundusDataModule(PreloadedFeatureDataModule):
    """Draws the images first, then is a ``PreloadedFeatureDataModule`` over them.

    Args:
        root: folder of the images, made where it is missing.
        store: local path or fsspec URL of the feature store.
        count: images of all classes together.
        seed: of the images.
        size: side of the images in pixels.
        **kwargs: see ``PreloadedFeatureDataModule``.
    """

    def __init__(self, root: str, store: str, count: int = 300, seed: int = 0, size: int = 512, **kwargs: Any) -> None:
        super().__init__(root, store, **kwargs)
        self.count, self.image_seed, self.drawn_size = count, seed, size

    def read_manifest(self, kind: Kind = "single-label") -> Manifest:
        """The drawn data set."""
        write_fundus_images(self.root, self.count, self.image_seed, self.drawn_size)
        return super().read_manifest(kind)
