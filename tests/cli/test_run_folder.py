"""The history of a run, and which epoch is its best, where the metric that should say so has no value."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.loggers import Logger

from commands import run
from fpt_lightning.cli.run_folder import BestCheckpoint, RunLogger, checkpoint_callbacks

pytestmark = pytest.mark.usefixtures("few_figures")


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


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_history_has_a_row_an_epoch(config: Path, tmp_path: Path) -> None:
    run("fit", "--config", config, "--trainer.log_every_n_steps", "1")
    found = rows_of(tmp_path / "run" / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in found] == [("0", "2"), ("1", "5")]
    assert all(row.values() and all(row.values()) for row in found)  # no hole
    assert {"train_loss_epoch", "val_auc", "lr-AdamW", "epoch_seconds"} <= set(found[0])
    assert not any(name.startswith("test_") or name.endswith("_step") for name in found[0])


def test_a_history_of_several_rows_an_epoch_goes_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,lr,step,val_auc\n,0.1,0,\n0,,3,0.5\n0,,3,\n1,,6,0.6\n2,,9,0.7\n")
    logger = RunLogger(str(tmp_path))
    logger.go_on(1)
    logger.log_metrics({"lr": 0.3}, 6)
    logger.log_metrics({"epoch": 2, "val_auc": 0.8, "train_loss_step": 1.0}, 9)
    logger.save()
    assert rows_of(tmp_path / "metrics.csv") == [
        {"epoch": "0", "step": "3", "lr": "", "val_auc": "0.5"},
        {"epoch": "1", "step": "6", "lr": "", "val_auc": "0.6"},
        {"epoch": "2", "step": "9", "lr": "0.3", "val_auc": "0.8"},
    ]


class Kept(Logger):
    """A logger that keeps what it is told."""

    name, version = "kept", "0"
    told: ClassVar[list[dict[str, float]]] = []
    settings: ClassVar[dict[str, Any]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        Kept.told.append(dict(metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        Kept.settings.update(params)


def test_loggers_tell_the_best_epoch_from_the_last(config: Path, tmp_path: Path) -> None:
    Kept.told.clear()
    run("fit", "--config", config, "--trainer.logger", f"{__name__}.Kept")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name in ("best", "last"):
        (told,) = [each for each in Kept.told if f"{name}_test_auc" in each]
        assert told == {f"{name}_{key}": value for key, value in metrics[name].items()}
    assert not any(key.startswith("test_") for each in Kept.told for key in each)
    assert Kept.settings["data"]["batch_size"] == 8
    assert Kept.settings["encoder"] == "test_vit"


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
