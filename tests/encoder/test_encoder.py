"""The frozen encoder against a naive recomputation of every family's attention, and its weights files and refusals."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import pickle
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpt_lightning.encoder import selection
from fpt_lightning.encoder.config import EncoderConfig, encoder_shape
from fpt_lightning.encoder.frozen import FrozenEncoder, build_encoder
from fpt_lightning.encoder.selection import (
    attention_with_importance,
    class_token_importance,
    number_of_tokens,
    select_tokens,
)
from fpt_lightning.encoder.weights import weights_digest
from fpt_lightning.errors import ConfigurationError, EncoderError
from reference import FAMILIES, NaiveFeatures, naive_encode, randomise
from small import write_images

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = (0, 2, 3)  # one block in between and at least one after are not tapped
REAL_MODELS = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
]


@dataclass
class Run:
    """One encoder and what it gave, beside what the reference gives."""

    encoder: FrozenEncoder
    features: Tensor
    indices: Tensor
    pooled: Tensor
    block_outputs: list[Tensor]
    naive: NaiveFeatures


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The reference is made of thousands of tiny operations, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resolution_of(name: str, kind: str) -> tuple[int, int]:
    height, width = encoder_shape(name).patch_size
    return (224, 224) if kind == "native" else (9 * height, 13 * width)


def images_for(resolution: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *resolution, generator=torch.Generator().manual_seed(3))


def build(config: EncoderConfig, resolution: tuple[int, int]) -> FrozenEncoder:
    """An encoder whose weights all matter."""
    encoder = FrozenEncoder(config, resolution)
    randomise(encoder.model)
    return encoder


def plain_model(encoder: FrozenEncoder) -> nn.Module:
    """timm's model of the same weights, without the tap."""
    model: nn.Module = timm.create_model(encoder.config.name, img_size=encoder.resolution, num_classes=0)
    model.load_state_dict(encoder.model.state_dict())
    return model.eval()


def encode_both(name: str, kind: str, layers: tuple[int, ...] | None, batch: int) -> Run:
    resolution = resolution_of(name, kind)
    encoder = build(EncoderConfig(name, pretrained=False, layers=layers), resolution)
    outputs: list[Tensor] = []
    for layer in encoder.config.tapped_layers[:-1]:
        encoder.model.blocks[layer].register_forward_hook(lambda module, args, output: outputs.append(output))
    images = images_for(resolution, batch)
    features, indices, pooled = encoder(images)
    naive = naive_encode(plain_model(encoder), images, encoder.config.tapped_layers, encoder.shape.patch_size)
    return Run(encoder, features, indices, pooled, outputs, naive)


@cache
def small_run(family: str, kind: str) -> Run:
    return encode_both(FAMILIES[family], kind, LAYERS, batch=2)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


def assert_same_selection(indices: Tensor, naive: NaiveFeatures, criterion: str = "global") -> None:
    """Identical indices; two tokens whose importances agree to rounding may stand in either order."""
    expected = naive.selected(criterion, indices.shape[-1])
    importance = naive.importance[criterion]
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all(), "a token was selected twice"
    torch.testing.assert_close(importance.gather(-1, indices), importance.gather(-1, expected), rtol=1e-5, atol=1e-9)
    assert (indices == expected).float().mean() > 0.99


def assert_same_features(run: Run) -> None:
    positions = run.indices[..., None].expand(*run.indices.shape, run.naive.keys.shape[-1])
    assert run.features.dtype == torch.float32
    assert_close(run.features[:, 0], run.naive.keys.gather(3, positions))
    assert_close(run.features[:, 1], run.naive.values.gather(3, positions))


def assert_same_block_outputs(run: Run) -> None:
    assert len(run.block_outputs) == len(run.naive.block_outputs) - 1
    for actual, expected in zip(run.block_outputs, run.naive.block_outputs, strict=False):
        assert_close(actual, expected)


def assert_same_pooled(run: Run) -> None:
    """The class token of the last tapped block, or the mean of its patches."""
    last, shape = run.naive.block_outputs[-1], run.encoder.shape
    assert run.pooled.dtype == torch.float32
    assert_close(run.pooled, last[:, 0] if shape.class_token else last[:, shape.prefix_tokens :].mean(1))


# ----------------------------------------------------------------------------------- every family against the reference

every_family = pytest.mark.parametrize("family", FAMILIES)
every_size = pytest.mark.parametrize("kind", ["native", "non-square"])


@every_size
@every_family
def test_the_reference_is_right(family: str, kind: str) -> None:
    assert small_run(family, kind).naive.attention_error < 1e-5


