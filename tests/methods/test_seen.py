"""A checkpoint knows the images and groups of its training: a test split that holds them is refused by name."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.errors import CheckpointError
from small import quiet_trainer, tiny_model

MakeData = Callable[..., PreloadedFeatureDataModule]
SPLITS = ["train"] * 5 + ["val"] * 2 + ["test"] * 3


def own(name: str, number: int, split: str) -> str:
    """A group for each image."""
    return f"g{name}{number}"


def table(root: Path, splits: list[str], group: Callable[[str, int, str], str] = own) -> None:
    """The split of each of ten images a class."""
    with (root / "labels.csv").open("w", newline="") as file:
        rows = [
            (f"{name}/{number:03d}.png", name, split, group(name, number, split))
            for name in "abc"
            for number, split in enumerate(splits)
        ]
        csv.writer(file).writerows([("image", "label", "split", "group"), *rows])


@pytest.fixture
def trained(image_root: Path, tiny_data: MakeData, tmp_path: Path) -> Callable[..., Any]:
    """What a stage says of a checkpoint of ``SPLITS`` with other splits."""
    table(image_root, SPLITS)
    data, model = tiny_data(manifest="labels.csv"), tiny_model()
    data.preload(model, quiet_trainer(tmp_path))
    trainer = quiet_trainer(tmp_path)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "m.ckpt")

    def run(stage: str, splits: list[str], group: Callable[[str, int, str], str] = own, **options: Any) -> Any:
        table(image_root, splits, group)
        again = quiet_trainer(tmp_path)
        given = {"ckpt_path": str(tmp_path / "m.ckpt"), "verbose": False}
        return getattr(again, stage)(tiny_model(), tiny_data(manifest="labels.csv", **options), **given)

    return run


def test_its_own_split_is_tested(trained: Callable[..., Any], tmp_path: Path) -> None:
    assert trained("test", SPLITS)
    assert trained("validate", SPLITS)
    about = torch.load(tmp_path / "m.ckpt", weights_only=True)["fpt_lightning"]
    assert {split: len(names) for split, names in about["seen"].items()} == {"train": 30, "val": 12}  # with groups


def test_images_that_were_trained_on_are_not_tested(trained: Callable[..., Any]) -> None:
    swapped = [{"train": "test", "test": "train"}.get(split, split) for split in SPLITS]
    with pytest.raises(CheckpointError, match=r"30 of the images and groups of .* test .* a/000\.png.*split\.csv"):
        trained("test", swapped)
    one = ["test", *SPLITS[1:]]
    with pytest.raises(CheckpointError, match=r"6 of .* a/000\.png, b/000\.png, c/000\.png, ga0, gb0"):
        trained("test", one)
    assert trained("test", one, allow_overlap=True)
    assert trained("test", one, external=True, mean=[0.4])


def test_images_that_chose_the_epoch_are_not_tested(trained: Callable[..., Any]) -> None:
    swapped = [{"val": "test", "test": "val"}.get(split, split) for split in SPLITS]
    with pytest.raises(CheckpointError, match="12 of the images and groups of the split test"):
        trained("test", swapped)
    assert trained("validate", swapped)  # the test images are free to validate


def test_images_that_were_trained_on_are_not_validated(trained: Callable[..., Any]) -> None:
    swapped = [{"val": "train", "train": "val"}.get(split, split) for split in SPLITS]
    with pytest.raises(CheckpointError, match="30 of the images and groups of the split val"):
        trained("validate", swapped)


def test_another_image_of_a_patient_that_was_trained_on(trained: Callable[..., Any]) -> None:
    """The tested images are new to the model, their patients are not."""
    with pytest.raises(CheckpointError, match=r"1 of the images and groups of the split test .*: ga0\."):
        trained("test", SPLITS, lambda name, number, split: "ga0" if split == "test" else "")


def test_a_checkpoint_of_an_earlier_version_knows_none(trained: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = torch.load(tmp_path / "m.ckpt", weights_only=True)
    for name in ("seen", "case_rule", "case_thresholds"):
        del checkpoint["fpt_lightning"][name]
    torch.save(checkpoint, tmp_path / "m.ckpt")
    assert trained("test", ["test", *SPLITS[1:]])
