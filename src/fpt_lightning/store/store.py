"""The feature store as training reads it: keys and values of the selected tokens, in Zarr (paper, section 3.6)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from fpt_lightning.errors import DamagedStoreError, StoreError
from fpt_lightning.files import file_states
from fpt_lightning.store.codecs import CODECS
from fpt_lightning.store.index import StoreIndex, open_group
from fpt_lightning.store.layout import SHARD, open_array, row_bytes
from fpt_lightning.store.place import is_local, resolve
from fpt_lightning.store.reader import BufferPool, Chunk, RemoteReader, ShardCache, ShardReader
from fpt_lightning.store.specification import FeatureShape
from fpt_lightning.store.storage import open_filesystem


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
        self._folder = url if is_local(url) else None  # of a local store
        self._cache = None if cache is None else ShardCache(url, cache)
        self._columns = {name: column for column, name in enumerate(self.sample_arrays)}  # of ``checksums``
        self._reader, self._remote = ShardReader(SHARD), RemoteReader(self._storage, SHARD)
        self._buffers = BufferPool()
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
        url = resolve(url)
        return cls(url, open_group(url), tolerant, cache)

    def arrays_of(self, inputs: Sequence[str]) -> list[str]:
        """The arrays that hold what a method takes: those of the codec for ``features``."""
        features = CODECS[self.specification.codec].arrays(self.shape)
        return [name for given in inputs for name in (features if given == "features" else (given,))]

    @property
    def extended(self) -> bool:
        """Whether the arrays have the rows of all samples, and no other; ``extend`` may have been stopped."""
        return {array.shape[0] for array in self._arrays.values()} == {self.orientations * len(self.ids)}

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
            DamagedStoreError: their bytes are damaged, gone or those of another row, naming the sample.
            StoreError: the storage cannot be reached.
        """
        return self.read_all(rows, [name])[name]

    def read_all(self, rows: Sequence[int], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Rows of several arrays, as ``read`` gives those of one; of a store that is far away, all at once."""
        blocks = self.buffers(len(rows), names)
        self.read_into(rows, blocks)
        return blocks

    def buffers(self, count: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Room for ``count`` rows of several arrays, used again once nobody holds it."""
        arrays = {name: self.sample_arrays[name] for name in names}
        return {name: self._buffers.take((count, *size), dtype) for name, (size, dtype) in arrays.items()}

    def read_into(self, rows: Sequence[int], blocks: Mapping[str, NDArray[Any]]) -> None:
        """Fill ``buffers``, or a part of them; raises as ``read``."""
        for (row, name), error in self._read(rows, blocks).items():
            raise DamagedStoreError(
                f"the feature store {self.url} cannot give the {name} of {self.name(row)}: "
                f"{type(error).__name__}: {error}."
            ) from error

    def damage(self, rows: Sequence[int], name: str) -> dict[int, str]:
        """What is wrong with those of the rows that ``read`` could not give.

        Raises:
            StoreError: the storage cannot be reached.
        """
        wrong = self._read(rows, self.buffers(len(rows), [name]))
        return {row: str(error) for (row, _), error in wrong.items()}

    def _read(self, rows: Sequence[int], blocks: Mapping[str, NDArray[Any]]) -> dict[tuple[int, str], Exception]:
        wanted = dict[tuple[int, str, int], Chunk]()
        for name, block in blocks.items():
            if name in self._memory:
                np.take(self._memory[name].numpy(), rows, 0, out=block, mode="clip")  # "raise" would buffer the output
                continue
            for i, (row, sample) in enumerate(zip(rows, block, strict=True)):
                path = self.shard_path(name, row // SHARD)
                wanted[row, name, i] = Chunk(path, row % SHARD, sample, self._checksum(row, name))
        errors = self._fetch(list(wanted.values()))
        return {key[:2]: error for key, error in zip(wanted, errors, strict=True) if error is not None}

    def _fetch(self, chunks: Sequence[Chunk]) -> Sequence[Exception | None]:
        if self._cache is not None:
            self._cache.fetch([chunk.path for chunk in chunks])
            return [self._read_copy(self._cache, chunk) for chunk in chunks]
        if self._folder is not None:
            return [self._read_file(chunk._replace(path=f"{self._folder}/{chunk.path}")) for chunk in chunks]
        return self._remote.read(chunks)

    def _read_copy(self, cache: ShardCache, chunk: Chunk) -> Exception | None:
        error = self._read_file(chunk._replace(path=cache.path(chunk.path)))
        if isinstance(error, ValueError):  # the copy may be damaged where the shard is not
            cache.discard(chunk.path)
            error = self._read_file(chunk._replace(path=cache.path(chunk.path)))
        return error

    def _read_file(self, chunk: Chunk) -> Exception | None:
        try:
            self._reader.read(chunk)
        except (OSError, ValueError) as error:
            return error
        return None

    def _checksum(self, row: int, name: str) -> int | None:
        """That the row must have there; None if its record does not say."""
        return int(self.checksums[row, self._columns[name]])

    def shard_path(self, name: str, shard: int) -> str:
        """Path in the store of a shard's file."""
        return f"{name}/c/{shard}" + "/0" * len(self.sample_arrays[name][0])

    def shard_sizes(self, name: str, shards: Sequence[int]) -> NDArray[np.int64]:
        """Bytes of the files of shards, (shards,); -1 where there is none, or a storage does not list it."""
        paths = [self.shard_path(name, shard) for shard in shards]
        if self._folder is not None:
            return file_states([f"{self._folder}/{path}" for path in paths])[:, 0]
        filesystem, root = open_filesystem(self.url)
        filesystem.invalidate_cache()
        try:
            listed = filesystem.find(f"{root}/{name}", detail=True)
        except Exception:  # of a server that lists nothing, in an error of its own
            listed = {}
        return np.array([listed.get(f"{root}/{path}", {}).get("size", -1) for path in paths], np.int64)

    def present(self, name: str, shard: int) -> NDArray[np.bool_]:
        """Which of a shard's chunks lie in its file.

        Raises:
            StoreError: the storage cannot be reached.
        """
        path = self.shard_path(name, shard)
        if self._folder is not None:
            return self._reader.index(f"{self._folder}/{path}").present(SHARD)
        return self._remote.indices([path])[0].present(SHARD)

    def load_indices(self, shards: Sequence[tuple[str, int]]) -> None:
        """Fetch the indices of shards of arrays that are far away, at once, and keep them for ``present`` and ``read``.

        Raises:
            StoreError: the storage cannot be reached.
        """
        if self._folder is None:
            self._remote.indices([self.shard_path(*shard) for shard in shards])

    def verify_again(self) -> None:
        """Verify each chunk's checksum at its next read, as if none had been read."""
        self._reader, self._remote = ShardReader(SHARD), RemoteReader(self._storage, SHARD)


def available_memory(shared: bool) -> int | None:
    """Bytes that can be taken without swapping, as shared memory or any; None where only Linux would say.

    Containers often have little shared memory (``docker run --shm-size``).
    """
    info, shared_memory = Path("/proc/meminfo"), Path("/dev/shm")
    if not info.is_file():
        return None
    free = {line.split()[0]: 1024 * int(line.split()[1]) for line in info.read_text().splitlines()}["MemAvailable:"]
    return min(free, shutil.disk_usage(shared_memory).free) if shared and shared_memory.is_dir() else free
