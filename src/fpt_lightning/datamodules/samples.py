"""Batches: what methods get, drawn by (epoch, index) from image files or from a store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from fpt_lightning.data.device_views import DeviceViews
from fpt_lightning.data.images import ImageReader
from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.data.prefetch import items_in_threads, thread_pool
from fpt_lightning.data.transforms import ViewTransform, normalise, stored_copy
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.store.store import FeatureStore


class Batch(TypedDict, total=False):
    """What both data modules yield: ids, labels and those of the rest that the method names in its ``INPUTS``.

    Attributes:
        ids: B sample ids.
        labels: (B,), int64, -1 where unlabelled; (B, classes), fp32, NaN where unknown, in a multi-label task; (B,),
            fp32, in a regression.
        side_images: (B, 3, side, side), fp32, normalised, augmented in training.
        copies: in place of them, low-resolution copies (B, size, size, 3), uint8, of which the device makes views.
        view_numbers: that decide these views (``fpt_lightning.data.device_views.DeviceViews.numbers``).
        features: keys and values (B, 2, L, H, T, head_dim), as the store's codec has them; where the model evaluates
            O orientations of a store, (O * B, ...): of all images, then of the next orientation of all, and so on.
        key_scales: of the codec, where it has any (``fpt_lightning.store.codecs.Features``); of as many as features.
        value_scales: like those of the keys.
        indices: of the tokens that features are of (B, L, H, T), int32; from a store, where they are explained.
        pooled: pooled features (B, D), fp32, or (O * B, D).
        images: (B, 3, height, width), fp32, normalised; augmented in training where they are an input themselves, never
            where they stand in for stored features that have yet to be computed.
    """

    ids: list[str]
    labels: Tensor
    side_images: Tensor
    copies: Tensor
    view_numbers: Tensor
    features: Tensor
    key_scales: Tensor
    value_scales: Tensor
    indices: Tensor
    pooled: Tensor
    images: Tensor


STORED = frozenset({"features", "pooled"})
"""Inputs that a feature store holds."""
_PARTS = 2  # of a batch; more would wait for Python's lock, which augmenting holds for much of its time


def check_processes(images: int, processes: int) -> None:
    """Refuse to evaluate images in more processes than there are images: one without would keep the others waiting.

    Raises:
        ConfigurationError: naming both.
    """
    if images < processes > 1:
        raise ConfigurationError(
            f"{images} image(s) are to be evaluated in {processes} processes, each in one: give trainer.devices (times "
            f"trainer.num_nodes) {max(images, 1)} at most."
        )


class EpochSampler(DistributedSampler[Any]):
    """Pairs (epoch, index): with them a view depends on the seed, the epoch and the sample, on no worker.

    Training ranks get equally many pairs, the first ones repeated where needed; others get each sample once. A pass
    that no trainer names an epoch for is of the next one.

    Args:
        count: of samples.
        rank: of this process.
        world_size: of all.
        shuffle: a new order each epoch.
        seed: of the orders.

    Raises:
        ConfigurationError: ``check_processes``, of samples that are not for training.
    """

    def __init__(self, count: int, rank: int, world_size: int, shuffle: bool, seed: int) -> None:
        if not shuffle:
            check_processes(count, world_size)
        self.count, self.rank, self.world_size = count, rank, world_size
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, epoch = list(range(self.count)), self.epoch
        self.epoch += 1
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count).tolist()
            order += (order * self.world_size)[: -self.count % self.world_size]
        return iter([(epoch, index) for index in order[self.rank :: self.world_size]])

    def __len__(self) -> int:
        total = self.count + (-self.count % self.world_size if self.shuffle else 0)
        return len(range(self.rank, total, self.world_size))


@dataclass(frozen=True)
class Views:
    """How images become normalised, augmented ones."""

    transform: ViewTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int

    def empty(self, count: int) -> Tensor:
        """Room for (count, 3, height, width), fp32."""
        return torch.empty(count, 3, *self.transform.size)

    def draw(self, images: Iterable[NDArray[Any]], keys: Sequence[tuple[int, int]], out: Tensor) -> Tensor:
        """B views (``empty``), in ``out``, from B images (height, width, 3) and their (epoch, index)."""
        seeds = [int(np.random.SeedSequence([self.seed, *key]).generate_state(1)[0]) for key in keys]
        return normalise(self.transform.draw(images, seeds), self.mean, self.std, out)


class Samples(Dataset[Batch], ABC):
    """Samples by (epoch, index), fetched a batch at a time."""

    def __init__(self, manifest: Manifest, samples: Sequence[Sample], side_views: Views | None) -> None:
        self.manifest, self.samples, self.side_views = manifest, samples, side_views

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int] | int) -> Batch:
        """A batch of one."""
        return self.__getitems__([key])

    @abstractmethod
    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> Batch:
        """A batch; an index alone, as Lightning's ``overfit_batches`` draws them, is of epoch 0."""

    @abstractmethod
    def in_threads(self, batches: Iterable[Sequence[Any]], threads: int) -> Generator[Batch, None, None]:
        """The same of several batches (``PrefetchingLoader``)."""

    def _labelled(self, samples: Sequence[Sample]) -> Batch:
        return {"ids": [sample.id for sample in samples], "labels": labels_of(self.manifest, samples)}


