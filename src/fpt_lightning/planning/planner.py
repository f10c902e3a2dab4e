"""What a run will need, before it runs: parameters, memory, store; and the largest batch and resolution that fit.

Everything is predicted on fake tensors (``fpt_lightning.planning.memory``): no weights are loaded and no image is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from fpt_lightning.data.orientations import evaluated_at_once
from fpt_lightning.data.prefetch import AHEAD
from fpt_lightning.encoder.config import check_resolution
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.files import align
from fpt_lightning.methods import ClassificationModule, FPTPlusModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.tuning import build_on_meta
from fpt_lightning.planning.memory import (
    Device,
    Precision,
    example_batch,
    predict_encoding_memory,
    predict_evaluation_memory,
    predict_explanation_memory,
    predict_training_memory,
)
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
        orientations: of each image that are stored.
        image_size: side of the stored low-resolution copies in pixels.
        preload_batch_size: images encoded at once.
        device: that the run is on: ``cpu`` or ``cuda``.
    """

    method: type[ClassificationModule]
    arguments: Mapping[str, Any]
    resolution: tuple[int, int]
    batch_size: int = 16
    precision: Precision = "32-true"
    codec: str | None = "int8"
    orientations: int = 1
    image_size: int = 256
    preload_batch_size: int = 4
    device: Device = "cpu"

    def make(self) -> ClassificationModule:
        """The method."""
        return self.method(**self.arguments)

    @property
    def encodes(self) -> bool:
        """Whether the method learns from what a frozen encoder gives."""
        return issubclass(self.method, FeatureModule)

    @property
    def stores(self) -> bool:
        """Whether that is stored."""
        return self.codec is not None and self.encodes

    @property
    def explains(self) -> bool:
        """Whether the method has prompts to explain."""
        return issubclass(self.method, FPTPlusModule)

    # Predicted peaks of live tensor bytes

    def preload_bytes(self) -> int:
        """Of the frozen pass into the store; 0 for a method that needs none."""
        if not self.stores:
            return 0
        config = build_on_meta(self.make, None).encoder_config
        return predict_encoding_memory(config, self.resolution, self.preload_batch_size, self.device)

    def fit_bytes(self) -> int:
        """Of a training step, or of the validation beside the optimiser's state where that takes more."""
        step = predict_training_memory(*self._sizes, precision=self.precision, **self._features)
        if self._test_time_orientations == 1:
            return step
        module = build_on_meta(self.make, self.resolution)
        return max(step, 8 * module.learnable_parameters + self.test_bytes())

    def test_bytes(self) -> int:
        """Of a batch in validation and test."""
        return self._evaluation_bytes

    def predict_bytes(self) -> int:
        """Of a batch in prediction, from images; they come ``preload_batch_size`` at a time to a frozen encoder."""
        return (self._from_images if self.encodes else self).test_bytes()

    def explain_bytes(self) -> int:
        """Of a batch in ``explain --deletion true``, of a split or from new images; 0 for a method without prompts."""
        if not self.explains:
            return 0
        each = (self._evaluated, self._from_images) if self.stores else (self,)
        return max(predict_explanation_memory(*one._sizes, **one._features) for one in each)

    @cached_property
    def _evaluation_bytes(self) -> int:
        return predict_evaluation_memory(*self._evaluated._sizes, precision=self.precision, **self._features)

    @property
    def _sizes(self) -> tuple[Callable[[], ClassificationModule], tuple[int, int], int]:
        return self.make, self.resolution, self.batch_size

    @property
    def _features(self) -> dict[str, Any]:
        return {
            "codec": self.codec or "fp32",
            "live": self.codec is None,
            "images_at_once": self.preload_batch_size,
            "device": self.device,
        }

    @cached_property
    def _test_time_orientations(self) -> int:
        return build_on_meta(self.make, None).test_time_orientations

    @property
    def _evaluated(self) -> Setting:
        return self._with_evaluated(self.batch_size)

    @property
    def _from_images(self) -> Setting:
        return replace(self._with_evaluated(self.preload_batch_size), codec=None)

    def _with_evaluated(self, batch_size: int) -> Setting:
        return replace(self, batch_size=evaluated_at_once(batch_size, self._test_time_orientations))


@dataclass(frozen=True)
class Plan:
    """What a run will need. Memory is of live tensors; a GPU adds its context (``CONTEXT_BYTES``).

    Attributes:
        label: the method's name.
        learnable_parameters: their number.
        learnable_ratio: learnable parameters / all.
        peaks: bytes by stage, of ``STAGES``; 0 for one that the method does not have.
        waiting_bytes: of the batches that are prepared ahead in fit, in the host's memory (pinned, for a GPU); the one
            in use is counted in ``peaks``.
        sample_bytes: stored, of one image; None without a store.
        largest_batch: with which every stage fits the memory given, up to ``LARGEST_BATCH``; 0 where none does; None if
            not asked.
        largest_resolution: likewise, side in pixels of square images.
    """

    label: str
    learnable_parameters: int
    learnable_ratio: float
    peaks: Mapping[str, int]
    waiting_bytes: int
    sample_bytes: int | None
    largest_batch: int | None = None
    largest_resolution: int | None = None


