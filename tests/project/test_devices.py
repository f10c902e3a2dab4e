"""Two CPU processes (DDP over gloo) against one: the same training, the same figures, each file written once."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fpt_lightning.cli import main
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.store.store import FeatureStore
from small import TINY, write_images


def run(config: dict[str, Any], folder: Path, command: str, *arguments: str) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    given = [command, "--config", str(path), *arguments]
    if config["trainer"]["devices"] == 1:
        main(given)  # here: another process would import everything again
        return ""
    done = subprocess.run([sys.executable, "-m", "fpt_lightning", *given], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def configuration(root: Path, folder: Path, devices: int, global_batch: int = 8) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    return {
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "enable_progress_bar": False,
        },
        "model": {
            "class_path": "FPTPlusModule",
            "init_args": {"num_classes": 3, "learning_rate": 3e-3, "dropout": 0.0, **TINY},
        },
        "data": {
            "class_path": "PreloadedFeatureDataModule",
            "init_args": {
                "root": str(root),
                "store": str(folder / "store.zarr"),
                "resolution": 64,
                "mean": [0.4],
                "std": [0.2],
                "image_size": 48,
                "batch_size": global_batch // devices,
            },
        },
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of a run of this process, and of one of two; 24 images train, 7 and 7 do not divide by two."""
    folder = tmp_path_factory.mktemp("devices")
    for seed, (split, counts) in enumerate({"train": (8, 8, 8), "val": (3, 2, 2), "test": (3, 2, 2)}.items()):
        write_images(folder / "images" / split, dict(zip("abc", counts, strict=True)), seed=seed)
    found = {}
    for devices in (1, 2):
        own = folder / str(devices)
        said = run(configuration(folder / "images", own, devices), own, "fit")
        assert devices == 1 or "on 2 device(s)" in said  # the frozen pass is shared too
        found[devices] = own / "run"
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    return state


def test_two_processes_make_the_store_that_one_makes(runs: dict[int, Path]) -> None:
    one, two = (FeatureStore.open(str(runs[devices].parent / "store.zarr")) for devices in (1, 2))
    assert one.ids == two.ids
    assert two.done.all()
    assert len(two.ids) == 38  # in three shards
    for name in one.sample_arrays:
        assert np.array_equal(*(store.read(range(38), name) for store in (one, two)))


def test_two_processes_train_as_one_does(runs: dict[int, Path]) -> None:
    one, two = (weights(runs[devices]) for devices in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_each_image_counts_once(runs: dict[int, Path]) -> None:
    one, two = (Predictions.read(runs[devices] / "predictions.csv") for devices in (1, 2))
    assert len(two.ids) == 7
    assert (two.ids, two.labels.tolist()) == (one.ids, one.labels.tolist())
    assert abs(two.scores - one.scores).max() < 1e-4
    metrics = [json.loads((runs[devices] / "metrics.json").read_text()) for devices in (1, 2)]
    for checkpoint in ("best", "last"):
        for name in ("test_auc", "test_accuracy", "test_kappa", "test_loss"):
            assert metrics[1][checkpoint][name] == pytest.approx(metrics[0][checkpoint][name], abs=1e-4)


def test_what_is_fitted_to_validation_is_of_all_its_images(runs: dict[int, Path]) -> None:
    fitted = [torch.load(runs[n] / "last.ckpt", weights_only=True)["fpt_lightning"] for n in (1, 2)]
    assert fitted[1]["thresholds"] == pytest.approx(fitted[0]["thresholds"], abs=1e-3)
    one, two = (each["calibration"] for each in fitted)
    assert two["temperature"] == pytest.approx(one["temperature"], rel=1e-2)
    assert two["biases"] == pytest.approx(one["biases"], abs=1e-2)


def test_validation_metrics_are_of_all_its_images(runs: dict[int, Path]) -> None:
    logged = []
    for devices in (1, 2):
        with (runs[devices] / "metrics.csv").open(newline="") as file:
            logged.append([float(row["val_auc"]) for row in csv.DictReader(file) if row["val_auc"]])
    assert logged[1] == pytest.approx(logged[0], abs=1e-6)
    assert len(logged[0]) == 3


def test_one_process_writes_and_leaves_the_same_files(runs: dict[int, Path]) -> None:
    one, two = ({path.name for path in runs[devices].iterdir()} for devices in (1, 2))
    assert one == two
    assert "report.html" in two
    with (runs[2] / "metrics.csv").open(newline="") as file:
        epochs = [row["epoch"] for row in csv.DictReader(file) if row["val_auc"]]
    assert epochs == ["0", "1", "2"]


@pytest.mark.slow
def test_a_live_encoder_divided_among_processes_trains_as_a_whole_one(tmp_path: Path) -> None:
    """``ShardedEncoder`` on two processes against one process: the recipe of docs/devices.md.

    9 images are 2 batches of one process and 1 of the other.
    """
    for seed, (split, count) in enumerate({"train": 8, "val": 3, "test": 3}.items()):
        write_images(tmp_path / "images" / split, dict.fromkeys("abc", count), seed=seed)
    found = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        config = configuration(tmp_path / "images", folder, devices)
        config["data"]["class_path"] = "ImageDataModule"
        del config["data"]["init_args"]["store"]
        if devices == 2:
            config["trainer"]["callbacks"] = [{"class_path": "fpt_lightning.cli.callbacks.ShardedEncoder"}]
        said = run(config, folder, "fit")
        assert ("divided among 2 processes" in said) == (devices == 2)
        found[devices] = folder / "run"
    one, two = (weights(found[devices]) for devices in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_sigterm_of_one_of_two_processes_stops_both(tmp_path: Path) -> None:
    """Lightning's own handler would wait for the other process, which is at another step."""
    write_images(tmp_path / "images", {"a": 8, "b": 8, "c": 8})
    config = configuration(tmp_path / "images", tmp_path, 2)
    config["trainer"]["max_epochs"] = 10_000
    path, last = tmp_path / "config.yaml", tmp_path / "run/last.ckpt"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fpt_lightning", "fit", "--config", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as training:
        try:
            deadline = time.monotonic() + 120
            while not last.is_file() and time.monotonic() < deadline:
                time.sleep(0.1)
            training.terminate()
            said, _ = training.communicate(timeout=60)  # the pipe ends when both have
        finally:
            training.kill()
    assert training.returncode == 143, said[-3000:]
    assert torch.load(last, weights_only=True)["epoch"] < 10_000
