"""Memory: counted, and predicted on fake tensors, for every method."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from cases import CASES, make
from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.cli.callbacks import PeakMemory
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods import ClassificationModule, FPTPlusModule
from fpt_lightning.methods.tuning import EncoderModule
from fpt_lightning.planning.memory import Attention, LiveTensorBytes, Precision, TrainingStep, example_batch
from fpt_lightning.planning.memory import predict_training_memory as predict
from fpt_lightning.store.codecs import CODECS
from small import SHALLOW, quiet_trainer

RESOLUTION = (128, 96)


def real(name: str, precision: Precision, attention: Attention, **changes: Any) -> int:
    module = make(name, **changes)
    if isinstance(module, EncoderModule):
        module.build(RESOLUTION)
    return TrainingStep(module, example_batch(module, RESOLUTION, 8), precision, attention).live_bytes()


def test_live_bytes_count_every_storage_once_until_it_is_freed() -> None:
    before = torch.ones(100)
    with LiveTensorBytes() as live:
        live.count([before, {"again": before.view(10, 10)}])
        assert live.current == 400
        a = torch.zeros(1000)
        view = a[:10].view(2, 5)
        assert live.current == 4400
        b = a + 1
        assert live.peak == live.current == 8400
        del a, view
        assert live.current == 4400
        c = torch.zeros(500, dtype=torch.float16)
        assert (live.current, live.peak) == (5400, 8400)
        del b, c
    assert live.current == 400


@pytest.mark.parametrize("attention", ["fused", "eager"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_what_a_real_step_takes(name: str, precision: Precision, attention: Attention) -> None:
    predicted = predict(lambda: make(name, encoder=SHALLOW), RESOLUTION, 8, precision=precision, attention=attention)
    assert predicted == pytest.approx(real(name, precision, attention, encoder=SHALLOW), rel=0.01)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if issubclass(case.method, EncoderModule)])
def test_a_prediction_with_gradient_checkpointing(name: str) -> None:
    if name == "linear":
        pytest.skip("linear probing keeps nothing for a backward pass")
    saving = {"gradient_checkpointing": True}
    predicted = predict(lambda: make(name, **saving), RESOLUTION, 8)
    assert predicted == pytest.approx(real(name, "32-true", "fused", **saving), rel=0.01)
    assert predicted < 0.8 * predict(lambda: make(name), RESOLUTION, 8)


@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_what_a_run_reports(
    name: str, tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path
) -> None:
    """Lightning's loop, its optimiser and this package's callback; on 8 images of 64 pixels a batch."""
    module, data = make(name, encoder=SHALLOW), tiny_data()
    if data.uses_store(module):
        data.preload(module, quiet_trainer(tmp_path))
    reported: dict[str, float] = {}

    class Report(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            reported.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    quiet_trainer(tmp_path, callbacks=[PeakMemory(), Report()], limit_train_batches=2).fit(module, data)
    predicted = predict(lambda: make(name, encoder=SHALLOW), (64, 64), 8)
    assert predicted / 2**20 == pytest.approx(reported["train_peak_live_mib"], rel=0.05)


def test_eager_attention_keeps_its_maps() -> None:
    tokens, heads, depth = 1 + 8 * 6, 2, 6
    maps = 4 * 8 * heads * tokens**2 * depth
    more = predict(lambda: make("full"), RESOLUTION, 8, attention="eager") - predict(
        lambda: make("full"), RESOLUTION, 8
    )
    assert 0.9 * maps < more < 1.5 * maps  # fused attention keeps a number a query instead


def test_memory_falls_with_what_learns() -> None:
    taken = [predict(lambda name=name: make(name), RESOLUTION, 8) for name in ("full", "lora", "linear")]
    assert taken == sorted(taken, reverse=True)


def test_a_prediction_reads_no_weights_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    predict(lambda: make("full", pretrained="nowhere.pth"), RESOLUTION, 8)
    assert torch.equal(state, torch.get_rng_state())


def test_a_resolution_that_patches_do_not_divide() -> None:
    for name in ("fpt_plus", "lora"):
        with pytest.raises(ConfigurationError, match="resolution 100 x 96 is not a multiple of the patch size"):
            predict(lambda name=name: make(name), (100, 96), 8)


def test_fpt_plus_takes_a_fraction_of_the_published_memory() -> None:
    """The paper's setting on ViT-B; the published code takes 344.7 MiB."""

    def mib(codec: str, prompt_head: bool = False, **changes: bool) -> float:
        options: dict[str, Any] = {"encoder": "vit_base_patch16_224.augreg_in21k", **changes}
        method = partial(FPTPlusModule, 5, prompt_head=prompt_head, **options)
        return predict(method, (512, 512), 16, codec=codec) / 2**20

    assert mib("int8") < 93
    assert mib("int8", prompt_head=True) < 94
    assert mib("int8", gradient_checkpointing=True) < 57
    assert mib("int4", gradient_checkpointing=True) < 43


