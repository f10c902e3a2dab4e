"""Memory that is counted, parameters that are reported, files that are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist

from fpt_lightning import ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.cli.callbacks import (
    EpochSeconds,
    LearnableParameters,
    PeakMemory,
    ResultsWriter,
    ShardedEncoder,
    write_confusion,
)
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.evaluation.predictions import Predictions
from small import quiet_trainer, tiny_model

DataMaker = Callable[..., PreloadedFeatureDataModule]


def test_peak_memory_of_a_step_is_logged_and_the_same_each_time(tiny_data: DataMaker, tmp_path: Path) -> None:
    peaks = []
    for run in range(2):
        data, module = tiny_data(), tiny_model()
        data.preload(module, quiet_trainer(tmp_path))
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[PeakMemory()])
        torch.manual_seed(run)
        trainer.fit(module, data)
        peaks.append(float(trainer.callback_metrics["train_peak_live_mib"]))
        assert trainer.callback_metrics["peak_resident_mib"] > 100
        trainer.test(module, data, verbose=False)
        assert 0 < trainer.callback_metrics["test_peak_live_mib"] < peaks[-1]
    learnable = sum(p.numel() for p in module.parameters())
    assert peaks[0] == peaks[1]
    assert 4 * 4 * learnable / 2**20 < peaks[0] < 20  # parameters, gradients, two moments; and the batch of 8


def test_a_live_encoder_counts(tiny_data: DataMaker, image_root: Path, tmp_path: Path) -> None:
    stored, live = tiny_data(), ImageDataModule(str(image_root), resolution=64, mean=[0.4], std=[0.2], image_size=48)
    stored.preload(tiny_model(), quiet_trainer(tmp_path))
    peaks = []
    for data in (stored, live):
        module = tiny_model()
        trainer = quiet_trainer(tmp_path, callbacks=[PeakMemory()])
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        peaks.append(float(trainer.callback_metrics["test_peak_live_mib"]))
    (encoder,) = module.encoders
    weights = 4 * sum(p.numel() for p in encoder.parameters()) / 2**20
    assert peaks[1] > peaks[0] + weights


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one, in which an encoder is divided as among several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this PyTorch divides modules of GPUs alone")
@pytest.mark.usefixtures("one_process")
def test_every_block_of_a_divided_encoder_is_divided_again_after_use() -> None:
    from torch.distributed.tensor import DTensor

    images = torch.randn(2, 3, 64, 64)
    expected = FrozenEncoder(EncoderConfig("test_vit", False, (1, 3)), (64, 64))(images)
    module = tiny_model(layers=[1, 3])
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(resolution=(64, 64)), world_size=1, strategy=strategy)
    ShardedEncoder().setup(trainer, module, "predict")
    assert all(torch.equal(a, b) for a, b in zip(module.encode(images), expected, strict=True))
    (encoder,) = module.encoders
    assert [all(isinstance(p, DTensor) for p in block.parameters()) for block in encoder.model.blocks] == [True] * 4


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_a_process_with_fewer_batches_runs_a_divided_encoder_as_often(stage: str) -> None:
    """Here twice a batch, as with mirror images: 2 batches, where another process has 5."""
    module, batches, passes = tiny_model(), [2], list[int]()
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(resolution=(64, 64)),
        strategy=SimpleNamespace(reduce=lambda own, reduce_op: {"max": own + 3}[reduce_op]),
        sanity_checking=False,
        num_val_batches=batches,
        num_test_batches=batches,
        num_predict_batches=batches,
    )
    module.use_encoder(FrozenEncoder(module.encoder_config, (64, 64)))
    callback = ShardedEncoder()
    callback.setup(trainer, module, stage)
    module.encoders[0].register_forward_hook(lambda m, images, out: passes.append(len(images[0])))
    for _ in range(2):  # epochs
        passes.clear()
        getattr(callback, f"on_{stage}_start")(trainer, module)
        for batch_idx in range(2):
            assert len(passes) == 2 * batch_idx
            module.encode(torch.zeros(4, 3, 64, 64))
            module.encode(torch.zeros(4, 3, 64, 64))
            getattr(callback, f"on_{stage}_batch_end")(trainer, module, None, None, batch_idx)
        assert passes == [4] * 4 + [1] * 6


def test_an_epochs_seconds_leave_out_its_validation(tiny_data: DataMaker, tmp_path: Path) -> None:
    class Slow(L.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            time.sleep(1)

        def on_train_batch_start(self, *_: Any) -> None:
            time.sleep(0.1)

    data, module = tiny_data(), tiny_model()
    data.preload(module, quiet_trainer(tmp_path))
    trainer = quiet_trainer(tmp_path, callbacks=[EpochSeconds(), Slow()])
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = float(trainer.callback_metrics["epoch_seconds"])
    assert 0.3 < seconds < time.perf_counter() - start - 1  # 3 steps; a sanity check and a validation of a batch each


def test_the_learnable_share_is_said(tiny_data: DataMaker, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    data, module = tiny_data(), tiny_model()
    data.preload(module, quiet_trainer(tmp_path))
    quiet_trainer(tmp_path, callbacks=[LearnableParameters()]).fit(module, data)
    learnable = sum(p.numel() for p in module.parameters())
    total = learnable + module.encoder_shape.parameters
    assert f"learnable parameters: {learnable:,}; {100 * learnable / total:.2f}% of the total {total:,}" in said.text


def test_results_serve_a_foreign_trainer(tiny_data: DataMaker, tmp_path: Path) -> None:
    data, module = tiny_data(), tiny_model()
    data.preload(module, quiet_trainer(tmp_path))
    trainer = quiet_trainer(tmp_path / "run", callbacks=[ResultsWriter()])
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert (tmp_path / "run" / "test" / "model" / "metrics.json").is_file()
    trainer.predict(module, data, return_predictions=False)
    assert len((tmp_path / "run" / "predict" / "model" / "predictions.csv").read_text().splitlines()) == 31


def test_the_confusion_matrix_has_true_classes_in_rows(tmp_path: Path) -> None:
    scores = np.array([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.2, 0.8]])
    labels = np.array([0, 1, -1, 0])
    write_confusion(tmp_path, Predictions("single-label", tuple("abcd"), labels, scores, ("no", "yes")))
    assert (tmp_path / "confusion_matrix.csv").read_text() == "true \\ predicted,no,yes\nno,1,1\nyes,1,0\n"
    assert (tmp_path / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion_matrix.csv", "confusion_matrix.png"]
