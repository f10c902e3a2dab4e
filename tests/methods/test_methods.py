"""FPT+ as a LightningModule: what learns, what stays frozen, checkpoints, seeds, resuming, precision."""

from __future__ import annotations

import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fpt_lightning import FPTPlusModule, ImageDataModule, PreloadedFeatureDataModule, methods
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.errors import CheckpointError, ConfigurationError, EncoderError
from fpt_lightning.methods import FPTModule, QueryTokensModule
from small import ROOT, TINY, quiet_trainer, tiny_model, write_images

DataMaker = Callable[..., PreloadedFeatureDataModule]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of all tests, beside which their store stands."""
    return write_images(tmp_path_factory.mktemp("methods") / "images", {"a": 10, "b": 10, "c": 10})


@pytest.fixture
def data(tiny_data: DataMaker, image_root: Path) -> PreloadedFeatureDataModule:
    """A preloaded data module whose store is complete, in fp32."""
    made = tiny_data(codec="fp32", store=str(image_root.parent / "store.zarr"))
    made.preload(tiny_model(), quiet_trainer(image_root.parent))
    return made


@pytest.fixture
def checkpoint(data: PreloadedFeatureDataModule, image_root: Path) -> Path:
    """Of ``tiny_model()`` after an epoch; written once."""
    path = image_root.parent / "model.ckpt"
    if not path.exists():
        trainer = quiet_trainer(image_root.parent)
        trainer.fit(tiny_model(), data)
        trainer.save_checkpoint(path)
    return path


def live_twin(data: PreloadedFeatureDataModule, **changes: Any) -> ImageDataModule:
    settings: dict[str, Any] = {
        "root": data.root,
        "resolution": 64,
        "mean": [0.4],
        "std": [0.2],
        "image_size": 48,
        "batch_size": 8,
    }
    return ImageDataModule(**{**settings, **changes})


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [(4, 845_669), (8, 864_101), (16, 900_965), (32, 974_693), (64, 1_122_149), (128, 1_417_061)],
)
def test_learnable_parameters_are_the_papers(prompts: int, expected: int) -> None:
    module = FPTPlusModule(5, encoder="vit_base_patch16_384", pretrained=False, prompts=prompts, prompt_head=False)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == expected
    assert module.encoder_shape.parameters == 86_859_496
    paper = {4: 0.96, 8: 0.99, 16: 1.03, 32: 1.11, 64: 1.28, 128: 1.61}  # table 4
    assert round(100 * module.learnable_ratio, 2) == paper[prompts]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_have_their_methods_own_learning_rate(path: Path) -> None:
    model = yaml.safe_load(path.read_text())["model"]
    module = getattr(methods, model["class_path"])(3, encoder="test_vit", pretrained=False)
    assert model["init_args"].get("learning_rate", module.learning_rate) == module.learning_rate
    assert module.hparams["learning_rate"] == module.learning_rate


def test_a_checkpoint_of_a_subclass_says_what_it_was_made_with() -> None:
    """What was given, and what was found in its place."""
    module = FPTModule(3, encoder="test_vit", pretrained=False, side_resolution=None, warmup_epochs=2)
    assert module.hparams["side_resolution"] == 224
    assert (module.hparams["prompt_head"], module.hparams["warmup_epochs"]) == (False, 2)


# The prompts' own head


def test_with_a_prompt_head_training_starts_as_query_tokens(data: PreloadedFeatureDataModule) -> None:
    """And goes on from there: the side network learns from the second step on, its head from the first."""
    torch.manual_seed(0)
    module = tiny_model(reduction=2).eval()
    peer = QueryTokensModule(3, encoder="test_vit", pretrained=False, reduction=2, prompts=4).eval()
    assert module.prompt_head is not None
    peer.load_state_dict(
        {f"fusion.{k}": v for k, v in module.fusion.state_dict().items()}
        | {f"head.{k}": v for k, v in module.prompt_head.state_dict().items()}
    )
    data.side_resolution = 32
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(module(batch), peer(batch))
    for step in range(2):
        before = state(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        optimizer.zero_grad()
        module.task.loss(module(batch), batch["labels"]).backward()
        optimizer.step()
        changed = {name for name, value in state(module).items() if not torch.equal(value, before[name])}
        assert {"side.head.weight", "prompt_head.weight", "fusion.prompts"} <= changed
        assert ("side.positions" in changed) == bool(step)


def test_a_prompt_head_costs_as_many_parameters_as_it_has_numbers_to_read() -> None:
    module = FPTPlusModule(5, encoder="vit_base_patch16_384", pretrained=False)
    assert module.learnable_parameters == 900_965 + 5 * (6 * 16 * 96 + 1)
    assert round(100 * module.learnable_ratio, 2) == 1.08


def test_a_checkpoint_from_before_an_option_is_one_without_it(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(tiny_model(prompt_head=False), data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    del content["hyper_parameters"]["prompt_head"]
    tiny_model(prompt_head=False).on_load_checkpoint(content)
    with pytest.raises(CheckpointError, match="prompt_head: None in the checkpoint, True here"):
        tiny_model().on_load_checkpoint(content)
    torch.save(content, tmp_path / "model.ckpt")
    loaded, _ = load_trained(tmp_path / "model.ckpt")
    assert isinstance(loaded, FPTPlusModule)
    assert loaded.prompt_head is None


def test_building_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the encoder was built")

    monkeypatch.setattr(FrozenEncoder, "__init__", fail)
    FPTPlusModule(3, encoder="vit_large_patch16_224", pretrained=True)
    FPTPlusModule(3, encoder="vit_base_patch16_224", pretrained="nowhere.safetensors")


def test_fit_on_a_finished_store_never_builds_the_encoder(
    data: PreloadedFeatureDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the encoder was built")

    monkeypatch.setattr(FrozenEncoder, "__init__", fail)
    module = tiny_model()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)


def test_every_parameter_learns(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    module = tiny_model(learning_rate=1e-2)
    before = state(module)
    quiet_trainer(tmp_path).fit(module, data)
    after = state(module)
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_live_and_preloaded_give_the_same_logits(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    module = tiny_model().eval()
    with torch.no_grad():
        module.fusion.prompts.normal_()  # so that the stored tokens matter
    live = live_twin(data, side_resolution=32)
    stored = data
    stored.side_resolution = 32
    stored.setup("test")
    live.setup("test")
    for a, b in zip(stored.test_dataloader(), live.test_dataloader(), strict=True):
        assert a["ids"] == b["ids"]
        assert torch.equal(a["side_images"], b["side_images"])
        with torch.no_grad():
            torch.testing.assert_close(module(a), module(b), rtol=1e-5, atol=1e-5)
            a["features"] = a["features"].flip(0)
            assert not torch.allclose(module(a), module(b), atol=1e-4)


def test_the_live_encoder_stays_frozen(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    module = tiny_model()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, live_twin(data))
    (encoder,) = module.encoders
    fresh = FrozenEncoder(module.encoder_config, (64, 64))
    assert equal(state(encoder), state(fresh))
    module.train()
    assert not any(part.training for part in encoder.modules())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert not any(id(p) in held for p in encoder.parameters())
    assert not any(p.grad is not None for p in encoder.parameters())
    trainer.save_checkpoint(tmp_path / "live.ckpt", weights_only=True)
    assert (tmp_path / "live.ckpt").stat().st_size < 200_000  # 13,000 parameters, no encoder


def test_checkpoint_round_trip_under_weights_only(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    module = tiny_model()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, data)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    content = torch.load(path, weights_only=True)
    assert sum(v.numel() for v in content["state_dict"].values()) == sum(p.numel() for p in module.parameters())
    loaded = FPTPlusModule.load_from_checkpoint(path, weights_only=True)
    assert equal(state(loaded), state(module))
    assert loaded.class_names == ("a", "b", "c")
    assert loaded.specification == data.specification
    assert loaded.specification is not None
    assert loaded.specification.encoder == "test_vit"
    assert len(loaded.specification.weights_digest) == 64


def test_a_vit_b_checkpoint_is_small(tmp_path: Path) -> None:
    module = FPTPlusModule(5, encoder="vit_base_patch16_384", pretrained=False)
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert 3.78e6 < (tmp_path / "best.ckpt").stat().st_size < 3.88e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "test_vit2", "prompts": 4}, "encoder: 'test_vit' in the checkpoint, 'test_vit2' here"),
        ({"prompts": 8}, "prompts: 4 in the checkpoint, 8 here"),
        ({"layers": [4, 5]}, "layers: None in the checkpoint, [4, 5] here"),
        ({"token_ratio": 0.5}, "token_ratio: 0.2 in the checkpoint, 0.5 here"),
        ({"num_classes": 4}, "num_classes: 3 in the checkpoint, 4 here"),
        ({"prompt_head": False}, "prompt_head: True in the checkpoint, False here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(
    checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    other = tiny_model(**changes)
    with pytest.raises(CheckpointError) as caught:
        other.on_load_checkpoint(content)
    assert message in str(caught.value)


def test_a_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not written by a method of fpt-lightning"):
        tiny_model().on_load_checkpoint({"state_dict": {}})


def test_other_random_weights_are_refused_when_the_encoder_runs(
    data: PreloadedFeatureDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_model()
    quiet_trainer(tmp_path).fit(module, data)
    build = FrozenEncoder.__init__

    def changed(self: FrozenEncoder, *args: Any) -> None:
        build(self, *args)
        self.digest = "0" * 64

    monkeypatch.setattr(FrozenEncoder, "__init__", changed)
    with pytest.raises(CheckpointError, match="other weights of test_vit"):
        module.encode(torch.zeros(1, 3, 64, 64))


def test_data_of_other_classes_or_settings_are_refused(
    data: PreloadedFeatureDataModule, tmp_path: Path, image_root: Path
) -> None:
    module = tiny_model()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, data)
    with pytest.raises(CheckpointError, match=r"mean: \(0.4, 0.4, 0.4\), asked for \(0.3, 0.3, 0.3\)"):
        trainer.test(module, live_twin(data, mean=[0.3]), verbose=False)
    with pytest.raises(CheckpointError, match=r"resolution: \(64, 64\), asked for \(96, 96\)"):
        trainer.predict(module, live_twin(data, resolution=96))
    other = shutil.copytree(image_root, tmp_path / "other")
    (other / "c").rename(other / "d")
    with pytest.raises(CheckpointError, match=r"classes \['a', 'b', 'c'\], the data have \['a', 'b', 'd'\]"):
        trainer.test(module, live_twin(data, root=str(other)), verbose=False)


def run(data: PreloadedFeatureDataModule, folder: Path, *, epochs: int, workers: int = 0, **fit: Any) -> FPTPlusModule:
    """Fit with seed 7 for up to 4 epochs, of which ``epochs`` are done; the last checkpoint is ``folder/last.ckpt``."""
    L.seed_everything(7)
    fresh = PreloadedFeatureDataModule(
        data.root,
        data.url,
        codec="fp32",
        resolution=64,
        mean=[0.4],
        std=[0.2],
        image_size=48,
        batch_size=8,
        num_workers=workers,
    )

    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == epochs:
                raise KeyboardInterrupt

    module = tiny_model(learning_rate=1e-3)
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    callbacks = [last, *([Stop()] if epochs < 4 else [])]
    trainer = quiet_trainer(folder, max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
    if epochs < 4:
        with pytest.raises(SystemExit):
            trainer.fit(module, fresh, **fit)
    else:
        trainer.fit(module, fresh, **fit)
    return module


def test_one_seed_gives_the_same_weights_whatever_the_workers(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    first = run(data, tmp_path / "a", epochs=4)
    assert equal(state(first), state(run(data, tmp_path / "b", epochs=4)))
    assert equal(state(first), state(run(data, tmp_path / "c", epochs=4, workers=2)))
    L.seed_everything(8)
    assert not equal(state(first), state(tiny_model(learning_rate=1e-3)))


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (3, 1)])
def test_resuming_ends_as_not_stopping(
    data: PreloadedFeatureDataModule, tmp_path: Path, stop: int, workers: int
) -> None:
    whole = run(data, tmp_path / "whole", epochs=4)
    run(data, tmp_path / "part", epochs=stop, workers=workers)
    resumed = run(data, tmp_path / "part", epochs=4, workers=workers, ckpt_path=tmp_path / "part" / "last.ckpt")
    assert equal(state(whole), state(resumed))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precision(data: PreloadedFeatureDataModule, tmp_path: Path, precision: str) -> None:
    module = tiny_model()
    before = state(module)
    trainer = quiet_trainer(tmp_path, precision=precision)
    trainer.fit(module, data)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert not equal(before, state(module))
    assert 0 <= trainer.test(module, data, verbose=False)[0]["test_auc"] <= 1


def test_fp16_arithmetic_is_close_to_fp32(data: PreloadedFeatureDataModule) -> None:
    """``16-mixed`` needs CUDA to train; its autocast arithmetic runs on the CPU."""
    module = tiny_model().eval()
    data.side_resolution = 32
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        half = module(batch).float()
    with torch.no_grad():
        torch.testing.assert_close(half, module(batch), rtol=0.05, atol=0.02)


class Waits(TorchDispatchMode):
    """Keeps where an operation waits for the device, except in PyTorch's optimisers, whose counts are the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[list[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack()]
            if not any("/torch/optim/" in frame for frame in frames):
                self.places.append(frames)
        return func(*args, **(kwargs or {}))