@every_size
@every_family
def test_selected_tokens(family: str, kind: str) -> None:
    run = small_run(family, kind)
    shape = run.encoder.shape
    tokens = shape.tokens(run.encoder.resolution)
    assert run.naive.keys.shape[3] == tokens == run.encoder.tokens
    assert run.indices.shape == (2, len(LAYERS), shape.heads, int(tokens * 0.2))
    assert run.indices.dtype == torch.int64
    assert_same_selection(run.indices, run.naive)


@every_size
@every_family
def test_keys_and_values_are_those_the_attention_uses(family: str, kind: str) -> None:
    run = small_run(family, kind)
    assert run.features.shape == (2, 2, *run.indices.shape[1:], run.encoder.shape.head_dim)
    assert_same_features(run)


@every_size
@every_family
def test_tapped_blocks_give_their_own_output(family: str, kind: str) -> None:
    assert_same_block_outputs(small_run(family, kind))
    assert_same_pooled(small_run(family, kind))


@every_family
def test_selection_is_per_head_and_peaky(family: str) -> None:
    """The cases above could not tell heads or criteria apart if attention were uniform."""
    run = small_run(family, "native")
    importance = run.naive.importance["global"]
    assert (importance.max(-1).values > 1.5 * importance.median(-1).values).all()
    assert not torch.equal(run.indices[:, :, 0].sort(-1).values, run.indices[:, :, 1].sort(-1).values)


@pytest.mark.slow
@every_size
@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models(name: str, kind: str) -> None:
    run = encode_both(name, kind, None, batch=1)
    assert run.naive.attention_error < 1e-5
    assert_same_selection(run.indices, run.naive)
    assert_same_features(run)
    assert_same_block_outputs(run)


@every_size
@pytest.mark.parametrize("family", ["vit", "deit-distilled", "dinov3", "eva02-separate", "beit"])
def test_class_token_criterion(family: str, kind: str) -> None:
    run = small_run(family, kind)
    config = EncoderConfig(FAMILIES[family], pretrained=False, layers=LAYERS, criterion="class_token")
    other = build(config, run.encoder.resolution)
    features, indices, pooled = other(images_for(run.encoder.resolution))
    assert_same_selection(indices, run.naive, "class_token")
    assert not torch.equal(indices, run.indices)
    assert_same_features(Run(other, features, indices, pooled, [], run.naive))


@pytest.mark.parametrize(("ratio", "count"), [(0.001, 1), (0.5, 98), (1.0, 197)])
def test_token_ratio(ratio: float, count: int) -> None:
    run = small_run("vit", "native")
    encoder = build(EncoderConfig(FAMILIES["vit"], False, LAYERS, token_ratio=ratio), (224, 224))
    features, indices, _ = encoder(images_for((224, 224)))
    assert indices.shape[-1] == features.shape[-2] == encoder.selected == count
    assert_same_selection(indices, run.naive)


def test_the_upper_half_is_tapped_by_default() -> None:
    assert EncoderConfig("test_vit", False).tapped_layers == (3, 4, 5)
    assert EncoderConfig(FAMILIES["vit"], False).tapped_layers == (2, 3, 4)


# ------------------------------------------------------------------------------------------------- what is not computed


@pytest.mark.parametrize("criterion", ["global", "class_token"])
def test_nothing_after_the_last_tapped_block_runs(criterion: str) -> None:
    encoder = FrozenEncoder(EncoderConfig("test_vit", False, layers=(1, 3), criterion=criterion), (64, 64))
    called: list[str] = []
    for name, module in encoder.model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    encoder(images_for((64, 64)))
    assert {"blocks.2.mlp", "blocks.1.attn.proj", "blocks.3.mlp"} <= set(called)
    assert not [name for name in called if re.match(r"blocks\.[45]|(norm|fc_norm|head)\b", name)]


