"""The whole way on real images, where FPT_CHEST_XRAY and FPT_FUNDUS name their folders (with labels.csv in them).

Chest X-rays with the columns image, label, patient_id and split; fundus photographs with image, grade (0 to 4),
maculopathy (0 or 1) and patient.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpt_lightning import Predictor, PreloadedFeatureDataModule
from fpt_lightning.cli import main
from fpt_lightning.data.images import ImageReader, read_image
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.data.transforms import resize
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.deployment.export import Classifier, export
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.evaluation.predictions import Predictions

ROOT, FUNDUS = os.environ.get("FPT_CHEST_XRAY", ""), os.environ.get("FPT_FUNDUS", "")

pytestmark = pytest.mark.slow
chest = pytest.mark.skipif(not ROOT, reason="FPT_CHEST_XRAY does not name the folder of the real images")
fundus = pytest.mark.skipif(not FUNDUS, reason="FPT_FUNDUS does not name the folder of the real images")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of 3 epochs, in ``run``, and of what it predicts for the validation images."""
    folder = tmp_path_factory.mktemp("chest_xray")
    settings = [
        *("--trainer.default_root_dir", folder / "run", "--trainer.max_epochs", 3, "--trainer.accelerator", "cpu"),
        *("--model", "FPTPlusModule", "--model.num_classes", 3, "--model.encoder", "test_vit"),
        *("--model.pretrained", "false", "--model.learning_rate", 1e-3),
        *("--data", "PreloadedFeatureDataModule", "--data.root", ROOT, "--data.manifest", "labels.csv"),
        *("--data.group_column", "patient_id", "--data.store", folder / "store.zarr", "--data.resolution", 256),
    ]
    main(["fit", *map(str, settings)])
    best = folder / "run" / "best.ckpt"
    main(["predict", *map(str, settings), "--ckpt_path", str(best), "--data.root", f"{ROOT}/val"])
    return folder


