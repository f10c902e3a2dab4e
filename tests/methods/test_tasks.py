"""Tasks: heads, losses, scores and metrics of each, through every method and from manifest to checkpoint."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn import metrics as sk
from torch import Tensor, nn

from fpt_lightning import FPTPlusModule, PreloadedFeatureDataModule
from fpt_lightning.cli import main
from fpt_lightning.cli.callbacks import ResultsWriter
from fpt_lightning.errors import CheckpointError, ConfigurationError
from fpt_lightning.evaluation.calibration import Calibration, calibrated, fit_calibration
from fpt_lightning.evaluation.decisions import fit_thresholds
from fpt_lightning.evaluation.metrics import multilabel_metrics, regression_metrics
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.scores import evaluate
from fpt_lightning.methods import METHODS
from fpt_lightning.methods.tasks import TASKS, Coral, make_task
from fpt_lightning.methods.tuning import EncoderModule, build_on_meta
from fpt_lightning.planning.memory import TrainingStep, example_batch
from small import CLASSES, SHALLOW, TINY, data_for, quiet_trainer, table

DataMaker = Callable[..., PreloadedFeatureDataModule]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Losses and scores


def test_unknown_labels_neither_count_nor_learn() -> None:
    logits = torch.randn(4, 3, generator=generator(), requires_grad=True)
    labels = torch.tensor([[1.0, 0, math.nan], [math.nan] * 3, [0, 1, 1], [1, math.nan, 0]])
    loss = make_task("multilabel", 3).loss(logits, labels)
    known = ~labels.isnan()
    torch.testing.assert_close(loss, nn.BCEWithLogitsLoss()(logits[known], labels[known]))
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, known)


def test_a_batch_without_any_known_label_has_no_loss() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = make_task("multilabel", 3).loss(logits, torch.full((2, 3), math.nan))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_balanced_weights_of_labels_are_negatives_for_each_positive() -> None:
    task = make_task("multilabel", 2, "balanced")
    task.adapt(torch.tensor([[1.0, 0], [0, 0], [0, math.nan], [0, 1]]))
    torch.testing.assert_close(task.weights, torch.tensor([3.0, 2.0]))


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_coral_gives_ordered_probabilities(classes: int) -> None:
    task = Coral(classes)
    nn.init.normal_(task.first, generator=generator(1))
    nn.init.normal_(task.steps, std=3, generator=generator(2))
    logits = torch.linspace(-30, 30, 100)[:, None]
    scores = task.scores(logits)
    assert scores.shape == (100, classes)
    assert (scores >= 0).all()
    torch.testing.assert_close(scores.sum(1), torch.ones(100))
    expected_grade = (scores * torch.arange(classes)).sum(1).detach()
    assert (expected_grade.diff() >= -1e-6).all()
    assert expected_grade[[0, -1]].tolist() == pytest.approx([0, classes - 1], abs=0.1)


def test_coral_starts_with_thresholds_a_step_apart_around_0() -> None:
    torch.testing.assert_close(Coral(4).above(torch.zeros(1, 1)), torch.tensor([[1.0, 0, -1]]))


def test_corals_loss_is_that_of_its_binary_questions() -> None:
    task, logits, labels = Coral(4), torch.randn(5, 1, generator=generator()), torch.tensor([0, 1, 2, 3, 1])
    questions = torch.stack([(labels > k).float() for k in range(3)], 1)
    torch.testing.assert_close(task.loss(logits, labels), nn.BCEWithLogitsLoss()(task.above(logits), questions))
    above = task.above(logits).sigmoid()
    torch.testing.assert_close(task.scores(logits)[:, 3], above[:, 2])
    torch.testing.assert_close(task.scores(logits)[:, 1], above[:, 0] - above[:, 1])


def test_numbers_are_learned_standardised_and_told_in_their_own_unit() -> None:
    task = make_task("regression", 1)
    labels = torch.tensor([40.0, 60, 80])
    task.adapt(labels)
    assert task.loss(torch.tensor([[-1.0], [0], [1]]), labels) == 0
    assert task.scores(torch.tensor([[-1.0], [0.5]])).tolist() == [40, 70]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("segmentation", 3), "model.task is 'segmentation': choose one of multiclass, multilabel"),
        (("multiclass", 1), "model.num_classes is 1: give at least 2"),
        (("coral", 1), "model.num_classes is 1: give at least 2"),
        (("multilabel", 0), "model.num_classes is 0: give at least 1"),
        (("regression", 2), "model.num_classes is 2: it is 1 for the task 'regression'"),
        (("regression", 1, "balanced"), "class_weights is balanced, which the task 'regression' does not take"),
        (("coral", 3, [1.0, 1, 1]), "class_weights is .*, which the task 'coral' does not take"),
        (("multilabel", 3, None, 0.1), "label_smoothing is 0.1, which the task 'multilabel' does not take"),
        (("ordinal", 3, [1.0]), "model.class_weights has 1 numbers for 3 classes"),
    ],
)
def test_what_a_task_does_not_take(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_task(*arguments)


@pytest.mark.parametrize(
    ("task", "labels", "words"),
    [
        ("multilabel", [[1.0, 0], [1, 1]], r"\[2, 1\] positive and \[0, 1\] negative"),
        ("multiclass", [0, 0], r"training images of each class are \[2, 0\]"),
        ("regression", [5.0, 5], "the 2 training labels are all 5"),
    ],
)
def test_labels_that_decide_nothing(task: str, labels: Any, words: str) -> None:
    made = make_task(task, 1 if task == "regression" else 2, None if task == "regression" else "balanced")
    with pytest.raises(ConfigurationError, match=words):
        made.adapt(torch.tensor(labels))


# Metrics


def scored_labels(seed: int = 0) -> tuple[Tensor, Tensor]:
    """The last label is never positive; one in five is unknown."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((60, 4)) < [0.5, 0.2, 0.7, 0]).astype(int)
    scores = (0.4 * labels + rng.random((60, 4))).round(1) / 1.4  # with ties
    return torch.tensor(scores), torch.tensor(np.where(rng.random((60, 4)) < 0.2, -1, labels))


