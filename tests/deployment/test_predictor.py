"""Predictor: the numbers of ``fpt-lightning predict`` for files, arrays and folders, and what it refuses."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import fails
from fpt_lightning import ImageDataModule, Predictor
from fpt_lightning.cli import main
from fpt_lightning.data.images import read_image
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import build_encoder
from fpt_lightning.errors import CheckpointError, ConfigurationError, DataError, ImageError
from fpt_lightning.evaluation.calibration import Calibration
from fpt_lightning.evaluation.decisions import decide
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.files import read_rows
from fpt_lightning.methods import METHODS, FPTPlusModule
from miniatures import reads_dicom, write_dicom
from small import quiet_trainer, save_trained, tiny_model, write_images
from threads import at_once, in_lockstep

TINY = {"encoder": "test_vit", "side_resolution": 32, "prompts": 4}


def checkpoint(folder: Path, **settings: Any) -> Path:
    return save_trained(FPTPlusModule, folder / "best.ckpt", (64, 96), **{**TINY, **settings})


def test_the_numbers_are_those_of_predict(image_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ImageDataModule(
        str(image_root), resolution=(64, 96), image_size=48, batch_size=8, fit="letterbox", crop_border=True
    )
    trainer = quiet_trainer(tmp_path / "fit")
    trainer.fit(tiny_model(learning_rate=3e-3), data)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    model = ["--model", "FPTPlusModule", "--model.num_classes", "3"]
    model += ["--model.encoder", "test_vit", "--model.pretrained", "false"]
    model += ["--model.side_resolution", "32", "--model.prompts", "4"]
    reading = ["--data", "ImageDataModule", "--data.root", str(image_root), "--data.resolution", "[64,96]"]
    reading += ["--data.image_size", "48", "--data.fit", "letterbox", "--data.crop_border", "true"]
    run = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    command = ["predict", *model, *reading, *run, "--data.batch_size", "8", "--ckpt_path", str(path), "--coverage"]
    assert "a coverage of 0.9 needs 9 labelled validation patients" in fails(capsys, *command, "0.9")
    main([*command, "0.7"])
    expected = Predictions.read(tmp_path / "run" / "predict" / path.stem / "predictions.csv")
    found = Predictor(path)(image_root)
    assert (found.ids, found.classes) == (expected.ids, expected.classes)
    assert not found.known.any()
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-6)
    predictor = Predictor(path)
    assert predictor.module.calibration != Calibration()
    rows, table = read_rows(tmp_path / "run/predict/last/predictions.csv", "predictions"), predictor.table(found)
    assert not {"set", "abstains"} & table[0].keys()
    sets = predictor.sets(found, 0.7)
    assert [row["set"] for row in rows] == sets.columns(found)["set"]
    beside = [(row["set"], row["abstains"]) for row in predictor.table(found, coverage=0.7)]
    assert [(row["set"], int(row["abstains"])) for row in rows] == beside
    assert all(("|" in held) == bool(abstains) for held, abstains in beside)


@pytest.mark.parametrize("method", ["linear", "stored_linear"])
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_paths_arrays_and_folders_give_the_same(method: str, task: str, image_root: Path, tmp_path: Path) -> None:
    path = save_trained(METHODS[method], tmp_path / "best.ckpt", (64, 96), encoder="test_vit", task=task)
    predictor = Predictor(str(path), batch_size=4)
    files = sorted(image_root.rglob("*.png"))[8:15]
    folder = predictor(image_root)
    by_path = predictor(files)
    by_array = predictor([np.asarray(Image.open(file)) for file in files])
    assert by_path.ids == tuple(map(str, files))
    assert by_array.ids == tuple(f"array_{i}" for i in range(7))
    np.testing.assert_allclose(by_path.scores, folder.scores[8:15], atol=1e-5)
    np.testing.assert_allclose(by_array.scores, by_path.scores, atol=1e-5)
    np.testing.assert_allclose(predictor(files[0]).scores, by_path.scores[:1], atol=1e-5)
    assert by_path.kind == {"multilabel": "multi-label", "regression": "regression"}[task]
    assert not by_path.known.any()
    assert by_path.scores.std(0).max() > 1e-3


def test_arrays_of_16_bits_and_of_grey_are_at_full_scale(tmp_path: Path) -> None:
    predictor = Predictor(checkpoint(tmp_path))
    grey = np.random.default_rng(0).integers(0, 256, (70, 50), dtype=np.uint8)
    colour = np.repeat(grey[..., None], 3, 2)
    scores = predictor([grey, colour, grey.astype(np.uint16) * 257]).scores
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-6)
    np.testing.assert_allclose(scores[2], scores[0], atol=5e-3)  # 8 bits are rounded when resized
    np.testing.assert_allclose(predictor(colour).scores, scores[:1], atol=1e-6)


def test_dicom_files_and_pages(tmp_path: Path) -> None:
    if not reads_dicom(tmp_path):
        pytest.skip("pydicom is not installed")
    write_dicom(tmp_path / "scan.dcm", "patient", "L", seed=0)
    pages = [np.random.default_rng(seed).integers(0, 256, (40, 60), dtype=np.uint8) for seed in (0, 1)]
    first, second = (Image.fromarray(page) for page in pages)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    predictor = Predictor(checkpoint(tmp_path))
    found = predictor([tmp_path / "scan.dcm", f"{tmp_path}/pages.tif#1", f"{tmp_path}/pages.tif#2"])
    expected = predictor([read_image(tmp_path / "scan.dcm"), *pages])
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_decisions_and_table_follow_the_fitted_thresholds(image_root: Path, tmp_path: Path) -> None:
    predictor = Predictor(checkpoint(tmp_path))
    found = predictor(image_root)
    decided = predictor.decide(found)
    np.testing.assert_array_equal(decided[:, 0], found.scores[:, 0] >= 0.3)
    np.testing.assert_array_equal(decided[:, 1], found.scores[:, 1] >= 0.6)
    np.testing.assert_array_equal(decided[:, 2], found.scores.argmax(1) == 2)
    rows = predictor.table(found, tmp_path / "table.csv")
    by_class = [f"{column}_{name}" for column in ("prob", "threshold", "decided") for name in "abc"]
    assert list(rows[0]) == ["path", *by_class, "most_probable"]
    assert [rows[0][f"threshold_{name}"] for name in "abc"] == [0.3, 0.6, ""]
    assert [row["decided_a"] for row in rows] == decided[:, 0].astype(int).tolist()
    assert rows[0]["most_probable"] == "abc"[found.scores[0].argmax()]
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [float(row["prob_c"]) for row in csv.DictReader(file)] == [row["prob_c"] for row in rows]


def test_a_regression_has_numbers_and_no_decisions(image_root: Path, tmp_path: Path) -> None:
    predictor = Predictor(checkpoint(tmp_path, task="regression"))
    found = predictor(image_root)
    assert predictor.table(found)[3] == {"path": "a/003.png", "prediction": found.scores[3]}
    with pytest.raises(ConfigurationError, match="regression"):
        predictor.decide(found)


def test_multi_label_is_decided_from_one_half_on_without_a_threshold() -> None:
    scores = np.array([[0.6, 0.2], [0.4, 0.9]])
    found = Predictions("multi-label", ("x", "y"), np.full((2, 2), np.nan), scores, ("a", "b"))
    assert decide(found, {"b": 0.1}).tolist() == [[True, True], [False, True]]


def test_weights_that_have_moved_are_given_again(image_root: Path, tmp_path: Path) -> None:
    weights, moved = tmp_path / "encoder.pt", tmp_path / "moved.pt"
    torch.save(build_encoder(EncoderConfig("test_vit", pretrained=False), (64, 96)).state_dict(), weights)
    path = checkpoint(tmp_path, pretrained=str(weights))
    expected = Predictor(path)(image_root)
    weights.rename(moved)
    with pytest.raises(CheckpointError, match=rf"{weights}.* are not there: give their place now as pretrained"):
        Predictor(path)
    np.testing.assert_array_equal(Predictor(path, pretrained=str(moved))(image_root).scores, expected.scores)
    folder = tmp_path / "of a hub"
    folder.mkdir()
    shutil.copy(moved, folder / "pytorch_model.bin")
    np.testing.assert_array_equal(Predictor(path, pretrained=str(folder))(image_root).scores, expected.scores)
    other = {name: tensor + 1 for name, tensor in torch.load(moved, weights_only=True).items()}
    torch.save(other, moved)
    with pytest.raises(CheckpointError, match="other weights"):
        Predictor(path, pretrained=str(moved))


def test_the_encoder_is_loaded_once(image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(checkpoint(tmp_path))
    monkeypatch.setattr("fpt_lightning.encoder.frozen.build_encoder", None)
    assert len(predictor(image_root).ids) == 30


@pytest.mark.parametrize("method", ["fpt_plus", "prompt"])
def test_threads_share_a_predictor(method: str, image_root: Path, tmp_path: Path) -> None:
    path = save_trained(METHODS[method], tmp_path / "best.ckpt", (64, 96), encoder="test_vit", prompts=4)
    predictor = Predictor(path)
    images: list[Any] = sorted(image_root.rglob("*.png"))[8:11]
    alone = [predictor(image).scores for image in images]
    assert not np.allclose(alone[0], alone[1], atol=1e-4)
    module: Any = predictor.module
    in_lockstep(module.vit.blocks if method == "prompt" else module.encoders[0].model.blocks, len(images))
    np.testing.assert_array_equal([found.scores for found in at_once(predictor, images)], alone)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], DataError, "no image"),
        (["x.png", "x.png"], DataError, r"'x\.png' is there more than once"),
        ("gone.png", ImageError, r"gone\.png does not exist"),
        (np.zeros((8, 8, 4), np.uint8), ImageError, r"array_0 has the shape \(8, 8, 4\)"),
        ([np.zeros((8, 8, 3), np.float32)], ImageError, "dtype float32"),
        (np.zeros((0, 8), np.uint8), ImageError, "array_0"),
    ],
)
def test_images_that_cannot_be_predicted(images: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        Predictor(checkpoint(tmp_path))(images)


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    with pytest.raises(ConfigurationError, match="batch_size is 0"):
        Predictor(path, batch_size=0)
    with pytest.raises(ConfigurationError, match="device is 'toaster'"):
        Predictor(path, device="toaster")


def test_what_is_no_checkpoint_of_this_package(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Predictor(tmp_path / "none.ckpt")
    for content, message in (
        ([1], "is not a checkpoint of Lightning"),
        ({"state_dict": {}}, "is not a checkpoint of Lightning"),
        ({"global_step": 1, "state_dict": {}}, "not written by a method of fpt-lightning"),
        ({"global_step": 1, "fpt_lightning": {"method": "Other"}}, "not written by a method of fpt-lightning"),
    ):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match=message):
            Predictor(tmp_path / "other.ckpt")


def test_a_checkpoint_that_does_not_say_what_its_images_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not say the resolution"):
        Predictor(checkpoint(tmp_path, specification={"mean": (), "std": ()}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    root, path = write_images(tmp_path / "images", {"a": 3, "b": 3}), checkpoint(tmp_path)
    on_gpu = Predictor(path, device="cuda")(root)
    np.testing.assert_allclose(on_gpu.scores, Predictor(path)(root).scores, atol=1e-3)
