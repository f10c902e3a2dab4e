"""What a run will need, before it runs: parameters, memory, store; and the largest batch and resolution that fit.

Everything is predicted on fake tensors (``fpt_lightning.planning.memory``): no weights are loaded and no image is read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fpt_lightning.encoder.config import check_resolution
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.files import align
from fpt_lightning.methods import ClassificationModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.tuning import build_on_meta
from fpt_lightning.planning.memory import Precision, predict_encoding_memory, predict_training_memory
from fpt_lightning.store.preload import feature_shape
from fpt_lightning.store.store import bytes_per_row

LARGEST_BATCH, LARGEST_RESOLUTION = 1024, 4096  # looked for; in images, and pixels a side
CONTEXT_BYTES = 2**30
"""Of a GPU's memory, what the CUDA context, the libraries and the allocator's reserve are taken to need. It differs
between GPUs and drivers, and was not measured."""


@dataclass(frozen=True)
class Setting:
    """A run as far as its cost depends on it.

    Attributes:
        method: its class.
        arguments: of the method.
        resolution: (height, width) of the encoder's images in pixels.
        batch_size: of training.
        precision: Lightning's ``32-true`` or ``bf16-mixed``.
        codec: of the stored keys and values; None where there is no store, and the encoder runs in every step.
        mirrored: whether mirror images are stored too.
        image_size: side of the stored low-resolution copies in pixels.
        preload_batch_size: images encoded at once.
    """

    method: type[ClassificationModule]
    arguments: Mapping[str, Any]
    resolution: tuple[int, int]
    batch_size: int = 16
    precision: Precision = "32-true"
    codec: str | None = "int8"
    mirrored: bool = False
    image_size: int = 256
    preload_batch_size: int = 4

    def make(self) -> ClassificationModule:
        """The method."""
        return self.method(**self.arguments)

    @property
    def stores(self) -> bool:
        """Whether the method learns from a store."""
        return self.codec is not None and issubclass(self.method, FeatureModule)

    def training_bytes(self) -> int:
        """Predicted peak live tensor bytes of a training step."""
        return predict_training_memory(
            self.make,
            self.resolution,
            self.batch_size,
            precision=self.precision,
            codec=self.codec or "fp32",
            live=self.codec is None,
        )

    def encoding_bytes(self) -> int:
        """Predicted peak live tensor bytes of the frozen pass into the store; 0 for a method that needs none."""
        if not self.stores:
            return 0
        return predict_encoding_memory(self.make().encoder_config, self.resolution, self.preload_batch_size)


@dataclass(frozen=True)
class Plan:
    """What a run will need. Memory is of live tensors, as on a CPU; a GPU adds its context (``CONTEXT_BYTES``).

    Attributes:
        label: the method's name.
        learnable_parameters: their number.
        learnable_ratio: learnable parameters / all.
        training_bytes: peak of a training step.
        sample_bytes: stored, of one image; None without a store.
        encoding_bytes: peak of the frozen pass; None without a store.
        largest_batch: that fits the memory given, up to ``LARGEST_BATCH``; 0 where none does; None if not asked.
        largest_resolution: likewise, side in pixels of square images, for training and frozen pass.
    """

    label: str
    learnable_parameters: int
    learnable_ratio: float
    training_bytes: int
    sample_bytes: int | None
    encoding_bytes: int | None
    largest_batch: int | None = None
    largest_resolution: int | None = None


def plan(setting: Setting, gpu_memory: int | None = None) -> Plan:
    """Predict what a run will need.

    Args:
        setting: of the run.
        gpu_memory: bytes of the GPU, for the largest batch and resolution.

    Raises:
        ConfigurationError: settings that cannot work.
    """
    module = build_on_meta(setting.make, setting.resolution)
    check_resolution("data.resolution", setting.resolution, module.encoder_shape.patch_size, module.encoder_shape.name)
    shape = feature_shape(module.encoder_config, setting.resolution)
    batch = resolution = None
    if gpu_memory is not None:
        budget, patch = gpu_memory - CONTEXT_BYTES, module.encoder_shape.patch_size
        batch = largest(lambda n: replace(setting, batch_size=n).training_bytes(), budget, LARGEST_BATCH)

        def at(patches: int) -> int:
            sized = replace(setting, resolution=(patches * patch[0], patches * patch[1]))
            return max(sized.training_bytes(), sized.encoding_bytes())

        resolution = patch[0] * largest(at, budget, LARGEST_RESOLUTION // patch[0])
    return Plan(
        label=getattr(module, "LABEL", type(module).__name__),
        learnable_parameters=module.learnable_parameters,
        learnable_ratio=module.learnable_ratio,
        training_bytes=setting.training_bytes(),
        sample_bytes=(1 + setting.mirrored) * bytes_per_row(setting.codec, shape, setting.image_size)
        if setting.stores and setting.codec
        else None,
        encoding_bytes=setting.encoding_bytes() if setting.stores else None,
        largest_batch=batch,
        largest_resolution=resolution,
    )


def largest(needed: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest number from 1 to ``limit`` that needs no more than ``budget``; 0 where not even 1 does.

    ``needed`` grows, nearly linearly or with the square, so that a few guesses suffice.
    """
    known = {1: needed(1)}
    if known[1] > budget:
        return 0
    fits, too_large, guess = 1, limit + 1, min(8, limit)
    while too_large - fits > 1:
        known[guess] = needed(guess)
        if known[guess] <= budget:
            fits = guess
        else:
            too_large = guess
        slope = (known[guess] - known[1]) / max(1, guess - 1)
        line = fits + int((budget - known[fits]) / max(1.0, slope)) if known[guess] <= budget else (fits + guess) // 2
        guess = min(max(line, fits + 1), too_large - 1)
    return fits