@pytest.mark.parametrize("batch_size", [60, 7])
def test_metrics_of_labels_equal_scikit_learn(batch_size: int) -> None:
    scores, labels = scored_labels()
    collection = multilabel_metrics(4, "")
    for start in range(0, 60, batch_size):
        collection.update(scores[start : start + batch_size], labels[start : start + batch_size])
    found = {name: float(value) for name, value in collection.compute().items()}
    known = [(scores[labels[:, c] >= 0, c].numpy(), labels[labels[:, c] >= 0, c].numpy()) for c in range(4)]
    expected = {
        "auc": np.mean([sk.roc_auc_score(y, p) for p, y in known[:3]]),
        "average_precision": np.mean([sk.average_precision_score(y, p) for p, y in known[:3]]),
        "auc_classes": 3,
        "f1": np.mean([sk.f1_score(y, p > 0.5, zero_division=0) for p, y in known]),
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_label_of_which_nothing_is_known_is_left_out() -> None:
    scores, labels = scored_labels()
    without, unknown = multilabel_metrics(4, ""), multilabel_metrics(5, "")
    without.update(scores, labels)
    unknown.update(torch.cat([scores, scores[:, :1]], 1), torch.cat([labels, labels[:, :1] * 0 - 1], 1))
    assert unknown.compute() == without.compute()
    nothing = multilabel_metrics(2, "")
    nothing.update(scores[:, :2], labels[:, :2] * 0 - 1)
    found = {name: float(value) for name, value in nothing.compute().items()}
    assert found.pop("auc_classes") == 0
    assert all(math.isnan(value) for value in found.values())


def test_metrics_of_numbers_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(60, 15, 40)
    predicted = true + rng.normal(0, 5, 40)
    collection = regression_metrics("")
    collection.update(torch.tensor(predicted), torch.tensor(true))
    expected = {
        "mae": sk.mean_absolute_error(true, predicted),
        "rmse": sk.root_mean_squared_error(true, predicted),
        "r2": sk.r2_score(true, predicted),
        "pearson": np.corrcoef(true, predicted)[0, 1],
        "spearman": np.corrcoef(true.argsort().argsort(), predicted.argsort().argsort())[0, 1],
    }
    assert {name: float(value) for name, value in collection.compute().items()} == pytest.approx(expected, abs=1e-5)


def test_one_number_has_no_r2() -> None:
    collection = regression_metrics("")
    collection.update(torch.tensor([3.0]), torch.tensor([4.0]))
    assert math.isnan(collection.compute()["r2"])


# Every method


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_every_task(name: str, task: str) -> None:
    options: dict[str, Any] = {"encoder": SHALLOW, "pretrained": False}
    if "side_images" in METHODS[name].INPUTS:
        options["side_resolution"] = 32
    module = METHODS[name](CLASSES[task], task=task, **options)
    if isinstance(module, EncoderModule):
        module.build((64, 64))
    if task == "regression":
        module.task.adapt(torch.tensor([1.0, 3.0]))
    batch = example_batch(module, (64, 64), 2, codec="fp32")
    for tensor in batch.values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor is not batch["labels"]:
            nn.init.normal_(tensor, generator=generator())
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    assert module(batch).shape == (2, module.task.outputs)
    TrainingStep(module, batch)()
    assert [name for name, p in module.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert module.task.scores(module(batch)).shape == ((2,) if task == "regression" else (2, 3))


def test_the_published_number_of_parameters_stays() -> None:
    published = {"encoder": "vit_base_patch16_224.augreg_in21k", "prompt_head": False}
    module = build_on_meta(lambda: FPTPlusModule(5, **published), (512, 512))
    assert module.learnable_parameters == 900_965


# From a manifest to a checkpoint and back


def model_for(task: str, **changes: Any) -> FPTPlusModule:
    return FPTPlusModule(**{"num_classes": CLASSES[task], "task": task, "learning_rate": 5e-3, **TINY, **changes})


@pytest.mark.parametrize("task", TASKS)
def test_each_task_is_learned_and_a_checkpoint_gives_the_same_scores(
    task: str, tiny_data: DataMaker, image_root: Path, tmp_path: Path
) -> None:
    data, model = data_for(task, tiny_data, image_root), model_for(task)
    data.preload(model, quiet_trainer(tmp_path))
    trainer = quiet_trainer(tmp_path, max_epochs=12, check_val_every_n_epoch=12)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (first,) = trainer.test(model, data, verbose=False)
    name, mode = model.task.MONITOR
    assert first[f"test_{name}"] < 6 if mode == "min" else first[f"test_{name}"] > 0.8
    again = quiet_trainer(tmp_path).test(
        model_for(task), data_for(task, tiny_data, image_root), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False
    )
    assert again == [first]


@pytest.mark.parametrize("task", ["ordinal", "coral"])
def test_grades_that_are_words_need_their_order(
    task: str, tiny_data: DataMaker, image_root: Path, tmp_path: Path
) -> None:
    model = model_for(task)
    data_for(task, tiny_data, image_root).preload(model, quiet_trainer(tmp_path))
    with pytest.raises(ConfigurationError, match=r"high, low, mid are words.* such as \[mid, low, high\]"):
        quiet_trainer(tmp_path).fit(model, data_for(task, tiny_data, image_root, classes=None))
    quiet_trainer(tmp_path).fit(model_for("multiclass"), data_for(task, tiny_data, image_root, classes=None))


def test_a_checkpoint_of_another_task_is_refused(tiny_data: DataMaker, image_root: Path, tmp_path: Path) -> None:
    data = data_for("ordinal", tiny_data, image_root)
    data.preload(model_for("ordinal"), quiet_trainer(tmp_path))
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(model_for("ordinal"), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="task: 'ordinal' in the checkpoint, 'multiclass' here"):
        quiet_trainer(tmp_path).test(model_for("multiclass"), data, ckpt_path=str(tmp_path / "last.ckpt"))


def test_numbers_without_training_labels(tiny_data: DataMaker, image_root: Path, tmp_path: Path) -> None:
    data = data_for("regression", tiny_data, image_root)
    data.preload(model_for("regression"), quiet_trainer(tmp_path))
    data.trainer = quiet_trainer(tmp_path)
    data.trainer.strategy.connect(model_for("regression"))
    data.setup("fit")
    with pytest.raises(ConfigurationError, match=r"model.task 'regression' .* needs the training labels"):
        quiet_trainer(tmp_path).fit(model_for("regression"), data.train_dataloader())


# What is fitted to validation images


def fitted(
    data: PreloadedFeatureDataModule, folder: Path, task: str = "multilabel", **changes: Any
) -> tuple[FPTPlusModule, Path]:
    """A model after three epochs, and its checkpoint."""
    torch.manual_seed(0)  # or the tests before this one decide how far its calibration moves the thresholds
    model = model_for(task, **changes)
    data.preload(model, quiet_trainer(folder))
    trainer = quiet_trainer(folder, max_epochs=3)
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model, folder / "last.ckpt"


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_label_unknown_in_a_split_is_left_out_and_said(
    split: str, tiny_data: DataMaker, image_root: Path, tmp_path: Path
) -> None:
    path = table(image_root, "multilabel")
    header, *rows = csv.reader(path.open(newline=""))
    parts = ["train", "train", "val", "test"]
    changed = tmp_path / "labels.csv"
    with changed.open("w", newline="") as file:
        csv.writer(file).writerow([*header, "split"])
        for number, row in enumerate(rows):
            unknown = [*row[:-1], ""] if parts[number % 4] == split else row
            csv.writer(file).writerow([*unknown, parts[number % 4]])
    data, model = data_for("multilabel", tiny_data, image_root, manifest=str(changed)), model_for("multilabel")
    data.preload(model, quiet_trainer(tmp_path))
    trainer = quiet_trainer(tmp_path / "run", callbacks=[ResultsWriter(tmp_path / "run")])
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    assert found["test_auc_classes"] == (2 if split == "test" else 3)
    assert found["test_auc"] > 0
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())["model"]
    said = f"Labels of which nothing is known, left out of the macro means: {header[-1]}."
    assert (said in evaluation["notes"]) == (split == "test")
    assert evaluation["overall"]["auc"]["value"] == pytest.approx(found["test_auc"], abs=1e-5)


def validation_predictions(model: FPTPlusModule, data: PreloadedFeatureDataModule) -> Predictions:
    model.eval()
    with torch.no_grad():
        rows = [
            row
            for batch in data.val_dataloader()
            for row in zip(
                batch["ids"], batch["labels"].tolist(), model.task.scores(model(batch)).tolist(), strict=True
            )
        ]
    return model.predictions(sorted(rows))


def test_thresholds_and_calibration_are_those_of_the_validation_images(
    tiny_data: DataMaker, image_root: Path, tmp_path: Path
) -> None:
    data = data_for("multilabel", tiny_data, image_root)
    model, path = fitted(data, tmp_path)
    predictions = validation_predictions(model, data)
    found = fit_calibration(predictions)
    assert model.calibration.temperature == pytest.approx(found.temperature, rel=1e-3)
    assert model.calibration.biases == pytest.approx(found.biases, abs=1e-3)
    assert model.thresholds == pytest.approx(fit_thresholds(calibrated(predictions, model.calibration)))
    assert model.thresholds != pytest.approx(fit_thresholds(predictions), rel=1e-2)
    assert set(model.thresholds) >= {"red", "green"}
    again = FPTPlusModule.load_from_checkpoint(path, weights_only=True)
    assert (again.thresholds, again.calibration) == (model.thresholds, model.calibration)


@pytest.mark.parametrize("calibrate", [False, True])
def test_the_calibration_changes_test_and_prediction_where_it_is_wanted(
    tiny_data: DataMaker, image_root: Path, tmp_path: Path, calibrate: bool
) -> None:
    data = data_for("multilabel", tiny_data, image_root)
    model, _ = fitted(data, tmp_path, calibrate=calibrate)
    model.calibration = Calibration(2.5, (0.3, 0.0, -0.2))
    trainer = quiet_trainer(tmp_path, callbacks=[ResultsWriter(tmp_path)])
    trainer.test(model, data, verbose=False)
    found = Predictions.read(tmp_path / "predictions.csv")
    model.eval()
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        logits = model(batch).double()
    if calibrate:
        logits = logits / 2.5 + torch.tensor([0.3, 0.0, -0.2])
    order = [batch["ids"].index(id) for id in found.ids]
    np.testing.assert_allclose(found.scores, logits.sigmoid()[order], atol=1e-6)
    live = trainer.predict(model, data.test_dataloader())
    assert live is not None
    np.testing.assert_allclose(live[0]["scores"], logits.sigmoid(), atol=1e-6)


@pytest.mark.parametrize("name", ["multiclass", "coral", "multilabel"])
def test_a_calibration_does_to_scores_what_it_does_to_predictions(name: str) -> None:
    task = make_task(name, 3)
    scores = task.scores(torch.randn(6, task.outputs, generator=generator())).detach()
    labels = np.zeros(6, int) if task.KIND == "single-label" else np.zeros((6, 3))
    predictions = Predictions(task.KIND, tuple("abcdef"), labels, scores.double().numpy(), ("x", "y", "z"))
    calibration = Calibration(1.7, (0.2, 0.1, -0.3))
    expected = calibrated(predictions, calibration).scores
    np.testing.assert_allclose(task.calibrated(scores, calibration), expected, rtol=1e-5)


def test_numbers_are_not_calibrated(tiny_data: DataMaker, image_root: Path, tmp_path: Path) -> None:
    model, _ = fitted(data_for("regression", tiny_data, image_root), tmp_path, task="regression")
    assert not model.calibrate
    assert model.calibration == Calibration()


@pytest.mark.parametrize("task", ["ordinal", "multilabel"])
def test_validation_is_measured_as_test_is(task: str, tiny_data: DataMaker, image_root: Path, tmp_path: Path) -> None:
    data = data_for(task, tiny_data, image_root)
    model, path = fitted(data, tmp_path, task=task)
    logged = {name: float(value) for name, value in model.trainer.callback_metrics.items() if name.startswith("val_")}
    raw = validation_predictions(model, data)
    found = evaluate(calibrated(raw, model.calibration), resamples=2).overall
    assert logged["val_auc"] == pytest.approx(found["auc"].value, abs=1e-4)
    if task == "ordinal":
        assert logged["val_accuracy"] == pytest.approx(found["accuracy"].value, abs=1e-4)
        assert logged["val_quadratic_kappa"] == pytest.approx(found["quadratic_kappa"].value, abs=1e-4)
    (again,) = quiet_trainer(tmp_path).validate(model_for(task), data, ckpt_path=str(path), verbose=False)
    assert {name: again[name] for name in logged} == pytest.approx(logged, abs=1e-4)


def test_the_weights_of_training_are_those_of_the_calibration(
    tiny_data: DataMaker, image_root: Path, tmp_path: Path
) -> None:
    data = data_for("multiclass", tiny_data, image_root)
    model, _ = fitted(data, tmp_path, task="multiclass", class_weights=[1.0, 2.0, 8.0])
    found = fit_calibration(validation_predictions(model, data), [1.0, 2.0, 8.0])
    assert model.calibration.biases == pytest.approx(found.biases, abs=1e-3)


# Through the command line


@pytest.mark.parametrize("task", [task for task in TASKS if task != "coral"])  # which leaves what ordinal does
def test_a_run_leaves_predictions_and_their_evaluation(
    task: str, image_root: Path, tmp_path: Path, tiny_data: DataMaker
) -> None:
    data: dict[str, Any] = {
        "root": str(image_root),
        "store": str(tmp_path / "s.zarr"),
        "manifest": str(table(image_root, task)),
        "resolution": 64,
        "mean": [0.4],
        "std": [0.2],
        "image_size": 48,
        "batch_size": 8,
    }
    if task == "multilabel":
        data["label_column"] = ["red", "green", "bright"]
    elif task != "regression":
        data["classes"] = ["low", "mid", "high"]
    model = {"num_classes": CLASSES[task], "task": task, "learning_rate": 3e-3, **TINY}
    config = {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
        },
        "model": {"class_path": "FPTPlusModule", "init_args": model},
        "data": {"class_path": "PreloadedFeatureDataModule", "init_args": data},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    root = tmp_path / "run"
    monitor = f"val_{model_for(task).task.MONITOR[0]}"
    assert monitor in str(list(torch.load(root / "last.ckpt", weights_only=True)["callbacks"]))
    evaluations = json.loads((root / "evaluation.json").read_text())
    assert set(evaluations) == {"best", "last"}
    overall = evaluations["best"]["overall"]
    assert overall["mae" if task == "regression" else "auc"]["low"] is not None
    predictions = Predictions.read(root / "predictions.csv")
    assert predictions.kind == model_for(task).task.KIND
    assert len(predictions.ids) in (5, 6)
    again = evaluate(predictions, evaluations["best"]["thresholds"]).to_dict()  # from the file, to the last bit
    assert (again["overall"], again["per_class"]) == (overall, evaluations["best"]["per_class"])
    logged = json.loads((root / "metrics.json").read_text())["best"]
    same = {name: value for name, value in logged.items() if name.removeprefix("test_") in overall}
    assert len(same) >= 2
    for name, value in same.items():
        if name != "test_f1":  # which torchmetrics counts absent classes in
            near = 1e-3 if task == "regression" else 1e-5  # torchmetrics sums in fp32, of numbers that hardly differ
            assert value == pytest.approx(overall[name.removeprefix("test_")]["value"], rel=near, abs=near), name
    assert (root / "confusion_matrix.png").is_file() == (predictions.kind == "single-label")
    main(["predict", "--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(root / "best.ckpt")])
    unknown = Predictions.read(root / "predict" / "best" / "predictions.csv")
    assert unknown.kind == predictions.kind
    assert not unknown.known.any()
    known = dict(zip(unknown.ids, unknown.scores, strict=True))
    np.testing.assert_allclose([known[id] for id in predictions.ids], predictions.scores, atol=0.3, rtol=0.01)