@chest
def test_chest_xrays(folder: Path) -> None:
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["best"]["test_auc"] > 0.5
    with (folder / "run" / "predict" / "best" / "predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 108


@chest
def test_predictor_and_onnx_on_chest_xrays(folder: Path) -> None:
    import onnxruntime

    predicted = Predictions.read(folder / "run" / "predict" / "best" / "predictions.csv")
    predictor = Predictor(folder / "run" / "best.ckpt", batch_size=16)
    found = predictor(f"{ROOT}/val")
    assert found.ids == predicted.ids
    np.testing.assert_allclose(found.scores, predicted.scores, atol=2e-6)

    export(ckpt_path=str(folder / "run" / "best.ckpt"), out=str(folder / "model.onnx"), attention=True)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    reader = ImageReader((256, 256))
    pixels = [resize(reader(f"{ROOT}/val/{id}"), (256, 256)) for id in found.ids]
    inputs = np.stack([image.numpy() for image in pixels]).astype(np.float32) / np.float32(255)
    scores, attention = session.run(None, {"images": inputs})
    with torch.no_grad():
        same = Classifier(*load_trained(folder / "run" / "best.ckpt"), attention=True)(torch.from_numpy(inputs))
    changed = np.abs(attention - same[1].numpy()).max((1, 2)) > 1e-6
    assert changed.mean() < 0.05, "only ties for the last place of a head may go to the other token"
    np.testing.assert_allclose(scores[~changed], same[0].numpy()[~changed], atol=1e-4)
    np.testing.assert_allclose(scores, same[0].numpy(), atol=2e-3)

    at_resolution = predictor([image.permute(1, 2, 0).numpy() for image in pixels])
    np.testing.assert_allclose(scores, at_resolution.scores, atol=2e-3)  # the low-resolution copies are not rounded
    np.testing.assert_allclose(scores, found.scores, atol=2e-2)  # nor made from the whole file
    assert attention.shape == (108, 16, 16)
    assert attention.min() >= 0
    differences = (np.abs(scores - other).max() for other in (same[0].numpy(), at_resolution.scores, found.scores))
    print(
        "largest differences of onnxruntime: {:.2g} from PyTorch, {:.2g} from Predictor on images at the resolution, "
        "{:.2g} on whole files".format(*differences)
    )


# Fundus photographs


def rows() -> list[dict[str, str]]:
    with (Path(FUNDUS) / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@fundus
@pytest.mark.parametrize("task", ["ordinal", "coral"])
def test_grades_with_patients_kept_whole(task: str, tmp_path: Path) -> None:
    settings = [
        *("--trainer.default_root_dir", tmp_path / "run", "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu"),
        *("--model", "QueryTokensModule", "--model.num_classes", 5, "--model.encoder", "test_vit"),
        *("--model.pretrained", "false", "--model.task", task),
        *("--data", "PreloadedFeatureDataModule", "--data.root", FUNDUS, "--data.manifest", "labels.csv"),
        *("--data.label_column", "grade", "--data.group_column", "patient", "--data.resolution", 224),
        *("--data.store", tmp_path / "store.zarr", "--data.mean", "[0.4]", "--data.std", "[0.2]"),
    ]
    main(["fit", *map(str, settings)])
    with (tmp_path / "run" / "split.csv").open(newline="") as file:
        split = list(csv.DictReader(file))
    assert len(split) == len(rows())
    assert {row["image"]: (row["label"], row["group"]) for row in split} == {
        row["image"]: (row["grade"], row["patient"]) for row in rows()
    }
    of_patients = {(row["group"], row["split"]) for row in split}
    assert len(of_patients) == len({row["patient"] for row in rows()})
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert -1 <= metrics["best"]["test_quadratic_kappa"] <= 1
    found = Predictions.read(tmp_path / "run" / "predictions.csv")
    assert found.classes == ("0", "1", "2", "3", "4")
    assert set(found.ids) == {row["image"] for row in split if row["split"] == "test"}


@fundus
def test_true_and_false_are_the_zeros_and_ones(tmp_path: Path) -> None:
    """As a class and as one of several labels."""
    words = {"0": "False", "1": "True"}
    table = tmp_path / "words.csv"
    with table.open("w", newline="") as file:
        listed = [(row["image"], words[row["maculopathy"]], row["patient"]) for row in rows()]
        csv.writer(file).writerows([("image", "maculopathy", "patient"), *listed])
    arguments = {"label_column": "maculopathy", "group_column": "patient"}
    numbers = read_manifest(FUNDUS, "labels.csv", **arguments)
    named = read_manifest(FUNDUS, str(table), **arguments)
    assert (numbers.classes, named.classes) == (("0", "1"), ("False", "True"))
    assert [sample.label for sample in numbers.samples] == [sample.label for sample in named.samples]
    several = read_manifest(FUNDUS, str(table), kind="multi-label", **{**arguments, "label_column": ["maculopathy"]})
    assert {s.id: s.targets[0] for s in several.samples} == {row["image"]: int(row["maculopathy"]) for row in rows()}


@fundus
def test_photographs_of_twelve_bits_in_sixteen_keep_their_levels(tmp_path: Path) -> None:
    """Their green channel, as a camera of 12 bits would have written it."""
    for number, row in enumerate(rows()[:30]):
        green = read_image(Path(FUNDUS) / row["image"])[::4, ::4, 1].astype(np.uint16) * 16
        path = tmp_path / "images" / f"{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(green).save(path)

    def levels(value_range: str) -> int:
        data = PreloadedFeatureDataModule(
            str(tmp_path / "images"), str(tmp_path / f"{value_range}.zarr"), resolution=64, value_range=value_range
        )
        store = data.preload(EncoderConfig("test_vit", pretrained=False))
        return len(np.unique(store.read(list(range(30)), "images")))

    assert levels("full") <= 17
    assert levels("auto") > 200
