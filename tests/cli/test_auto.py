"""``fit --model auto``: all methods on one store, compared on the validation images; stopped runs go on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from commands import fails, run
from fpt_lightning.cli import auto, entry
from fpt_lightning.errors import DataError
from fpt_lightning.evaluation.predictions import Predictions

pytestmark = pytest.mark.usefixtures("few_figures")
RATES = {
    "stored_linear": ("0.001", "0.1"),
    "query_tokens": ("0.0001", "0.01"),
    "fpt_plus": ("0.0001", "0.01"),
}
METHODS = tuple(RATES)


@pytest.fixture
def command(config: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three methods at two rates, one epoch each."""
    monkeypatch.setattr(auto, "CANDIDATES", METHODS)
    monkeypatch.setattr(auto, "FACTORS", (0.1, 10))
    return ["fit", "--config", str(config), "--model", "auto", "--model.prompts", "2", "--trainer.max_epochs", "1"]


def settings(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    return content


def validation_auc(folder: Path) -> float:
    predictions = Predictions.read(folder / "validate" / "best" / "predictions.csv")
    return float(np.mean([roc_auc_score(predictions.labels == c, predictions.scores[:, c]) for c in range(3)]))


def test_every_method_is_trained_and_validation_chooses(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    run(*command)
    said = capsys.readouterr().out
    runs = {(method, rate): root / method / rate for method in METHODS for rate in RATES[method]}
    for (method, rate), folder in runs.items():
        own = settings(folder)
        assert own["class_path"].endswith(f".{auto.METHODS[method].__name__}")
        assert own["init_args"]["learning_rate"] == float(rate)
        assert own["init_args"]["encoder"] == "test_vit"
        assert own["init_args"].get("prompts", 2) == 2  # an argument of FPT+ alone
        assert {"best", "last"} == set(json.loads((folder / "metrics.json").read_text()))

    choice = json.loads((root / "choice.json").read_text())
    judged = {row["label"]: row for row in choice["methods"]}
    assert list(judged) == ["Linear probing, stored", "Query tokens, stored", "FPT+"]
    values = {}
    for row in judged.values():
        folder = Path(row["checkpoint"]).parent
        values[row["label"]] = validation_auc(folder)
        assert row["validation"]["value"] == pytest.approx(values[row["label"]])
        others = [float(line["val_auc"]) for line in _history(folder.parent) if line["val_auc"]]
        assert row["validation"]["value"] == pytest.approx(max(others))  # the better of the two rates
    assert choice["best"] == judged[max(values, key=lambda name: values[name])]
    chosen = choice["chosen"]["label"]
    assert choice["chosen"] == judged[chosen]
    assert judged[chosen]["difference"] is None
    for other in set(values) - {chosen}:
        assert judged[other]["difference"]["value"] == pytest.approx(values[other] - values[chosen])
    assert f"Use {chosen}" in said
    assert (root / "choice.txt").read_text().strip() in said
    run(*said.split("fpt-lightning ")[1].split("--data.root")[0].split())  # the command that is named


def _history(folder: Path) -> list[dict[str, str]]:
    return [row for path in folder.glob("*/metrics.csv") for row in csv.DictReader(path.open(newline=""))]


def test_the_same_command_goes_on_where_it_was_stopped(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    run(*command)
    choice = (root / "choice.json").read_text()
    untouched, stopped, begun = root / "fpt_plus/0.01", root / "fpt_plus/0.0001", root / "stored_linear/0.1"
    times = {path: path.stat().st_mtime_ns for path in untouched.rglob("*") if path.is_file()}
    (stopped / "metrics.json").unlink()  # trained, not tested
    for path in begun.glob("*"):
        if path.name != "config.yaml":  # stopped in its first epoch
            path.unlink() if path.is_file() else None
    (root / "choice.json").unlink()
    capsys.readouterr()
    run(*command)
    assert {path: path.stat().st_mtime_ns for path in untouched.rglob("*") if path.is_file()} == times
    assert {"best", "last"} == set(json.loads((stopped / "metrics.json").read_text()))
    again = json.loads((root / "choice.json").read_text())
    for row, earlier in zip(again["methods"], json.loads(choice)["methods"], strict=True):
        assert row["validation"] == earlier["validation"]


def test_what_cannot_be_compared_is_refused_before_anything_runs(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "trainer.fast_dev_run" in fails(capsys, *command, "--trainer.fast_dev_run", "true")
    assert "leave --ckpt_path out" in fails(capsys, *command, "--ckpt_path", "x.ckpt")
    root = tmp_path / "run"
    root.mkdir()
    (root / "auto.yaml").write_text("data: of another\n")
    message = fails(capsys, *command)
    assert "holds runs of another configuration" in message
    assert "there: data: of another" in message
    assert sorted(path.name for path in root.iterdir()) == [".lock", "auto.yaml"]


def test_each_method_is_tried_around_its_own_learning_rate() -> None:
    tried = {method: auto.learning_rates(method) for method in auto.CANDIDATES}
    assert tried["stored_linear"] == tried["attentive"] == [3e-3, 1e-2, 3e-2]
    assert tried["query_tokens"] == tried["fpt_plus"] == [3e-4, 1e-3, 3e-3]


def test_a_metric_without_a_value_cannot_choose(tmp_path: Path) -> None:
    run = auto.Candidate(tmp_path, "attentive", 1e-3)
    (tmp_path / "metrics.csv").write_text("epoch,val_auc\n0,nan\n1,0.7\n2,nan\n")
    assert run.score("auc", "max") == 0.7
    (tmp_path / "metrics.csv").write_text("epoch,val_auc\n0,nan\n")
    with pytest.raises(DataError, match=r"val_auc has no value in .*metrics\.csv"):
        run.score("auc", "max")


def test_only_the_model_can_be_auto() -> None:
    assert entry._asks_auto(["fit", "--model", "auto"])
    assert entry._asks_auto(["fit", "--model=auto"])
    assert not entry._asks_auto(["fit", "--model", "FPTPlusModule", "--trainer.accelerator", "auto"])


LINEAR, QUERIES, FPT = "Linear probing, stored", "Query tokens, stored", "FPT+"


@pytest.mark.parametrize(
    ("mode", "errors", "chosen", "best", "told"),
    [
        ("min", ((5, 5), (5, 5), (1, 1)), FPT, FPT, "It is told apart from all others."),
        ("max", ((5, 5), (5, 5), (1, 1)), QUERIES, LINEAR, f"do not tell it apart from {LINEAR} (1 x its time)."),
        ("min", ((9, 9), (5, 5), (1, 8.8)), QUERIES, FPT, f"do not tell it apart from {FPT} (1 x its time)."),
        ("min", ((9, 9), (5, 5), (1, 9.2)), QUERIES, QUERIES, f"do not tell it apart from {FPT} (1 x its time)."),
    ],
)
def test_another_than_query_tokens_is_chosen_where_it_is_told_apart(
    mode: str, errors: tuple[tuple[float, float], ...], chosen: str, best: str, told: str, tmp_path: Path
) -> None:
    """Numbers that are wrong by so much, every second one by the other."""
    truth = np.arange(40.0)
    runs = []
    for method, (even, odd) in zip(("stored_linear", "query_tokens", "fpt_plus"), errors, strict=True):
        folder = tmp_path / method
        (folder / "validate" / "best").mkdir(parents=True)
        ids = tuple(f"{i:02d}" for i in range(40))
        wrong = np.where(np.arange(40) % 2, odd, -even)
        Predictions("regression", ids, truth, truth + wrong, ()).write(folder / "validate/best/predictions.csv")
        (folder / "metrics.csv").write_text(
            f"epoch,val_mae,epoch_seconds,train_peak_live_mib\n0,{even},2,\n1,{even + 1},4,9\n"
        )
        runs.append(auto.Candidate(folder, method, 1e-3))
    choice = auto.choose(runs, "mae", mode)
    assert (choice.chosen.label, choice.best.label) == (chosen, best)
    assert [run.score("mae", "min") for run in runs] == [-even for even, _ in errors]
    assert (choice.chosen.epoch_seconds, choice.chosen.memory_mib) == (3, 9)
    means = dict(zip((LINEAR, QUERIES, FPT), (sum(each) / 2 for each in errors), strict=True))
    for each in choice.methods:
        if each.label == chosen:
            assert each.difference is None
        else:
            assert each.difference is not None
            assert each.difference.value == pytest.approx(means[each.label] - means[chosen])
    advice = choice.advice()
    assert advice in choice.table()
    if chosen == best:
        assert advice.startswith(f"Use {chosen}: the best validation mean absolute error, {means[chosen]:.3f} [")
    else:
        assert f"the best validation mean absolute error is that of {best}, {means[best]:.3f} [" in advice
    assert told in advice
