"""The feature store as training reads it: keys and values of the selected tokens, in Zarr (paper, section 3.6)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from fpt_lightning.errors import StoreError
from fpt_lightning.files import file_states
from fpt_lightning.store.codecs import CODECS
from fpt_lightning.store.index import StoreIndex, open_group
from fpt_lightning.store.layout import SHARD, open_array, row_bytes
from fpt_lightning.store.reader import BufferPool, ShardCache, ShardReader, shard_entries
from fpt_lightning.store.specification import FeatureShape


def sample_arrays(codec: str, shape: FeatureShape, image_size: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of what each array has for a row; the codec's arrays come first."""
    return {
        **CODECS[codec].arrays(shape),
        "indices": ((shape.layers, shape.heads, shape.tokens), np.dtype("int32")),
        "pooled": ((shape.width,), np.dtype("float32")),
        "images": ((image_size, image_size, 3), np.dtype("uint8")),
    }


def bytes_per_row(codec: str, shape: FeatureShape, image_size: int) -> int:
    """Stored bytes of one row, without Zarr's metadata."""
    return row_bytes(sample_arrays(codec, shape, image_size))


class FeatureStore(StoreIndex):
    """A feature store, at a local path or any fsspec URL, for reading.

    Use ``open``; attributes as of ``StoreIndex``.
    """

    def __init__(self, url: str, group: zarr.Group, tolerant: bool = False, cache: str | None = None) -> None:
        super().__init__(url, group, tolerant)
        self._arrays |= {name: open_array(group, url, name, *row) for name, row in self.sample_arrays.items()}
        self._folder = None if "://" in url else url  # of a local store
        self._cache = None if cache is None else ShardCache(url, cache)
        self._reader, self._buffers = ShardReader(SHARD), BufferPool()
        self._memory: dict[str, Tensor] = {}  # arrays that were loaded whole

    def _declared_arrays(self, documents: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        return sample_arrays(self.specification.codec, self.shape, self.specification.image_size)

    @classmethod
    def open(cls, url: str, tolerant: bool = False, cache: str | None = None) -> FeatureStore:
        """Open an existing store.

        Args:
            url: where.
            tolerant: whether damaged records count as absent, for ``fpt_lightning.store.damage`` to name them.
            cache: folder of local copies of the shards that are read (``fpt_lightning.store.reader.ShardCache``).

        Raises:
            StoreError: there is none, or it is of another format or damaged, or the cache's folder cannot be made.
        """
        return cls(url, open_group(url), tolerant, cache)

    def arrays_of(self, inputs: Sequence[str]) -> list[str]:
        """The arrays that hold what a method takes: those of the codec for ``features``."""
        features = CODECS[self.specification.codec].arrays(self.shape)
        return [name for given in inputs for name in (features if given == "features" else (given,))]

    @property
    def extended(self) -> bool:
        """Whether the arrays have the rows of all samples, and no other; ``extend`` may have been stopped."""
        return {array.shape[0] for array in self._arrays.values()} == {self.views * len(self.ids)}

    def load(self, names: Sequence[str], shared: bool = False) -> None:
        """Hold arrays in memory from now on; ``read`` takes from it.

        Args:
            names: of ``sample_arrays``.
            shared: whether worker processes, however they start, are to use the same memory.

        Raises:
            StoreError: they do not fit the memory that is free, or their bytes are damaged, naming the sample.
        """
        absent = {name: self.sample_arrays[name] for name in names if name not in self._memory}
        needed = sum(len(self.done) * math.prod(size) * dtype.itemsize for size, dtype in absent.values())
        free = available_memory(shared)
        if free is not None and needed > free:
            raise StoreError(
                f"the feature store {self.url} needs {needed / 1e9:.1f} GB in {'shared ' if shared else ''}memory, of "
                f"which {free / 1e9:.1f} GB are free: set data.in_memory to false"
                f"{', data.num_workers to 0' if shared else ''}, or choose a smaller token_ratio, resolution or codec."
            )
        for name, (size, dtype) in absent.items():
            whole = torch.zeros((len(self.done), *size), dtype=getattr(torch, dtype.name))
            if shared:
                whole = whole.share_memory_()  # type: ignore[no-untyped-call]
            for start in range(0, len(self.done), SHARD):
                rows = [row for row in range(start, min(start + SHARD, len(self.done))) if self.done[row]]
                whole[rows] = torch.from_numpy(self.read(rows, name))
            self._memory[name] = whole

    def read(self, rows: Sequence[int], name: str) -> NDArray[Any]:
        """Rows of one of ``sample_arrays``, in a buffer that is used again once nobody holds it.

        Returns:
            (len(rows), ...), in the array's shape and dtype.

        Raises:
            StoreError: their bytes are damaged or gone, naming the sample.
        """
        size, dtype = self.sample_arrays[name]
        buffer = self._buffers.take((len(rows), *size), dtype)
        if name in self._memory:
            np.take(self._memory[name].numpy(), rows, 0, out=buffer, mode="clip")  # "raise" would buffer the output
            return buffer
        if self._cache is not None:
            self._cache.fetch([self.shard_path(name, row // SHARD) for row in rows])
        for row, sample in zip(rows, buffer, strict=True):
            try:
                self._read_sample(row, name, sample)
            except Exception as error:  # zarr raises differently for each kind of damage
                raise StoreError(
                    f"the feature store {self.url} cannot give the {name} of {self.name(row)}: "
                    f"{type(error).__name__}: {error}."
                ) from error
        return buffer

    def _read_sample(self, row: int, name: str, sample: NDArray[Any]) -> None:
        shard = self.shard_path(name, row // SHARD)
        if self._cache is not None:
            try:
                self._reader.read(self._cache.path(shard), row % SHARD, sample)
            except ValueError:  # the copy may be damaged where the shard is not
                self._cache.discard(shard)
                self._reader.read(self._cache.path(shard), row % SHARD, sample)
        elif self._folder is not None:
            self._reader.read(f"{self._folder}/{shard}", row % SHARD, sample)
        else:
            sample[...] = self._arrays[name][row]
            if not sample.any() and not self.present(name, row // SHARD)[row % SHARD]:
                raise ValueError("the shard does not hold it")  # Zarr gives zeros

    def shard_path(self, name: str, shard: int) -> str:
        """Path in the store of a shard's file."""
        return f"{name}/c/{shard}" + "/0" * len(self.sample_arrays[name][0])

    def shard_sizes(self, name: str, shards: Sequence[int]) -> NDArray[np.int64]:
        """Bytes of the files of shards, (shards,); -1 where there is none, or a storage does not list it."""
        paths = [self.shard_path(name, shard) for shard in shards]
        if self._folder is not None:
            return file_states([f"{self._folder}/{path}" for path in paths])[:, 0]
        filesystem, root = fsspec.core.url_to_fs(self.url)
        filesystem.invalidate_cache()
        try:
            listed = filesystem.find(f"{root}/{name}", detail=True)
        except Exception:  # of a server that lists nothing, in an error of its own
            listed = {}
        return np.array([listed.get(f"{root}/{path}", {}).get("size", -1) for path in paths], np.int64)

    def present(self, name: str, shard: int) -> NDArray[np.bool_]:
        """Which of a shard's chunks lie in its file."""
        filesystem, path = fsspec.core.url_to_fs(self.url)
        return shard_entries(filesystem, f"{path}/{self.shard_path(name, shard)}", SHARD)

    def verify_again(self) -> None:
        """Verify each chunk's checksum at its next read, as if none had been read."""
        self._reader = ShardReader(SHARD)


def available_memory(shared: bool) -> int | None:
    """Bytes that can be taken without swapping, as shared memory or any; None where only Linux would say.

    Containers often have little shared memory (``docker run --shm-size``).
    """
    info, shared_memory = Path("/proc/meminfo"), Path("/dev/shm")
    if not info.is_file():
        return None
    free = {line.split()[0]: 1024 * int(line.split()[1]) for line in info.read_text().splitlines()}["MemAvailable:"]
    return min(free, shutil.disk_usage(shared_memory).free) if shared and shared_memory.is_dir() else free
