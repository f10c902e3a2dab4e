"""The feature store: keys and values of the selected tokens, in Zarr (paper, section 3.6); the only importer of zarr.

Layout (Zarr v3, one row a chunk, whole shards of rows, every chunk with a crc32c checksum):

    features    (rows, 2, L, H, T, head_dim)   keys and values, as the codec has them (fpt_lightning.codecs)
    ..._scales  (rows, L, H, ...)              their scales and offsets, of the codecs that have any
    indices     (rows, L, H, T)                their tokens, int32, most important first
    pooled      (rows, D)                      the pooled feature after the last tapped block, fp32
    images      (rows, size, size, 3)          the low-resolution copies, uint8
    file_sizes  (rows,)                        bytes of the image file, int64
    done        (rows,)                        1 once all of the above is written, uint8

A sample has one row, or two where the store is mirrored: its image's, then the mirror image's. The group's attributes
hold the specification, its fingerprint and the sample ids in the order of the rows. A shard has one writer; ``done`` is
written last, so whatever stops a writer leaves only complete rows and absent ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import fsspec
import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import Crc32cCodec

from fpt_lightning.codecs import CODECS, FeatureShape, relative_error
from fpt_lightning.errors import StaleStoreError, StoreError
from fpt_lightning.images import INTERPOLATION, ImageReader
from fpt_lightning.pages import file_and_page
from fpt_lightning.reader import AT_ONCE, BufferPool, ShardCache, ShardIndex, ShardReader, index_bytes

FORMAT = 4  # of the layout above and of what the numbers in it mean
SHARD = 16  # rows
_RECORD_BYTES = 8 + 1  # file_sizes and done


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
            StoreError: fields are missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            raise StoreError(f"the specification has the fields {sorted(content)} where {sorted(names)} are expected.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

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
        done: whether each row is complete.
    """

    def __init__(self, url: str, group: zarr.Group, cache: str | None = None) -> None:
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
            self.shape = FeatureShape(**attributes["shape"])
            self.made_with: dict[str, str] = attributes["made_with"]
            self.ids: tuple[str, ...] = tuple(attributes["ids"])
            self.sample_arrays = sample_arrays(self.specification.codec, self.shape, self.specification.image_size)
            self._arrays = {name: self._array(name) for name in (*self.sample_arrays, "file_sizes", "done")}
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{url} is not a feature store of fpt-lightning: {error!r}.") from error
        if attributes.get("fingerprint") != self.specification.fingerprint():
            raise StoreError(
                f"the specification of the feature store {url} does not match its fingerprint: rebuild it."
            )
        self.views = self.specification.views
        self.rows = {id: position * self.views for position, id in enumerate(self.ids)}
        self._folder = None if "://" in url else url  # of a local store
        self._cache = None if cache is None else ShardCache(url, cache)
        self._reader, self._buffers = ShardReader(SHARD), BufferPool()
        self._memory: dict[str, Tensor] = {}  # arrays that were loaded whole
        self.done = self._record("done").astype(bool)

    @classmethod
    def create(
        cls, url: str, specification: FeatureSpecification, shape: FeatureShape, made_with: dict[str, str]
    ) -> FeatureStore:
        """Make an empty store.

        Args:
            url: where; nothing may be there.
            specification: complete (mean, std and weights digest known).
            shape: of one sample.
            made_with: versions and device, for the record.

        Raises:
            StoreError: something is there already.
        """
        try:
            group = zarr.open_group(url, mode="w-")
        except FileExistsError as error:
            raise StoreError(f"there is something at {url} already, which is not a complete feature store.") from error
        for name, (sample, dtype) in sample_arrays(specification.codec, shape, specification.image_size).items():
            _create_array(group, name, sample, dtype)
        for name, number in (("file_sizes", "int64"), ("done", "uint8")):
            group.create_array(name, shape=(0,), chunks=(SHARD,), dtype=number, compressors=None, fill_value=0)
        group.attrs.put(
            {
                "specification": specification.to_dict(),
                "fingerprint": specification.fingerprint(),
                "shape": asdict(shape),
                "made_with": made_with,
                "ids": [],
            }
        )
        return cls(url, group)

    @classmethod
    def open(cls, url: str, writable: bool = False, cache: str | None = None) -> FeatureStore:
        """Open an existing store.

        Args:
            url: where.
            writable: whether samples are to be written.
            cache: folder of local copies of the shards that are read (``fpt_lightning.reader.ShardCache``).

        Raises:
            StoreError: there is none, or it is of another format or damaged, or the cache's folder cannot be made.
        """
        try:
            group = zarr.open_group(url, mode="r+" if writable else "r")
        except (FileNotFoundError, zarr.errors.GroupNotFoundError) as error:
            raise StoreError(f"there is no feature store at {url}.") from error
        except Exception as error:  # damaged metadata surfaces as JSON, key or value errors
            raise StoreError(f"the feature store {url} cannot be opened: {type(error).__name__}: {error}.") from error
        return cls(url, group, cache)

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

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of the samples that are not complete in the store."""
        return [id for id in ids if id not in self.rows or not all(self.done[row] for row in self._rows_of([id]))]

    def missing_rows(self, ids: Sequence[str]) -> list[int]:
        """Ascending, the incomplete rows of samples that the store has."""
        return sorted(row for row in self._rows_of(ids) if not self.done[row])

    def _rows_of(self, ids: Sequence[str]) -> list[int]:
        return [self.rows[id] + view for id in ids for view in range(self.views)]

    def extend(self, ids: Sequence[str]) -> FeatureStore:
        """The store with rows for new samples at its end; known ones keep theirs. One process does this."""
        new = [id for id in ids if id not in self.rows]
        total = self.views * (len(self.ids) + len(new))
        for array in self._arrays.values():
            array.resize((total, *array.shape[1:]))
        self._group.attrs.update({"ids": [*self.ids, *new]})
        return FeatureStore.open(self.url, writable=True)

    def write(self, rows: Sequence[int], content: Mapping[str, NDArray[Any]], file_sizes: Sequence[int]) -> None:
        """Write complete rows of one shard; others of the shard are left as they are.

        Args:
            rows: ascending, all within one shard, which no other process writes.
            content: (rows, ...) of each of ``sample_arrays``.
            file_sizes: bytes.
        """
        for name, block in {**content, "file_sizes": np.asarray(file_sizes)}.items():
            for start, stop in _runs(rows):
                self._arrays[name][rows[start] : rows[stop - 1] + 1] = block[start:stop]
        for start, stop in _runs(rows):
            self._arrays["done"][rows[start] : rows[stop - 1] + 1] = np.ones(stop - start, np.uint8)
        self.done[list(rows)] = True

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
        if same and np.array_equal(self.done, other.done):
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
                    f"the feature store {self.url} cannot give the {name} of {self._name(row)}: "
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

    def _name(self, row: int) -> str:
        id, mirrored = self.source(row)
        return f"the mirror image of {id}" if mirrored else id

    def _shard(self, name: str, shard: int) -> str:
        """Path in the store of a shard's file."""
        return f"{name}/c/{shard}" + "/0" * len(self.sample_arrays[name][0])

    def changed(self, root: Path, ids: Sequence[str]) -> list[str]:
        """Those of the samples that are stored, but whose image file below ``root`` has another size by now."""
        sizes = self._record("file_sizes").tolist()
        found = []
        for id in ids:
            path = file_and_page(root / id)[0]
            rows = self._rows_of([id]) if id in self.rows else []
            stored = {sizes[row] for row in rows if self.done[row]}
            if stored and path.is_file() and {path.stat().st_size} != stored:
                found.append(id)
        return found

    def forget(self, ids: Sequence[str]) -> None:
        """Count samples as absent, so that the next preload computes them again."""
        for row in self._rows_of(ids):
            self._arrays["done"][row] = 0
            self.done[row] = False

    def check_present(self) -> None:
        """Make sure that every complete row has its chunks, as Zarr reads an absent chunk as zeros.

        Raises:
            StoreError: naming the first sample whose data are gone.
        """
        filesystem, path = fsspec.core.url_to_fs(self.url)
        rows = np.flatnonzero(self.done)
        shards = [(name, int(shard)) for name in self.sample_arrays for shard in np.unique(rows // SHARD)]

        def lost(given: tuple[str, int]) -> NDArray[Any]:
            name, shard = given
            present = _shard_entries(filesystem, f"{path}/{self._shard(name, shard)}")
            own = rows[rows // SHARD == shard]
            absent: NDArray[Any] = own[~present[own % SHARD]]
            return absent

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for (name, shard), absent in zip(shards, pool.map(lost, shards), strict=True):
                if len(absent):
                    raise StoreError(
                        f"the feature store {self.url} has lost the {name} of {self._name(absent[0])} (shard {shard}): "
                        "rebuild it."
                    )

    def _array(self, name: str) -> Any:
        array: Any = self._group[name]
        return array.with_config({"write_empty_chunks": True})  # an absent chunk must mean an absent sample

    def _record(self, name: str) -> NDArray[Any]:
        """One number a sample."""
        try:
            return np.asarray(self._arrays[name][: self.views * len(self.ids)])
        except Exception as error:  # zarr raises differently for each kind of damage
            raise StoreError(
                f"the record {name!r} of the feature store {self.url} is damaged ({type(error).__name__}): rebuild it."
            ) from error


def _create_array(group: zarr.Group, name: str, sample: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    group.create_array(
        name,
        shape=(0, *sample),
        chunks=(1, *sample),
        shards=(SHARD, *sample),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
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
