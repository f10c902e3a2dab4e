"""The command line in this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from fpt_lightning.cli import main


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What is said on stderr when a command fails for a reason made for people: one message, status 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.split("fpt-lightning: ")[-1]
    assert "Traceback" not in message
    return message


def methods_said(report: str) -> str:
    """The paragraph on methods of a ``report.html``."""
    found = re.search('<h2>Methods</h2><p class="prose">(.*?)</p>', report)
    assert found is not None
    return unescape(found[1])


def run(*args: object) -> None:
    main([str(arg) for arg in args])


@contextmanager
def few_figures() -> Iterator[None]:
    """Runs leave no report and no picture of the confusion matrix, whose figures take half of a small run's time."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("write_report", "write_confusion"):
            patched.setattr(f"fpt_lightning.cli.callbacks.{name}", lambda *_, **__: None)
        yield


def write_config(root: Path, folder: Path) -> Path:
    """``folder/config.yaml``: 2 epochs of FPT+ on small images of 3 classes, with a store and a run in the folder."""
    content = {
        "trainer": {
            "default_root_dir": str(folder / "run"),
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
                "root": str(root),
                "store": str(folder / "store.zarr"),
                "resolution": 64,
                "image_size": 48,
                "batch_size": 8,
            },
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def change(config: Path, section: str, **values: Any) -> None:
    """Change what a configuration says of a section."""
    content = yaml.safe_load(config.read_text())
    (content[section].get("init_args") or content[section]).update(values)
    config.write_text(yaml.safe_dump(content))