class LargestStorage(TorchDispatchMode):
    """Records the largest memory of floating numbers that any operation gives back; expanded views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.bytes = max([self.bytes, *(t.untyped_storage().nbytes() for t in tensors)])
        return out


@pytest.mark.parametrize("criterion", ["global", "class_token"])
@pytest.mark.parametrize("family", ["vit-dynamic-size", "beit"])
def test_no_map_of_the_whole_batch(family: str, criterion: str) -> None:
    config = EncoderConfig(FAMILIES[family], False, layers=(2, 3), criterion=criterion)
    encoder = FrozenEncoder(config, (512, 512))
    batch, heads, tokens = 4, encoder.shape.heads, encoder.tokens
    assert tokens == 1025
    images = images_for((512, 512), batch)
    with LargestStorage() as largest:
        encoder(images)
    assert 4 * batch * tokens * encoder.shape.width <= largest.bytes < 4 * batch * heads * tokens**2 / 2


# ---------------------------------------------------------------------------------------------------- frozen, and fixed


def test_frozen_stays_frozen() -> None:
    encoder = FrozenEncoder(EncoderConfig("test_vit", False), (64, 64))
    parent = nn.Sequential(encoder, nn.Dropout())
    assert parent.train().training
    encoder.train(True)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(part.requires_grad for part in encoder(images_for((64, 64)).requires_grad_()))


def test_building_leaves_random_states_alone() -> None:
    encoder_shape.cache_clear()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    FrozenEncoder(EncoderConfig("test_vit", False), (64, 64))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("family", ["vit", "dinov3", "eva02-separate", "beit"])
def test_two_random_builds_are_bit_equal(family: str) -> None:
    torch.manual_seed(1)
    first = FrozenEncoder(EncoderConfig(FAMILIES[family], False), (224, 224))
    torch.manual_seed(2)
    second = FrozenEncoder(EncoderConfig(FAMILIES[family], False), (224, 224))
    assert first.digest == second.digest
    own, other = first.model.state_dict(), second.model.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
    images = images_for((224, 224))
    assert all(torch.equal(a, b) for a, b in zip(first(images), second(images), strict=True))


def test_a_pass_depends_on_its_own_image_only() -> None:
    encoder = build(EncoderConfig("test_vit", False, LAYERS), (96, 64))
    images = images_for((96, 64), batch=3)
    together = encoder(images)
    alone = [encoder(images[i : i + 1]) for i in range(3)]
    assert_close(together.features, torch.cat([one.features for one in alone]))
    assert_close(together.pooled, torch.cat([one.pooled for one in alone]))
    assert torch.equal(together.indices, torch.cat([one.indices for one in alone]))


def test_autocast_does_not_touch_the_frozen_pass() -> None:
    encoder = build(EncoderConfig("test_vit", False, LAYERS), (64, 64))
    images = images_for((64, 64))
    plain = encoder(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = encoder(images)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("criterion", ["global", "class_token"])
def test_bf16_is_close_to_fp32(criterion: str) -> None:
    images = images_for((96, 96))
    config = EncoderConfig("test_vit", False, LAYERS, token_ratio=0.5, criterion=criterion)
    exact, rounded = (FrozenEncoder(replace(config, precision=p), (96, 96))(images) for p in ("fp32", "bf16"))
    assert {part.dtype for part in (rounded.features, rounded.pooled)} == {torch.float32}
    assert 0 < (rounded.pooled - exact.pooled).norm() / exact.pooled.norm() < 0.02
    same = [
        len(set(a.tolist()) & set(b.tolist())) / len(a)
        for a, b in zip(exact.indices.flatten(0, 2), rounded.indices.flatten(0, 2), strict=True)
    ]
    assert sum(same) / len(same) > 0.9


def test_the_precision_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = importlib.import_module("encoder_precision")
    for module in ("environment", "encoder_precision"):
        monkeypatch.setattr(f"{module}.RESULTS", tmp_path)
    monkeypatch.setattr("store_codecs.NATIVE", 64)
    monkeypatch.setattr(benchmark, "ENCODERS", {"tiny, untrained": "test_vit"})
    monkeypatch.setattr("store_codecs.ENCODERS", benchmark.ENCODERS)
    write_images(tmp_path / "images", {"a": 12, "b": 12})
    small = ["--resolution", "64", "--images", "4", "--rounds", "1"]
    benchmark.main(["--data", str(tmp_path / "images"), "--out", str(tmp_path / "out"), *small])
    (row,) = json.loads((tmp_path / "encoder_precision.json").read_text())["rows"]
    assert 0 < row["keys"] < 0.02
    assert 0 < row["values"] < 0.02
    assert all(0 <= share < 0.5 for share in row["other_tokens"])
    assert "| tiny, untrained | " in (tmp_path / "encoder_precision.md").read_text()


def test_an_unknown_precision() -> None:
    with pytest.raises(ConfigurationError, match="encoder_precision is 'fp8': choose one of fp32, bf16"):
        EncoderConfig("test_vit", False, precision="fp8")


def test_the_tap_works_where_fused_attention_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = FrozenEncoder(EncoderConfig("test_vit", False), (64, 64))(images_for((64, 64)))
    timm.layers.set_fused_attn(False)
    try:
        encoder = FrozenEncoder(EncoderConfig("test_vit", False), (64, 64))
    finally:
        timm.layers.set_fused_attn(True)
    assert all(torch.equal(a, b) for a, b in zip(encoder(images_for((64, 64))), expected, strict=True))


def test_a_failed_pass_leaves_nothing_behind() -> None:
    encoder = FrozenEncoder(EncoderConfig("test_vit", False), (64, 64))
    expected = encoder(images_for((64, 64)))
    out_of_memory = encoder.model.blocks[4].norm1.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder(images_for((64, 64)))
    out_of_memory.remove()
    assert all(torch.equal(a, b) for a, b in zip(encoder(images_for((64, 64))), expected, strict=True))


@every_family
def test_shape_is_known_without_weights(family: str) -> None:
    shape = encoder_shape(FAMILIES[family])
    model = small_run(family, "native").encoder.model
    assert (shape.width, shape.depth) == (model.embed_dim, len(model.blocks))
    assert shape.heads == model.blocks[0].attn.num_heads
    assert shape.class_token == (getattr(model, "cls_token", None) is not None)
    assert shape.prefix_tokens == model.num_prefix_tokens


def test_published_parameter_count_of_vit_base() -> None:
    shape = encoder_shape("vit_base_patch16_384")
    assert shape.parameters == 86_859_496
    assert (shape.width, shape.heads, shape.head_dim, shape.depth, shape.patch_size) == (768, 12, 64, 12, (16, 16))
    assert shape.tokens((512, 512)) == 1025
    assert number_of_tokens(1025, 0.2) == 205


# -------------------------------------------------------------------------------------------------------- the selection


def full_map(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    scores = query.double() @ key.double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.double()
    return scores.softmax(-1)


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many pieces":
        monkeypatch.setattr(selection, "_MAP_BYTES", 4 * 3 * 23 * 5)  # 5 rows of 23: the last piece is shorter


BIASES: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "float (N, N)": lambda: torch.randn(23, 23) * 2,
    "float (1, H, N, N)": lambda: torch.randn(1, 3, 23, 23) * 2,
    "float (B, 1, N, N)": lambda: torch.randn(2, 1, 23, 23) * 2,
    "float (B, 1, 1, N)": lambda: torch.randn(2, 1, 1, 23) * 2,
    "float with -inf": lambda: torch.zeros(23, 23).masked_fill(torch.eye(23) == 1, -torch.inf),
    "bool (N, N)": lambda: torch.rand(23, 23) > 0.4,
    "bool (B, H, N, N)": lambda: torch.rand(2, 3, 23, 23) > 0.4,
    "bool (B, 1, 1, N)": lambda: torch.rand(2, 1, 1, 23) > 0.4,
}


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kind", BIASES)
def test_attention_in_pieces(kind: str, scale: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 23, 8) * 2 for _ in range(3))
    bias = BIASES[kind]()
    attention_map = full_map(query, key, bias, scale)
    output, importance = attention_with_importance(query, key, value, bias=bias, scale=scale)
    assert importance.dtype == torch.float32
    assert_close(importance, attention_map.mean(-2))
    assert_close(output, attention_map @ value.double())
    assert_close(output, F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale))
    assert_close(class_token_importance(query, key, bias=bias, scale=scale), attention_map[:, :, 0])


def test_a_piece_of_the_map_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_MAP_BYTES", 2**18)
    query, key, value = (torch.randn(2, 2, 500, 8) for _ in range(3))  # one image's map takes 2 MB
    with LargestStorage() as largest:
        attention_with_importance(query, key, value)
    assert 2**17 < largest.bytes <= 2**18


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_importance_is_summed_in_single_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 300, 16).to(dtype) for _ in range(3))
    output, importance = attention_with_importance(query, key, value)
    assert output.dtype == dtype
    torch.testing.assert_close(importance.sum(-1), torch.ones(1, 2), rtol=0, atol=1e-5)


def test_select_tokens_keeps_each_heads_own() -> None:
    key, value = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    importance = torch.rand(2, 3, 9)
    selected, indices = select_tokens(key, value, importance, 4)
    assert selected.shape == (2, 2, 3, 4, 4)
    for b in range(2):
        for h in range(3):
            order = sorted(range(9), key=lambda j: -float(importance[b, h, j]))[:4]
            assert indices[b, h].tolist() == order
            assert torch.equal(selected[b, 0, h], key[b, h, order])
            assert torch.equal(selected[b, 1, h], value[b, h, order])


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_basse_patch16_224", "'vit_basse_patch16_224' is not a model of timm .* similar names"),
        ("resnet18", r"'resnet18' \(ResNet\) is not a plain vision transformer"),
        ("convnext_atto", "'convnext_atto' .* is not a plain vision transformer"),
        ("swin_tiny_patch4_window7_224", r"\(SwinTransformer\) is not a plain vision transformer"),
        ("pvt_v2_b0", "is not a plain vision transformer"),
        ("vit_tiny_r_s16_p8_224", "is not a plain vision transformer"),
        ("test_vit.of_nobody", r"of_nobody.* has test_vit\.r160_in1k\."),
    ],
)
def test_unusable_encoders(name: str, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        EncoderConfig(name, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (4, 6)}, r"layers is \[4, 6\].*test_vit.*0 to 5"),
        ({"layers": (-1, 2)}, r"layers is \[-1, 2\]"),
        ({"layers": (3, 2)}, r"layers is \[3, 2\].*ascending"),
        ({"layers": (2, 2)}, r"layers is \[2, 2\].*distinct"),
        ({"layers": ()}, r"layers is \[\]"),
        ({"token_ratio": 0.0}, r"token_ratio is 0\.0.*\(0, 1\]"),
        ({"token_ratio": -0.2}, r"token_ratio is -0\.2"),
        ({"token_ratio": 1.01}, r"token_ratio is 1\.01"),
        ({"token_ratio": float("nan")}, "token_ratio is nan"),
        ({"criterion": "mean"}, "criterion is 'mean': choose one of global, class_token"),
    ],
)
def test_unusable_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EncoderConfig("test_vit", False, **options)


def test_class_token_criterion_without_a_class_token() -> None:
    with pytest.raises(ConfigurationError, match="test_vit2 has no class token: use criterion 'global'"):
        EncoderConfig("test_vit2", False, criterion="class_token")


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        ((224, 230), r"resolution 224 x 230 .*patch size 16 x 16 of test_vit.*\[224, 240\] \(height\) and \[224, "),
        ((100, 64), r"resolution 100 x 64 .*\[96, 112\] \(height\) and \[64, 80\] \(width\)"),
        ((8, 64), r"resolution 8 x 64 .*\[16\] \(height\)"),
    ],
)
def test_resolution_that_patches_do_not_fill(resolution: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FrozenEncoder(EncoderConfig("test_vit", False), resolution)


def test_images_of_another_size() -> None:
    encoder = FrozenEncoder(EncoderConfig("test_vit", False), (64, 96))
    with pytest.raises(ConfigurationError, match=r"the images are 96 x 64 pixels, .* resolution 64 x 96"):
        encoder(torch.zeros(1, 3, 96, 64))


def test_a_block_without_the_attention_call() -> None:
    encoder = FrozenEncoder(EncoderConfig("test_vit", False), (64, 64))
    encoder.model.blocks[4].attn.fused_attn = False
    with pytest.raises(EncoderError, match="block 4 of test_vit did not call scaled_dot_product_attention"):
        encoder(torch.zeros(1, 3, 64, 64))


# -------------------------------------------------------------------------------------------------------- weights files

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


def without_head(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights as the frozen encoder keeps them."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head")}


def assert_encodes_like(path: str, model: nn.Module, name: str = "test_vit") -> None:
    """The encoder built from ``path`` gives what the encoder with ``model``'s weights gives."""
    loaded = FrozenEncoder(EncoderConfig(name, pretrained=path), (64, 64))
    expected = FrozenEncoder(EncoderConfig(name, pretrained=False), (64, 64))
    images = images_for((64, 64))
    assert not torch.equal(loaded(images)[0], expected(images)[0])
    expected.model.load_state_dict(without_head(model))
    assert all(torch.equal(a, b) for a, b in zip(loaded(images), expected(images), strict=True))


