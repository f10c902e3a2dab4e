"""A maker of feature stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.writing import WritableStore
from small import SPECIFICATION
from stores import IDS, SHAPE, write


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., FeatureStore]:
    def make(codec: str = "int8", ids: Sequence[str] = IDS, rows: Sequence[int] = range(20)) -> FeatureStore:
        specification = replace(SPECIFICATION, codec=codec)
        store = WritableStore.create(str(tmp_path / "s.zarr"), specification, SHAPE, {"torch": "9"}).extend(ids)
        write(store, rows)
        return store

    return make
