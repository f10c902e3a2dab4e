"""The command line: every example, every file that a run leaves, and what people are told when something is wrong."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm
import torch
import wandb
import yaml
from safetensors.torch import load_file, save_file

from commands import change, fails, methods_said, run
from fpt_lightning import methods
from fpt_lightning.cli import crossval, main, training
from fpt_lightning.cli.entry import Terminated
from fpt_lightning.cli.run_folder import checkpoint_callbacks
from fpt_lightning.cli.series import claimed
from fpt_lightning.cli.training import CommandLine
from fpt_lightning.datamodules.images import ImageDataModule
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.errors import DataError
from fpt_lightning.evaluation.cases import by_case
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.scores import Evaluation, evaluate
from fpt_lightning.methods import FPTPlusModule
from fpt_lightning.store.store import FeatureStore
from miniatures import MINIATURES, build, reads_dicom
from small import ROOT, tiny_model, write_images

EXAMPLES = ROOT / "examples"
PATCH_16 = ["--model.encoder", "test_vit", "--model.pretrained", "false", "--model.side_resolution", "32"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_fit_test_and_predict_leave_what_they_should(
    config: Path, image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[float | None] = []  # validation AUC of the checkpoint that is tested

    def evaluated(*args: Any, **settings: Any) -> Evaluation:
        known.append(settings["validation_auc"])
        return evaluate(*args, **settings)

    monkeypatch.setattr("fpt_lightning.cli.callbacks.evaluate", evaluated)
    root = tmp_path / "run"
    run("fit", "--config", config)
    of_epoch = {row["epoch"]: float(row["val_auc"]) for row in rows(root / "metrics.csv") if row["val_auc"]}
    epochs = [torch.load(root / f"{name}.ckpt", weights_only=True)["epoch"] for name in ("last", "best")]
    assert known == [of_epoch[str(epoch)] for epoch in epochs]
    left = {path.name for path in root.iterdir()}
    assert left >= {
        "best.ckpt",
        "last.ckpt",
        "config.yaml",
        "split.csv",
        "metrics.csv",
        "metrics.json",
        "predictions.csv",
        "confusion_matrix.csv",
        "confusion_matrix.png",
    }
    metrics = json.loads((root / "metrics.json").read_text())
    assert set(metrics) == {"best", "last"}
    names = {
        f"test_{n}" for n in ("auc", "accuracy", "balanced_accuracy", "f1", "precision", "recall", "kappa", "loss")
    }
    assert names <= set(metrics["best"])
    logged = {name for row in rows(root / "metrics.csv") for name, value in row.items() if value}
    assert {"train_loss_epoch", "val_auc", "val_loss", "train_peak_live_mib", "peak_resident_mib", "lr-AdamW"} <= logged
    assert "state_dict" in torch.load(root / "best.ckpt", weights_only=True)
    assert "optimizer_states" not in torch.load(root / "best.ckpt", weights_only=True)

    run("test", "--config", config, "--ckpt_path", root / "best.ckpt")
    again = json.loads((root / "test" / "best" / "metrics.json").read_text())
    for name in names:
        assert again["best"][name] == pytest.approx(metrics["best"][name])
    assert (root / "test" / "best" / "predictions.csv").read_text() == (root / "predictions.csv").read_text()

    run("predict", "--config", config, "--ckpt_path", root / "best.ckpt", "--data.root", image_root)
    tested = {row["path"]: row for row in rows(root / "predictions.csv")}
    predicted = {row["path"]: row for row in rows(root / "predict" / "best" / "predictions.csv")}
    assert len(predicted) == 30
    for path, row in tested.items():
        assert list(row) == ["path", "label", "most_probable", "prob_a", "prob_b", "prob_c"]
        assert list(predicted[path]) == ["path", "most_probable", "prob_a", "prob_b", "prob_c"]
        assert row["label"] == path[0]
        for name in ("prob_a", "prob_b", "prob_c"):  # the stored features are fp16, the live ones fp32
            assert float(row[name]) == pytest.approx(float(predicted[path][name]), abs=2e-3)
        assert math.isclose(sum(float(row[f"prob_{c}"]) for c in "abc"), 1, abs_tol=1e-5)


@pytest.fixture
def cased(config: Path, tmp_path: Path) -> list[str]:
    """Options of a data set of 2 classes with two images a case."""
    paths = [f"{name}/{number:03d}.png" for name in "ab" for number in range(10)]
    splits = ("train", "train", "val", "test", "test")
    lines = [f"{path},{path[0]},{path[0]}{i // 2},{splits[i // 2 % 5]}" for i, path in enumerate(paths)]
    (tmp_path / "exams.csv").write_text("\n".join(["image,label,exam,split", *lines]))
    change(config, "model", num_classes=2)
    change(config, "data", manifest=str(tmp_path / "exams.csv"), case_column="exam")
    return ["--config", str(config)]


def test_cases_are_tested_and_predicted_by_the_rule_of_validation(
    cased: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpt_lightning.methods.base.choose_rule", lambda validation: "noisy-or")
    root = tmp_path / "run"
    cased += ["--data.orientations", "2", "--data.zoom", "0.6"]
    cased += ["--model.test_time_orientations", "2", "--model.label_smoothing", "0.1"]
    run("fit", *cased, "--report_pictures", 2)
    record = torch.load(root / "best.ckpt", weights_only=True)["fpt_lightning"]
    assert record["case_rule"] == "noisy-or"
    images, cases = (Predictions.read(root / f"{name}.csv") for name in ("predictions", "predictions_cases"))
    assert images.cases == tuple(path[0] + str(int(path[2:5]) // 2 + 5 * (path[0] == "b")) for path in images.ids)
    assert (cases.ids, cases.groups) == (("a3", "a4", "b8", "b9"), ())
    np.testing.assert_array_equal(cases.scores, by_case(images, "noisy-or").scores)
    found = json.loads((root / "evaluation.json").read_text())["best"]["cases"]
    assert (found["unit"], found["images"]) == ("case", 4)
    assert "noisy-or" in found["notes"][0]
    assert "had the best AUC" in found["notes"][0]
    alone = evaluate(cases, record["case_thresholds"])
    assert found["per_class"] == json.loads(json.dumps(alone.to_dict()))["per_class"]
    report = (root / "report.html").read_text()
    assert all(f"<h2>{title}</h2>" in report for title in ("Cases", "ROC curves of cases"))
    told = methods_said(report)
    for fact in (
        "was trained on the encoder test_vit (weights: random) at 64 x 64 pixels",
        "2 orientations of every image, each but the first of which shows 80% of each side",
        "Probabilities were calibrated by a temperature and a bias of each class, fitted to the validation images.",
        "Options of FPTPlusModule that are not its defaults: label_smoothing 0.1, side_resolution 32, test_time_",
        "8 training images of 4 groups, 4 validation images of 2 groups, 8 test images of 4 groups",
        "(split: as given with the data set)",
        "Training took 2 epochs of AdamW (learning rate 0.003",
        "batch size 8, augmentation default, precision 32-true, seed 0)",
        "which had the best validation AUC (",
        "Thresholds were fitted to the validation images",
    ):
        assert fact in told, told
    assert "None of 10 cases have images in more than one split." in report
    assert "None of 20 image files are, by their bytes, in more than one split." in report
    wrong = int((images.scores.argmax(1) != images.labels).sum())
    assert report.count('<img alt="" src="data:image/jpeg;base64,/9j/') == min(wrong, 2)
    assert rows(root / "split.csv")[0]["case"] == "a0"

    run("test", *cased, "--ckpt_path", root / "best.ckpt")
    again = (root / "test/best/predictions_cases.csv").read_text()
    assert again == (root / "predictions_cases.csv").read_text()
    new = write_images(tmp_path / "new", {"x": 3})
    (new / "exams.csv").write_text("image,exam\nx/000.png,one\nx/001.png,one\nx/002.png,\n")
    given = ["--ckpt_path", root / "best.ckpt", "--data.root", new, "--data.manifest", "exams.csv"]
    run("predict", *cased, *given)
    predicted = Predictions.read(root / "predict/best/predictions_cases.csv")
    assert (predicted.ids, predicted.known.any()) == (("one", "x/002.png"), False)


def test_cases_of_several_labels(
    cased: list[str], config: Path, image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tmp_path / "exams.csv").read_text()
    (tmp_path / "exams.csv").write_text(text.replace("a/000.png,a,", "a/000.png,b,"))
    message = fails(capsys, "fit", *cased)
    assert "1 cases (data.case_column) have images of several labels (a0), of which the second class counts" in message
    assert "name them in data.classes, the finding last" in message
    settings: dict[str, Any] = {"case_column": "exam", "resolution": 64, "image_size": 48}
    elsewhere = ImageDataModule(str(image_root), str(tmp_path / "exams.csv"), external=True, **settings)
    with pytest.raises(DataError, match="have images of several labels"):
        elsewhere.check("test", tiny_model(num_classes=3))  # of whose classes these images have two
    (tmp_path / "exams.csv").write_text(text.replace("a/000.png,a,", "a/000.png,c,"))
    change(config, "model", num_classes=3)
    assert "is known of grades (model.task ordinal or coral), of two classes" in fails(capsys, "fit", *cased)
    data = ImageDataModule(str(image_root), str(tmp_path / "exams.csv"), classes=[*"abc"], **settings)
    data.check("fit", tiny_model(task="ordinal"))
    assert data.labelled.mixed_cases() == ["a0"]


@pytest.mark.usefixtures("few_figures")
def test_the_saved_config_reruns_the_same_run_and_serves_every_subcommand(finished: Path, tmp_path: Path) -> None:
    root, twin = finished / "run", tmp_path / "twin"
    saved = root / "config.yaml"
    paths = [yaml.safe_load(saved.read_text())[section]["class_path"] for section in ("model", "data")]
    assert paths == ["fpt_lightning.FPTPlusModule", "fpt_lightning.PreloadedFeatureDataModule"]  # wherever they lie
    run("fit", "--config", saved, "--trainer.default_root_dir", twin, "--data.store", tmp_path / "twin.zarr")
    assert (root / "metrics.json").read_text() == (twin / "metrics.json").read_text()
    assert (root / "predictions.csv").read_text() == (twin / "predictions.csv").read_text()
    run("preload", "--config", twin / "config.yaml")
    for command in ("validate", "test", "predict"):
        run(command, "--config", twin / "config.yaml", "--ckpt_path", twin / "last.ckpt")


@pytest.mark.usefixtures("few_figures")
def test_another_seed_is_another_run(trained: Path, tmp_path: Path) -> None:
    run("fit", "--config", trained, "--seed_everything", 1, "--trainer.default_root_dir", tmp_path / "other")
    assert (tmp_path / "run" / "predictions.csv").read_text() != (tmp_path / "other" / "predictions.csv").read_text()


@pytest.mark.usefixtures("few_figures")
def test_a_resumed_run_leaves_the_same_metrics(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills come in ``test_faults.py``."""
    whole, part = tmp_path / "run", tmp_path / "part"
    arguments = ["fit", "--config", trained, "--trainer.default_root_dir", part]
    with monkeypatch.context() as patched:
        patched.setattr(training, "checkpoint_callbacks", lambda *given: [Stop(), *checkpoint_callbacks(*given)])
        with pytest.raises(SystemExit):
            run(*arguments)
    assert not (part / "metrics.json").exists()
    run(*arguments, "--ckpt_path", part / "last.ckpt")
    assert (whole / "predictions.csv").read_text() == (part / "predictions.csv").read_text()
    kept = ("epoch", "step", "val_auc", "val_loss", "train_loss_epoch")
    series = [
        [
            float(row[name] or -1)
            for row in rows(folder / "metrics.csv")
            if row["val_auc"] or row["train_loss_epoch"]
            for name in kept
        ]
        for folder in (whole, part)
    ]
    assert series[0] == series[1]