@pytest.mark.parametrize(
    ("suffix", "prefix"),
    [
        (".safetensors", ""),
        (".safetensors", "backbone."),
        (".pt", ""),
        (".bin", "encoder."),
        (".pth", "module."),
        (".pth", "module.backbone."),
        (".pth", "_orig_mod.module."),
    ],
)
def test_weights_file_with_prefixes(tmp_path: Path, suffix: str, prefix: str) -> None:
    model = source_model()
    assert_encodes_like(save(prefixed(model.state_dict(), prefix), tmp_path / f"weights{suffix}"), model)


WRAPPERS: dict[str, Callable[[Tensors], Any]] = {
    "model": lambda own: {"model": own, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda own: {"state_dict": prefixed(own, "module."), "arch": "vit"},
    "model_state_dict": lambda own: {"model_state_dict": own},
    "teacher with a head of its own": lambda own: {
        "student": {"backbone.cls_token": torch.zeros(1)},
        "teacher": prefixed(own, "backbone.") | {"dino_head.last_layer.weight": torch.zeros(4, 4)},
    },
    "one in another": lambda own: {"model": {"state_dict": prefixed(own, "module.encoder.")}},
    "half precision": lambda own: {"model": {k: v.half() for k, v in own.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_file_with_wrappers(tmp_path: Path, wrapper: str) -> None:
    model = source_model()
    path = save(WRAPPERS[wrapper](model.state_dict()), tmp_path / "weights.pth")
    assert_encodes_like(path, model.half().float() if wrapper == "half precision" else model)


def test_weights_file_without_or_with_another_head(tmp_path: Path) -> None:
    model = source_model()
    body = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    assert_encodes_like(save(body, tmp_path / "headless.pth"), model)
    body["head.weight"], body["head.bias"] = torch.zeros(7, 64), torch.zeros(7)
    assert_encodes_like(save(body, tmp_path / "another.pth"), model)


@every_family
def test_every_family_reads_back_its_own_weights(tmp_path: Path, family: str) -> None:
    """And the file is digested alike at its own and at another resolution."""
    name = FAMILIES[family]
    patch = encoder_shape(name).patch_size[0]
    model = source_model(name, (6 * patch, 6 * patch))
    config = EncoderConfig(name, pretrained=save(model.state_dict(), tmp_path / "weights.safetensors"))
    native = FrozenEncoder(config, (6 * patch, 6 * patch))
    assert all(torch.equal(v, native.model.state_dict()[k]) for k, v in without_head(model).items())
    other = FrozenEncoder(config, (9 * patch, 5 * patch))
    assert other(images_for(other.resolution))[1].max() < other.tokens
    assert native.digest == other.digest


@pytest.mark.parametrize("resolution", [(96, 160), (80, 320)])
def test_positions_are_interpolated(tmp_path: Path, resolution: tuple[int, int]) -> None:
    """The second resolution has as many patches as the published 160 x 160, in another grid."""
    model = source_model("test_vit", (160, 160))
    encoder = FrozenEncoder(EncoderConfig("test_vit", save(model.state_dict(), tmp_path / "w.pth")), resolution)
    class_token, grid = model.pos_embed[:, :1], model.pos_embed[:, 1:].unflatten(1, (10, 10)).permute(0, 3, 1, 2)
    size = (resolution[0] // 16, resolution[1] // 16)
    expected = F.interpolate(grid, size, mode="bicubic", antialias=True, align_corners=False)
    assert_close(encoder.model.pos_embed, torch.cat([class_token, expected.flatten(2).mT], 1))
    assert torch.equal(encoder.model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_relative_positions_are_interpolated(tmp_path: Path) -> None:
    name = FAMILIES["beit"]
    model = source_model(name, (96, 96))
    encoder = FrozenEncoder(EncoderConfig(name, save(model.state_dict(), tmp_path / "w.pth")), (96, 160))
    own, table = (m.blocks[1].attn.relative_position_bias_table for m in (encoder.model, model))
    assert own.shape == (11 * 19 + 3, 4)
    assert torch.equal(own[-3:], table[-3:])  # those of the class token
    assert torch.allclose(own[11 * 19 // 2], table[11 * 11 // 2], atol=1e-2)  # distance zero
    assert own[:-3].std() > 0.3


def test_published_layout_of_deit3(tmp_path: Path) -> None:
    name = FAMILIES["deit3"]
    model = source_model(name)
    published = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): v for key, v in model.state_dict().items()}
    assert "blocks.0.gamma_2" in published
    assert_encodes_like(save({"model": published}, tmp_path / "deit3.pth"), model, name)


def test_published_layout_of_dinov2(tmp_path: Path) -> None:
    """Registers named otherwise, a position for the class token, a mask token."""
    name = FAMILIES["dinov2-registers"]
    model = source_model(name, (56, 56))
    published = dict(model.state_dict())
    published["register_tokens"] = published.pop("reg_token")
    extra = torch.randn(1, 1, 64)
    published["pos_embed"] = torch.cat([extra, published["pos_embed"]], 1)
    published["cls_token"] = published["cls_token"] - extra
    published["mask_token"] = torch.zeros(1, 64)
    encoder = FrozenEncoder(EncoderConfig(name, save(published, tmp_path / "dinov2.pth")), (56, 56))
    for key, tensor in without_head(model).items():
        assert_close(encoder.model.state_dict()[key], tensor)


def in_layout_of_dinov3(model: nn.Module) -> Tensors:
    """Weights of timm's model under Meta's names, with one bias for queries, keys and values."""
    own, published = model.state_dict(), {}
    for key, tensor in own.items():
        if key.endswith("q_bias"):
            v_bias = own[key.replace("q_bias", "v_bias")]
            key, tensor = key.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.zeros(64), v_bias])
        if not key.endswith("v_bias"):
            name = key.replace("reg_token", "storage_tokens")
            published[name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = tensor
    return published


def test_published_layout_of_dinov3(tmp_path: Path) -> None:
    name = FAMILIES["dinov3-qkv-bias"]
    model = source_model(name)
    published = in_layout_of_dinov3(model)
    published |= {f"{key}_mask": torch.ones(192) for key in published if key.endswith("qkv.bias")}
    published |= {"rope_embed.periods": torch.ones(4), "mask_token": torch.zeros(1, 64)}
    assert_encodes_like(save(published, tmp_path / "dinov3.pth"), model, name)


def without_some(own: Tensors) -> Tensors:
    return {k: v for k, v in own.items() if k not in ("cls_token", "blocks.2.attn.qkv.bias")}


MISFITS: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "missing": (without_some, ["missing: cls_token", "missing: blocks.2.attn.qkv.bias"]),
    "extra": (
        lambda own: own | {"blocks.6.norm1.weight": torch.ones(64), "adapter": torch.ones(2)},
        ["not in the model: blocks.6.norm1.weight", "not in the model: adapter"],
    ),
    "shape": (
        lambda own: own | {"blocks.1.mlp.fc1.weight": torch.ones(128, 64)},
        ["shape: blocks.1.mlp.fc1.weight is (128, 64), the model has (192, 64)"],
    ),
    "another width": (
        lambda own: dict(timm.create_model("deit_tiny_patch16_224", img_size=64).state_dict()),
        ["shape: cls_token is (1, 1, 192), the model has (1, 1, 64)", "... and 136 more"],
    ),
}


def test_published_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to the hub")

    encoder_shape("test_vit")
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        EncoderError, match=r"weights of test_vit \(OSError: no route.* a local file as model.pretrained"
    ):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=True), (64, 64))


def test_positions_of_a_square_grid_are_interpolated_to_another_grid_of_as_many(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", pretrained=False, img_size=96)  # 6 x 6 patches
    path = save(dict(source.state_dict()), tmp_path / "weights.safetensors")
    encoder = FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (144, 64))  # 9 x 4 patches
    expected = resample_abs_pos_embed(source.pos_embed, [9, 4], [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.model.pos_embed, expected)
    assert not torch.equal(encoder.model.pos_embed, source.pos_embed)


@pytest.mark.parametrize("kind", MISFITS)
def test_weights_that_do_not_fit_are_listed(tmp_path: Path, kind: str) -> None:
    change, messages = MISFITS[kind]
    path = save(change(dict(source_model().state_dict())), tmp_path / "weights.safetensors")
    with pytest.raises(EncoderError) as caught:
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))
    assert path in str(caught.value)
    assert all(message in str(caught.value) for message in messages)
    assert len(str(caught.value).splitlines()) <= 14


