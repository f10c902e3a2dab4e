"""Which epoch is the best one, where the metric that should say so has no value."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from commands import run
from fpt_lightning.cli.run_folder import BestCheckpoint, checkpoint_callbacks


@pytest.mark.parametrize("task", ["multiclass", "ordinal", "coral"])
def test_without_a_metric_the_loss_chooses(task: str, config: Path, image_root: Path, tmp_path: Path) -> None:
    """Validation images of one class alone have no AUC, and no kappa once all are taken for it."""
    splits = {"a": ["train"] * 6 + ["val"] * 2 + ["test"] * 2, "b": ["train"] * 8 + ["test"] * 2}
    rows = [
        (f"{name}/{number:03d}.png", name, split)
        for name, parts in {**splits, "c": splits["b"]}.items()
        for number, split in enumerate(parts)
    ]
    table = image_root / "labels.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "split"), *rows])
    options = ["--model.task", task, "--data.manifest", "labels.csv", "--data.classes", "[a,b,c]"]
    options += ["--trainer.max_epochs", "4", "--model.learning_rate", "0.01"]
    with pytest.warns(UserWarning, match="has no value in the validation images") as warned:
        run("fit", "--config", config, *options)
    assert sum("has no value" in str(warning.message) for warning in warned) == 1
    folder = tmp_path / "run"
    with (folder / "metrics.csv").open(newline="") as file:
        losses = {int(row["epoch"]): float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]}
    best = torch.load(folder / "best.ckpt", weights_only=True)
    assert len(losses) == 4
    assert losses[best["epoch"]] == min(losses.values())
    assert best["epoch"] > 0  # where the first was kept before
    assert json.loads((folder / "metrics.json").read_text())["best"]["test_auc"] > 0


def test_a_run_that_goes_on_still_chooses_by_the_loss(tmp_path: Path) -> None:
    first, second = (checkpoint_callbacks(str(tmp_path), "auc", "max")[0] for _ in range(2))
    key = first.state_key
    assert isinstance(first, BestCheckpoint)
    first._choose_by_loss()
    first.best_model_score = torch.tensor(0.3)
    assert first.state_key == key == second.state_key
    second.load_state_dict(first.state_dict())
    assert (second.monitor, second.mode, second.best_model_score) == ("val_loss", "min", torch.tensor(0.3))
    third = checkpoint_callbacks(str(tmp_path), "auc", "max")[0]
    third.load_state_dict(checkpoint_callbacks(str(tmp_path), "auc", "max")[0].state_dict())
    assert (third.monitor, third.mode) == ("val_auc", "max")
