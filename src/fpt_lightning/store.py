"""The feature store: keys and values of the selected tokens, in Zarr (paper, section 3.6); the only importer of zarr.

Layout (Zarr v3, one row a chunk, whole shards of rows, every chunk with a crc32c checksum):

    features    (rows, 2, L, H, T, head_dim)   keys and values, as the codec has them (fpt_lightning.codecs)
    ..._scales  (rows, L, H, ...)              their scales and offsets, of the codecs that have any
    indices     (rows, L, H, T)                their tokens, int32, most important first
    pooled      (rows, D)                      the pooled feature after the last tapped block, fp32
    images      (rows, size, size, 3)          the low-resolution copies, uint8
    records     (rows, 4)                      int64: 0 absent, 1 complete, 2 left out (its image is broken); and of the
                                               image file the bytes, the time of change in ns, and the first 8 bytes of
                                               its SHA-256

A sample has one row, or two where the store is mirrored: its image's, then the mirror image's. The group's attributes
hold the specification, the sample ids in the order of the rows, a copy of the arrays' metadata, and a fingerprint of
all that. A shard has one writer. A row's record is written after its data, and the group after its arrays, each file
under a partial name first: whatever stops a writer leaves complete rows and absent ones, or no store. Only who holds
``lock_store`` writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, cast

import fsspec
import numpy as np
import torch
import zarr
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from fpt_lightning.codecs import CODECS, FeatureShape, relative_error
from fpt_lightning.errors import StaleStoreError, StoreError, in_one_line
from fpt_lightning.images import INTERPOLATION, ImageReader
from fpt_lightning.manifest import file_digest
from fpt_lightning.pages import file_and_page
from fpt_lightning.reader import AT_ONCE, BufferPool, ShardCache, ShardIndex, ShardReader, index_bytes

FORMAT = 4  # of the layout above and of what the numbers in it mean
SHARD = 16  # rows
ABSENT, COMPLETE, LEFT_OUT = range(3)  # what a record says of its row
_RECORDS = {"records": ((4,), np.dtype("int64"))}
_RECORD_BYTES = 4 * 8
REPAIR = "fpt-lightning store repair --config CONFIG"


class FileRecord(NamedTuple):
    """What tells an image file from another.

    Attributes:
        size: in bytes.
        changed: time of its last change in ns.
        digest: the first 8 bytes of its SHA-256, as a signed number.
    """

    size: int
    changed: int
    digest: int

    @classmethod
    def of(cls, image: Path) -> FileRecord:
        """Of an image's file; zeros where there is none."""
        path = file_and_page(image)[0]
        if not path.is_file():
            return cls(0, 0, 0)
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, _digest(path, status.st_size, status.st_mtime_ns))

    def describes(self, image: Path) -> bool:
        """Whether an image's file is still the one recorded; it is read only if its time alone differs."""
        path = file_and_page(image)[0]
        status = path.stat()
        if self.size != status.st_size:
            return False
        return self.changed == status.st_mtime_ns or self.digest == FileRecord.of(image).digest


@cache
def _digest(path: Path, size: int, changed: int) -> int:
    return int(file_digest(path)[:16], 16) - 2**63


