"""What can be known is refused before an image is read or encoded, by every command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from commands import fails, run
from fpt_lightning import FPTPlusModule
from fpt_lightning.cli.series import Configuration
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.encoder.frozen import FrozenEncoder
from small import table

Say = Callable[..., str]


def changed(config: Path, name: str, **sections: dict[str, Any]) -> Path:
    """A configuration beside another one, with other values."""
    content = yaml.safe_load(config.read_text())
    for section, values in sections.items():
        (content[section].get("init_args") or content[section]).update(values)
    path = config.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Say:
    """What a command says that fails without an encoder or an image, and leaves nothing new."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("too late")

    def call(*args: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(FrozenEncoder, "__init__", forbidden)
            patch.setattr("fpt_lightning.data.images.ImageReader.__call__", forbidden)
            patch.setattr("fpt_lightning.cli.trainer.plan", lambda setting, memory: None)  # which takes long
            patch.setattr("fpt_lightning.cli.trainer.table", lambda *_: "")
            message = fails(capsys, *args)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return call


@pytest.mark.parametrize("command", ["fit", "preload", "plan"])
@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"image_size": 24}}, "the side network's resolution is 32, but the low-resolution copies have 24"),
        ({"data": {"resolution": 72}}, "data.resolution"),
        ({"model": {"num_classes": 4}}, "model.num_classes is 4, but the data set"),
        ({"model": {"test_time_orientations": 2}}, "with data.orientations 2"),
        (
            {"model": {"task": "regression", "num_classes": 1}, "data": {"manifest": "same.csv"}},
            "the 3 training labels are all 7",
        ),
        (
            {"model": {"class_weights": "balanced"}, "data": {"manifest": "lacks.csv"}},
            "model.class_weights is 'balanced', but the training images of each class are [2, 1, 0]",
        ),
        ({"model": {"task": "ordinal"}}, "a, b, c are words in alphabetical order"),
        ({"model": {"pretrained": "no.pth"}}, "the weights file 'no.pth' (pretrained) does not exist"),
        ({"data": {"root": "nowhere"}, "model": {"num_classes": None}}, "the data root 'nowhere' is not a folder"),
    ],
)
def test_before_the_frozen_pass(
    command: str, sections: dict[str, dict[str, Any]], words: str, config: Path, image_root: Path, say: Say
) -> None:
    listed = [f"{name}/{i:03d}.png" for name in "abc" for i in range(3)]
    splits = {"same": ["train", "val", "test"] * 3, "lacks": ["train", "train", "val"] + ["train", "val", "test"] * 2}
    splits["lacks"][-3:] = ["val", "val", "test"]
    for name, used in splits.items():
        labels = ["7"] * 9 if name == "same" else [path[0] for path in listed]
        rows = [",".join(row) for row in zip(listed, labels, used, strict=True)]
        (image_root / f"{name}.csv").write_text("\n".join(["image,label,split", *rows]))
    assert words in say(command, "--config", changed(config, "other", **sections))


