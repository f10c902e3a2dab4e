"""The files of a data set's images, each looked at once: where storage is far away, every look takes a millisecond."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fpt_lightning.data.pages import named_page
from fpt_lightning.files import file_digest, file_states


@dataclass(frozen=True)
class ImageFiles:
    """What the file system says of the files of images; nothing is read.

    Use ``look``.

    Attributes:
        root: the folder that ids are relative to.
        ids: of the images.
        sizes: of each one's file in bytes, (images,), int64; -1 where there is none.
        changed: time of its last change in ns, (images,), int64.
        pages: page or frame of its file that each id means, (images,), int64; -1 where none is said.
    """

    root: Path
    ids: tuple[str, ...]
    sizes: NDArray[np.int64] = field(repr=False)
    changed: NDArray[np.int64] = field(repr=False)
    pages: NDArray[np.int64] = field(repr=False)
    _digests: dict[Path, int] = field(default_factory=dict, repr=False)  # of files that were read

    @classmethod
    def look(cls, root: Path, ids: Sequence[str]) -> ImageFiles:
        """Look at the files of images below a folder, once at one that several are pages of."""
        folder = os.path.join(root, "")
        states = file_states([folder + id for id in ids])
        pages = np.full(len(ids), -1, np.int64)
        gone = {position: named_page(ids[position]) for position in np.flatnonzero(states[:, 0] < 0).tolist()}
        files = dict.fromkeys(file for file, page in gone.values() if page is not None)
        known = dict(zip(files, file_states([folder + file for file in files]), strict=True))
        for position, (file, page) in gone.items():
            if page is not None:
                states[position], pages[position] = known[file], page
        return cls(root, tuple(ids), states[:, 0], states[:, 1], pages)

    def of(self, ids: Sequence[str]) -> ImageFiles:
        """Of these images, in their order; those that were not among the others are looked at now."""
        if tuple(ids) == self.ids:
            return self
        known = {id: position for position, id in enumerate(self.ids)}
        new = ImageFiles.look(self.root, [id for id in ids if id not in known])
        known |= {id: position for position, id in enumerate(new.ids, len(self.ids))}
        order = [known[id] for id in ids]
        sizes, changed, pages = (
            np.concatenate([old, more])[order]
            for old, more in ((self.sizes, new.sizes), (self.changed, new.changed), (self.pages, new.pages))
        )
        return ImageFiles(self.root, tuple(ids), sizes, changed, pages)

    @property
    def present(self) -> NDArray[np.bool_]:
        """Whether each image has a file."""
        there: NDArray[np.bool_] = self.sizes >= 0
        return there

    def path(self, position: int) -> Path:
        """Of an image's file."""
        id = self.ids[position]
        return self.root / (id if self.pages[position] < 0 else named_page(id)[0])

    def digest(self, position: int) -> int:
        """``short_digest`` of an image's file, which is read once; 0 where there is none."""
        path = self.path(position)
        if path not in self._digests:
            self._digests[path] = short_digest(path) if path.is_file() else 0
        return self._digests[path]

    def known_digest(self, position: int) -> int | None:
        """``digest`` of an image's file if it has been read already."""
        return self._digests.get(self.path(position))

    def look_again(self) -> ImageFiles:
        """As the files are now; those that have not changed need not be read again."""
        now = ImageFiles.look(self.root, self.ids)
        same = (now.sizes == self.sizes) & (now.changed == self.changed)
        paths = (self.path(position) for position in np.flatnonzero(same).tolist()) if self._digests else ()
        now._digests.update({path: self._digests[path] for path in paths if path in self._digests})
        return now


def short_digest(path: Path) -> int:
    """The first 8 bytes of a file's SHA-256, as a signed number."""
    return int(file_digest(path)[:16], 16) - 2**63
