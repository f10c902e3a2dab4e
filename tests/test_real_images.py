"""The whole way on real chest X-rays, where FPT_CHEST_XRAY names their folder (with labels.csv in it)."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from fpt_lightning.cli import main

ROOT = os.environ.get("FPT_CHEST_XRAY", "")


@pytest.mark.slow
@pytest.mark.skipif(not ROOT, reason="FPT_CHEST_XRAY does not name the folder of the real images")
def test_chest_xrays(tmp_path: Path) -> None:
    settings = [
        *("--trainer.default_root_dir", tmp_path / "run", "--trainer.max_epochs", 3, "--trainer.accelerator", "cpu"),
        *("--model", "FPTPlusModule", "--model.num_classes", 3, "--model.encoder", "test_vit"),
        *("--model.pretrained", "false", "--model.learning_rate", 1e-3),
        *("--data", "PreloadedFeatureDataModule", "--data.root", ROOT, "--data.manifest", "labels.csv"),
        *("--data.group_column", "patient_id", "--data.store", tmp_path / "store.zarr", "--data.resolution", 256),
    ]
    main(["fit", *map(str, settings)])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["best"]["test_auc"] > 0.5
    best = tmp_path / "run" / "best.ckpt"
    main(["predict", *map(str, settings), "--ckpt_path", str(best), "--data.root", f"{ROOT}/val"])
    with (tmp_path / "run" / "predict" / "predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 108