@pytest.mark.parametrize(
    ("codec", "batch_size", "resolution", "saving"),
    [
        *((codec, 8, 128, True) for codec in CODECS),  # the blocks of the side network
        ("int4", 16, 128, False),
        *((codec, 3, 1536, True) for codec in CODECS),  # stored tokens, widened
        ("int4", 1, 2048, False),
        ("int8", 7, 1536, True),  # in pieces of which the last is smaller
    ],
)
def test_a_prediction_whatever_takes_most(codec: str, batch_size: int, resolution: int, saving: bool) -> None:
    """A block of the side network, the tokens of one or of several pieces, or the optimiser."""

    def method() -> ClassificationModule:
        return make("fpt_plus", gradient_checkpointing=saving)

    module, size = method(), (resolution, resolution)
    real = TrainingStep(module, example_batch(module, size, batch_size, codec=codec)).live_bytes()
    assert predict(method, size, batch_size, codec=codec) == pytest.approx(real, rel=0.01)


# The benchmarks


def test_the_memory_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some methods in every variant on a small encoder; the paper's figures are those of its tables 1 and 2."""
    benchmark = importlib.import_module("memory_by_resolution")
    monkeypatch.setattr("environment.RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "DOCS", tmp_path)
    monkeypatch.setattr(benchmark, "ENCODERS", {"ViT-B": SHALLOW})
    some = {name: benchmark.METHODS[name] for name in ("Linear probing", "LoRA", "FPT+", "Attentive probing, stored")}
    assert len(benchmark.METHODS) == 13
    monkeypatch.setattr(benchmark, "METHODS", some)
    benchmark.main(["--resolutions", "64", "128", "--encoders", "ViT-B"])
    result = json.loads((tmp_path / "memory_by_resolution.json").read_text())
    assert len(result["cells"]) == 2 * (4 * 3 + 1)
    assert all(cell["bytes"]["live"] > 0 for cell in result["cells"])
    table = (tmp_path / "memory_by_resolution.md").read_text()
    assert table.count("| FPT+ |") == 4  # the paper's row, and three variants: it has nothing to recompute
    assert "| FPT+ | 736 |" in table
    assert table.count("| LoRA |") == 5
    assert (tmp_path / "memory_by_resolution.png").read_bytes().startswith(b"\x89PNG")
    assert benchmark.PAPER["ViT-L", "Full fine-tuning"][384] == 26470


def test_the_training_step_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small encoder, beside a stand-in that is no more than a linear layer."""
    benchmark = importlib.import_module("training_step")
    monkeypatch.setattr("environment.RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "ENCODER", SHALLOW)
    monkeypatch.setattr(benchmark, "CODECS", ("int8", "int4"))
    monkeypatch.setattr(benchmark, "BATCHES", (1, 4, 8))
    monkeypatch.setattr(benchmark, "RESOLUTIONS", (384, 512, 640))
    (tmp_path / "published_step.py").write_text(
        "import torch\n"
        "def published_step():\n"
        "    model, batch = torch.nn.Linear(1000, 1000), (torch.ones(16, 1000),)\n"
        "    optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        "    def step():\n"
        "        optimizer.zero_grad()\n"
        "        model(*batch).sum().backward()\n"
        "    return step, model, optimizer, batch\n"
    )
    benchmark.main(["--published", str(tmp_path), "--rounds", "1"])
    result = json.loads((tmp_path / "training_step.json").read_text())
    assert len(result["steps"]) == 4
    for row in result["steps"]:
        assert row["bytes"] == pytest.approx(row["bytes_predicted"], rel=0.01)
    weights = 4 * 1000 * 1001
    assert 2 * weights < result["published"]["bytes"] < 2.2 * weights
    assert result["growth"]["int8"]["batch"]["8"] > result["growth"]["int8"]["batch"]["1"]
    assert "| **int8** |" in (tmp_path / "training_step.md").read_text()
