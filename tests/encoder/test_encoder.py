"""The frozen encoder against a naive recomputation of every family's attention, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import pickle
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpt_lightning.encoder import execution, selection
from fpt_lightning.encoder.config import EncoderConfig, encoder_shape
from fpt_lightning.encoder.frozen import FrozenEncoder, build_encoder
from fpt_lightning.encoder.selection import (
    attention_with_importance,
    class_token_importance,
    number_of_tokens,
    select_tokens,
)
from fpt_lightning.errors import ConfigurationError, EncoderError
from reference import FAMILIES, NaiveFeatures, assert_close, images_for, naive_encode, randomise
from small import write_images
from threads import at_once, in_lockstep

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


def build(config: EncoderConfig, resolution: tuple[int, int]) -> FrozenEncoder:
    """An encoder whose weights all matter."""
    encoder = FrozenEncoder(config, resolution)
    randomise(encoder.model)
    return encoder


def plain_model(encoder: FrozenEncoder) -> nn.Module:
    """timm's model of the same weights, without the tap, and with random ones in what follows the last tapped block."""
    model: nn.Module = timm.create_model(encoder.config.name, img_size=encoder.resolution, num_classes=0)
    missing, unknown = model.load_state_dict(encoder.model.state_dict(), strict=False)
    last = encoder.config.tapped_layers[-1]
    assert not unknown
    assert all(re.match(r"norm\.|attn_pool\.|fc_norm\.", n) or int(n.split(".")[1]) > last for n in missing)
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
        if isinstance(module, nn.Identity):
            continue
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


def test_building_leaves_random_states_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder_shape.cache_clear()
    for device in (torch.cuda, torch.mps, torch.xpu):
        monkeypatch.setattr(device, "manual_seed" if device is torch.mps else "manual_seed_all", None)  # not callable
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    FrozenEncoder(EncoderConfig("test_vit", False), (64, 64))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize(("asked", "expected"), [("cuda", "cpu"), ("meta", "meta")])
def test_where_a_random_build_draws(asked: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning builds models within the context of a GPU, whose generator would give other weights."""

    def create(*_: Any, **__: Any) -> nn.Module:
        return nn.Linear(1, 1)

    monkeypatch.setattr("fpt_lightning.encoder.frozen.timm.create_model", create)
    config = EncoderConfig("test_vit", False)
    with FakeTensorMode(), torch.device(asked):
        assert torch.empty(0).device.type == asked
        assert {p.device.type for p in build_encoder(config, (64, 64)).parameters()} == {expected}


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
    for name, most in (("bf16", 0.02), ("fp16", 0.002)):
        assert 0 < row[name]["keys"] < most
        assert 0 < row[name]["values"] < most
        assert all(0 <= share < 0.5 for share in row[name]["other_tokens"])
        assert f"| tiny, untrained | {name} | " in (tmp_path / "encoder_precision.md").read_text()


def test_an_unknown_precision() -> None:
    with pytest.raises(ConfigurationError, match="encoder_precision is 'fp8': choose one of fp32, bf16, fp16"):
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


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit"])
def test_threads_share_an_encoder(family: str) -> None:
    encoder = build(EncoderConfig(FAMILIES[family], False, LAYERS), (96, 96))
    images = list(images_for((96, 96), batch=3).split(1))
    alone = [encoder(image) for image in images]
    in_lockstep(encoder.model.blocks, len(images))
    for found, expected in zip(at_once(encoder, images), alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_memory_estimate_does_not_cut_short_the_pass_of_another_thread() -> None:
    with execution.sketched(torch.device("cpu")):
        assert list(execution.to_do("abc")) == ["a"]
        assert at_once(lambda pieces: list(execution.to_do(pieces)), ["abc"]) == [["a", "b", "c"]]


def test_threads_build_the_same_random_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would draw from the one global generator in turn."""
    expected = FrozenEncoder(EncoderConfig("test_vit", False), (64, 64)).digest
    create, seeded = timm.create_model, threading.Barrier(2)

    def create_together(*args: Any, **kwargs: Any) -> nn.Module:
        with contextlib.suppress(threading.BrokenBarrierError):
            seeded.wait(0.2)
        model: nn.Module = create(*args, **kwargs)
        return model

    monkeypatch.setattr("fpt_lightning.encoder.frozen.timm.create_model", create_together)
    built = at_once(lambda config: FrozenEncoder(config, (64, 64)), [EncoderConfig("test_vit", False)] * 2)
    assert [encoder.digest for encoder in built] == [expected] * 2


def test_copies_of_an_encoder_that_has_run() -> None:
    encoder = build(EncoderConfig("test_vit", False), (64, 64))
    expected = encoder(images_for((64, 64)))
    saved = io.BytesIO()
    torch.save(encoder, saved)
    saved.seek(0)
    copies = copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), torch.load(saved, weights_only=False)
    randomise(encoder, seed=1)
    for other in copies:
        assert all(torch.equal(a, b) for a, b in zip(other(images_for((64, 64))), expected, strict=True))


@every_family
def test_shape_is_known_without_weights(family: str) -> None:
    shape = encoder_shape(FAMILIES[family])
    model: Any = build_encoder(EncoderConfig(FAMILIES[family], False), resolution_of(FAMILIES[family], "native"))
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
        (
            "vit_basse_patch16_224",
            "'vit_basse_patch16_224' is not a model of timm .*; the nearest are vit_base_patch16_2",
        ),
        ("dinov2_small", "the nearest are vit_small_patch14_dinov2, vit_small_patch14_reg4_dinov2, "),
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
    with pytest.raises(EncoderError, match="6 blocks of test_vit called scaled_dot_product_attention 5 times"):
        encoder(torch.zeros(1, 3, 64, 64))
