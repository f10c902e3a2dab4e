"""What decides the numbers in a feature store, and so must match before it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from fpt_lightning.data.images import FULL_RANGE, INTERPOLATION, Fit, ImageReader
from fpt_lightning.data.orientations import COUNTS, SMALLEST_PART
from fpt_lightning.errors import StoreError

FORMAT = 5  # of the store's layout and of what the numbers in it mean
BORDER = 2  # of ``fpt_lightning.data.images.bright_box``, which was from black on at first


@dataclass(frozen=True)
class FeatureShape:
    """The shape of one sample's features: layers L, heads H, tokens T, head_dim."""

    layers: int
    heads: int
    tokens: int
    head_dim: int

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class FeatureSpecification:
    """All that decides the numbers in a store.

    Attributes:
        encoder: timm's model name.
        weights: what identifies them without loading them (``EncoderConfig.weights``).
        weights_digest: SHA-256 of the loaded parameters; empty until they have been loaded.
        layers: tapped blocks.
        token_ratio: share of the tokens kept.
        criterion: of their importance.
        resolution: (height, width) of the encoder's images in pixels.
        mean: of each channel; empty where it is still to be computed.
        std: of each channel; empty where it is still to be computed.
        statistics: ``given``, or which images mean and std were computed over, and how many of them.
        image_size: side of the low-resolution copies in pixels.
        codec: a row of ``fpt_lightning.store.codecs.CODECS``.
        precision: of the frozen pass.
        orientations: of each sample, one after the other (``fpt_lightning.data.orientations``).
        zoom: the smallest part of each side that the further ones show.
        interpolation: how images are resized.
        fit: how images come to the encoder's aspect (``fpt_lightning.data.images.ImageReader``).
        crop_border: whether their dark border is cut off.
        border: version of how it is found; it counts where it is cut off.
        window: of grey DICOM values (``fpt_lightning.data.images.read_image``).
        value_range: (low, high) of 16-bit pictures that become black and white; empty for the full range, or where it
            is still to be measured.
        range_of: ``full``, ``given``, ``none`` where no picture has 16 bits, or which images it was measured over,
            and how many of them.
        format: version of the store's layout.
    """

    encoder: str
    weights: str
    layers: tuple[int, ...]
    token_ratio: float
    criterion: str
    resolution: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    statistics: str
    image_size: int
    codec: str
    precision: str = "fp32"
    orientations: int = 1
    zoom: float = 1.0
    weights_digest: str = ""
    interpolation: str = INTERPOLATION
    fit: str = "squash"
    crop_border: bool = False
    border: int = BORDER
    window: str = "header"
    value_range: tuple[float, ...] = ()
    range_of: str = "full"
    format: int = FORMAT

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> FeatureSpecification:
        """The inverse of ``to_dict``.

        Raises:
            StoreError: fields are missing, unknown or of another type.
        """
        content = {**_EARLIER, **content}
        if isinstance(content.get("mirrored"), bool):  # before there were more of them
            content["orientations"] = 1 + content.pop("mirrored")
        if content.pop("zoomed", False):
            raise StoreError("the specification is zoomed as by an earlier version: make the store anew.")
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            raise StoreError(f"the specification has the fields {sorted(content)} where {sorted(names)} are expected.")
        for name, kind in _FIELDS.items():
            value = content[name] if isinstance(content[name], list) else [content[name]]
            if isinstance(content[name], list) != (name in _LISTS) or not all(type(v) in kind for v in value):
                raise StoreError(f"the specification's {name} is {content[name]!r}.")
        if len(content["resolution"]) != 2:
            raise StoreError(f"the specification's resolution is {content['resolution']!r}.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        specification = cls(**values)
        specification._check_ranges()
        return specification

    def _check_ranges(self) -> None:
        """Refuse numbers that no image and no encoder could have."""
        numbers = (*self.mean, *self.std, *self.value_range, self.token_ratio)
        sound = {
            "layers": len(self.layers) > 0 and all(layer >= 0 for layer in self.layers),
            "token_ratio": 0 < self.token_ratio <= 1,
            "resolution": min(self.resolution) > 0,
            "image_size": self.image_size > 0,
            "orientations": self.orientations in COUNTS,
            "zoom": SMALLEST_PART <= self.zoom <= 1,
            "mean": len(self.mean) == len(self.std) and all(math.isfinite(number) for number in numbers),
            "std": all(number > 0 for number in self.std),
            "value_range": not self.value_range
            or (len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]),
            "fit": self.fit in get_args(Fit),
        }
        if wrong := [name for name, is_sound in sound.items() if not is_sound]:
            raise StoreError(f"the specification's {wrong[0]} is {getattr(self, wrong[0])!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def reader(self) -> ImageReader:
        """What reads the images."""
        low, high = self.value_range or FULL_RANGE
        return ImageReader(self.resolution, self.fit, self.crop_border, self.window, value_range=(low, high))

    def _shown(self, name: str) -> str:
        value = getattr(self, name)
        return "full" if name == "value_range" and not value else repr(value)

    def differences(self, asked: FeatureSpecification, ignore: Sequence[str] = ()) -> list[str]:
        """How this specification differs from what is asked, field by field, for people.

        Mean and std are compared as numbers where they were given, and by the images they were computed over where
        they are ``auto``, all or a sample of them; the range of 16-bit pictures likewise, where there are such; the
        weights by their digest where both have one, and by name or files else.
        """
        skip = {*ignore, "statistics"} if asked.statistics == "given" else {*ignore, "mean", "std"}
        by_number = {"none": {"value_range", "range_of"}, "full": {"range_of"}, "given": {"range_of"}}
        skip |= by_number.get(asked.range_of, {"value_range"})
        if not (self.weights_digest and asked.weights_digest):
            skip.add("weights_digest")
        elif self.weights_digest == asked.weights_digest:
            skip.add("weights")
        if not (self.crop_border and asked.crop_border):
            skip.add("border")
        return [
            f"{field.name}: {self._shown(field.name)}, asked for {asked._shown(field.name)}"
            for field in fields(self)
            if field.name not in skip and self._compared(field.name) != asked._compared(field.name)
        ]

    def _compared(self, name: str) -> object:
        value = getattr(self, name)
        return _images(value) if name in ("statistics", "range_of") else value


_SAMPLE = ", from "


def from_sample(images: str, drawn: int, total: int) -> str:
    """What ``statistics`` or ``range_of`` says of images of which not all may have been drawn."""
    return images if drawn == total else f"{images}{_SAMPLE}{drawn:,} of {total:,}"


def is_over(statistics: str, images: str) -> bool:
    """Whether ``statistics`` or ``range_of`` is of these images, all of them or a sample."""
    return _images(statistics) == images


def _images(statistics: str) -> str:
    return statistics.partition(_SAMPLE)[0]


_EARLIER = {"border": 1, "window": "header", "value_range": [], "range_of": "full", "zoom": 1.0}
"""Of specifications that earlier versions wrote, which lack these."""
_LISTS = {field.name for field in fields(FeatureSpecification) if str(field.type).startswith("tuple")}
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int)}
_FIELDS = {
    field.name: _KINDS[str(field.type).removeprefix("tuple[").split(",")[0]] for field in fields(FeatureSpecification)
}
"""The types of a specification's values, or of those in its lists."""
