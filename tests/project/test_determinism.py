"""``trainer.deterministic: true``: nothing that runs has no deterministic form on a GPU, as PyTorch documents it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import CASES, make
from fpt_lightning import ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.cli.trainer import Trainer
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.methods import AdaLoRAModule, ClassificationModule, FineTuningModule
from fpt_lightning.methods.tasks import TASKS
from nondeterminism import Refused
from reference import FAMILIES
from small import CLASSES, data_for, quiet_trainer, tiny_model

DataMaker = Callable[..., PreloadedFeatureDataModule]


@pytest.fixture(autouse=True)
def _flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What such a trainer sets for the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    yield
    torch.use_deterministic_algorithms(False)


def learned(result: Tensor) -> None:
    result.sum().backward()


def some(*shape: int) -> Tensor:
    return torch.rand(*shape, requires_grad=True)


DOCUMENTED: dict[str, Callable[[], Any]] = {
    "AvgPool3d": lambda: learned(nn.AvgPool3d(2)(some(1, 1, 4, 4, 4))),
    "AdaptiveAvgPool2d": lambda: learned(nn.AdaptiveAvgPool2d(2)(some(1, 1, 5, 5))),
    "AdaptiveAvgPool3d": lambda: learned(nn.AdaptiveAvgPool3d(2)(some(1, 1, 5, 5, 5))),
    "MaxPool3d": lambda: learned(nn.MaxPool3d(2)(some(1, 1, 4, 4, 4))),
    "AdaptiveMaxPool2d": lambda: learned(nn.AdaptiveMaxPool2d(2)(some(1, 1, 5, 5))),
    "FractionalMaxPool2d": lambda: learned(nn.FractionalMaxPool2d(2, 2)(some(1, 1, 5, 5))),
    "FractionalMaxPool3d": lambda: learned(nn.FractionalMaxPool3d(2, 2)(some(1, 1, 5, 5, 5))),
    "MaxUnpool1d": lambda: nn.MaxUnpool1d(2)(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)),
    "MaxUnpool2d": lambda: nn.MaxUnpool2d(2)(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.long)),
    "MaxUnpool3d": lambda: nn.MaxUnpool3d(2)(torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, dtype=torch.long)),
    "linear": lambda: learned(F.interpolate(some(1, 1, 4), 3, mode="linear")),
    "bilinear": lambda: learned(F.interpolate(some(1, 1, 4, 4), 3, mode="bilinear")),
    "bilinear, antialias": lambda: learned(F.interpolate(some(1, 1, 4, 4), 3, mode="bilinear", antialias=True)),
    "bicubic": lambda: learned(F.interpolate(some(1, 1, 4, 4), 3, mode="bicubic")),
    "bicubic, antialias": lambda: learned(F.interpolate(some(1, 1, 4, 4), 3, mode="bicubic", antialias=True)),
    "trilinear": lambda: learned(F.interpolate(some(1, 1, 4, 4, 4), 3, mode="trilinear")),
    "ReflectionPad1d": lambda: learned(nn.ReflectionPad1d(1)(some(1, 1, 4))),
    "ReflectionPad2d": lambda: learned(nn.ReflectionPad2d(1)(some(1, 1, 4, 4))),
    "ReflectionPad3d": lambda: learned(nn.ReflectionPad3d(1)(some(1, 1, 4, 4, 4))),
    "ReplicationPad1d": lambda: learned(nn.ReplicationPad1d(1)(some(1, 1, 4))),
    "ReplicationPad3d": lambda: learned(nn.ReplicationPad3d(1)(some(1, 1, 4, 4, 4))),
    "NLLLoss": lambda: nn.NLLLoss()(some(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)),
    "CTCLoss": lambda: learned(
        nn.CTCLoss()(
            some(4, 1, 3).log_softmax(-1), torch.ones(1, 2, dtype=torch.long), torch.tensor([4]), torch.tensor([2])
        )
    ),
    "EmbeddingBag": lambda: learned(nn.EmbeddingBag(3, 2, mode="max")(torch.tensor([[0, 1]]))),
    "put_": lambda: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)),
    "histc": lambda: torch.rand(4).histc(2),
    "bincount": lambda: torch.bincount(torch.tensor([0, 1]), torch.rand(2)),
    "kthvalue": lambda: torch.rand(4).kthvalue(2),
    "median": lambda: torch.rand(4).median(0),
    "nanmedian": lambda: torch.rand(4).nanmedian(0),
    "grid_sample": lambda: learned(F.grid_sample(some(1, 1, 4, 4), torch.zeros(1, 2, 2, 2), align_corners=False)),
    "cumsum": lambda: torch.rand(4).cumsum(0),
    "scatter_reduce": lambda: torch.ones(3).scatter_reduce(0, torch.tensor([0]), torch.ones(1), "prod"),
}
"""Of the documentation in torch 2.6 and 2.14, all but quantised tensors."""


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_is_documented_is_found(name: str) -> None:
    with Refused() as found:
        DOCUMENTED[name]()
    assert found.names


def test_what_has_a_deterministic_form_is_let_through() -> None:
    """Among it what shares a name with what has none."""
    with Refused() as found:
        torch.rand(4).median()
        torch.arange(4).cumsum(0)
        torch.bincount(torch.arange(4))
        torch.ones(3).scatter_reduce(0, torch.tensor([0]), torch.ones(1), "sum")
        learned(nn.CrossEntropyLoss()(some(2, 3), torch.tensor([0, 1])))
        learned(some(4)[torch.tensor([0, 0])])
    assert found.calls > 6
    assert not found.names


def trained(model: ClassificationModule, data: ImageDataModule, folder: Path, evaluate: bool) -> Refused:
    """The frozen pass, training and validation; test and prediction, whose steps are validation's, where wanted."""

    settings = {"deterministic": True, "limit_train_batches": 4, "limit_val_batches": 1, "limit_test_batches": 1}
    with Refused() as found:
        if isinstance(data, PreloadedFeatureDataModule) and data.uses_store(model):
            data.preload(model, quiet_trainer(folder, **settings))
        trainer = quiet_trainer(folder, **settings, limit_predict_batches=1)
        trainer.fit(model, data)
        if evaluate:
            trainer.test(model, data, verbose=False)
            trainer.predict(model, data)
    assert torch.are_deterministic_algorithms_enabled()
    assert found.calls > 500
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_method(name: str, tiny_data: DataMaker, tmp_path: Path) -> None:
    model = make(name)
    assert not trained(model, tiny_data(batch_size=5), tmp_path, evaluate=False).names
    if isinstance(model, AdaLoRAModule):
        assert max(model.ranks.values()) > min(model.ranks.values())  # it has allocated