class ImageSamples(Samples):
    """Samples read from their image files."""

    def __init__(
        self,
        manifest: Manifest,
        samples: Sequence[Sample],
        side_views: Views | None,
        views: Views | None,
        reader: ImageReader,
        image_size: int,
    ) -> None:
        super().__init__(manifest, samples, side_views)
        self.views, self.reader, self.image_size = views, reader, image_size

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> Batch:
        return self.gather([self.prepare(key) for key in keys])

    def in_threads(self, batches: Iterable[Sequence[Any]], threads: int) -> Generator[Batch, None, None]:
        return items_in_threads(self.prepare, self.gather, batches, threads)

    def prepare(self, key: tuple[int, int] | int) -> tuple[Sample, dict[str, Tensor]]:
        """A sample with its views (1, 3, height, width), in any thread."""
        drawn_for = _with_epoch(key)
        sample = self.samples[drawn_for[1]]
        image, views = self.reader(self.manifest.path(sample)), {}
        if self.views is not None:
            views["images"] = self.views.draw([image], [drawn_for], self.views.empty(1))
        if self.side_views is not None:
            copy = stored_copy(image, self.image_size)
            views["side_images"] = self.side_views.draw([copy], [drawn_for], self.side_views.empty(1))
        return sample, views

    def gather(self, prepared: Sequence[tuple[Sample, dict[str, Tensor]]]) -> Batch:
        """A batch of what ``prepare`` gave."""
        samples, views = zip(*prepared, strict=True)
        inputs = {name: torch.cat([each[name] for each in views]) for name in views[0]}
        return cast(Batch, {**self._labelled(samples), **inputs})


class StoredSamples(Samples):
    """Samples read from a feature store.

    Args:
        manifest: of the samples.
        samples: those of a split.
        side_views: of the side images, drawn here, or left to the device by ``DeviceViews``.
        store: that has them.
        arrays: of it that are read.
        orientation_seed: by which one of the store's orientations is drawn; None for the images themselves.
        evaluated: orientations that are read, from the image on.
    """

    def __init__(
        self,
        manifest: Manifest,
        samples: Sequence[Sample],
        side_views: Views | DeviceViews | None,
        store: FeatureStore,
        arrays: Sequence[str],
        orientation_seed: int | None,
        evaluated: int = 1,
    ) -> None:
        super().__init__(manifest, samples, side_views if isinstance(side_views, Views) else None)
        self.device_views = side_views if isinstance(side_views, DeviceViews) else None
        self.store, self.arrays, self.orientation_seed, self.evaluated = store, arrays, orientation_seed, evaluated

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> Batch:
        return self._batch(keys, 1, map)

    def in_threads(self, batches: Iterable[Sequence[Any]], threads: int) -> Generator[Batch, None, None]:
        """Each batch is parted among the threads: items ahead of it would need room for another."""
        threads = min(threads, _PARTS)
        with thread_pool(threads) as pool:
            for keys in batches:
                yield self._batch(keys, threads, pool.map)

    def _batch(self, keys: Sequence[tuple[int, int] | int], parts: int, each: Callable[..., Iterable[None]]) -> Batch:
        drawn_for, count = [_with_epoch(key) for key in keys], len(keys)
        samples, parts = [self.samples[index] for _, index in drawn_for], min(parts, count)
        rows = [
            self.store.rows[sample.id] + self._orientation(key) for sample, key in zip(samples, drawn_for, strict=True)
        ]
        turned = [row + further for further in range(1, self.evaluated) for row in rows]
        side_views, device_views = self.side_views, self.device_views
        stored = self.store.buffers(count + len(turned), self.arrays)
        copies = {} if side_views is None and device_views is None else self.store.buffers(count, ["images"])
        views = None if side_views is None else side_views.empty(count)
        of_images = {name: array[:count] for name, array in stored.items()} | copies
        of_turned = {name: array[count:] for name, array in stored.items()}

        def read(rows: Sequence[int], arrays: Mapping[str, NDArray[Any]], part: slice) -> None:
            self.store.read_into(rows[part], {name: array[part] for name, array in arrays.items()})

        def fill(part: int) -> None:
            some = _share(part, parts, count)
            read(rows, of_images, some)  # at once, as each read of a store that is far away takes its time
            if turned:
                read(turned, of_turned, _share(part, parts, len(turned)))
            if side_views is not None and views is not None:
                side_views.draw(copies["images"][some], drawn_for[some], views[some])

        list(each(fill, range(parts)))
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in stored.items()}
        if views is not None:
            batch["side_images"] = views
        if device_views is not None:
            batch |= {"copies": torch.from_numpy(copies["images"]), "view_numbers": device_views.numbers(drawn_for)}
        return cast(Batch, {**self._labelled(samples), **batch})

    def _orientation(self, key: tuple[int, int]) -> int:
        """That is drawn."""
        if self.orientation_seed is None:
            return 0
        drawn = np.random.SeedSequence([self.orientation_seed, *key, 1]).generate_state(1)[0]
        return int(drawn) % self.store.orientations


def _share(part: int, parts: int, count: int) -> slice:
    """Of ``count`` things, those of one of several parts."""
    return slice(count * part // parts, count * (part + 1) // parts)


def _with_epoch(key: tuple[int, int] | int) -> tuple[int, int]:
    return (0, key) if isinstance(key, int) else key


def labels_of(manifest: Manifest, samples: Sequence[Sample]) -> Tensor:
    """The labels of samples, as a batch has them."""
    if manifest.kind == "single-label":
        return torch.tensor([sample.label for sample in samples])
    targets = torch.tensor([sample.targets for sample in samples])
    return targets if manifest.kind == "multi-label" else targets[:, 0]


def collated(batch: Any) -> Any:
    """The batch, which ``Samples`` gave whole."""
    return batch


def start_worker(worker: int) -> None:
    """Keep a loader's worker to one thread; OpenCV would start one a core."""
    import cv2

    cv2.setNumThreads(0)
