"""What a run shows: its images as they pass, and what came out, once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from commands import run, write_config
from fpt_lightning.cli import screen
from fpt_lightning.cli.screen import CheckpointResult, results
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.scores import Evaluation, evaluate
from fpt_lightning.files import align

pytestmark = pytest.mark.usefixtures("few_figures")


class Recorded:
    """In place of a bar: what it would have counted."""

    made: list[Recorded]

    def __init__(self, label: str, total: int, unit: str = "image", done: int = 0) -> None:
        self.unit = unit
        self.labels, self.total, self.done, self.told, self.closed = [label], total, done, "", False
        Recorded.made.append(self)

    def update(self, count: int) -> None:
        self.done += count

    def tell(self, label: str, told: str) -> None:
        self.labels.append(label)
        self.told = told

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    monkeypatch.setattr(screen, "Progress", Recorded)
    Recorded.made = []
    return Recorded.made


@pytest.fixture
def config(image_root: Path, tmp_path: Path) -> Path:
    path = write_config(image_root, tmp_path)
    content = yaml.safe_load(path.read_text())
    del content["trainer"]["enable_progress_bar"]
    path.write_text(yaml.safe_dump(content))
    return path


def test_bars_count_images_of_every_stage(config: Path, tmp_path: Path, bars: list[Recorded]) -> None:
    run("fit", "--config", config)
    assert [(bar.labels[0], bar.total) for bar in bars] == [
        ("preload", 30),
        ("epoch 1/2", 42),
        ("test", 6),
        ("test", 6),
    ]
    assert all(bar.done == bar.total and bar.closed for bar in bars)
    assert bars[1].labels[-1] == "epoch 2/2"
    assert bars[1].told.startswith("val_auc ")
    run("fit", "--config", config, "--ckpt_path", tmp_path / "run" / "last.ckpt", "--trainer.max_epochs", 3)
    assert (bars[4].labels[0], bars[4].total, bars[4].done) == ("epoch 3/3", 63, 63)
    del bars[:]
    run("predict", "--config", config, "--ckpt_path", tmp_path / "run" / "best.ckpt")
    run("validate", "--config", config, "--ckpt_path", tmp_path / "run" / "best.ckpt")
    assert [(bar.labels[0], bar.total, bar.done) for bar in bars] == [("predict", 30, 30), ("validate", 3, 3)]


@pytest.mark.parametrize("data", [{"orientations": 2}, {"limit": 2}])
def test_orientations_and_limits_are_counted(
    data: dict[str, Any], config: Path, tmp_path: Path, bars: list[Recorded]
) -> None:
    limited = "limit" in data
    given = ["--trainer.limit_train_batches", 2] if limited else ["--data.orientations", "2"]
    run("fit", "--config", config, *given)
    assert [(bar.total, bar.unit) for bar in bars[:2]] == (
        [(30, "image"), (32, "image")] if limited else [(60, "orientation"), (42, "image")]
    )
    assert all(bar.done == bar.total for bar in bars)


def test_a_bar_of_the_users_stays_alone(config: Path, bars: list[Recorded]) -> None:
    run("fit", "--config", config, "--trainer.callbacks+", "TQDMProgressBar")
    assert [bar.labels[0] for bar in bars] == ["preload"]


def test_results_are_shown_once(config: Path, capfd: pytest.CaptureFixture[str], bars: list[Recorded]) -> None:
    run("fit", "--config", config)
    shown = "".join(capfd.readouterr())
    assert shown.count("average precision") == 2  # of all images and of each class
    assert shown.count("bootstrap resamples") == 1
    for noise in ("Test metric", "Restoring states", "Loaded model", "GPU available", "Seed set", "`Trainer.fit`"):
        assert noise not in shown


def evaluation(seed: int, classes: tuple[str, ...] = ("healthy", "mild", "severe")) -> Evaluation:
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(len(classes)), 40)
    labels = np.arange(40) % len(classes)
    ids = tuple(map(str, range(40)))
    return evaluate(Predictions("single-label", ids, labels, scores, classes), resamples=50)


def result(name: str, epoch: int, value: float | None, found: Evaluation) -> CheckpointResult:
    return CheckpointResult(name, epoch, "val_auc", value, found)


def test_best_and_last_stand_side_by_side() -> None:
    best, last = evaluation(0), evaluation(1)
    shown = results(
        [CheckpointResult("best", 5, "val_auc", 0.93, best), CheckpointResult("last", 20, "val_auc", None, last)]
    )
    lines = shown.splitlines()
    assert lines[2].split() == ["best", "last"]
    assert lines[3].split() == ["epoch", "5", "20"]
    assert lines[4].split() == ["val_auc", "0.930"]
    (auc,) = [line for line in lines if line.startswith("AUC ")]
    assert re.split(r"\s{2,}", auc) == ["AUC", str(best.overall["auc"]), str(last.overall["auc"])]
    assert "Of the best epoch:" in shown


def test_one_epoch_that_is_both_stands_alone() -> None:
    both = evaluation(0)
    shown = results(
        [CheckpointResult("best", 3, "val_auc", 0.9, both), CheckpointResult("last", 3, "val_auc", 0.9, both)]
    )
    assert "best and last" in shown
    assert "Of the best" not in shown
    assert shown.count(str(both.overall["auc"])) == 1


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_tables_and_notes_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = evaluation(0, ("healthy", "early glaucoma", "advanced glaucoma"))
    both = results([result("best", 1, 0.5, found), result("last", 2, 0.5, found)])
    shown = f"{found.table()}\n{both}"
    assert max(map(len, shown.splitlines())) <= columns
    for values in found.per_class.values():
        assert all(str(value) in shown for value in values.values())


def test_a_table_is_parted_between_columns() -> None:
    rows = [["class", "one", "two"], ["a", "1.234", "2"]]
    assert align(rows) == align(rows, 18) == "class    one  two\na      1.234    2"
    assert align(rows, 14) == "class    one\na      1.234\n\nclass  two\na        2"
    assert align(rows, 3) == align(rows, 14)  # a column is never broken