@pytest.mark.parametrize(("command", "num_classes"), [("fit", None), ("preload", 3)])
def test_groups_of_several_splits_are_listed_in_the_runs_folder(
    command: str,
    num_classes: int | None,
    config: Path,
    image_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [f"{name}/{i:03d}.png,{name},{split}" for name in "abc" for i, split in enumerate(("train", "val", "test"))]
    (image_root / "leak.csv").write_text("\n".join(["image,label,split", *rows]))
    given = {"manifest": "leak.csv", "group_column": "label"}
    listing = tmp_path / "run" / "overlaps.csv"
    path = changed(config, "leak", data=given, model={"num_classes": num_classes})
    message = fails(capsys, command, "--config", path)
    assert "3 groups have images in more than one split: a, b, c: mend the splits" in message
    assert f"; {listing} lists all." in message
    assert "group,train,a/000.png,val,a/001.png,a" in listing.read_text().splitlines()
    assert not (tmp_path / "store.zarr").exists()


@pytest.mark.parametrize("command", ["fit", "preload", "plan"])
def test_dicom_without_pydicom(
    command: str, config: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    (image_root / "b" / "scan").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "b/scan is DICOM: pip install 'fpt-lightning[dicom]'" in say(command, "--config", config)


def test_a_logger_without_its_package(config: Path, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    for name in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    for command in ("fit", "plan"):
        said = say(
            command, "--config", config, "--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "a"
        )
        assert "pip install 'fpt-lightning[tensorboard]'" in said


def test_a_stale_store_is_known_to_plan(config: Path, say: Say) -> None:
    run("preload", "--config", config)
    assert "made with other settings" in say("plan", "--config", config, "--data.codec", "fp16")


def of_task(task: str, config: Path, image_root: Path) -> Path:
    """A configuration of a task that says no number of classes."""
    columns = ["red", "green", "bright"] if task == "multilabel" else "label"
    data = {"manifest": str(table(image_root, task)), "label_column": columns, "mean": [0.4], "std": [0.2]}
    return changed(config, "told", model={"task": task, "num_classes": None}, data=data)


@pytest.mark.parametrize(("task", "number"), [("multiclass", 3), ("multilabel", 3), ("regression", 1)])
def test_the_number_of_classes_is_that_of_the_data(task: str, number: int, config: Path, image_root: Path) -> None:
    told = Configuration(["fit", "--config", str(of_task(task, config, image_root))])
    assert told.settings["model"]["init_args"]["num_classes"] == number


@pytest.mark.usefixtures("few_figures")
def test_a_run_writes_down_the_number_of_classes(
    config: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data are read once for it, and in prediction, without labels, the checkpoint knows it."""
    told, read = of_task("multilabel", config, image_root), []
    real = read_manifest
    monkeypatch.setattr(
        "fpt_lightning.datamodules.base.read_manifest", lambda *args, **more: read.append(args) or real(*args, **more)
    )
    run("fit", "--config", told, "--trainer.max_epochs", 1)
    assert len(read) == 1
    folder = config.parent / "run"
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["num_classes"] == 3
    run("predict", "--config", told, "--ckpt_path", "best", "--data.root", image_root / "a")
    assert (folder / "predict" / "best" / "predictions.csv").is_file()


def test_before_fit(config: Path, tmp_path: Path, say: Say) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert f"{file} is a file: give another folder" in say(
        "fit", "--config", config, "--trainer.default_root_dir", file / "run"
    )
    assert "trainer.max_epochs is -1" in say("fit", "--config", config, "--trainer.max_epochs", -1)
    outside = changed(config, "other", data={"external": True, "mean": [0.4], "std": [0.2]})
    assert "data.external is true: all images are for test" in say("fit", "--config", outside)


def test_what_does_not_fit_the_checkpoint(trained: Path, image_root: Path, tmp_path: Path, say: Say) -> None:
    config = changed(trained, "own", data={"root": str(image_root)})  # the same images, of which some are renamed
    last = ["--ckpt_path", tmp_path / "run" / "last.ckpt"]
    again = ["--data.store", tmp_path / "other.zarr"]  # which is not there yet
    deep = changed(config, "deep", model={"prompts": 4})
    words = "prompts: 16 in the checkpoint, 4 here"
    for command in ("fit", "validate", "test", "predict"):
        assert words in say(command, "--config", deep, *last, *again)
    assert words in say("explain", "--config", deep, *last, "--out", tmp_path / "out")
    for name, value, before in (
        ("learning_rate", 1e-6, 0.003),
        ("weight_decay", 0.5, 0.1),
        ("betas", [0.8, 0.9], None),
    ):
        said = say("fit", "--config", changed(config, "other", model={name: value}), *last, *again)
        assert f"model.{name}: {before or ''}" in said
        assert "in the checkpoint" in said
        assert f"{value} here" in said
    large = changed(config, "large", data={"resolution": 96})
    for command in ("fit", "test", "predict"):
        assert "resolution: (64, 64), asked for (96, 96)" in say(command, "--config", large, *last, *again)
    moved = changed(config, "moved", data={"split_seed": 3})
    for command in ("fit", "test"):
        assert "is split at random, and not as it was in training" in say(command, "--config", moved, *last, *again)
    (image_root / "a").rename(image_root / "d")
    for command in ("fit", "validate"):
        assert "trained with the classes ['a', 'b', 'c'], the data have ['b', 'c', 'd']" in say(
            command, "--config", config, *last, *again
        )


def test_the_public_check(tiny_data: Callable[..., Any]) -> None:
    """As another Lightning project calls it."""
    model = FPTPlusModule(num_classes=3, encoder="test_vit", pretrained=False, side_resolution=32)
    data = tiny_data()
    data.check("fit", model)
    assert data.model is None
    with pytest.raises(Exception, match="augmentation is 'weak'"):
        tiny_data(augmentation="weak").check("predict", model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_lightning_refuses_is_one_line(config: Path, say: Say) -> None:
    said = say("fit", "--config", config, "--trainer.accelerator", "gpu")
    assert said.startswith("ConfigurationError: ")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("few_figures")
def test_the_batches_that_are_overfitted(trained: Path, tmp_path: Path) -> None:
    """Lightning draws them by a sampler of its own, which knows no epochs."""
    own = ["--trainer.default_root_dir", tmp_path / "other"]
    run("fit", "--config", trained, "--trainer.overfit_batches", 1, *own)
    assert (tmp_path / "other" / "best.ckpt").is_file()


def test_more_processes_than_images_to_evaluate(config: Path, say: Say) -> None:
    """One without any would let the others wait for ever."""
    message = say("fit", "--config", config, "--trainer.devices", 40, "--trainer.strategy", "ddp")
    assert "image(s) are to be evaluated in 40 processes, each in one: give trainer.devices" in message