class Damage(NamedTuple):
    """What cannot be read of a store.

    Attributes:
        row: whose.
        array: of ``FeatureStore.sample_arrays``, or ``records``.
        reason: for people.
    """

    row: int
    array: str
    reason: str


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
        statistics: ``given``, or which training images mean and std were computed over.
        image_size: side of the low-resolution copies in pixels.
        codec: a row of ``fpt_lightning.codecs.CODECS``.
        precision: of the frozen pass.
        mirrored: whether each sample has the features of its mirror image too.
        interpolation: how images are resized.
        fit: how images come to the encoder's aspect (``fpt_lightning.images.ImageReader``).
        crop_border: whether their dark border is cut off.
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
    mirrored: bool = False
    weights_digest: str = ""
    interpolation: str = INTERPOLATION
    fit: str = "squash"
    crop_border: bool = False
    format: int = FORMAT

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> FeatureSpecification:
        """The inverse of ``to_dict``.

        Raises:
            StoreError: fields are missing, unknown or of another type.
        """
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            raise StoreError(f"the specification has the fields {sorted(content)} where {sorted(names)} are expected.")
        for name, kind in _FIELDS.items():
            value = content[name] if isinstance(content[name], list) else [content[name]]
            if isinstance(content[name], list) != (name in _LISTS) or not all(type(v) in kind for v in value):
                raise StoreError(f"the specification's {name} is {content[name]!r}.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def reader(self) -> ImageReader:
        """What reads the images."""
        return ImageReader(self.resolution, self.fit, self.crop_border)

    @property
    def views(self) -> int:
        """Rows of a sample in a store."""
        return 2 if self.mirrored else 1

    def differences(self, asked: FeatureSpecification, ignore: Sequence[str] = ()) -> list[str]:
        """How this specification differs from what is asked, field by field, for people.

        Mean and std are compared as numbers where they were given, and by the images they were computed over where
        they are ``auto``; the weights' digest only where both have one.
        """
        skip = {*ignore, "statistics"} if asked.statistics == "given" else {*ignore, "mean", "std"}
        if not (self.weights_digest and asked.weights_digest):
            skip.add("weights_digest")
        return [
            f"{field.name}: {getattr(self, field.name)!r}, asked for {getattr(asked, field.name)!r}"
            for field in fields(self)
            if field.name not in skip and getattr(self, field.name) != getattr(asked, field.name)
        ]


_LISTS = {field.name for field in fields(FeatureSpecification) if str(field.type).startswith("tuple")}
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int)}
_FIELDS = {
    field.name: _KINDS[str(field.type).removeprefix("tuple[").split(",")[0]] for field in fields(FeatureSpecification)
}
"""The types of a specification's values, or of those in its lists."""


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
    arrays = sample_arrays(codec, shape, image_size).values()
    return sum(math.prod(size) * dtype.itemsize for size, dtype in arrays) + _RECORD_BYTES


