"""The whole way on real chest X-rays, where FPT_CHEST_XRAY names their folder (with labels.csv in it)."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fpt_lightning import Predictor
from fpt_lightning.cli import main
from fpt_lightning.data.images import ImageReader
from fpt_lightning.data.transforms import resize
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.deployment.export import Classifier, export
from fpt_lightning.evaluation.predictions import Predictions

ROOT = os.environ.get("FPT_CHEST_XRAY", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROOT, reason="FPT_CHEST_XRAY does not name the folder of the real images"),
]


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


def test_chest_xrays(folder: Path) -> None:
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["best"]["test_auc"] > 0.5
    with (folder / "run" / "predict" / "predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 108


def test_predictor_and_onnx_on_chest_xrays(folder: Path) -> None:
    import onnxruntime

    predicted = Predictions.read(folder / "run" / "predict" / "predictions.csv")
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
    np.testing.assert_allclose(scores, same[0].numpy(), atol=1e-4)
    changed = np.abs(attention - same[1].numpy()).max((1, 2)) > 1e-6
    assert changed.mean() < 0.05, "only ties for the last place of a head may go to the other token"

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
