"""Fast reading of a store: samples as they lie in their shards, straight into reused buffers.

A shard (Zarr v3, sharding codec) is a file of chunks, each the raw bytes of a sample and their crc32c, with an index of
(offset, length) and its crc32c at the end. Any Zarr reader gives the same numbers; zarr-python takes three to ten times
as long. Shards that are far away are copied whole, once.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fpt_lightning.errors import StoreError

_ABSENT = np.uint64(2**64 - 1)  # marks a chunk that a shard does not hold
CRC_BYTES = 4
AT_ONCE = 16  # requests to a remote storage
_VERSION = ("size", "etag", "e_tag", "mtime", "lastmodified", "last_modified", "updated", "created", "generation")


@dataclass
class ShardIndex:
    """Where the chunks of a shard lie in its file.

    Attributes:
        offsets: of each chunk, in bytes.
        lengths: of each chunk, in bytes, checksum included.
        present: whether a chunk lies within the file.
        identity: of the file that the index was read from.
        verified: chunks whose checksum was found right.
    """

    offsets: NDArray[np.uint64]
    lengths: NDArray[np.uint64]
    present: NDArray[np.bool_]
    identity: tuple[int, int, int]
    verified: NDArray[np.bool_]

    @classmethod
    def parse(cls, tail: bytes, size: int, samples: int, identity: tuple[int, int, int] = (0, 0, 0)) -> ShardIndex:
        """From the last ``index_bytes`` of a shard of ``size`` bytes; all chunks are absent where these are damaged."""
        chunks = np.full((samples, 2), _ABSENT)
        if len(tail) == index_bytes(samples) and _checksum(tail[:-CRC_BYTES]) == tail[-CRC_BYTES:]:
            chunks = np.frombuffer(tail[:-CRC_BYTES], np.dtype("<u8")).reshape(samples, 2)
        offsets, lengths = chunks.T
        room = np.uint64(max(0, size - len(tail)))
        present = (offsets != _ABSENT) & (lengths <= room) & (offsets <= room - np.minimum(lengths, room))
        return cls(offsets, lengths, present, identity, np.zeros(samples, bool))


def index_bytes(samples: int) -> int:
    """Length of a shard's index."""
    return 16 * samples + CRC_BYTES


def shard_entries(filesystem: fsspec.AbstractFileSystem, path: str, samples: int) -> NDArray[np.bool_]:
    """Which of a shard's chunks lie in its file, on any storage.

    Args:
        filesystem: of the storage.
        path: of the shard there; none lies in a file that is not there.
        samples: of a shard.
    """
    length = index_bytes(samples)
    try:
        size = filesystem.size(path)
        tail = filesystem.cat_file(path, start=-length) if size >= length else b""
    except FileNotFoundError:
        size, tail = 0, b""
    return ShardIndex.parse(tail, size, samples).present


