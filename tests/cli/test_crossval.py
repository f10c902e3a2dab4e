"""``crossval``: all folds and seeds from one store, stopped and gone on with, as one report and one ensemble."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

import commands
from commands import fails, methods_said, run, write_config
from fpt_lightning import Predictor
from fpt_lightning.cli import crossval, training
from fpt_lightning.cli.run_folder import checkpoint_callbacks
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.encoder import frozen
from fpt_lightning.evaluation.cases import by_case
from fpt_lightning.evaluation.conformal import fit_nonconformity
from fpt_lightning.evaluation.gallery import largest_errors
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.scores import evaluate
from fpt_lightning.methods.ensemble import EnsembleModule
from small import write_images

PREDICTED = "predictions.csv"


@pytest.fixture(scope="module", autouse=True)
def few_figures() -> Iterator[None]:
    """Of the runs; a cross-validation has a report of its own."""
    with commands.few_figures():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose three folds were run with seed 0, in ``run``."""
    folder = tmp_path_factory.mktemp("crossval")
    write_config(write_images(folder / "images", {"a": 10, "b": 10, "c": 10}), folder)
    run(*command(folder))
    return folder


def command(folder: Path, *options: object) -> list[str]:
    return ["crossval", "--config", str(folder / "config.yaml"), "--data.folds", "3", *map(str, options)]