class Stop(L.Callback):
    """Ctrl-C in the second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "stopped"),
    [
        ("preload", (FrozenEncoder, "forward")),
        ("predict", (FrozenEncoder, "forward")),
        ("fit", (FPTPlusModule, "forward")),
    ],
)
def test_sigterm_stops_a_command_which_says_so_by_its_status(
    command: str, stopped: tuple[Any, str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's prediction goes on to its end, and its training ends with status 0."""
    method, batches = getattr(*stopped), []

    def asked_to_stop(*given: Any, **options: Any) -> Any:
        batches.append(0)
        os.kill(os.getpid(), signal.SIGTERM)
        return method(*given, **options)

    out = trained.parent / "out"
    own = {
        "preload": ["--overwrite", "true"],
        "predict": ["--ckpt_path", trained.parent / "run/best.ckpt", "--trainer.default_root_dir", out],
        "fit": ["--trainer.default_root_dir", out],
    }
    monkeypatch.setattr(*stopped, asked_to_stop)
    with pytest.raises(SystemExit) as raised:
        run(command, "--config", trained, *own[command])
    assert (raised.value.code, len(batches)) == (143, 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not list(out.rglob("predictions.csv"))
    if command == "preload":
        monkeypatch.undo()
        run(command, "--config", trained)
        store = FeatureStore.open(str(trained.parent / "store.zarr"))
        assert not store.missing(store.ids)


@pytest.mark.usefixtures("few_figures")
def test_a_shared_model_is_tested_and_predicts_as_its_checkpoint_does(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, shared = trained.parent / "run/best.ckpt", tmp_path / "model.v1"
    run("export", "--ckpt_path", best, "--out", shared, "--format", "hub", "--with_encoder", "true")
    found = {}
    for name, path in {"checkpoint": best, "shared": shared}.items():
        for command in ("test", "predict"):
            root = tmp_path / name / command
            run(command, "--config", trained, "--ckpt_path", path, "--trainer.default_root_dir", root)
            (table,) = root.rglob("predictions.csv")
            found[command, name] = table.read_text()
    for command in ("test", "predict"):
        assert found[command, "shared"] == found[command, "checkpoint"]
    assert (tmp_path / "shared/test/test/model.v1/evaluation.json").is_file()
    weights, other = shared / "encoder.safetensors", tmp_path / "other.safetensors"
    own = ["--config", trained, "--model.pretrained", weights, "--data.store", tmp_path / "own.zarr"]
    run("preload", *own)  # elsewhere, where the same weights have another name
    run("test", *own, "--ckpt_path", shared, "--trainer.default_root_dir", tmp_path / "own")
    (table,) = (tmp_path / "own").rglob("predictions.csv")
    assert table.read_text() == found["test", "checkpoint"]

    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, other)
    live = ["--config", trained, "--model.pretrained", other, "--data", "ImageDataModule", "--ckpt_path", best]
    live += ["--trainer.default_root_dir", tmp_path / "live"]
    assert "was trained with other weights of test_vit than those loaded now" in fails(capsys, "test", *live)
    own[3:] = [other, "--data.store", tmp_path / "others.zarr"]
    run("preload", *own)
    assert "weights_digest: " in fails(capsys, "test", *own, "--ckpt_path", best)

    told = fails(capsys, "fit", "--config", trained, "--ckpt_path", shared)
    assert "model.v1 (ckpt_path) is a model to share, without the state of its training" in told
    assert "has no config.json" in fails(capsys, "test", "--config", trained, "--ckpt_path", tmp_path)


@pytest.mark.parametrize(("stopped_by", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_series_that_is_stopped_says_by_what(
    stopped_by: type[BaseException], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        with claimed(tmp_path / "crossval.yaml", "{}", []):
            try:
                raise stopped_by
            except KeyboardInterrupt:  # as Lightning does
                sys.exit(1)

    monkeypatch.setattr(crossval, "cross_validate", stopped)
    with pytest.raises(SystemExit) as raised:
        run("crossval", "--config", tmp_path / "config.yaml")
    assert raised.value.code == status


def test_print_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["num_classes"] == 3
    assert printed["trainer"]["gradient_clip_val"] == 1.0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import fpt_lightning

    with pytest.raises(SystemExit):
        main(["--version"])
    assert fpt_lightning.__version__ in capsys.readouterr().out


@pytest.mark.usefixtures("few_figures")
def test_precision_from_the_command_line(trained: Path, tmp_path: Path) -> None:
    options = ["--trainer.max_epochs", 1, "--trainer.default_root_dir", tmp_path / "half"]
    run("fit", "--config", trained, "--trainer.precision", "bf16-mixed", *options)
    assert json.loads((tmp_path / "half" / "metrics.json").read_text())["best"]["test_auc"] is not None


@pytest.mark.usefixtures("few_figures")
def test_loggers(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once; ``live.yaml`` of the examples has one."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    root, board = tmp_path / "logged", tmp_path / "board"
    loggers = [
        {"class_path": "WandbLogger", "init_args": {"offline": True, "project": "p"}},
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(board)}},
    ]
    change(trained, "trainer", logger=loggers, default_root_dir=str(root), max_epochs=1)
    run("fit", "--config", trained)
    wandb.finish()
    assert list((root / "wandb").glob("offline-run-*"))
    assert list(board.rglob("events.out.tfevents.*"))
    assert (root / "metrics.csv").is_file()


def example_data(name: str, tmp_path: Path) -> list[str]:
    """A small generated data set in the layout that an example expects, as arguments that put it in place."""
    root = tmp_path / "data"
    where = ["--data.root", str(root), "--data.resolution", "64", "--data.image_size", "48", "--data.batch_size", "8"]
    where += ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    where += ["--trainer.default_root_dir", str(tmp_path / "run")]
    if name == "live.yaml":
        where += ["--trainer.logger.init_args.save_dir", str(tmp_path / "run")]
    store = ["--data.store", str(tmp_path / "store.zarr")]
    if name.removesuffix(".yaml") in MINIATURES:
        build(name.removesuffix(".yaml"), root)
        run("datasets", "prepare", name.removesuffix(".yaml"), root)
    elif name == "table.yaml":
        write_images(root, {"x": 20, "y": 20, "z": 20})
        lines = [
            f"{p.relative_to(root)},{p.parent.name},{int(p.stem) // 2}{p.parent.name}" for p in root.rglob("*.png")
        ]
        (root / "labels.csv").write_text("\n".join(["image,label,patient", *lines]))
    elif name == "multilabel.yaml":
        write_images(root, {"x": 20, "y": 20, "z": 20})
        marks = {"x": "1,0,-1", "y": "0,1,", "z": ",,1"}
        lines = [f"{p.relative_to(root)},{p.parent.name}{p.stem},{marks[p.parent.name]}" for p in root.rglob("*.png")]
        (root / "labels.csv").write_text("\n".join(["image,patient,edema,effusion,pneumothorax", *lines]))
    elif name == "live.yaml":
        write_images(root, {"a": 10, "b": 10, "c": 10})
        store = []
    else:
        assert name == "quickstart.yaml", f"{name} has no test data: add them here"
        where += ["--data.count", "30", "--data.size", "320"]
    return [*where, *store, *PATCH_16]


@pytest.mark.parametrize("name", sorted({p.name for p in EXAMPLES.glob("*.yaml")} - {"sweep.yaml"}))
def test_every_example_runs(name: str, tmp_path: Path) -> None:
    """Of the paper's data sets one is run to its end, the others a step, as is what ``README.md`` runs."""
    if name == "cmmd.yaml" and not reads_dicom(tmp_path):
        pytest.skip("read_image does not read DICOM")
    command = ["fit", "--config", EXAMPLES / name, *example_data(name, tmp_path)]
    if name in ("cmmd.yaml", "live.yaml", "multilabel.yaml", "table.yaml"):
        run(*command)
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert 0 <= metrics["best"]["test_auc"] <= 1
    else:
        run(*command, "--trainer.fast_dev_run", "true")
        assert FeatureStore.open(str(tmp_path / "store.zarr")).done.all()


TINY_ENCODER = ["--model.encoder", "test_vit", "--model.pretrained", "false"]


def method_example(name: str, config: Path) -> list[object]:
    """Arguments that put the method of an example in the place of a configuration's."""
    arguments = ["--config", config, "--config", EXAMPLES / "methods" / name, *TINY_ENCODER]
    return [*arguments, "--model.side_resolution", "32"] if "fpt" in name else arguments


@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter.*")
@pytest.mark.parametrize("name", sorted(path.name for path in (EXAMPLES / "methods").glob("*.yaml")))
def test_every_method_is_an_override_of_any_example(name: str, config: Path) -> None:
    """With one and the same data section, as far as a step of training and validation."""
    ran = CommandLine(["fit", *map(str, method_example(name, config)), "--trainer.fast_dev_run", "true"])
    assert type(ran.model).__name__ == yaml.safe_load((EXAMPLES / "methods" / name).read_text())["model"]["class_path"]
    assert ran.model.hparams["num_classes"] == 3
    assert ran.trainer.global_step == 1


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("name", ["lora.yaml", "attentive_probing.yaml"])
def test_a_method_is_an_override_of_every_command(name: str, trained: Path, image_root: Path, tmp_path: Path) -> None:
    """Fit, test and predict with one and the same data section, of a method on images and one on stored features."""
    root = tmp_path / "other"
    args = [*method_example(name, trained), "--trainer.default_root_dir", root]
    run("fit", *args)
    metrics = json.loads((root / "metrics.json").read_text())
    assert 0 <= metrics["best"]["test_auc"] <= 1
    saved = yaml.safe_load((root / "config.yaml").read_text())
    assert saved["model"]["class_path"].endswith(
        yaml.safe_load((EXAMPLES / "methods" / name).read_text())["model"]["class_path"]
    )
    assert saved["model"]["init_args"]["num_classes"] == 3
    run("test", *args, "--ckpt_path", root / "best.ckpt")
    again = json.loads((root / "test" / "best" / "metrics.json").read_text())
    assert again["best"]["test_auc"] == pytest.approx(metrics["best"]["test_auc"])
    run("predict", *args, "--ckpt_path", root / "best.ckpt", "--data.root", image_root / "a")
    assert len(rows(root / "predict" / "best" / "predictions.csv")) == 10


def test_every_method_has_an_example() -> None:
    named = {yaml.safe_load(path.read_text())["model"]["class_path"] for path in (EXAMPLES / "methods").glob("*.yaml")}
    assert named == {method.__name__ for method in methods.METHODS.values()}


@pytest.mark.parametrize("name", sorted(path.name for path in (EXAMPLES / "encoders").glob("*.yaml")))
def test_every_encoder_is_an_override_of_any_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights are not at hand: the name is timm's, with weights, and it fits the paper's settings."""
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--config", EXAMPLES / "ddr.yaml", "--config", EXAMPLES / "encoders" / name, "--print_config")
    assert not stopped.value.code
    parsed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert parsed["encoder"] in timm.list_pretrained()
    assert parsed["pretrained"] is True
    module = methods.FPTPlusModule(**parsed)
    assert module.encoder_shape.tokens((512, 512)) in (1025, 4097)


@pytest.mark.parametrize(
    "override",
    [
        ("--model.prompts", "32"),
        ("--model.side_resolution", "256"),
        ("--model.token_ratio", "0.5"),
        ("--model.layers", "[8, 9, 10, 11]"),
    ],
)
def test_every_ablation_is_one_override(override: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    example = EXAMPLES / "methods" / "fpt_plus.yaml"
    assert " ".join(override).replace("[", '"[').replace("]", ']"') in example.read_text()
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--config", EXAMPLES / "ddr.yaml", "--config", example, *override, "--print_config")
    assert not stopped.value.code
    parsed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert parsed[override[0].removeprefix("--model.")] == yaml.safe_load(override[1])


@pytest.mark.usefixtures("few_figures")
def test_a_method_is_one_option(config: Path, tmp_path: Path) -> None:
    """Arguments that it shares with the configured one stay, others (``side_resolution``) are left out."""
    run("fit", "--config", config, "--model", "BitFitModule", "--trainer.max_epochs", 1)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["best"]
    assert not (tmp_path / "store.zarr").exists()


def test_a_method_on_images_has_nothing_to_preload(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "preload", "--config", config, "--config", EXAMPLES / "methods" / "lora.yaml")
    assert "LoRAModule trains on images, not on stored features: there is nothing to preload" in message


# What people are told


def test_a_run_is_never_overwritten(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    message = fails(capsys, "fit", "--config", trained)
    assert f"{tmp_path / 'run'} already holds a run" in message
    assert "--ckpt_path" in message
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_no_checkpoint(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("test", "predict", "validate"):
        assert "give --ckpt_path" in fails(capsys, command, "--config", config)
    assert "nowhere.ckpt (ckpt_path) does not exist" in fails(
        capsys, "test", "--config", config, "--ckpt_path", "nowhere.ckpt"
    )


def test_a_damaged_checkpoint(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(b"not a checkpoint")
    for command in ("test", "fit"):
        message = fails(capsys, command, "--config", config, "--ckpt_path", path)
        assert f"the checkpoint {path} cannot be read" in message


def test_a_checkpoint_never_replaces_what_was_typed(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    best = tmp_path / "run" / "best.ckpt"
    message = fails(capsys, "test", "--config", trained, "--ckpt_path", best, "--model.prompts", 8)
    assert "prompts: 16 in the checkpoint, 8 here" in message
    message = fails(capsys, "predict", "--config", trained, "--ckpt_path", best, "--model.encoder", "test_vit2")
    assert "encoder: 'test_vit' in the checkpoint, 'test_vit2' here" in message


@pytest.mark.usefixtures("few_figures")
def test_a_stale_store_names_fields_and_the_command(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("preload", "--config", config)
    message = fails(capsys, "fit", "--config", config, "--model.token_ratio", 0.5, "--data.resolution", 96)
    assert "token_ratio: 0.2, asked for 0.5" in message
    assert "resolution: (64, 64), asked for (96, 96)" in message
    options = f"--config {config} --model.token_ratio 0.5 --data.resolution 96"  # else it would be stale again
    assert f"\n  fpt-lightning preload {options} --overwrite true\n" in message
    run(*f"preload {options} --overwrite true".split())
    run("fit", "--trainer.max_epochs", 1, *options.split())


def test_test_without_a_store(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    best = tmp_path / "run" / "best.ckpt"
    message = fails(capsys, "test", "--config", trained, "--ckpt_path", best, "--data.store", tmp_path / "none.zarr")
    assert "there is no feature store" in message
    assert "fpt-lightning preload" in message


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_broken_image_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], image_root: Path, tmp_path: Path, threads: int
) -> None:
    broken = image_root / "b" / "004.png"
    broken.write_bytes(broken.read_bytes()[:200])
    change(config, "data", mean=[0.4], std=[0.2], decoding_threads=threads)
    message = fails(capsys, "fit", "--config", config)
    assert message.startswith("ImageError: 1 of 30 images cannot be read, all others are stored:\n")
    assert f"the image {broken} cannot be read" in message
    assert not (tmp_path / "run" / "config.yaml").exists()
    write_images(image_root, {"a": 10, "b": 10, "c": 10})
    run("fit", "--config", config, "--trainer.max_epochs", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.root", "nowhere"], "the data root 'nowhere' is not a folder"),
        (["--model.num_classes", "4"], "model.num_classes is 4, but the data set"),
        (["--data.resolution", "100"], "data.resolution 100 x 100 is not a multiple of the patch size 16 x 16"),
        (["--data.manifest", "none.csv"], "none.csv does not exist"),
        (["--data.mean", "[0.5, 0.5]", "--data.std", "[0.2]"], "data.mean is [0.5, 0.5]"),
        (["--model.encoder", "vit_bse"], "'vit_bse' is not a model of timm"),
        (["--model.encoder", "convnext_tiny"], "not a plain vision transformer"),
        (["--model.pretrained", "nowhere.pth"], "the weights file 'nowhere.pth' (pretrained) does not exist"),
        (["--data.classes", "[a, b]"], "data.classes is ['a', 'b'], but the labels are ['a', 'b', 'c']"),
        (["--model.layers", "[3, 9]"], "layers is [3, 9]"),
        (["--trainer.precision", "bf16-true"], "use 32-true, bf16-mixed or 16-mixed"),
        (["--model.side_resolution", "64"], "set data.image_size to at least 64"),
    ],
)
def test_settings_that_cannot_work(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in fails(capsys, "fit", "--config", config, *arguments)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_the_frozen_pass_is_in_fp32_whatever_trains_on_it(config: Path, tmp_path: Path, precision: str) -> None:
    change(config, "data", mean=[0.4], std=[0.2], codec="fp32")
    run("preload", "--config", config, "--data.store", tmp_path / "plain.zarr")
    run("preload", "--config", config, "--trainer.precision", precision)
    one, two = (FeatureStore.open(str(tmp_path / name)) for name in ("plain.zarr", "store.zarr"))
    assert all(np.array_equal(one.read([row], "features")[0], two.read([row], "features")[0]) for row in range(30))


def test_preload_needs_a_store(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(config.read_text())
    content["data"]["class_path"] = "ImageDataModule"
    del content["data"]["init_args"]["store"]
    config.write_text(yaml.safe_dump(content))
    assert "data is ImageDataModule, which has no store" in fails(capsys, "preload", "--config", config)


def test_predict_on_a_folder_without_images(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    best = tmp_path / "run" / "best.ckpt"
    message = fails(capsys, "predict", "--config", trained, "--ckpt_path", best, "--data.root", tmp_path / "empty")
    assert f"there is no image below {tmp_path / 'empty'}" in message


# Splits, folds and images of elsewhere


@pytest.mark.usefixtures("few_figures")
def test_the_split_of_a_run_can_be_given_back(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    again = ["--data.manifest", root / "split.csv", "--data.split_seed", 5]
    run("test", "--config", trained, "--ckpt_path", root / "best.ckpt", *again)
    assert (root / "test" / "best" / "predictions.csv").read_text() == (root / "predictions.csv").read_text()


def test_another_random_split_is_not_tested(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for other in (["--data.split_seed", 5], ["--data.fold", 2, "--data.folds", 5]):
        message = fails(capsys, "test", "--config", trained, "--ckpt_path", tmp_path / "run" / "best.ckpt", *other)
        assert "split at random, and not as it was in training" in message
        assert "data.external true" in message


@pytest.mark.usefixtures("few_figures")
def test_folds_test_each_image_once(config: Path, tmp_path: Path) -> None:
    tested: list[str] = []
    for fold in (1, 2, 3):
        root = tmp_path / f"fold{fold}"
        folds = ["--data.fold", fold, "--data.folds", 3, "--data.mean", "[0.4]", "--data.std", "[0.2]"]
        run("fit", "--config", config, *folds, "--trainer.default_root_dir", root, "--trainer.max_epochs", 1)
        tested += [row["path"] for row in rows(root / "predictions.csv")]
    assert sorted(tested) == [f"{name}/{i:03d}.png" for name in "abc" for i in range(10)]


def elsewhere(tmp_path: Path, names: dict[str, str]) -> list[object]:
    """Arguments of a test on other images, whose labels are ``names`` of their folders."""
    root = write_images(tmp_path / "elsewhere", dict.fromkeys(names, 4), seed=7)
    lines = [f"{path.relative_to(root)},{names[path.parent.name]}" for path in sorted(root.rglob("*.png"))]
    (root / "other.csv").write_text("\n".join(["image,label", *lines]))
    return ["--data.root", root, "--data.manifest", "other.csv", "--data.store", tmp_path / "other.zarr"]


@pytest.mark.usefixtures("few_figures")
def test_a_model_is_tested_on_images_of_elsewhere(trained: Path, tmp_path: Path) -> None:
    """Which lack a class, so that the others have other numbers."""
    root = tmp_path / "run"
    where = [*elsewhere(tmp_path, {"b": "b", "c": "c"}), "--data.external", "true"]
    run("preload", "--config", trained, *where)
    run("test", "--config", trained, "--ckpt_path", root / "best.ckpt", *where)
    found = rows(root / "test" / "best-elsewhere" / "predictions.csv")
    assert [row["label"] for row in found] == ["b"] * 4 + ["c"] * 4
    assert list(found[0]) == ["path", "label", "most_probable", "prob_a", "prob_b", "prob_c"]
    metrics = json.loads((root / "test" / "best-elsewhere" / "metrics.json").read_text())["best"]
    right = [max("abc", key=lambda name: float(row[f"prob_{name}"])) == row["label"] for row in found]
    assert metrics["test_accuracy"] == pytest.approx(sum(right) / 8)
    assert metrics["test_auc_classes"] == 2


def test_classes_of_elsewhere_are_matched_by_name(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [*elsewhere(tmp_path, {"b": "b", "c": "other"}), "--data.external", "true"]
    run("preload", "--config", trained, *where)
    message = fails(capsys, "test", "--config", trained, "--ckpt_path", tmp_path / "run" / "best.ckpt", *where)
    assert "trained with the classes ['a', 'b', 'c'], the data have ['b', 'other']" in message


def test_images_of_elsewhere_are_not_trained_on(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(config, "data", external=True)
    assert "'auto' is measured over training images, but data.external" in fails(capsys, "preload", "--config", config)
    change(config, "data", mean=[0.4], std=[0.2])
    assert "data.external is true: all images are for test" in fails(capsys, "fit", "--config", config)
