"""The arithmetic of the frozen encoder: what is asked for, whatever PyTorch's and Lightning's settings are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fpt_lightning import ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import Encoded, FrozenEncoder, check_finite
from fpt_lightning.encoder.precision import HALF, full_precision
from fpt_lightning.errors import ConfigurationError, EncoderError
from fpt_lightning.methods import BitFitModule
from fpt_lightning.store.store import FeatureStore
from reference import FAMILIES, images_for, randomise
from small import quiet_trainer, tiny_model

DataMaker = Callable[..., PreloadedFeatureDataModule]
TINY_ENCODER = EncoderConfig("test_vit", pretrained=False)
IMAGES = images_for((64, 64))


def same(one: Encoded, other: Encoded) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# PyTorch's settings

NEW = hasattr(torch.backends.cudnn, "conv")  # torch 2.9


def settings() -> dict[str, Any]:
    """What fp32 products and convolutions may become, and the dtype of new tensors."""
    found: dict[str, Any] = {"dtype": torch.get_default_dtype()}
    backends: Any = torch.backends
    if NEW:
        found["cuda products"] = backends.cuda.matmul.fp32_precision
        found["cuda convolutions"] = backends.cudnn.conv.fp32_precision
        found["cpu products"] = backends.mkldnn.matmul.fp32_precision
        found["cpu convolutions"] = backends.mkldnn.conv.fp32_precision
    else:
        found["products"] = torch.get_float32_matmul_precision()
        found["cuda convolutions"] = backends.cudnn.allow_tf32
    return found


FULL = dict.fromkeys(("cuda products", "cuda convolutions", "cpu products", "cpu convolutions"), "ieee")
FULL = {"dtype": torch.float32, **(FULL if NEW else {"products": "highest", "cuda convolutions": False})}


@pytest.fixture
def _rounding() -> Iterator[None]:
    """Everything that rounds is on; it was PyTorch's default for convolutions."""
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_float32_matmul_precision("highest")
    torch.set_default_dtype(torch.float32)
    torch.backends.cudnn.allow_tf32 = convolutions


def spied(encoder: FrozenEncoder) -> list[dict[str, Any]]:
    """The settings under which the encoder's patches and a block are computed, as it runs."""
    found: list[dict[str, Any]] = []
    model: Any = encoder.model
    for part in (model.patch_embed, model.blocks[3]):
        part.register_forward_hook(lambda *_: found.append(settings()))
    return found


@pytest.mark.usefixtures("_rounding")
def test_no_setting_of_pytorch_changes_the_frozen_pass() -> None:
    before = settings()
    encoder = FrozenEncoder(TINY_ENCODER, (64, 64))
    found = spied(encoder)
    encoded = encoder(IMAGES)
    assert found == [FULL, FULL] != [before, before]
    assert settings() == before
    with full_precision():
        plain = FrozenEncoder(TINY_ENCODER, (64, 64))
        assert plain.digest == encoder.digest
        assert same(plain(IMAGES), encoded)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.usefixtures("_rounding")
def test_they_come_back_after_an_error() -> None:
    before = settings()
    encoder = FrozenEncoder(TINY_ENCODER, (64, 64))
    with pytest.raises(ConfigurationError), full_precision():
        encoder(IMAGES[..., :32])
    assert settings() == before


@pytest.mark.usefixtures("_rounding")
def test_threads_that_overlap_put_the_settings_back_last() -> None:
    """One enters first and leaves first, while the other still runs."""
    before, entered, left = settings(), threading.Event(), threading.Event()

    def first() -> None:
        with full_precision():
            entered.set()
            both.wait(5)
        left.set()

    both = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(5)
    with full_precision():
        both.set()
        assert left.wait(5)
        assert settings() == FULL
    thread.join()
    assert settings() == before


@pytest.mark.usefixtures("_rounding")
def test_an_encoder_that_trains_is_of_fp32_too() -> None:
    module = BitFitModule(3, encoder="test_vit", pretrained=False)
    module.build((64, 64))
    assert {p.dtype for p in module.vit.parameters()} == {torch.float32}
    assert module._digest == FrozenEncoder(TINY_ENCODER, (64, 64)).digest