def contents(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def macro_auc(predictions: Predictions) -> float:
    return float(np.mean([roc_auc_score(predictions.labels == c, predictions.scores[:, c]) for c in range(3)]))


def test_folds_are_pooled_in_one_report(folder: Path) -> None:
    root = folder / "run"
    pooled = Predictions.read(root / PREDICTED)
    folds = [Predictions.read(root / f"seed0/fold{k}" / PREDICTED) for k in (1, 2, 3)]
    assert list(pooled.ids) == sorted(id for fold in folds for id in fold.ids)
    assert len(pooled.ids) == 30
    scores = {id: row.tolist() for fold in folds for id, row in zip(fold.ids, fold.scores, strict=True)}
    assert [scores[id] for id in pooled.ids] == pooled.scores.tolist()
    found = json.loads((root / "crossval.json").read_text())
    assert (found["folds"], found["seeds"], found["held_out"]) == (3, [0], True)
    auc = found["metrics"]["auc"]
    assert auc["value"] == pytest.approx(macro_auc(pooled))
    assert auc["folds"]["values"] == pytest.approx([macro_auc(fold) for fold in folds])
    evaluation = json.loads((root / "evaluation.json").read_text())
    assert evaluation["overall"]["auc"] == {name: auc[name] for name in ("value", "low", "high")}
    assert evaluation["overall"] == evaluate(pooled).to_dict()["overall"]  # as ``evaluate`` on the file gives them
    report = (root / "report.html").read_text()
    assert "<h2>Most confident errors</h2>" not in report
    assert "3 folds: mean, standard deviation (sd), lowest, highest." in report
    told = methods_said(report)
    for fact in (
        "was trained on the encoder test_vit (weights: random) at 64 x 64 pixels. Options of FPTPlusModule that are",
        "not its defaults: side_resolution 32. 30 images of the data set images",
        "were tested, in 3 folds, of which each tests once and the next one validates. Each of the 3 models was",
        "trained for 2 epochs at most with AdamW (learning rate 0.003, weight decay 0.1, batch size 8 a process,",
        "precision 32-true, seed 0), and tested after the epoch with the best validation AUC (",
        "The folds' predictions are pooled. Intervals are 95% percentile intervals of 2,000 bootstrap resamples",
        "thresholds that were fitted to the other folds' predictions by Youden's index",
        "Probabilities were calibrated by a temperature and a bias of each class, fitted to the validation images.",
    ):
        assert fact in told, told
    shown = [f"{np.mean(auc['folds']['values']):.3f}", f"{min(auc['folds']['values']):.3f}"]
    assert all(f"<td>{value}</td>" in report.split("<h2>Folds</h2>")[1] for value in shown)
    assert {path.name for path in (root / "seed0/fold2").iterdir()} > {"best.ckpt", "split.csv", "evaluation.json"}
    of_fold, of_all = ((root / name / "card.md").read_text() for name in ("seed0/fold2", "."))
    assert "# FPT+ on images" in of_fold
    assert "Split: fold 2 of 3, drawn at random with seed 0, stratified, groups whole." in of_fold
    assert "| training | epoch " in of_fold
    assert "| images | 12 | 9 | 9 |" in of_fold
    assert "# FPT+, mean of 3 on images" in of_all
    assert "An ensemble of the models of a cross-validation" in of_all
    assert not [text for text in (of_fold, of_all) if ".png" in text or str(folder) in text]


def test_the_most_confident_errors_of_all_folds_are_shown_where_asked_for(folder: Path, tmp_path: Path) -> None:
    untrained = ["--trainer.max_epochs", 1, "--model.learning_rate", 1e-9, "--trainer.default_root_dir", tmp_path]
    run(*command(folder, *untrained, "--report_pictures", 2))
    errors = largest_errors(pooled := Predictions.read(tmp_path / PREDICTED), 2)
    shown = (tmp_path / "report.html").read_text().split("<h2>Most confident errors</h2>")[1].split("</section>")[0]
    assert len(errors) == shown.count("data:image/jpeg") == 2
    assert all(f"<b>{pooled.ids[row]}</b>" in shown for row in errors)


def test_one_store_is_made_once(folder: Path) -> None:
    """Mean and std of all images, as in ``test_one_store_serves_every_fold``."""
    assert [path.name for path in folder.glob("*.zarr")] == ["store.zarr"]
    said = [yaml.safe_load((folder / f"run/seed0/fold{k}/config.yaml").read_text())["data"] for k in (1, 2, 3)]
    assert [each["init_args"].pop("fold") for each in said] == [1, 2, 3]
    assert said[0] == said[1] == said[2]
    assert said[0]["init_args"]["mean"] == "auto"


def test_the_ensemble_predicts_the_mean_of_the_folds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, images = folder / "run", folder / "images"
    ensemble = Predictor(root / "ensemble.ckpt")
    some = sorted(images.rglob("*.png"))[8:12]
    alone = [Predictor(root / f"seed0/fold{k}/best.ckpt")(some).scores for k in (1, 2, 3)]
    np.testing.assert_allclose(ensemble(some).scores, np.mean(alone, 0), atol=1e-6)
    thresholds = json.loads((root / "crossval.json").read_text())["thresholds"]
    assert set(thresholds) == {"a", "b", "c"}
    assert ensemble.module.thresholds == thresholds
    pooled = Predictions.read(root / PREDICTED)
    assert ensemble.module.nonconformity == fit_nonconformity(pooled)
    by_command = ["--config", root / "crossval.yaml", "--ckpt_path", "ensemble", "--data.root", images]
    run("predict", *by_command)
    predicted = Predictions.read(root / "predict/ensemble" / PREDICTED)
    np.testing.assert_allclose(predicted.scores, ensemble(images).scores, atol=2e-6)
    assert "were trained on or validated" in fails(capsys, "test", *by_command)
    assert "is an ensemble, and explain takes one model" in fails(
        capsys, "explain", *by_command, "--out", folder / "pictures"
    )
    message = fails(capsys, "predict", *by_command, "--model.prompts", 8)
    assert "prompts: 16 in the checkpoint, 8 here" in message


def test_cases_are_scored_and_predicted_by_one_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By that of the runs' validation cases, for the report, the file and the ensemble."""
    monkeypatch.setattr("fpt_lightning.methods.base.choose_rule", lambda validation: "noisy-or")
    paths = [f"{name}/{number:03d}.png" for name in "abc" for number in range(8)]
    write_images(tmp_path / "images", {"a": 8, "b": 8, "c": 8})
    lines = [f"{path},{path[0]},{path[0]}{i // 2}" for i, path in enumerate(paths)]
    (tmp_path / "images" / "exams.csv").write_text("\n".join(["image,label,exam", *lines]))
    write_config(tmp_path / "images", tmp_path)
    run(*command(tmp_path, "--data.manifest", "exams.csv", "--data.case_column", "exam", "--trainer.max_epochs", 1))
    root = tmp_path / "run"
    images, cases = (Predictions.read(root / f"{name}.csv") for name in ("predictions", "predictions_cases"))
    np.testing.assert_allclose(cases.scores, by_case(images, "noisy-or").scores)
    found = json.loads((root / "evaluation.json").read_text())["cases"]
    assert (found["unit"], found["images"]) == ("case", 12)
    assert "which 3 of 3 runs chose" in found["notes"][0]
    assert "<h2>ROC curves of cases</h2>" in (root / "report.html").read_text()
    ensemble, _ = load_trained(root / "ensemble.ckpt")
    assert (ensemble.case_rule, ensemble.case_thresholds) == ("noisy-or", found["thresholds"])


class Stop(L.Callback):
    """Ctrl-C in the second epoch of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1 and Path(trainer.default_root_dir) == self.folder:
            raise KeyboardInterrupt


def test_more_seeds_are_added_and_what_is_stopped_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run is trained again, and the one that was stopped comes to what it would have come to."""
    root, before = folder / "run", contents(folder / "run" / "seed0")
    stopped = root / "seed1/fold2"
    monkeypatch.setattr(frozen, "build_encoder", None)  # which the store spares
    with monkeypatch.context() as patched:
        patched.setattr(training, "checkpoint_callbacks", lambda *args: [Stop(stopped), *checkpoint_callbacks(*args)])
        with pytest.raises(SystemExit) as raised:
            run(*command(folder, "--seeds", 2))
    assert raised.value.code == 130
    said = capsys.readouterr().err
    assert f"Stopped. 4 of 6 runs are finished and kept in {root}.\n{stopped} goes on after epoch 1." in said
    assert said.rstrip().endswith("The same command goes on.")
    run(*command(folder, "--seeds", 2))
    assert {path: time for path, time in contents(root / "seed0").items() if path in before} == before

    options = ["--config", root / "crossval.yaml", "--data.fold", 2, "--seed_everything", 1]
    run("fit", *options, "--trainer.default_root_dir", folder / "whole")
    for name in (PREDICTED, "split.csv"):
        assert (stopped / name).read_text() == (folder / "whole" / name).read_text()

    by_seed = [Predictions.read(root / f"seed{seed}" / PREDICTED) for seed in (0, 1)]
    together = Predictions.read(root / PREDICTED)
    np.testing.assert_array_equal(together.scores, np.mean([each.scores for each in by_seed], 0))
    auc = json.loads((root / "crossval.json").read_text())["metrics"]["auc"]
    assert auc["seeds"]["values"] == pytest.approx([macro_auc(each) for each in by_seed])
    ensemble, _ = load_trained(root / "ensemble.ckpt")
    assert isinstance(ensemble, EnsembleModule)
    assert len(ensemble.members) == 6


def test_what_would_mix_or_leave_nothing_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder / "run")
    for options, message in (
        (["--trainer.max_epochs", "3"], "there: max_epochs: 2\n  now: max_epochs: 3"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run leaves nothing to report"),
        (["--ckpt_path", "last"], "leave --ckpt_path out"),
        (["--data.fold", "2"], "data.fold is 2, but crossval runs every fold"),
        (["--seeds", "0"], "seeds is 0: give 1 or more"),
        (["--seed_everything", "true"], "seed_everything is True: crossval counts its seeds from a number"),
    ):
        assert message in fails(capsys, *command(folder, *options))
    assert contents(folder / "run") == before
    split = folder / "run/seed0/fold3/split.csv"
    content = split.read_text()
    split.write_text(content.replace("a/000.png,a", "a/000.png,b"))
    assert "fold3 is of other images or labels than" in fails(capsys, *command(folder))
    split.write_text(content)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "best.ckpt").touch()
    assert "already holds a run" in fails(capsys, *command(folder, "--trainer.default_root_dir", alone))
    assert "crossval needs a configuration: give --config" in fails(capsys, "crossval", "--seeds", "2")


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A configuration of images of which every fifth is a given test image."""
    root = write_images(tmp_path / "images", {"a": 10, "b": 10, "c": 10})
    paths = sorted(root.rglob("*.png"))
    rows = [f"{p.relative_to(root)},{p.parent.name},{'test' if i % 5 == 0 else 'train'}" for i, p in enumerate(paths)]
    (root / "labels.csv").write_text("\n".join(["image,label,split", *rows]))
    path = write_config(root, tmp_path)
    content = yaml.safe_load(path.read_text())
    arguments = {"num_classes": 3, "encoder": "test_vit", "pretrained": False, "learning_rate": 1e-2}
    content["model"] = {"class_path": "StoredLinearProbingModule", "init_args": arguments}
    content["data"]["init_args"] |= {"manifest": "labels.csv", "folds": 2}
    path.write_text(yaml.safe_dump(content))
    return tmp_path


def test_given_test_images_are_tested_by_all_folds(
    given: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scores are the ensemble's; thresholds are of validation images, which are other ones in each fold."""
    root = given / "run"
    run("crossval", "--config", given / "config.yaml", "--trainer.max_epochs", 1)
    tested = Predictions.read(root / PREDICTED)
    assert len(tested.ids) == 6
    run("test", "--config", root / "crossval.yaml", "--ckpt_path", "ensemble")
    of_ensemble = Predictions.read(root / "test/ensemble" / PREDICTED)
    np.testing.assert_allclose(of_ensemble.scores, tested.scores, atol=1e-6)
    found, evaluation = (json.loads((root / f"{name}.json").read_text()) for name in ("crossval", "evaluation"))
    again = json.loads((root / "test/ensemble/evaluation.json").read_text())["ensemble"]
    assert again["thresholds"] == found["thresholds"] == evaluation["thresholds"]
    assert again["coverage"] == evaluation["coverage"]
    assert evaluation["coverage"]["images"] == 24
    assert not found["held_out"]
    validated = [Predictions.read(root / f"seed0/fold{k}/validate/best" / PREDICTED) for k in (1, 2)]
    assert len({id for each in validated for id in each.ids}) == 24
    monkeypatch.setattr(crossval, "feature_method", lambda name: None)
    capsys.readouterr()
    run("crossval", "--config", root / "crossval.yaml")  # it is finished, and may be asked for by its own file
    assert "There is no ensemble" in capsys.readouterr().out
