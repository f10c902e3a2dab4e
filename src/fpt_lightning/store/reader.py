"""Fast reading of a store: samples as they lie in their shards, straight into reused buffers.

A shard (Zarr v3, sharding codec) is a file of chunks, each the raw bytes of a sample and their crc32c, with an index of
(offset, length) and its crc32c at the end. Any Zarr reader gives the same numbers; zarr-python takes three to ten times
as long. Of shards that are far away, ranges are read many at once, or the shards are copied whole, once.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from fpt_lightning.errors import StoreError, in_one_line
from fpt_lightning.store.storage import AT_ONCE, Range, Storage, open_filesystem

FOREIGN = "it belongs to another row or store"
GONE = "the shard does not hold it"
TRUNCATED = "the shard is truncated"
_ABSENT = 2**64 - 1  # marks a chunk that a shard does not hold
_UNBOUNDED = 2**63
CRC_BYTES = 4
_VERSION = ("size", "etag", "e_tag", "mtime", "lastmodified", "last_modified", "updated", "created", "generation")


@dataclass(slots=True)
class ShardIndex:
    """Where the chunks of a shard lie in its file; small, as a process keeps one of every shard that it has read.

    Attributes:
        entries: offset and length in bytes, checksum included, of each chunk, as they lie in the file; none where these
            are damaged.
        room: bytes of the file ahead of its index.
        identity: of the file that the index was read from.
        verified: chunks whose checksum was found right, a bit each.
    """

    entries: bytes
    room: int
    identity: tuple[int, int, int]
    verified: int = 0

    @classmethod
    def parse(
        cls, tail: bytes, size: int | None, samples: int, identity: tuple[int, int, int] = (0, 0, 0)
    ) -> ShardIndex:
        """From the last ``index_bytes`` of a shard of ``size`` bytes; all chunks are absent where these are damaged.

        Where the size is not known, whether a chunk lies within the file is found when it is read.
        """
        whole = len(tail) == index_bytes(samples) and checksum_of(tail[:-CRC_BYTES]) == tail[-CRC_BYTES:]
        return cls(tail[:-CRC_BYTES] if whole else b"", _UNBOUNDED if size is None else size - len(tail), identity)

    def place(self, position: int) -> tuple[int, int] | None:
        """Offset and length of a chunk; None if it does not lie within the file."""
        if not self.entries:
            return None
        offset, length = struct.unpack_from("<QQ", self.entries, 16 * position)
        return (offset, length) if offset != _ABSENT and offset + length <= self.room else None

    def present(self, samples: int) -> NDArray[np.bool_]:
        """Which chunks lie within the file, (samples,)."""
        return np.array([self.place(position) is not None for position in range(samples)])


def index_bytes(samples: int) -> int:
    """Length of a shard's index."""
    return 16 * samples + CRC_BYTES


class Chunk(NamedTuple):
    """A sample to be read.

    Attributes:
        path: of its shard.
        position: in its shard.
        out: where to, a C-contiguous array of its shape and dtype.
        checksum: of the sample, as its record has it; None where that is not known.
    """

    path: str
    position: int
    out: NDArray[Any]
    checksum: int | None

    def offset(self, index: ShardIndex) -> int:
        """Where it begins in its shard.

        Raises:
            ValueError: it is absent, or another.
        """
        place = index.place(self.position)
        if place is None:
            raise ValueError(GONE)
        if place[1] != self.length:
            raise ValueError(FOREIGN)
        return place[0]

    @property
    def length(self) -> int:
        """In bytes, checksum included."""
        return self.out.nbytes + CRC_BYTES

    @property
    def raw(self) -> NDArray[np.uint8]:
        """``out`` as bytes."""
        return self.out.reshape(-1).view(np.uint8)

    def verify(self, stored: bytes | bytearray) -> None:
        """Hold what was read against the checksum beside it, and that against its record.

        Raises:
            ValueError: it is damaged, or another.
        """
        if checksum_of(self.raw) != bytes(stored):
            raise ValueError("its checksum is wrong")
        if self.checksum is not None and int.from_bytes(stored, "little") != self.checksum:
            raise ValueError(FOREIGN)


