"""Finding the files and folders of a data set below the folder that somebody unpacked it into."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fpt_lightning.errors import DataError

_DEPTH = 2  # folders that unpacking may have put around a piece
_SHOWN = 8  # entries of a folder that an error names


class Pieces(Mapping[str, Path]):
    """Where each file and folder is.

    Args:
        found: places by piece; of most there is one.
    """

    def __init__(self, found: Mapping[str, Sequence[Path]]) -> None:
        self._found = found

    def __getitem__(self, piece: str) -> Path:
        return self._found[piece][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def every(self, piece: str) -> list[Path]:
        """The places of a piece that comes in several parts."""
        return list(self._found[piece])


@dataclass(frozen=True)
class Wanted:
    """The pieces of a data set.

    Attributes:
        pieces: where to get each file and folder (with a slash at its end), by its path, or its paths with ``|``
            between them, of which the first that is there counts.
        apart: whether they are downloads of their own, each of which may lie in a folder of its own; else they lie in
            one folder.
        several: pieces of which there may be several, as of a download in parts.
    """

    pieces: Mapping[str, str]
    apart: bool = False
    several: tuple[str, ...] = ()

    def locate(self, root: Path, title: str) -> Pieces:
        """Find them below a folder, up to two folders deeper; the case of names does not count.

        The folder that has all of them counts before pieces elsewhere. The folder may also be the first part of a
        piece's path itself; tables may then lie beside it.

        Args:
            root: the folder.
            title: of the data set, for errors.

        Raises:
            DataError: a piece is missing, or there more than once.
        """
        tree = _Tree(root)
        whole = [base for base in tree.bases if all(tree.at(base, piece) for piece in self.pieces)]
        if root in whole:
            whole = [root]
        if len(whole) > 1:
            self._refuse_several(title, root, "all of it", whole)
        if whole:
            found = {piece: tree.at(whole[0], piece) for piece in self.pieces}
        elif self.apart:
            found = {piece: tree.everywhere(piece) for piece in self.pieces}
        else:
            best = max(tree.bases, key=lambda base: sum(bool(tree.at(base, piece)) for piece in self.pieces))
            found = {piece: tree.at(best, piece) for piece in self.pieces}
        found |= {piece: tree.everywhere(piece) for piece in self.several}
        if missing := [piece for piece, paths in found.items() if not paths]:
            raise MissingPiecesError(title, root, missing, self.pieces)
        for piece, paths in found.items():
            if len(paths) > 1 and piece not in self.several:
                self._refuse_several(title, root, piece, paths)
        return Pieces(found)

    @staticmethod
    def _refuse_several(title: str, root: Path, what: str, paths: Sequence[Path]) -> None:
        raise DataError(
            f"{title}: {what} is below {root} more than once, as {', '.join(map(str, paths))}: give the folder of one, "
            "or remove the others."
        )


class MissingPiecesError(DataError):
    """Pieces that are not there.

    Attributes:
        share: of all.
    """

    def __init__(self, title: str, root: Path, missing: Sequence[str], pieces: Mapping[str, str]) -> None:
        entries = sorted(path.name for path in root.iterdir())
        super().__init__(
            f"{title}: {root}, or a folder up to {_DEPTH} levels below it, must hold "
            f"{', '.join(piece.replace('|', ' or ') for piece in missing)}; {root} holds "
            f"{', '.join(entries[:_SHOWN]) or 'nothing'}{' and more' if len(entries) > _SHOWN else ''}. "
            f"Get what is missing from {', '.join(sorted({pieces[piece] for piece in missing}))}."
        )
        self.share = len(missing) / len(pieces)


class _Tree:
    """A folder and those below it; entries of a folder are read once.

    Attributes:
        bases: the folder, those up to ``_DEPTH`` levels below it, and the one that it lies in.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries: dict[Path, dict[str, list[Path]]] = {}
        level, self.bases = [root], [root]
        for _ in range(_DEPTH):
            level = [child for folder in level for child in self._folders(folder)]
            self.bases += level
        self.bases.append(root.absolute().parent)

    def at(self, base: Path, piece: str) -> list[Path]:
        """The piece in a folder, or nothing; several whose names differ in case alone.

        In the folder around the root, nothing but the root itself, what is below it, and files count.
        """
        for path in piece.split("|"):
            found = [base]
            for part in PurePosixPath(path.lower()).parts:
                found = [entry for folder in found for entry in self._listed(folder).get(part, [])]
            found = [entry for entry in found if entry.is_dir() == path.endswith("/")]
            if base == self.root.absolute().parent:
                within = [entry for entry in found if entry.is_relative_to(self.root.absolute())]
                found = [self._below(entry) for entry in within] or [e for e in found if not e.is_dir()]
            if found:
                return sorted(found)
        return []

    def everywhere(self, piece: str) -> list[Path]:
        """The piece in any folder, the outer one of those within each other."""
        below, around = self.bases[:-1], self.bases[-1]
        found = sorted({path for base in below for path in self.at(base, piece)}) or self.at(around, piece)
        return [path for path in found if not any(path != other and path.is_relative_to(other) for other in found)]

    def _below(self, path: Path) -> Path:
        """As seen from the root, which may be relative."""
        return self.root / path.relative_to(self.root.absolute())

    def _listed(self, folder: Path) -> dict[str, list[Path]]:
        """Entries by their names in lower case; none of a file."""
        if folder not in self._entries:
            listed: dict[str, list[Path]] = {}
            for entry in folder.iterdir() if folder.is_dir() else ():
                listed.setdefault(entry.name.lower(), []).append(entry)
            self._entries[folder] = listed
        return self._entries[folder]

    @staticmethod
    def _folders(folder: Path) -> list[Path]:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX")))
