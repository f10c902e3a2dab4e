"""The feature store as the frozen pass writes it: made, extended by samples, filled row by row, removed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.errors import StoreError
from fpt_lightning.store.index import FileRecord, open_group
from fpt_lightning.store.layout import (
    ABSENT,
    COMPLETE,
    LEFT_OUT,
    RECORDS,
    SHARD,
    array_documents,
    create_array,
    fingerprint,
    row_checksums,
    with_records,
    writing,
)
from fpt_lightning.store.place import is_local, resolve
from fpt_lightning.store.specification import FeatureShape, FeatureSpecification
from fpt_lightning.store.storage import open_filesystem
from fpt_lightning.store.store import FeatureStore, sample_arrays


class WritableStore(FeatureStore):
    """A feature store for who holds its lock (``fpt_lightning.store.lock``).

    Use ``create`` or ``open``; attributes as of ``StoreIndex``.
    """

    @classmethod
    def create(
        cls, url: str, specification: FeatureSpecification, shape: FeatureShape, made_with: dict[str, str]
    ) -> WritableStore:
        """Make an empty store.

        Args:
            url: where; nothing may be there, but what an earlier ``create`` or ``delete`` left that was stopped.
            specification: complete (mean, std and weights digest known).
            shape: of one sample.
            made_with: versions and device, for the record.

        Raises:
            StoreError: something is there already, or nothing can be written there.
        """
        url = resolve(url)
        arrays = with_records(sample_arrays(specification.codec, shape, specification.image_size))
        with writing(url):
            filesystem, path = open_filesystem(url)
            there = filesystem.ls(path, detail=False) if filesystem.exists(path) else []
        if not {name.rstrip("/").rsplit("/", 1)[-1] for name in there} <= arrays.keys():
            raise StoreError(f"there is something at {url} already, which is not a complete feature store.")
        attributes: dict[str, Any] = {
            "specification": specification.to_dict(),
            "shape": asdict(shape),
            "made_with": made_with,
            "ids": [],
        }
        with writing(url):
            for name, row in arrays.items():
                create_array(f"{url}/{name}", name, 0, *row)
            attributes["arrays"] = array_documents(url, arrays)
            group = zarr.create_group(url, attributes=attributes | {"fingerprint": fingerprint(attributes)})
        return cls(url, group)

    @classmethod
    def open(cls, url: str, tolerant: bool = False, cache: str | None = None) -> WritableStore:
        """Open an existing store, as ``FeatureStore.open`` does."""
        url = resolve(url)
        return cls(url, open_group(url, writable=True), tolerant, cache)

    @staticmethod
    def delete(url: str) -> None:
        """Remove a local store.

        Raises:
            StoreError: it is remote, or is not a feature store.
        """
        url = resolve(url)
        try:
            ours = "specification" in zarr.open_group(url, mode="r").attrs
        except Exception as error:  # damaged metadata surfaces as JSON, key or value errors
            raise StoreError(f"{url} cannot be recognised as a feature store: delete it yourself.") from error
        if not ours:
            raise StoreError(f"{url} is not a feature store of fpt-lightning: it is not deleted.")
        if not is_local(url):
            raise StoreError(f"the feature store {url} is remote: delete it with your storage's own tool.")
        with writing(url):
            (Path(url) / "zarr.json").unlink()  # first, so that what is half deleted is no store
            shutil.rmtree(Path(url))

    def extend(self, ids: Sequence[str]) -> WritableStore:
        """The store with rows for new samples at its end; known ones keep theirs. One process does this.

        Raises:
            StoreError: nothing can be written there.
        """
        new = [id for id in ids if id not in self.rows]
        total = self.orientations * (len(self.ids) + len(new))
        attributes: dict[str, Any] = {**self._group.attrs.asdict(), "ids": [*self.ids, *new]}
        with writing(self.url):
            for array in self._arrays.values():
                array.resize((total, *array.shape[1:]))
            attributes["arrays"] = array_documents(self.url, attributes["arrays"])
            self._group.attrs.put({**attributes, "fingerprint": fingerprint(attributes)})
        return WritableStore.open(self.url)

    def write(self, rows: Sequence[int], content: Mapping[str, NDArray[Any]], files: Sequence[FileRecord]) -> None:
        """Write complete rows of one shard; others of the shard are left as they are.

        Args:
            rows: ascending, all within one shard, which no other process writes.
            content: (rows, ...) of each of ``sample_arrays``.
            files: of the rows' images.

        Raises:
            StoreError: they cannot be written, such as on a full disk.
        """
        blocks = {name: np.asarray(content[name], dtype) for name, (_, dtype) in self.sample_arrays.items()}
        with writing(self.url):
            for name, block in blocks.items():
                self._put(name, rows, block)
        checksums = np.array([row_checksums(block) for block in blocks.values()], np.int64)
        self._record(rows, [(COMPLETE, *file) for file in files], checksums.T)

    def leave_out(self, rows: Sequence[int], files: Sequence[FileRecord]) -> None:
        """Record that rows of one shard have no data, as their images cannot be read; see ``write``."""
        self._record(rows, [(LEFT_OUT, *file) for file in files])

    def retime(self, files: ImageFiles) -> list[int]:
        """Record the times of change of files whose content is known to be what it was."""
        rows = sorted(super().retime(files))
        with writing(self.url):
            for _, shard in groupby(rows, lambda row: row // SHARD):
                own = list(shard)
                self._put(RECORDS, own, self._table[own])
        return rows

    def forget(self, ids: Sequence[str]) -> None:
        """Count samples as absent, so that the next preload computes them again."""
        self.forget_rows(self._rows_of(ids))

    def forget_rows(self, rows: Sequence[int]) -> None:
        """Count rows as absent."""
        for row in rows:
            self._record([row], [(ABSENT, 0, 0, 0)])

    def remove_partial_files(self) -> None:
        """Remove what writers that were killed left of files; only who holds the store's lock may."""
        if self._folder is not None:
            for file in Path(self._folder).rglob("*.partial"):
                file.unlink()

    def _record(
        self, rows: Sequence[int], records: Sequence[Sequence[int]], checksums: NDArray[np.int64] | None = None
    ) -> None:
        if checksums is None:
            checksums = np.zeros((len(rows), len(self.sample_arrays)), np.int64)
        table = np.column_stack([np.array(records, np.int64), self.owners[list(rows)], checksums])
        with writing(self.url):
            self._put(RECORDS, rows, table)
        self._table[list(rows)] = table

    def _put(self, name: str, rows: Sequence[int], block: NDArray[Any]) -> None:
        for start, stop in _runs(rows):
            self._arrays[name][rows[start] : rows[stop - 1] + 1] = block[start:stop]


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Positions [start, stop) of the runs of consecutive rows."""
    breaks = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
    return list(pairwise(breaks))