# Lightning's precisions


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_precision_that_changes_labels_is_refused(
    precision: Any, stage: str, tiny_data: DataMaker, tmp_path: Path
) -> None:
    data = tiny_data()
    trainer = quiet_trainer(tmp_path, precision=precision)
    with pytest.raises(ConfigurationError, match=rf"trainer.precision is '{precision}', .* use 32-true, bf16-mixed"):
        getattr(trainer, stage)(tiny_model(), ImageDataModule(data.root, resolution=64, mean=[0.4], std=[0.2]))
    with pytest.raises(ConfigurationError, match=rf"trainer.precision is '{precision}'"):
        data.preload(tiny_model(), trainer)
    assert not FeatureStore.exists(data.url)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_precision_that_changes_no_label(precision: str) -> None:
    """Whatever device it is for."""
    from lightning.pytorch.plugins.precision import MixedPrecision, Precision

    plugin = Precision() if precision == "32-true" else MixedPrecision(precision, "cpu")  # type: ignore[arg-type]
    labels = torch.tensor([1003.7, 1999.9])
    assert torch.equal(plugin.convert_input({"labels": labels})["labels"], labels)


# Half precision


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_held_in_half_precision_give_what_autocast_gives(family: str, precision: str) -> None:
    """To the bit, with random weights of every size that matters."""
    config = EncoderConfig(FAMILIES[family], pretrained=False, precision=precision)
    patch = config.shape.patch_size
    resolution = (2 * patch[0], 3 * patch[1])
    cast = FrozenEncoder(replace(config, precision="fp32"), resolution)
    randomise(cast)
    held = FrozenEncoder(config, resolution)
    held.load_state_dict(cast.state_dict())
    cast.config = config
    images = images_for(resolution)
    assert same(held(images), cast(images))
    dtypes = {type(module): {p.dtype for p in module.parameters(False)} for module in held.modules()}
    assert dtypes[nn.Linear] == dtypes[nn.Conv2d] == {HALF[precision]}
    assert {p.dtype for p in cast.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", HALF)
def test_the_digest_is_that_of_the_weights_as_they_were_loaded(precision: str) -> None:
    halved = FrozenEncoder(replace(TINY_ENCODER, precision=precision), (64, 64))
    assert halved.digest == FrozenEncoder(TINY_ENCODER, (64, 64)).digest


def test_fp16_is_closer_to_fp32_than_bf16() -> None:
    exact = FrozenEncoder(TINY_ENCODER, (96, 96))(images_for((96, 96)))
    errors = {}
    for precision in HALF:
        encoded = FrozenEncoder(replace(TINY_ENCODER, precision=precision), (96, 96))(images_for((96, 96)))
        assert {encoded.features.dtype, encoded.pooled.dtype} == {torch.float32}
        errors[precision] = float((encoded.pooled - exact.pooled).norm() / exact.pooled.norm())
    assert 0 < errors["fp16"] < errors["bf16"] / 3


def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tapped block's own outputs, which only the pooled feature has, leave the range of fp16."""
    build = FrozenEncoder.__init__

    def changed(self: FrozenEncoder, *args: Any) -> None:
        build(self, *args)
        with torch.no_grad():
            weight = self.model.blocks[5].mlp.fc2.weight  # type: ignore[index,union-attr]
            weight.fill_(6e4)

    monkeypatch.setattr(FrozenEncoder, "__init__", changed)


def test_fp16_that_overflows_names_the_image(
    tiny_data: DataMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overflowing(monkeypatch)
    model = tiny_model(encoder_precision="fp16")
    data = tiny_data()
    words = "that test_vit gives in fp16 are not finite; .* use model.encoder_precision bf16 or fp32"
    with pytest.raises(EncoderError, match=rf"{data.root}/[abc]/\d+.png {words}"):
        data.preload(model, quiet_trainer(tmp_path))
    live = ImageDataModule(data.root, resolution=64, mean=[0.4], std=[0.2], image_size=48, batch_size=8)
    with pytest.raises(EncoderError, match=rf"the features of [abc]/\d+.png {words}"):
        quiet_trainer(tmp_path).fit(model, live)


def test_what_is_not_finite_in_fp32_is_no_matter_of_precision() -> None:
    features = torch.zeros(2, 2, 1, 1, 1, 1)
    pooled = torch.tensor([[0.0], [np.nan]])
    with pytest.raises(EncoderError, match=r"the features of b .* in fp32 are not finite; its weights are damaged"):
        check_finite(Encoded(features, Tensor(), pooled), ["a", "b"], TINY_ENCODER)
    check_finite(Encoded(features, Tensor(), pooled.nan_to_num()), ["a", "b"], TINY_ENCODER)


def test_a_store_in_fp16_trains_and_its_checkpoint_remembers(tiny_data: DataMaker, tmp_path: Path) -> None:
    data, model = tiny_data(), tiny_model(encoder_precision="fp16")
    store = data.preload(model, quiet_trainer(tmp_path))
    assert store.specification.precision == "fp16"
    trainer = quiet_trainer(tmp_path)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.encoder_config.precision == "fp16"
    assert loaded.specification is not None
    assert loaded.specification.precision == "fp16"
