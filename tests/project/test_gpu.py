"""What only a CUDA device can show, and its command (``nox -s gpu``), run here on the CPU."""

from __future__ import annotations

import importlib
import json
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.data.device_views import DeviceViews
from fpt_lightning.deployment.predictor import Predictor
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from small import quiet_trainer, tiny_model, write_images

SETTINGS: dict[str, Any] = {"resolution": 64, "mean": [0.4], "std": [0.2], "image_size": 48, "batch_size": 4}


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device("cuda")


@pytest.fixture
def data(tmp_path: Path) -> PreloadedFeatureDataModule:
    images = write_images(tmp_path / "images", {"a": 10, "b": 10, "c": 10})
    return PreloadedFeatureDataModule(str(images), str(tmp_path / "store.zarr"), **SETTINGS)


@pytest.mark.gpu
def test_the_encoder_gives_what_it_gives_on_the_cpu(cuda: torch.device) -> None:
    encoder, images = FrozenEncoder(EncoderConfig("test_vit", pretrained=False), (64, 64)), torch.rand(4, 3, 64, 64)
    here = encoder(images)
    there = encoder.to(cuda)(images.to(cuda))
    assert torch.equal(here.indices, there.indices.cpu())
    torch.testing.assert_close(there.features.cpu(), here.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(there.pooled.cpu(), here.pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_views_of_a_batch_are_those_of_the_cpu(cuda: torch.device) -> None:
    views = DeviceViews(32, 64, True, (0.4,), (0.2,), 0)
    images, numbers = (
        torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8),
        views.numbers([(0, i) for i in range(8)]),
    )
    torch.testing.assert_close(
        views(images.to(cuda), numbers.to(cuda)).cpu(), views(images, numbers), rtol=0, atol=1e-4
    )


@pytest.mark.gpu
def test_building_an_encoder_leaves_the_generators_as_they_are(cuda: torch.device) -> None:
    torch.rand(1, device=cuda)
    before = torch.cuda.get_rng_state(cuda)
    FrozenEncoder(EncoderConfig("test_vit", pretrained=False), (64, 64))
    assert torch.equal(torch.cuda.get_rng_state(cuda), before)


@pytest.mark.gpu
def test_fit_and_predict_leave_nothing_on_the_device(
    cuda: torch.device, data: PreloadedFeatureDataModule, tmp_path: Path
) -> None:
    model = tiny_model()
    data.preload(model, quiet_trainer(tmp_path, accelerator="cuda"))
    L.seed_everything(0)
    quiet_trainer(tmp_path, accelerator="cuda", precision="bf16-mixed").fit(model, data)
    quiet_trainer(tmp_path, accelerator="cuda").predict(model, data)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < 16 * 2**20  # cuBLAS keeps a workspace


@pytest.mark.gpu
def test_threads_share_a_predictor(cuda: torch.device, data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    model, trainer = tiny_model(), quiet_trainer(tmp_path, accelerator="cuda", max_epochs=1)
    data.preload(model, trainer)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    predictor = Predictor(tmp_path / "model.ckpt", device="cuda")
    paths = sorted((tmp_path / "images").rglob("*.png"))[:8]
    alone, found = [predictor(path).scores.tolist() for path in paths], dict[int, Any]()

    def predict(number: int) -> None:
        found[number] = predictor(paths[number]).scores.tolist()

    threads = [threading.Thread(target=predict, args=(number,)) for number in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(paths))] == alone


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize(
    "chosen", [("attention", "frozen_pass", "pinned_memory", "marked_tests"), pytest.param((), marks=pytest.mark.slow)]
)
def test_the_checks_of_a_gpu_run_without_one(
    chosen: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as they can, on tiny sizes, all of them with ``-m slow``; what fails or is left out stops no other."""
    checks = importlib.import_module("gpu_check")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # which takes a minute

    def broken(bench: Any) -> dict[str, Any]:
        raise ValueError("broken")

    monkeypatch.setitem(checks.CHECKS, "broken", broken)
    options = ("--trainer.max_epochs", "1", "--data.count", "60")
    bench = checks.Bench(tmp_path, "test_vit", None, 64, 32, 60, 4, ("test_vit", 96), options)
    names = ["broken", *(chosen or (name for name in checks.CHECKS if name not in ("broken", "quickstart")))]
    assert checks.run(bench, names) == 1
    outcomes = {
        name: told["outcome"] for name, told in json.loads((tmp_path / "gpu_check.json").read_text())["checks"].items()
    }
    assert outcomes.pop("broken") == "failed"
    without = dict.fromkeys(("marked_tests", "pinned_memory"), "not done")
    assert outcomes == dict.fromkeys(names[1:], "passed") | without
    table = (tmp_path / "gpu_check.md").read_text()
    assert "| broken | failed | 0 | ValueError: broken |" in table
    assert "| pinned memory | not done | 0 | needs a GPU |" in table
