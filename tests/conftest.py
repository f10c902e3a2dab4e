"""Fixtures that several rooms share; helpers are in ``helpers``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import commands
from fpt_lightning import PreloadedFeatureDataModule
from small import write_images


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged from INFO on; Lightning's loggers keep it to themselves where nobody logs when it is imported."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """30 images of 3 classes in class folders."""
    return write_images(tmp_path / "images", {"a": 10, "b": 10, "c": 10})


@pytest.fixture
def few_figures() -> Iterator[None]:
    """For tests that look at no report."""
    with commands.few_figures():
        yield


@pytest.fixture
def tiny_data(image_root: Path, tmp_path: Path) -> Callable[..., PreloadedFeatureDataModule]:
    """A maker of preloaded data modules over ``image_root``, at 64 x 64, whose store is ``tmp_path / store.zarr``."""

    def make(**changes: Any) -> PreloadedFeatureDataModule:
        settings: dict[str, Any] = {
            "root": str(image_root),
            "store": str(tmp_path / "store.zarr"),
            "resolution": 64,
            "mean": [0.4],
            "std": [0.2],
            "image_size": 48,
            "batch_size": 8,
        }
        return PreloadedFeatureDataModule(**{**settings, **changes})

    return make
