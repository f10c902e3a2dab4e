"""Drawn fundus photographs: reproducible, alike but for a texture that a small copy has lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fpt_lightning.data.images import read_image
from fpt_lightning.data.transforms import stored_copy
from fpt_lightning.datamodules.synthetic import CLASSES, fundus_image, write_fundus_images
from fpt_lightning.errors import ConfigurationError, DataError


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.sqrt(np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_the_class_is_in_the_detail_alone() -> None:
    healthy, *others = (fundus_image(label, 3, 384) for label in range(len(CLASSES)))
    for other in others:
        assert difference(healthy, other) > 10
        assert difference(stored_copy(healthy, 128), stored_copy(other, 128)) < 1.5
        assert abs(healthy.mean() - other.mean()) < 1
    assert difference(*others) > 10


def test_a_seed_is_an_eye() -> None:
    first = fundus_image(1, 5, 384)
    assert first.shape == (384, 384, 3)
    assert np.array_equal(first, fundus_image(1, 5, 384))
    assert difference(first, fundus_image(1, 6, 384)) > 10


@pytest.mark.parametrize("arguments", [(3, 0, 384), (-1, 0, 384), (0, -1, 384), (0, 0, 100)])
def test_arguments_out_of_range(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigurationError):
        fundus_image(*arguments)


def test_a_set_is_written_once_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_fundus_images(root, 6, size=320)
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert len(files) == 6
    assert np.array_equal(read_image(root / "granular" / "0001.png"), fundus_image(1, 4, 320))
    lost = root / "striated" / "0001.png"
    content = lost.read_bytes()
    lost.rename(lost.with_name("0001.png.partial"))
    write_fundus_images(root, 6, size=320)
    assert lost.read_bytes() == content
    assert {p: t for p, t in files.items() if p != lost} == {
        p: p.stat().st_mtime_ns for p in root.rglob("*.png") if p != lost
    }


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write_fundus_images(root, 3, size=320)
    with pytest.raises(DataError, match=r"another synthetic set .*count 3 instead of 6"):
        write_fundus_images(root, 6, size=320)
    (root / "mine.png").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"not of this set, such as mine.png. Delete that folder, or name another"):
        write_fundus_images(root, 3, size=320)
    (root / "synthetic.json").write_text(json.dumps([]))
    with pytest.raises(DataError, match=r"no readable synthetic\.json"):
        write_fundus_images(root, 3, size=320)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        write_fundus_images(tmp_path / "file", 3, size=320)