class ShardReader:
    """Reads chunks of shards, each verified by its checksum the first time.

    Args:
        samples: of a shard.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._indices: dict[str, ShardIndex] = {}

    def read(self, path: str, chunk: int, out: NDArray[Any]) -> None:
        """Read one sample into a C-contiguous array of its shape and dtype.

        Args:
            path: of the shard.
            chunk: position of the sample in its shard.
            out: where to.

        Raises:
            OSError: the file cannot be read.
            ValueError: the sample is absent, truncated or damaged.
        """
        file = os.open(path, os.O_RDONLY)
        try:
            index = self._index(path, file)
            if not index.present[chunk] or index.lengths[chunk] != out.nbytes + CRC_BYTES:
                raise ValueError("the shard does not hold it")
            buffers: list[Any] = [out.reshape(-1).view(np.uint8)]
            verify = not index.verified[chunk]
            if verify:
                buffers.append(bytearray(CRC_BYTES))
            if os.preadv(file, buffers, int(index.offsets[chunk])) != sum(len(buffer) for buffer in buffers):
                raise ValueError("the shard is truncated")
            if verify and _checksum(buffers[0]) != bytes(buffers[1]):
                raise ValueError("its checksum is wrong")
            index.verified[chunk] = True
        finally:
            os.close(file)

    def _index(self, path: str, file: int) -> ShardIndex:
        status = os.fstat(file)
        identity = (status.st_ino, status.st_size, status.st_mtime_ns)  # a shard that was written again is another file
        index = self._indices.get(path)
        if index is None or index.identity != identity:
            length = min(index_bytes(self.samples), status.st_size)
            tail = os.pread(file, length, status.st_size - length)
            index = self._indices[path] = ShardIndex.parse(tail, status.st_size, self.samples, identity)
        return index


class ShardCache:
    """Local copies of a store's shards, each fetched whole when it is first needed.

    A copy serves as long as the storage reports the size and the time or ETag that the shard had, which every process
    asks once. Processes may share the folder: a copy appears under its name when it is complete.

    Args:
        url: of the store, any that fsspec knows.
        folder: of the copies; stores of several URLs may share it.

    Raises:
        StoreError: the folder cannot be made.
    """

    def __init__(self, url: str, folder: str) -> None:
        self.url = url
        self.folder = Path(folder).expanduser().absolute() / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._copies: dict[str, Path] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"copies of {url} cannot be kept in {folder} (data.cache): {error}.") from error

    def fetch(self, shards: Sequence[str]) -> None:
        """Copy what is not there yet, several at once.

        Args:
            shards: their paths in the store.

        Raises:
            StoreError: a shard that cannot be copied.
        """
        unknown = sorted({shard for shard in shards if shard not in self._copies})
        if unknown:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                self._copies.update(zip(unknown, pool.map(self._copy, unknown), strict=True))

    def path(self, shard: str) -> str:
        """Of the copy of a shard; see ``fetch``."""
        self.fetch([shard])
        return str(self._copies[shard])

    def discard(self, shard: str) -> None:
        """Remove a copy that is damaged."""
        self._copies.pop(shard).unlink(missing_ok=True)

    def _copy(self, shard: str) -> Path:
        try:
            filesystem, root = fsspec.core.url_to_fs(self.url)  # here, as an instance does not outlive a fork
            information = filesystem.info(f"{root}/{shard}")
            name = shard.replace("/", ".")
            copy = self.folder / f"{name}-{_version(information)}"
            if not copy.is_file():
                part = self.folder / f".{copy.name}-{os.getpid()}-{threading.get_ident()}"
                try:
                    filesystem.get_file(f"{root}/{shard}", str(part))
                    part.replace(copy)
                finally:
                    part.unlink(missing_ok=True)
                for old in self.folder.glob(f"{name}-*"):
                    if old != copy:
                        old.unlink(missing_ok=True)
            return copy
        except Exception as error:  # each storage has its own errors
            raise StoreError(
                f"the shard {shard} of the feature store {self.url} cannot be copied to {self.folder} (data.cache): "
                f"{type(error).__name__}: {error}."
            ) from error


def _version(information: Mapping[str, Any]) -> str:
    """What tells a file from what it was before, among what its storage says of it."""
    known = sorted((key.lower(), str(value)) for key, value in information.items() if key.lower() in _VERSION)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


class BufferPool:
    """Arrays that are used again once nobody holds them: fresh memory costs as much as reading into it."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], str], list[NDArray[Any]]] = defaultdict(list)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of undefined content; it returns by itself when it and all tensors and views over it are gone."""
        free = self._free[shape, dtype.str]
        buffer = free.pop() if free else np.empty(shape, dtype)
        lent = np.frombuffer(buffer.data, dtype).reshape(shape)
        weakref.finalize(lent.base, free.append, buffer)
        return lent

    def __reduce__(self) -> tuple[type[BufferPool], tuple[()]]:
        return BufferPool, ()  # each process has its own


def _checksum(content: Any) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")
