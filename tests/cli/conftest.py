"""A configuration for the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def config(image_root: Path, tmp_path: Path) -> Path:
    """A configuration that trains for 2 epochs on 30 small images."""
    content = {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
        },
        "model": {
            "class_path": "FPTPlusModule",
            "init_args": {
                "num_classes": 3,
                "encoder": "test_vit",
                "pretrained": False,
                "side_resolution": 32,
                "learning_rate": 3e-3,
            },
        },
        "data": {
            "class_path": "PreloadedFeatureDataModule",
            "init_args": {
                "root": str(image_root),
                "store": str(tmp_path / "store.zarr"),
                "resolution": 64,
                "image_size": 48,
                "batch_size": 8,
            },
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
