"""Fast reading of a local store: samples as they lie in their shards, straight into reused buffers.

A shard (Zarr v3, sharding codec) is a file of chunks, each the raw bytes of a sample and their crc32c, with an index of
(offset, length) and its crc32c at the end. Any Zarr reader gives the same numbers; zarr-python takes three to ten times
as long.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

_ABSENT = np.uint64(2**64 - 1)  # marks a chunk that a shard does not hold
_CRC_BYTES = 4


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
        if len(tail) == index_bytes(samples) and _checksum(tail[:-_CRC_BYTES]) == tail[-_CRC_BYTES:]:
            chunks = np.frombuffer(tail[:-_CRC_BYTES], np.dtype("<u8")).reshape(samples, 2)
        offsets, lengths = chunks.T
        room = np.uint64(max(0, size - len(tail)))
        present = (offsets != _ABSENT) & (lengths <= room) & (offsets <= room - np.minimum(lengths, room))
        return cls(offsets, lengths, present, identity, np.zeros(samples, bool))


def index_bytes(samples: int) -> int:
    """Length of a shard's index."""
    return 16 * samples + _CRC_BYTES


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
            if not index.present[chunk] or index.lengths[chunk] != out.nbytes + _CRC_BYTES:
                raise ValueError("the shard does not hold it")
            buffers: list[Any] = [out.reshape(-1).view(np.uint8)]
            verify = not index.verified[chunk]
            if verify:
                buffers.append(bytearray(_CRC_BYTES))
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
    return int(google_crc32c.value(content)).to_bytes(_CRC_BYTES, "little")
