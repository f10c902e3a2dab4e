"""The files of a data set's images: each looked at once, pages with their file, none read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fpt_lightning.data.image_files import ImageFiles, short_digest
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.files import file_digest


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was looked at, by name."""
    calls, stat = Counter[str](), os.stat

    def counted(path: Any, *args: Any, **options: Any) -> os.stat_result:
        calls[Path(path).name if isinstance(path, (str, Path)) else ""] += 1
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", counted)
    return calls


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, size in {"a.png": 3, "scan.dcm": 5, "odd#1": 7, "odd": 2}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "folder.png").mkdir()
    return tmp_path


IDS = ["a.png", "scan.dcm#1", "scan.dcm#12", "odd#1", "odd#2", "gone.png", "gone.dcm#1", "folder.png", "nul\0.png"]


def test_what_is_seen(root: Path) -> None:
    files = ImageFiles.look(root, IDS)
    assert files.sizes.tolist() == [3, 5, 5, 7, 2, -1, -1, -1, -1]
    assert files.present.tolist() == [True] * 5 + [False] * 4
    assert files.pages.tolist()[:5] == [-1, 1, 12, -1, 2]
    assert [files.path(i).name for i in range(5)] == ["a.png", "scan.dcm", "scan.dcm", "odd#1", "odd"]
    assert files.changed[:2].tolist() == [(root / name).stat().st_mtime_ns for name in ("a.png", "scan.dcm")]
    assert files.digest(3) == short_digest(root / "odd#1") == int(file_digest(root / "odd#1")[:16], 16) - 2**63
    assert files.digest(5) == 0


def test_none_is_looked_at_twice(root: Path, looked: Counter[str]) -> None:
    files = ImageFiles.look(root, [f"scan.dcm#{page}" for page in range(1, 500)])
    again = files.of(["a.png", "scan.dcm#7"])
    assert again.ids == ("a.png", "scan.dcm#7")
    assert (again.sizes.tolist(), again.pages.tolist()) == ([3, 5], [-1, 7])
    assert again.of(again.ids) is again
    assert looked["scan.dcm"] == looked["a.png"] == 1


@pytest.mark.parametrize("named", [True, False])
def test_a_manifest_looks_once_at_each_image(tmp_path: Path, named: bool, looked: Counter[str]) -> None:
    """Where the table has the names of the files, and where it leaves their suffixes out."""
    rows = ["image,label,split"]
    for number, split in enumerate(("train", "train", "val", "test")):
        (tmp_path / f"{number}.png").write_bytes(b"x" * (number + 1))
        rows.append(f"{number}{'.png' * named},{'ab'[number % 2]},{split}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    looked.clear()
    files = read_manifest(tmp_path, "table.csv").files
    assert files is not None
    assert files.sizes.tolist() == [1, 2, 3, 4]
    assert {looked[f"{number}.png"] for number in range(4)} == {1}