def shared_arguments(
    method: type[ClassificationModule], own: type[ClassificationModule] | str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Of one method's arguments, those that another shares: of all methods, or of all methods on features.

    Args:
        method: the other.
        own: the one, or its name.
        arguments: of the one; all of them are its own.
    """
    names = set(inspect.signature(ClassificationModule).parameters)
    if issubclass(method, FeatureModule):
        names |= set(inspect.signature(FeatureModule).parameters) - ({"layers"} if method.ALL_LAYERS else set())
    same = method.__name__ == (own if isinstance(own, str) else own.__name__)
    return {name: value for name, value in arguments.items() if same or name in names}


def parse_memory(text: str) -> int:
    """Bytes of an amount of memory: ``8GiB``, ``24 GB``, ``512MiB``; a bare number is in GiB.

    Raises:
        ConfigurationError: something else.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:([KMGT])(i?)B?)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ConfigurationError(f"gpu_memory is {text!r}: give an amount such as 8GiB, 24GB or 512MiB.")
    number, unit, binary = float(match[1]), (match[2] or "G").upper(), match[2] is None or bool(match[3])
    return int(number * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1))


def table(plans: Sequence[Plan], images: int | None, gpu_memory: int | None) -> str:
    """Plans as a table for people, a row each.

    Args:
        plans: of the methods.
        images: of the data set; None where unknown.
        gpu_memory: bytes, if the largest batch and resolution were asked.
    """
    heads = ["method", "learnable", "training", "store, an image", f"{images or 1000:,} images", "frozen pass"]
    if gpu_memory is not None:
        heads += ["largest batch", "largest resolution"]
    rows = [heads]
    for each in plans:
        row = [
            each.label,
            f"{each.learnable_parameters:,} ({100 * each.learnable_ratio:.2f}%)",
            _mib(each.training_bytes),
        ]
        size = each.sample_bytes
        row += ["-", "-"] if size is None else [f"{size / 1e6:.2f} MB", f"{(images or 1000) * size / 1e9:.2f} GB"]
        row.append("-" if each.encoding_bytes is None else _mib(each.encoding_bytes))
        if gpu_memory is not None:
            row += [_bounded(each.largest_batch, LARGEST_BATCH), _bounded(each.largest_resolution, LARGEST_RESOLUTION)]
        rows.append(row)
    return align(rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _bounded(number: int | None, limit: int) -> str:
    if not number:
        return "none"
    return f"{number:,} or more" if number >= limit else f"{number:,}"
