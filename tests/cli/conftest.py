"""A configuration for the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import write_config


@pytest.fixture
def config(image_root: Path, tmp_path: Path) -> Path:
    """A configuration that trains for 2 epochs on 30 small images."""
    return write_config(image_root, tmp_path)
