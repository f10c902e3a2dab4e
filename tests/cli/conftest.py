"""A configuration for the command line, and a run of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from commands import change, few_figures, run, write_config
from small import write_images


@pytest.fixture
def config(image_root: Path, tmp_path: Path) -> Path:
    """A configuration that trains for 2 epochs on 30 small images."""
    return write_config(image_root, tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``config.yaml``, whose mean and std are given, its images, store and run; nothing may change it."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(write_images(folder / "images", {"a": 10, "b": 10, "c": 10}), folder)
    change(config, "data", mean=[0.4], std=[0.2])
    with few_figures():
        run("fit", "--config", config)
    return folder


@pytest.fixture
def trained(finished: Path, tmp_path: Path) -> Path:
    """The configuration of a copy of that run and of its store, in ``tmp_path``; its images are the same."""
    for name in ("run", "store.zarr"):
        shutil.copytree(finished / name, tmp_path / name)
    config = write_config(finished / "images", tmp_path)
    change(config, "data", mean=[0.4], std=[0.2])
    return config
