"""What every result file says of where it was measured, and what benchmarks without arguments do with them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"  # of pictures that its pages show


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return done.stdout.strip()


_COMMIT = _git("rev-parse", "HEAD") + (" with changes" if _git("status", "--porcelain", "src") else "")
"""Of the code that was imported; a long run may end after the next commit."""


def environment() -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("fpt-lightning", "torch", "lightning", "timm", "zarr", "albumentations")
            },
        },
        "commit": _COMMIT,
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/{name}.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**environment(), **result}, indent=2) + "\n")
    return path


def take_no_arguments(description: str | None, arguments: Sequence[str] | None) -> None:
    """Of a benchmark that has none: ``--help`` says what it does, and others are refused, before anything runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