@pytest.mark.parametrize("task", TASKS)
def test_every_task(task: str, tiny_data: DataMaker, image_root: Path, tmp_path: Path) -> None:
    data = data_for(task, tiny_data, image_root, orientations=8)
    balanced = {} if task in ("coral", "regression") else {"class_weights": "balanced"}
    model = tiny_model(num_classes=CLASSES[task], task=task, test_time_orientations=8, prompt_head=True, **balanced)
    assert not trained(model, data, tmp_path, evaluate=True).names


def test_explanations(tiny_data: DataMaker, tmp_path: Path) -> None:
    data, model = tiny_data(batch_size=2), tiny_model()
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "limit_predict_batches": 1}
    trainer = Trainer(accelerator="cpu", deterministic=True, **settings)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with Refused() as found:
        trainer.explain(model, data, str(tmp_path / "out"), images=1, deletion=True, ckpt_path=str(tmp_path / "a.ckpt"))
    assert not found.names


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_encoders(family: str) -> None:
    """In the frozen pass, and where all of it learns."""
    model = FineTuningModule(3, encoder=FAMILIES[family], pretrained=False)
    patch = model.encoder_shape.patch_size
    resolution = (3 * patch[0], 2 * patch[1])
    model.build(resolution)
    encoder = FrozenEncoder(EncoderConfig(FAMILIES[family], pretrained=False), resolution)
    images = torch.randn(2, 3, *resolution)
    with Refused() as found:
        encoder(images)
        learned(model({"images": images}))
    assert not found.names
