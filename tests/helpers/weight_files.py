"""Small weights files and the models that they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from reference import images_for, randomise

Tensors = dict[str, Tensor]


def source_model(name: str = "test_vit", resolution: tuple[int, int] = (64, 64)) -> nn.Module:
    model: nn.Module = timm.create_model(name, img_size=resolution)
    randomise(model, seed=5)
    return model


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def save(content: Any, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return str(path)


def kept(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights as a frozen encoder that taps its last block keeps them."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("head", "norm."))}


def assert_encodes_like(path: str, model: nn.Module, name: str = "test_vit") -> None:
    """The encoder built from ``path`` gives what the encoder with ``model``'s weights gives."""
    loaded = FrozenEncoder(EncoderConfig(name, pretrained=path), (64, 64))
    expected = FrozenEncoder(EncoderConfig(name, pretrained=False), (64, 64))
    images = images_for((64, 64))
    assert not torch.equal(loaded(images)[0], expected(images)[0])
    expected.model.load_state_dict(kept(model))
    assert all(torch.equal(a, b) for a, b in zip(loaded(images), expected(images), strict=True))
