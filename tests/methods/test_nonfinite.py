"""Outputs that are not finite are refused by image, wherever a model answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from fpt_lightning import Predictor, PreloadedFeatureDataModule
from fpt_lightning.deployment.export import export
from fpt_lightning.errors import NonFiniteError
from fpt_lightning.methods import FPTPlusModule
from small import SHALLOW, quiet_trainer, save_trained, tiny_model

MakeData = Callable[..., PreloadedFeatureDataModule]


class Diverge(L.Callback):
    """What too large a learning rate does, in the second epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.current_epoch == 1:
            torch.nn.init.constant_(pl_module.side.head.bias, float("nan"))  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "ordinal", "coral", "regression"])
def test_a_fit_that_diverges(task: str, tiny_data: MakeData, image_root: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    rows = [f"{name}/{i:03d}.png,{label},{label}" for label, name in enumerate("abc") for i in range(10)]
    if task == "multilabel":
        rows = [f"{name}/{i:03d}.png,{i % 2},{label % 2}" for label, name in enumerate("abc") for i in range(10)]
    table.write_text("\n".join(["image,label,other", *rows]) + "\n")
    changes: dict[str, Any] = {"manifest": str(table)}
    if task == "multilabel":
        changes["label_column"] = ["label", "other"]
    classes = {"multilabel": 2, "regression": 1}.get(task, 3)
    data, model = tiny_data(**changes), tiny_model(task=task, num_classes=classes)
    data.preload(model, quiet_trainer(tmp_path))
    with pytest.raises(NonFiniteError, match=r"outputs for \w/\d+\.png are not finite after \d+ steps \(epoch 1\)"):
        quiet_trainer(tmp_path, max_epochs=3, callbacks=[Diverge()]).fit(model, data)


def test_a_checkpoint_that_diverged(tiny_data: MakeData, image_root: Path, tmp_path: Path) -> None:
    data, model = tiny_data(), tiny_model()
    data.preload(model, quiet_trainer(tmp_path))
    trainer = quiet_trainer(tmp_path)
    trainer.fit(model, data)
    torch.nn.init.constant_(model.side.head.weight, 3e38)  # finite, other than what comes of it
    path = tmp_path / "infinite.ckpt"
    trainer.save_checkpoint(path)
    for stage in (trainer.validate, trainer.test):
        with pytest.raises(NonFiniteError, match=r"outputs for \w/\d+\.png are not finite, with the checkpoint .*inf"):
            stage(model, datamodule=data, ckpt_path=str(path))
    with pytest.raises(NonFiniteError, match="are not finite"):
        trainer.predict(model, datamodule=data, ckpt_path=str(path))
    with pytest.raises(NonFiniteError, match=r"outputs for a/000\.png are not finite"):
        Predictor(path)(image_root)


def test_nothing_is_exported_that_is_not_finite(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="comes with a torch that exports")
    path = save_trained(FPTPlusModule, tmp_path / "a.ckpt", (64, 64), encoder=SHALLOW, side_resolution=32)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["side.head.weight"].fill_(3e38)
    torch.save(checkpoint, path)
    with pytest.raises(NonFiniteError, match="are not finite"):
        export(ckpt_path=str(path), out=str(tmp_path / "m.pt2"), format="torch")
    assert not list(tmp_path.glob("*.pt2"))