class Payload:
    """Code in a pickle: creates a file when it is read by a careless reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("where", ["beside the tensors", "alone, without torch.save"])
def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path: Path, where: str) -> None:
    target, path = tmp_path / "ran", tmp_path / "weights.pth"
    if where == "beside the tensors":
        torch.save({"model": source_model().state_dict(), "extra": Payload(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(target)))
    with pytest.raises(EncoderError, match=r"weights\.pth cannot be read safely"):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=str(path)), (64, 64))
    assert not target.exists()


@pytest.fixture
def truncated(tmp_path: Path) -> Callable[[str], str]:
    def cut(suffix: str) -> str:
        path = tmp_path / f"weights{suffix}"
        save(source_model().state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return str(path)

    return cut


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_weights_file(truncated: Callable[[str], str], suffix: str) -> None:
    path = truncated(suffix)
    with pytest.raises(EncoderError, match=re.escape(f"{path} cannot be read")):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"model": {}}, {"model": None}])
def test_weights_file_without_tensors(tmp_path: Path, content: Any) -> None:
    path = save(content, tmp_path / "weights.pth")
    with pytest.raises(EncoderError, match="holds no state_dict"):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))


def test_missing_weights_file(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.pth")
    with pytest.raises(EncoderError, match=re.escape(path) + ".*does not exist"):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))
    with pytest.raises(EncoderError, match="does not exist"):
        EncoderConfig("test_vit", pretrained=path).weights()


@pytest.mark.parametrize("name", ["weights.npz", "weights", "yes"])
def test_weights_file_of_another_kind(name: str) -> None:
    with pytest.raises(EncoderError, match=f"pretrained is '{name}': give true, false or a file ending in"):
        EncoderConfig("test_vit", pretrained=name)


def test_weights_are_named_without_loading_them(tmp_path: Path) -> None:
    assert EncoderConfig("test_vit", False).weights() == "random"
    assert EncoderConfig("vit_tiny_patch16_224.augreg_in21k").weights() == "timm:vit_tiny_patch16_224.augreg_in21k"
    model = source_model()
    names = []
    for seed in (0, 0, 1):
        randomise(model, seed)
        path = save(model.state_dict(), tmp_path / f"{len(names)}.safetensors")
        names.append(EncoderConfig("test_vit", path).weights())
    assert len(set(names)) == 2
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", name) for name in names)


def test_digest_follows_every_weight_that_features_depend_on() -> None:
    model = build_encoder(EncoderConfig("test_vit", False), (64, 64))
    digest = weights_digest(model)
    for name in ("blocks.0.attn.qkv.weight", "blocks.5.mlp.fc2.bias", "cls_token", "patch_embed.proj.weight"):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[0] += 1e-3
        assert weights_digest(changed) != digest
    with torch.no_grad():
        model.head.weight.zero_()
    assert weights_digest(model) == digest


# Files that hold more than the encoder


def test_the_teacher_of_a_joint_file_is_taken(tmp_path: Path) -> None:
    """DINO's and iBOT's files hold both; names in one dict, or the one in the other."""
    model, other = source_model(), timm.create_model("test_vit", img_size=64).state_dict()
    own = model.state_dict()
    joint = {**prefixed(other, "student.backbone."), **prefixed(own, "teacher.backbone.")}
    joint |= {"teacher.dino_head.mlp.0.weight": torch.zeros(2, 2), "student.dino_head.mlp.0.weight": torch.zeros(2, 2)}
    assert_encodes_like(save(joint, tmp_path / "joint.pth"), model)
    assert_encodes_like(save({"model": prefixed(joint, "module.")}, tmp_path / "wrapped.pth"), model)


def test_what_only_pretraining_uses_is_left_aside(tmp_path: Path) -> None:
    """The decoder of an MAE, as RETFound's file has it beside its arguments; the texts of a CLIP."""
    model = source_model()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.ones(8, 64)}
    decoder |= {f"decoder_blocks.{i}.attn.qkv.weight": torch.ones(24, 8) for i in range(80)}
    content = {"model": {**model.state_dict(), **decoder}, "args": argparse.Namespace(lr=1e-3, data="x"), "epoch": 3}
    for name in ("checkpoint.pth", "checkpoint.ckpt", "checkpoint.pth.tar"):
        assert_encodes_like(save(content, tmp_path / name), model)
    texts = {f"text.transformer.{i}.weight": torch.ones(2) for i in range(200)}
    clip = {**prefixed(model.state_dict(), "visual.trunk."), **texts, "logit_scale": torch.ones(())}
    assert_encodes_like(save(clip | {"visual.head.proj.weight": torch.ones(2)}, tmp_path / "clip.bin"), model)