def test_no_training_step_waits_for_the_device(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    """Up to the progress bar and the logger, but for the steps that the logger writes (``log_every_n_steps``)."""
    trainer = quiet_trainer(tmp_path, max_epochs=2, enable_progress_bar=True, logger=CSVLogger(tmp_path))
    with Waits() as waits:
        trainer.fit(tiny_model(), data)
    step = re.compile(r".*training_epoch_loop\.py:\d+ (advance|on_advance_end)$")
    in_steps = [frames for frames in waits.places if any(step.match(frame) for frame in frames)]
    assert not [frames for frames in in_steps if not any("evaluation_loop.py" in frame for frame in frames)]
    assert waits.places  # of the validation
    assert {"train_loss_step", "train_loss_epoch", "val_loss"} <= trainer.callback_metrics.keys()
    assert "train_loss_epoch" in trainer.progress_bar_metrics


def test_it_learns(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    L.seed_everything(0)
    module = tiny_model(learning_rate=3e-3)
    trainer = quiet_trainer(tmp_path, max_epochs=12)
    trainer.fit(module, data)
    assert trainer.test(module, data, verbose=False)[0]["test_auc"] == 1.0


def test_optimiser_and_schedule(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    rates: list[float] = []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = tiny_model(learning_rate=1e-3, weight_decay=0.05, betas=(0.8, 0.9), warmup_epochs=2)
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[Record()])
    trainer.fit(module, data)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["weight_decay"], optimizer.defaults["betas"]) == (0.05, (0.8, 0.9))
    steps, peak = len(rates), max(rates)
    assert peak == pytest.approx(1e-3)
    assert rates[0] == 0
    assert rates.index(peak) == steps // 2
    assert 0 < rates[-1] < 0.3 * peak


def test_class_weights(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    weights = [1.0, 2.0, 3.0]
    given = tiny_model(class_weights=weights).task.loss(logits, labels)
    torch.testing.assert_close(given, nn.functional.cross_entropy(logits, labels, torch.tensor(weights)))
    module = tiny_model(class_weights="balanced")
    quiet_trainer(tmp_path).fit(module, data)
    counts = data.labelled.class_counts("train")
    torch.testing.assert_close(module.task.weights, torch.tensor([sum(counts) / (3 * count) for count in counts]))
    assert not [name for name in module.state_dict() if name.startswith("task")]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 1}, ConfigurationError, "model.num_classes is 1"),
        ({"class_weights": [1.0, 2.0]}, ConfigurationError, "model.class_weights has 2 numbers for 3 classes"),
        ({"side_resolution": 40}, ConfigurationError, r"side_resolution 40 x 40 .* nearest are \[32, 48\]"),
        ({"reduction": 7}, ConfigurationError, "reduction is 7"),
        ({"prompts": 0}, ConfigurationError, "prompts is 0"),
        ({"token_ratio": 0.0}, ConfigurationError, "token_ratio is 0.0"),
        ({"encoder": "resnet18"}, EncoderError, "not a plain vision transformer"),
        ({"encoder": "swin_tiny_patch4_window7_224"}, EncoderError, "not a plain vision transformer"),
        ({"pretrained": "weights.txt"}, EncoderError, "'weights.txt'"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_model(**changes)


@pytest.mark.parametrize(
    ("encoder", "side"),
    [
        ("vit_small_patch14_dinov2", 126),
        ("vit_base_patch8_224", 128),
        ("vit_tiny_patch16_224", 128),
        ("vit_base_patch32_224", 128),
    ],
)
def test_a_side_resolution_that_nobody_gives_fits_the_patches(encoder: str, side: int) -> None:
    module = FPTPlusModule(num_classes=2, encoder=encoder, pretrained=False)
    assert module.side_resolution == module.hparams["side_resolution"] == side  # as earlier checkpoints have it
    assert FPTModule(num_classes=2, encoder=encoder, pretrained=False).side_resolution == 224


def test_a_number_of_classes_is_needed_in_python() -> None:
    with pytest.raises(ConfigurationError, match="num_classes is not given"):
        FPTPlusModule(encoder="test_vit", pretrained=False)


def test_features_of_another_encoder_are_refused() -> None:
    batch = {"side_images": torch.zeros(2, 3, 32, 32), "features": torch.zeros(2, 2, 3, 4, 5, 32)}
    with pytest.raises(ConfigurationError, match=r"test_vit with 3 tapped layers gives \(B, 2, 3, 2, T, 32\)"):
        tiny_model()(batch)


def test_endless_training_has_no_cosine(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_epochs is -1"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(tiny_model(), data)


def test_in_a_foreign_module_and_trainer(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    """The parts serve another project's LightningModule, loss and loop."""

    class Foreign(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = FPTPlusModule(num_classes=3, **TINY)

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch), batch["labels"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    data.side_resolution = 32
    module = Foreign()
    before = state(module)
    quiet_trainer(tmp_path, limit_val_batches=0).fit(module, data)
    assert not equal(before, state(module))


def test_a_device_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``mps`` before PyTorch 2.5, which refuses even to switch it off."""
    module = tiny_model()
    batch = {"images": torch.randn(2, 3, 64, 64), "side_images": torch.randn(2, 3, 32, 32)}
    expected = module.eval()(batch)
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: False)
    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
        monkeypatch.setattr(torch, name, None)  # not callable
    logits = module(batch)
    assert torch.equal(logits, expected)
    logits.sum().backward()
    with pytest.raises(ConfigurationError, match=r"no autocast to bfloat16 on 'cpu': use fp32 \(model\.encoder_prec"):
        tiny_model(encoder_precision="bf16")(batch)


def test_a_live_encoder_leaves_the_device_with_the_module(
    image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a trainer ends, by an error too."""
    left: list[FrozenEncoder] = []
    monkeypatch.setattr(FrozenEncoder, "cpu", lambda self: left.append(self))
    live = ImageDataModule(str(image_root), resolution=64, mean=[0.4], std=[0.2], image_size=48)
    module = tiny_model()

    class Interrupt(L.Callback):
        def on_test_end(self, *_: Any) -> None:
            raise RuntimeError("a failure")

    trainer = quiet_trainer(tmp_path, callbacks=[Interrupt()])
    trainer.fit(module, live)
    assert left == module.encoders
    trainer.predict(module, live)
    with pytest.raises(RuntimeError, match="a failure"):
        trainer.test(module, live, verbose=False)
    assert left == module.encoders * 3


# Gradients


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_are_gone_before_the_next_forward_pass(
    data: PreloadedFeatureDataModule, tmp_path: Path, accumulated: int
) -> None:
    """Once the optimiser has stepped; until then they add up. Callbacks still see them when a batch ends."""
    before, after = [], []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            before.append(pl_module.fusion.prompts.grad is not None)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            after.append(pl_module.fusion.prompts.grad is not None)

    data.batch_size = 4
    quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulated, callbacks=[Look()]).fit(
        tiny_model(), data
    )
    assert before[:4] == ([False] * 4 if accumulated == 1 else [False, True] * 2)
    assert all(after)