STAGES: dict[str, Callable[[Setting], int]] = {
    "fit": Setting.fit_bytes,
    "test": Setting.test_bytes,
    "explain": Setting.explain_bytes,
    "preload": Setting.preload_bytes,
    "predict": Setting.predict_bytes,
}
"""What predicts the peak of each stage; ``test`` is ``validate`` too."""


def plan(setting: Setting, gpu_memory: int | None = None) -> Plan:
    """Predict what a run will need.

    Args:
        setting: of the run.
        gpu_memory: bytes of the GPU, for the largest batch and resolution.

    Raises:
        ConfigurationError: settings that cannot work.
    """
    module = build_on_meta(setting.make, setting.resolution)
    patch = module.encoder_shape.patch_size
    check_resolution("data.resolution", setting.resolution, patch, module.encoder_shape.name)
    peaks = {name: peak(setting) for name, peak in STAGES.items()}
    batch = example_batch(
        module, *setting._sizes[1:], codec=setting.codec or "fp32", live=not setting.stores, device="meta"
    )
    found = Plan(
        label=getattr(module, "LABEL", type(module).__name__),
        learnable_parameters=module.learnable_parameters,
        learnable_ratio=module.learnable_ratio,
        peaks=peaks,
        waiting_bytes=(AHEAD + 1) * sum(part.nbytes for part in batch.values() if isinstance(part, Tensor)),
        sample_bytes=setting.orientations
        * bytes_per_row(setting.codec, feature_shape(module.encoder_config, setting.resolution), setting.image_size)
        if setting.stores and setting.codec
        else None,
    )
    if gpu_memory is None:
        return found
    budget = gpu_memory - CONTEXT_BYTES

    def of_batch(size: int) -> Setting:
        return replace(setting, batch_size=size)

    def of_patches(count: int) -> Setting:
        return replace(setting, resolution=(count * patch[0], count * patch[1]))

    return replace(
        found,
        largest_batch=largest_of_all(of_batch, budget, LARGEST_BATCH),
        largest_resolution=patch[0] * largest_of_all(of_patches, budget, LARGEST_RESOLUTION // patch[0]),
    )


def largest_of_all(make: Callable[[int], Setting], budget: int, limit: int) -> int:
    """The largest number with whose setting every stage fits; the second is asked at what the first leaves.

    ``test`` takes no more than ``fit``, nor ``preload`` than ``predict``, nor that than ``explain``.
    """
    for peak in (Setting.fit_bytes, Setting.explain_bytes if make(1).explains else Setting.predict_bytes):
        limit = largest(lambda number, peak=peak: peak(make(number)), budget, limit)  # type: ignore[misc]
    return limit


def largest(needed: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest number from 1 to ``limit`` that needs no more than ``budget``; 0 where not even 1 does.

    ``needed`` grows, nearly linearly or with the square, so that a few guesses suffice: on a line between what fits and
    what does not, or at their geometric mean where the line came to little.
    """
    if limit == 0 or (most := needed(limit)) <= budget:
        return limit
    if limit == 1 or (least := needed(1)) > budget:
        return 0
    fits, too_large, before = 1, limit, 2 * limit
    while too_large - fits > 1:
        guess = fits + int((budget - least) / (most - least) * (too_large - fits))
        if too_large - fits > before // 2:
            guess = math.isqrt(fits * too_large)
        before, guess = too_large - fits, min(max(guess, fits + 1), too_large - 1)
        if (found := needed(guess)) <= budget:
            fits, least = guess, found
        else:
            too_large, most = guess, found
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
    names = set(ClassificationModule.defaults())
    if issubclass(method, FeatureModule):
        names |= set(FeatureModule.defaults()) - ({"layers"} if method.ALL_LAYERS else set())
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
    """Plans as two tables for people, a row each: memory by stage, and all else.

    Args:
        plans: of the methods.
        images: of the data set; None where unknown.
        gpu_memory: bytes, if the largest batch and resolution were asked.
    """
    names = {"preload": "preload", "fit": "fit", "test": "validate, test", "predict": "predict", "explain": "explain"}
    memory = [["method", *names.values(), "batches ahead"]]
    rest = [["method", "learnable", "store, an image", f"{images or 1000:,} images"]]
    if gpu_memory is not None:
        rest[0] += ["largest batch", "largest resolution"]
    for each in plans:
        memory.append([each.label, *(_mib(each.peaks[name]) for name in names), _mib(each.waiting_bytes)])
        size = each.sample_bytes
        stored = ["-", "-"] if size is None else [f"{size / 1e6:.2f} MB", f"{(images or 1000) * size / 1e9:.2f} GB"]
        row = [each.label, f"{each.learnable_parameters:,} ({100 * each.learnable_ratio:.2f}%)", *stored]
        if gpu_memory is not None:
            row += [_bounded(each.largest_batch, LARGEST_BATCH), _bounded(each.largest_resolution, LARGEST_RESOLUTION)]
        rest.append(row)
    return f"{align(memory)}\n\n{align(rest)}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size else "-"


def _bounded(number: int | None, limit: int) -> str:
    if not number:
        return "none"
    return f"{number:,} or more" if number >= limit else f"{number:,}"