def encode(features: Tensor, specification: FeatureSpecification, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Keys and values as the specification's codec stores them, by array.

    Args:
        features: (B, 2, L, H, T, head_dim), fp32.
        specification: of the store.
        names: of the B images, for the error.

    Raises:
        StoreError: values that are not finite, or that the codec would distort, naming encoder, block, head and image.
    """
    codec = CODECS[specification.codec]
    coded = codec.encode(features)
    errors = relative_error(features, coded)  # (B, 2, L, H)
    if not codec.holds(errors):
        _refuse(features, errors, specification, names)
    return {name: part.cpu().numpy() for name, part in coded._asdict().items() if part is not None}


def _refuse(features: Tensor, errors: Tensor, specification: FeatureSpecification, names: Sequence[str]) -> NoReturn:
    name, codec = specification.codec, CODECS[specification.codec]
    image = int((~(errors <= codec.largest_error)).flatten(1).any(1).nonzero()[0])
    worst = errors[image].nan_to_num(torch.inf, torch.inf).argmax()
    part, layer, head = (int(i) for i in torch.unravel_index(worst, errors.shape[1:]))
    largest = features[image, part, layer, head].abs().max().item()
    one = features[image : image + 1]
    others = [name for name, other in CODECS.items() if other.holds(relative_error(one, other.encode(one)))]
    if math.isfinite(largest):
        remedy = f"use codec {' or '.join(others)}" if others else "no codec holds them"
    else:
        remedy = "the encoder gives NaN or Inf"
    raise StoreError(
        f"the features of {names[image]} do not fit {name}: {('keys', 'values')[part]} of block "
        f"{specification.layers[layer]}, head {head}, of {specification.encoder} (largest magnitude {largest:g}) would "
        f"have an error of {100 * errors[image, part, layer, head].item():.3g}%, where {100 * codec.largest_error:g}% "
        f"is allowed: {remedy}."
    )


class FeatureStore:
    """A Zarr group of features, at a local path or any fsspec URL.

    Use ``create`` or ``open``.

    Attributes:
        url: where it is.
        specification: what made it.
        shape: of one sample's features.
        sample_arrays: shape and dtype of what each array has for a row.
        ids: sample ids in the order of the rows.
        rows: the first (or only) row of each sample, by its id.
        records: (rows, 4), int64; see the layout above.
        lost_records: those of rows whose records are damaged, where that is tolerated; they are 0.
    """

    def __init__(self, url: str, group: zarr.Group, cache: str | None = None, tolerant: bool = False) -> None:
        self.url = url
        self._group = group
        try:
            attributes = cast(dict[str, Any], group.attrs.asdict())
            if attributes["specification"].get("format") != FORMAT:
                raise StoreError(
                    f"the feature store {url} has the format {attributes['specification'].get('format')!r}, this "
                    f"version of fpt-lightning reads {FORMAT}: rebuild it."
                )
            self.specification = FeatureSpecification.from_dict(attributes["specification"])
            if attributes.get("fingerprint") != _fingerprint(attributes):
                raise StoreError(
                    f"the attributes of the feature store {url} do not match their fingerprint: rebuild it."
                )
            self.shape = FeatureShape(**attributes["shape"])
            self.made_with: dict[str, str] = attributes["made_with"]
            self.ids: tuple[str, ...] = tuple(attributes["ids"])
            if not all(isinstance(id, str) for id in self.ids) or len(set(self.ids)) < len(self.ids):
                raise TypeError("the ids are not text, or not unique")
            documents = dict(attributes["arrays"])
            self.sample_arrays = sample_arrays(self.specification.codec, self.shape, self.specification.image_size)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{url} is not a feature store of fpt-lightning: {error!r}.") from error
        if _array_documents(url, documents) != documents:
            raise StoreError(f"the metadata of an array of the feature store {url} are damaged: rebuild it.")
        self._arrays = {name: self._array(name, *row) for name, row in (self.sample_arrays | _RECORDS).items()}
        self.views = self.specification.views
        self.rows = {id: position * self.views for position, id in enumerate(self.ids)}
        self._folder = None if "://" in url else url  # of a local store
        self._cache = None if cache is None else ShardCache(url, cache)
        self._reader, self._buffers = ShardReader(SHARD), BufferPool()
        self._memory: dict[str, Tensor] = {}  # arrays that were loaded whole
        self.records, self.lost_records = self._read_records(tolerant)

    @classmethod
    def create(
        cls, url: str, specification: FeatureSpecification, shape: FeatureShape, made_with: dict[str, str]
    ) -> FeatureStore:
        """Make an empty store.

        Args:
            url: where; nothing may be there, but what an earlier ``create`` or ``delete`` left that was stopped.
            specification: complete (mean, std and weights digest known).
            shape: of one sample.
            made_with: versions and device, for the record.

        Raises:
            StoreError: something is there already, or nothing can be written there.
        """
        arrays = sample_arrays(specification.codec, shape, specification.image_size) | _RECORDS
        filesystem, path = fsspec.core.url_to_fs(url)
        there = filesystem.ls(path, detail=False) if filesystem.exists(path) else []
        if not {name.rstrip("/").rsplit("/", 1)[-1] for name in there} <= arrays.keys():
            raise StoreError(f"there is something at {url} already, which is not a complete feature store.")
        attributes: dict[str, Any] = {
            "specification": specification.to_dict(),
            "shape": asdict(shape),
            "made_with": made_with,
            "ids": [],
        }
        with _writing(url):
            for name, row in arrays.items():
                _create_array(f"{url}/{name}", name, 0, *row)
            attributes["arrays"] = _array_documents(url, arrays)
            group = zarr.create_group(url, attributes=attributes | {"fingerprint": _fingerprint(attributes)})
        return cls(url, group)

    @classmethod
    def open(cls, url: str, writable: bool = False, cache: str | None = None, tolerant: bool = False) -> FeatureStore:
        """Open an existing store.

        Args:
            url: where.
            writable: whether samples are to be written.
            cache: folder of local copies of the shards that are read (``fpt_lightning.reader.ShardCache``).
            tolerant: whether damaged records count as absent, for ``verify`` to name them.

        Raises:
            StoreError: there is none, or it is of another format or damaged, or the cache's folder cannot be made.
        """
        try:
            group = zarr.open_group(url, mode="r+" if writable else "r")
        except (FileNotFoundError, zarr.errors.GroupNotFoundError) as error:
            raise StoreError(f"there is no feature store at {url}.") from error
        except Exception as error:  # damaged metadata surfaces as JSON, key or value errors
            raise StoreError(f"the feature store {url} cannot be opened: {type(error).__name__}: {error}.") from error
        return cls(url, group, cache, tolerant)

    @staticmethod
    def exists(url: str) -> bool:
        """Whether a Zarr group is there, complete or not."""
        filesystem, path = fsspec.core.url_to_fs(url)
        return bool(filesystem.exists(f"{path}/zarr.json"))

    @staticmethod
    def delete(url: str) -> None:
        """Remove a local store.

        Raises:
            StoreError: it is remote, or is not a feature store.
        """
        try:
            ours = "specification" in zarr.open_group(url, mode="r").attrs
        except Exception as error:  # damaged metadata surfaces as JSON, key or value errors
            raise StoreError(f"{url} cannot be recognised as a feature store: delete it yourself.") from error
        if not ours:
            raise StoreError(f"{url} is not a feature store of fpt-lightning: it is not deleted.")
        if "://" in url:
            raise StoreError(f"the feature store {url} is remote: delete it with your storage's own tool.")
        with _writing(url):
            (Path(url) / "zarr.json").unlink()  # first, so that what is half deleted is no store
            shutil.rmtree(Path(url))

    @property
    def bytes_per_row(self) -> int:
        """Stored bytes of one row, without Zarr's metadata."""
        return bytes_per_row(self.specification.codec, self.shape, self.specification.image_size)

    def source(self, row: int) -> tuple[str, bool]:
        """The id of a row's sample, and whether the row is of its mirror image."""
        return self.ids[row // self.views], row % self.views == 1

    def arrays_of(self, inputs: Sequence[str]) -> list[str]:
        """The arrays that hold what a method takes: those of the codec for ``features``."""
        features = CODECS[self.specification.codec].arrays(self.shape)
        return [name for given in inputs for name in (features if given == "features" else (given,))]

    def require(self, asked: FeatureSpecification, rebuild: str, ignore: Sequence[str] = ()) -> None:
        """Hold the store against what is asked.

        Raises:
            StaleStoreError: each differing field, and the command that rebuilds.
        """
        differences = self.specification.differences(asked, ignore)
        if differences:
            remedy = ""
            if any(line.startswith("statistics") for line in differences):
                given = f"data.mean {list(self.specification.mean)} and data.std {list(self.specification.std)}"
                remedy = f"\nTo keep its normalisation although the training images changed, give {given}."
            raise StaleStoreError(
                f"the feature store {self.url} was made with other settings:\n  "
                + "\n  ".join(differences)
                + f"\nRebuild it with\n  {rebuild}\nor name another data.store.{remedy}"
            )

    @property
    def done(self) -> NDArray[np.bool_]:
        """Whether each row is complete."""
        return cast(NDArray[np.bool_], self.records[:, 0] == COMPLETE)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of the samples that are neither complete nor left out in the store."""
        return [id for id in ids if id not in self.rows or ABSENT in self._states(id)]

    def left_out(self, ids: Sequence[str]) -> list[str]:
        """Those of the samples that were left out, as their images could not be read."""
        return [id for id in ids if id in self.rows and LEFT_OUT in self._states(id)]

    def missing_rows(self, ids: Sequence[str]) -> list[int]:
        """Ascending, the absent rows of samples that the store has."""
        return sorted(row for row in self._rows_of(ids) if self.records[row, 0] == ABSENT)

    def _states(self, id: str) -> list[int]:
        return [int(self.records[row, 0]) for row in self._rows_of([id])]

    def _rows_of(self, ids: Sequence[str]) -> list[int]:
        return [self.rows[id] + view for id in ids for view in range(self.views)]

    def extend(self, ids: Sequence[str]) -> FeatureStore:
        """The store with rows for new samples at its end; known ones keep theirs. One process does this.

        Raises:
            StoreError: nothing can be written there.
        """
        new = [id for id in ids if id not in self.rows]
        total = self.views * (len(self.ids) + len(new))
        attributes: dict[str, Any] = {**self._group.attrs.asdict(), "ids": [*self.ids, *new]}
        with _writing(self.url):
            for array in self._arrays.values():
                array.resize((total, *array.shape[1:]))
            attributes["arrays"] = _array_documents(self.url, attributes["arrays"])
            self._group.attrs.put({**attributes, "fingerprint": _fingerprint(attributes)})
        return FeatureStore.open(self.url, writable=True)

    @property
    def extended(self) -> bool:
        """Whether the arrays have the rows of all samples, and no other; ``extend`` may have been stopped."""
        return {array.shape[0] for array in self._arrays.values()} == {self.views * len(self.ids)}

    def write(self, rows: Sequence[int], content: Mapping[str, NDArray[Any]], files: Sequence[FileRecord]) -> None:
        """Write complete rows of one shard; others of the shard are left as they are.

        Args:
            rows: ascending, all within one shard, which no other process writes.
            content: (rows, ...) of each of ``sample_arrays``.
            files: of the rows' images.

        Raises:
            StoreError: they cannot be written, such as on a full disk.
        """
        with _writing(self.url):
            for name, block in content.items():
                self._put(name, rows, block)
        self._record(rows, [(COMPLETE, *file) for file in files])

    def leave_out(self, rows: Sequence[int], files: Sequence[FileRecord]) -> None:
        """Record that rows of one shard have no data, as their images cannot be read; see ``write``."""
        self._record(rows, [(LEFT_OUT, *file) for file in files])

    def _record(self, rows: Sequence[int], records: Sequence[Sequence[int]]) -> None:
        with _writing(self.url):
            self._put("records", rows, np.array(records, np.int64))
        self.records[list(rows)] = records

    def _put(self, name: str, rows: Sequence[int], block: NDArray[Any]) -> None:
        for start, stop in _runs(rows):
            self._arrays[name][rows[start] : rows[stop - 1] + 1] = block[start:stop]

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

    def share(self, other: FeatureStore) -> None:
        """Take over what another instance of the same store holds in memory; nothing if it is another by now."""
        same = self.specification == other.specification and self.ids == other.ids
        if same and np.array_equal(self.records, other.records):
            self._memory = other._memory

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
            self._cache.fetch([self._shard(name, row // SHARD) for row in rows])
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
        shard = self._shard(name, row // SHARD)
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
            if not sample.any() and not self._present(name, row // SHARD)[row % SHARD]:
                raise ValueError("the shard does not hold it")  # Zarr gives zeros

    def name(self, row: int) -> str:
        """What a row is of, for people."""
        id, mirrored = self.source(row)
        return f"the mirror image of {id}" if mirrored else id

    def _shard(self, name: str, shard: int) -> str:
        """Path in the store of a shard's file."""
        return f"{name}/c/{shard}" + "/0" * len(self.sample_arrays[name][0])

    def changed(self, root: Path, ids: Sequence[str]) -> list[str]:
        """Those of the samples that are stored or left out, but whose image file below ``root`` is another by now.

        A file is another if its size differs; if only its time of change does, its content decides.
        """
        found = []
        for id in ids:
            known = [FileRecord(*record[1:].tolist()) for record in self._known(id)]
            if known and file_and_page(root / id)[0].is_file() and not all(r.describes(root / id) for r in known):
                found.append(id)
        return found

    def _known(self, id: str) -> NDArray[np.int64]:
        records = self.records[self._rows_of([id])] if id in self.rows else self.records[:0]
        known: NDArray[np.int64] = records[records[:, 0] != ABSENT]
        return known

    def forget(self, ids: Sequence[str]) -> None:
        """Count samples as absent, so that the next preload computes them again."""
        self._forget_rows(self._rows_of(ids))

    def _forget_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._record([row], [(ABSENT, 0, 0, 0)])

    def check_present(self) -> None:
        """Make sure that every complete row has its chunks, as Zarr reads an absent chunk as zeros.

        Raises:
            StoreError: naming the first sample whose data are gone, or the extension of the store was stopped.
        """
        if not self.extended:
            raise StoreError(f"the arrays of the feature store {self.url} have not {len(self.ids)} samples: {REPAIR}.")
        for name, shard, present in self._shards():
            rows = self._complete_rows(shard)
            absent = rows[~present[rows % SHARD]]
            if len(absent):
                raise StoreError(
                    f"the feature store {self.url} has lost the {name} of {self.name(absent[0])} (shard {shard}): "
                    f"rebuild it, or what is lost of it, with `{REPAIR}`."
                )

    def _shards(self) -> Iterator[tuple[str, int, NDArray[np.bool_]]]:
        """Each array and shard that has complete rows, and which of its chunks are there."""
        shards = [
            (name, int(shard)) for name in self.sample_arrays for shard in np.unique(np.flatnonzero(self.done) // SHARD)
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for given, present in zip(shards, pool.map(lambda given: self._present(*given), shards), strict=True):
                yield *given, present

    def _complete_rows(self, shard: int) -> NDArray[np.intp]:
        return np.flatnonzero(self.done[shard * SHARD : (shard + 1) * SHARD]) + shard * SHARD

    def _present(self, name: str, shard: int) -> NDArray[np.bool_]:
        filesystem, path = fsspec.core.url_to_fs(self.url)
        return _shard_entries(filesystem, f"{path}/{self._shard(name, shard)}")

    def verify(self) -> list[Damage]:
        """All that cannot be read of the complete rows: every chunk is read, and its checksum compared.

        The store must have been opened ``tolerant``, else damaged records were an error already.
        """
        damage = [Damage(row, "records", "the checksum of the records is wrong") for row in self.lost_records]
        self._reader = ShardReader(SHARD)  # which has verified nothing yet
        for name, shard, _ in self._shards():
            for row in self._complete_rows(shard).tolist():
                try:
                    self.read([row], name)
                except StoreError as error:
                    damage.append(Damage(row, name, str(error.__cause__)))
        return damage

    def forget_damaged(self) -> list[str]:
        """Count the samples that ``verify`` finds damaged as absent, so that a preload computes them again.

        Returns:
            Their ids.
        """
        damage = self.verify()
        filesystem, path = fsspec.core.url_to_fs(self.url)
        broken = {f"records/c/{row // SHARD}/0" for row in self.lost_records}
        broken |= {
            self._shard(d.array, d.row // SHARD)
            for d in damage
            if d.array in self.sample_arrays and not self._present(d.array, d.row // SHARD).any()
        }
        for file in broken:  # what Zarr could not write into; rows that are forgotten next, or found lost until then
            if filesystem.exists(f"{path}/{file}"):
                filesystem.rm(f"{path}/{file}")
        self._forget_rows(sorted({d.row for d in damage if d.array != "records"}))
        return list(dict.fromkeys(self.source(d.row)[0] for d in damage))

    def remove_partial_files(self) -> None:
        """Remove what writers that were killed left of files; only who holds the store's lock may."""
        if self._folder is not None:
            for file in Path(self._folder).rglob("*.partial"):
                file.unlink()

    def _array(self, name: str, sample: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        try:
            array: Any = self._group[name]
            expected = _create_array(MemoryStore(), name, array.shape[0], sample, dtype).metadata
        except Exception as error:  # damaged metadata surfaces as errors of many kinds
            raise StoreError(
                f"the array {name} of the feature store {self.url} is damaged ({in_one_line(error)}): rebuild it."
            ) from error
        if array.metadata != expected:
            raise StoreError(
                f"the array {name} of the feature store {self.url} is not as fpt-lightning makes it: rebuild it."
            )
        return array.with_config({"write_empty_chunks": True})  # an absent chunk must mean an absent sample

    def _read_records(self, tolerant: bool) -> tuple[NDArray[np.int64], list[int]]:
        """The records, and the rows whose are damaged; those are 0."""
        array, total, lost = self._arrays["records"], self.views * len(self.ids), list[int]()
        records = np.zeros((total, 4), np.int64)
        try:
            records[: array.shape[0]] = array[:total]
        except Exception:  # zarr raises differently for each kind of damage: which rows?
            for start in range(0, total, SHARD):
                rows = range(start, min(start + SHARD, total))
                try:
                    records[start : rows.stop] = array[start : rows.stop]
                except Exception as error:
                    if not tolerant:
                        raise StoreError(
                            f"the records of {self.name(start)} to {self.name(rows[-1])} in the feature store "
                            f"{self.url} are damaged ({error}): compute them again with `{REPAIR}`."
                        ) from error
                    lost += rows
        return records, lost


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """Say which store could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"the feature store {url} cannot be written: {error.strerror or error}. What is complete of it is kept: "
            "make room, or make it writable, and preload again; or name another data.store."
        ) from error


def lock_store(url: str, shared: bool = False) -> IO[bytes] | None:
    """Keep other preloads from writing a local store while the file that is returned is open, or until a crash.

    The lock is that of the operating system on ``{url}.lock``. A remote store has none: None is returned.

    Args:
        url: of the store, which need not be there yet.
        shared: whether other processes of this preload may hold the lock too.

    Raises:
        StoreError: another preload holds it, or nothing can be written beside the store.
    """
    if "://" in url:
        return None
    with _writing(url):
        path = Path(f"{url}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")
    share_lock(file, url, shared)
    return file


def share_lock(file: IO[bytes], url: str, shared: bool = True) -> None:
    """Take a store's lock, or turn the exclusive one into a shared one."""
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise StoreError(
            f"another preload is writing the feature store {url}: wait for it, or stop it, then preload again."
        ) from error
    except OSError as error:
        rank_zero_warn(f"{url} cannot be locked ({error.strerror}): do not run two preloads of it at once.")


def _array_documents(url: str, names: Iterable[str]) -> dict[str, Any]:
    """Zarr's metadata of arrays as they lie there, but for their number of rows, which alone changes."""
    filesystem, path = fsspec.core.url_to_fs(url)
    documents = {}
    for name in names:
        try:
            documents[name] = json.loads(filesystem.cat_file(f"{path}/{name}/zarr.json"))
            documents[name]["shape"][0] = 0
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise StoreError(
                f"the metadata of the array {name} of the feature store {url} are damaged or gone "
                f"({type(error).__name__}: {error}): rebuild it."
            ) from error
    return documents


def _fingerprint(attributes: Mapping[str, Any]) -> str:
    """SHA-256 of a store's attributes but for itself, as canonical JSON."""
    content = {name: value for name, value in attributes.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _create_array(where: str | MemoryStore, name: str, rows: int, sample: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    sharded = name not in _RECORDS
    return zarr.create_array(
        where,
        shape=(rows, *sample),
        chunks=(1 if sharded else SHARD, *sample),
        shards=(SHARD, *sample) if sharded else None,
        dtype=dtype,
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        overwrite=True,  # what an earlier ``create`` left that was stopped
    )


def available_memory(shared: bool) -> int | None:
    """Bytes that can be taken without swapping, as shared memory or any; None where only Linux would say.

    Containers often have little shared memory (``docker run --shm-size``).
    """
    info, shared_memory = Path("/proc/meminfo"), Path("/dev/shm")
    if not info.is_file():
        return None
    free = {line.split()[0]: 1024 * int(line.split()[1]) for line in info.read_text().splitlines()}["MemAvailable:"]
    return min(free, shutil.disk_usage(shared_memory).free) if shared and shared_memory.is_dir() else free


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Positions [start, stop) of the runs of consecutive rows."""
    breaks = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
    return list(pairwise(breaks))


def _shard_entries(filesystem: fsspec.AbstractFileSystem, path: str) -> NDArray[np.bool_]:
    """Which of a shard's chunks lie in its file."""
    length = index_bytes(SHARD)
    try:
        size = filesystem.size(path)
        tail = filesystem.cat_file(path, start=-length) if size >= length else b""
    except FileNotFoundError:
        size, tail = 0, b""
    return ShardIndex.parse(tail, size, SHARD).present