class ShardReader:
    """Reads chunks of shards on this machine, each verified the first time.

    Args:
        samples: of a shard.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._indices: dict[str, ShardIndex] = {}

    def read(self, chunk: Chunk) -> None:
        """Read one sample straight to where it is wanted.

        Raises:
            OSError: the file cannot be read.
            ValueError: the sample is absent, truncated, damaged or another.
        """
        file = os.open(chunk.path, os.O_RDONLY)
        try:
            index = self._index(chunk.path, file)
            offset, verify = chunk.offset(index), not index.verified >> chunk.position & 1
            buffers: list[Any] = [chunk.raw, *([bytearray(CRC_BYTES)] if verify else [])]
            if os.preadv(file, buffers, offset) != sum(len(buffer) for buffer in buffers):
                raise ValueError(TRUNCATED)
            if verify:
                chunk.verify(buffers[1])
            index.verified |= 1 << chunk.position
        finally:
            os.close(file)

    def index(self, path: str) -> ShardIndex:
        """That of a shard, in which nothing lies where there is no such file; it is not kept."""
        try:
            file = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return ShardIndex.parse(b"", 0, self.samples)
        try:
            return self._parse(file, os.fstat(file))
        finally:
            os.close(file)

    def _index(self, path: str, file: int) -> ShardIndex:
        status = os.fstat(file)
        identity = (status.st_ino, status.st_size, status.st_mtime_ns)  # a shard that was written again is another file
        index = self._indices.get(path)
        if index is None or index.identity != identity:
            index = self._indices[path] = self._parse(file, status, identity)
        return index

    def _parse(self, file: int, status: os.stat_result, identity: tuple[int, int, int] = (0, 0, 0)) -> ShardIndex:
        length = min(index_bytes(self.samples), status.st_size)
        tail = os.pread(file, length, status.st_size - length)
        return ShardIndex.parse(tail, status.st_size, self.samples, identity)


class RemoteReader:
    """Reads chunks of shards that are far away: those of a batch at once, each verified every time.

    Args:
        storage: of the store; paths of chunks are below it.
        samples: of a shard.
    """

    def __init__(self, storage: Storage, samples: int) -> None:
        self.storage, self.samples = storage, samples
        self._indices: dict[str, ShardIndex] = {}

    def read(self, chunks: Sequence[Chunk]) -> list[ValueError | None]:
        """Read samples to where they are wanted.

        Returns:
            For each what is wrong with it, as ``ShardReader.read`` raises it.

        Raises:
            StoreError: the storage cannot be reached.
        """
        known = {chunk.path for chunk in chunks} & self._indices.keys()
        wrong = self._try(chunks)
        again = [i for i, error in enumerate(wrong) if error is not None and chunks[i].path in known]
        for path in {chunks[i].path for i in again}:  # the shard may have been written again since
            self._indices.pop(path, None)
        for i, error in zip(again, self._try([chunks[i] for i in again]), strict=True):
            wrong[i] = error
        return wrong

    def indices(self, paths: Sequence[str]) -> list[ShardIndex]:
        """Those of some shards, which are kept."""
        known = dict(self._indices)  # another thread may forget some
        unknown = sorted({path for path in paths if path not in known})
        length = index_bytes(self.samples)
        for path, tail in zip(unknown, self.storage.read([Range(path, -length) for path in unknown]), strict=True):
            known[path] = self._indices[path] = ShardIndex.parse(tail or b"", None, self.samples)
        return [known[path] for path in paths]

    def _try(self, chunks: Sequence[Chunk]) -> list[ValueError | None]:
        wrong: list[ValueError | None] = [None] * len(chunks)
        places: list[tuple[str, int, int]] = []  # path, offset, and which chunk
        for i, (chunk, index) in enumerate(zip(chunks, self.indices([chunk.path for chunk in chunks]), strict=True)):
            try:
                places.append((chunk.path, chunk.offset(index), i))
            except ValueError as error:
                wrong[i] = error
        runs = _runs(sorted(places), [chunk.length for chunk in chunks])
        ranges = [Range(path, start, start + sum(chunks[i].length for i in run)) for path, start, run in runs]
        for (*_, run), content in zip(runs, self.storage.read(ranges), strict=True):
            view = memoryview(content or b"")
            for i in run:
                wrong[i] = _take(chunks[i], view[: chunks[i].length])
                view = view[chunks[i].length :]
        return wrong


def _runs(places: Sequence[tuple[str, int, int]], lengths: Sequence[int]) -> list[tuple[str, int, list[int]]]:
    """Chunks that follow each other in one file, together."""
    runs: list[tuple[str, int, list[int]]] = []
    end = -1
    for path, offset, i in places:
        if runs and runs[-1][0] == path and end == offset:
            runs[-1][2].append(i)
        else:
            runs.append((path, offset, [i]))
        end = offset + lengths[i]
    return runs


def _take(chunk: Chunk, content: memoryview) -> ValueError | None:
    if len(content) != chunk.length:
        return ValueError(TRUNCATED)
    chunk.raw[:] = np.frombuffer(content[:-CRC_BYTES], np.uint8)
    try:
        chunk.verify(bytes(content[-CRC_BYTES:]))
    except ValueError as error:
        return error
    return None


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
            opened = open_filesystem(self.url)  # here, as an instance does not outlive a fork
            with ThreadPoolExecutor(AT_ONCE) as pool:
                self._copies.update(zip(unknown, pool.map(partial(self._copy, opened), unknown), strict=True))

    def path(self, shard: str) -> str:
        """Of the copy of a shard; see ``fetch``."""
        self.fetch([shard])
        return str(self._copies[shard])

    def discard(self, shard: str) -> None:
        """Remove a copy that is damaged."""
        if (copy := self._copies.pop(shard, None)) is not None:
            copy.unlink(missing_ok=True)

    def _copy(self, opened: tuple[Any, str], shard: str) -> Path:
        try:
            filesystem, root = opened if opened[0].async_impl else open_filesystem(self.url)  # one a thread
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
                f"{in_one_line(error)}."
            ) from error


def _version(information: Mapping[str, Any]) -> str:
    """What tells a file from what it was before, among what its storage says of it."""
    known = sorted((key.lower(), str(value)) for key, value in information.items() if key.lower() in _VERSION)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


class BufferPool:
    """Arrays that are used again once nobody holds them: fresh memory costs as much as reading into it."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], str], list[NDArray[Any]]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of undefined content; it returns by itself when it and all tensors and views over it are gone."""
        free = self._free.setdefault((shape, dtype.str), [])
        try:
            buffer = free.pop()
        except IndexError:  # asked first, another thread could take the last one
            buffer = np.empty(shape, dtype)
        lent = np.frombuffer(buffer.data, dtype).reshape(shape)
        weakref.finalize(lent.base, free.append, buffer)
        return lent

    def __reduce__(self) -> tuple[type[BufferPool], tuple[()]]:
        return BufferPool, ()  # each process has its own


def checksum_of(content: Any) -> bytes:
    """The crc32c of bytes, as Zarr writes it behind them."""
    return int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")