def test_every_other_tensor_is_accounted_for(tmp_path: Path) -> None:
    own = source_model().state_dict()
    path = save({**prefixed(own, "backbone."), "neck.weight": torch.ones(2)}, tmp_path / "neck.pth")
    with pytest.raises(EncoderError, match=r"most names below 'backbone.', but also neck.weight: give a file of"):
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))


def test_biases_that_timm_would_drop_are_named(tmp_path: Path) -> None:
    """timm's converter drops the biases of queries and values for models of DINOv3 that have none."""
    published = in_layout_of_dinov3(source_model(FAMILIES["dinov3-qkv-bias"]))
    path = save(published, tmp_path / "dinov3.pth")
    with pytest.raises(EncoderError, match=r"(?s)not used by timm's Eva: blocks.0.attn.qkv.bias.*qkvb in its name"):
        FrozenEncoder(EncoderConfig(FAMILIES["dinov3"], pretrained=path), (64, 64))


def test_a_refused_pickle_names_what_it_holds(tmp_path: Path) -> None:
    """And never repeats how PyTorch's safety is switched off."""
    path = save({"model": source_model().state_dict(), "when": Payload(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(EncoderError) as refused:
        FrozenEncoder(EncoderConfig("test_vit", pretrained=path), (64, 64))
    said = str(refused.value)
    assert re.search(r"it holds .*pathlib\.Path.*, which could run code", said)
    assert "weights_only" not in said
    assert "option" not in said
    assert "\n" not in said
