"""The fusion module and the side network against a naive second implementation, and the paper's parameter counts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods import FPTPlusModule
from fpt_lightning.methods.fusion import FineGrainedFusion, ProjectedFusion, cross_attention, piece_bytes
from fpt_lightning.methods.side import SideViT
from fpt_lightning.planning.memory import LiveTensorBytes
from fpt_lightning.store.codecs import CODECS, Features
from reference import naive_fusion, naive_loss, naive_side, randomise
from small import TINY

LAYERS, HEADS, WIDTH, SIDE_WIDTH, PROMPTS, SELECTED, CLASSES = 3, 4, 32, 16, 5, 7, 3
PATCH, RESOLUTION = (8, 16), (24, 48)  # 3 x 3 patches, neither square


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_fusion(dropout: float = 0.0) -> FineGrainedFusion:
    return FineGrainedFusion(LAYERS, HEADS, WIDTH, SIDE_WIDTH, PROMPTS, dropout)


def small_side() -> SideViT:
    return SideViT(SIDE_WIDTH, HEADS, LAYERS, PATCH, RESOLUTION, CLASSES)


def networks() -> nn.ModuleDict:
    """Both, with weights that all matter; the prompts are of the size of 1, not of 1e-6."""
    both = nn.ModuleDict({"fusion": small_fusion(), "side": small_side()})
    randomise(both, seed=1)
    return both


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, 2, L, H, T, head_dim), images and labels."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 2, LAYERS, HEADS, SELECTED, WIDTH // HEADS, generator=generator) * 2
    return features, torch.randn(2, 3, *RESOLUTION, generator=generator), torch.tensor([2, 0])


def loss_of(both: nn.ModuleDict, features: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(both["side"](images, both["fusion"](Features(features))), labels)


def gradients(both: nn.ModuleDict) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in both.named_parameters()}
    assert not [name for name, gradient in found.items() if gradient is None]
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- the reference


def test_fused_prompts() -> None:
    both, (features, _, _) = networks(), batch()
    fused = both["fusion"](Features(features))
    assert [tuple(prompts.shape) for prompts in fused] == [(2, PROMPTS, SIDE_WIDTH)] * LAYERS
    expected = naive_fusion(copy.deepcopy(both).double()["fusion"], features.double())
    for actual, naive in zip(fused, expected, strict=True):
        assert_close(actual, naive)


def test_fused_prompts_of_fpt() -> None:
    fusion = ProjectedFusion(LAYERS, HEADS, WIDTH, SIDE_WIDTH, PROMPTS, 0.0)
    randomise(fusion, seed=1)
    features, _, _ = batch()
    fused = fusion(Features(features))
    assert [tuple(prompts.shape) for prompts in fused] == [(2, PROMPTS, SIDE_WIDTH)] * LAYERS
    for actual, naive in zip(fused, naive_fusion(copy.deepcopy(fusion).double(), features.double()), strict=True):
        assert_close(actual, naive)
    fusion.dropout.p = 0.5
    torch.manual_seed(0)
    dropped = torch.stack(fusion.train()(Features(features))) == 0
    assert 0.3 < dropped.float().mean() < 0.7  # after the sum: the residual prompts are dropped too


@pytest.mark.parametrize("kind", [FineGrainedFusion, ProjectedFusion])
def test_prompts_start_at_almost_nothing(kind: type[FineGrainedFusion | ProjectedFusion]) -> None:
    torch.manual_seed(0)
    assert 0.9e-6 < kind(6, 12, 768, 96).prompts.std() < 1.1e-6


def test_logits() -> None:
    both, (features, images, _) = networks(), batch()
    reference = copy.deepcopy(both).double()
    expected = naive_side(reference["side"], images.double(), naive_fusion(reference["fusion"], features.double()))
    logits = both["side"](images, both["fusion"](Features(features)))
    assert logits.shape == (2, CLASSES)
    assert_close(logits, expected)


def test_every_gradient() -> None:
    both, (features, images, labels) = networks(), batch()
    reference = copy.deepcopy(both).double()
    loss = loss_of(both, features, images, labels)
    loss.backward()
    fused = naive_fusion(reference["fusion"], features.double())
    expected_loss = naive_loss(naive_side(reference["side"], images.double(), fused), labels)
    expected_loss.backward()
    assert_close(loss, expected_loss)
    actual, expected = gradients(both), gradients(reference)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-5, f"{name}: a test that cannot fail"
        difference = (actual[name].double() - gradient).abs().max() / gradient.abs().max()
        assert difference < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_features_are_widened_first(dtype: torch.dtype) -> None:
    """Stored in half precision, they give what their values in single precision give, gradients included."""
    features, images, labels = batch()
    found = []
    for given in (features.to(dtype), features.to(dtype).float(), features):
        both = networks()
        loss_of(both, given, images, labels).backward()
        found.append(gradients(both))
    for name, gradient in found[0].items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, found[1][name])
        assert (gradient - found[2][name]).norm() < 0.1 * found[2][name].norm() + 1e-6


@pytest.mark.parametrize("codec", CODECS)
def test_coded_features_give_what_they_stand_for(codec: str) -> None:
    """Widened within the fusion, they give what the numbers that they stand for give, gradients included."""
    features, images, labels = batch()
    coded = CODECS[codec].encode(features)
    plain = Features(torch.stack([torch.stack(wide(coded, i), 1) for i in range(LAYERS)], 2))
    found = []
    for given in (coded, plain):
        both = networks()
        F.cross_entropy(both["side"](images, both["fusion"](given)), labels).backward()
        found.append(gradients(both))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def wide(coded: Features, layer: int) -> list[Tensor]:
    return [part.widened(torch.float32) for part in coded.layer(layer)]


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4"])
def test_gradients_are_those_of_finite_differences(codec: str) -> None:
    features, _, _ = batch()
    keys, values = CODECS[codec].encode(features).layer(0)
    queries = torch.randn(HEADS, PROMPTS, WIDTH // HEADS, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: cross_attention(q, keys, values), queries)
    assert torch.autograd.gradcheck(lambda q, w: cross_attention(q, keys, values, w), (queries, weight))


def test_pieces_of_a_batch_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(7, 2, LAYERS, HEADS, SELECTED, WIDTH // HEADS)
    found = []
    for images in (7, 3, 1):
        monkeypatch.setattr("fpt_lightning.methods.fusion._PIECE_BYTES", images * features[0, 0, 0].nbytes)
        fusion = networks()["fusion"]
        fused = torch.stack(fusion(Features(features)))
        fused.square().sum().backward()
        found.append((fused.detach(), fusion.prompts.grad, fusion.out.weight.grad))
    for fused, *gradients in found[1:]:
        assert_close(fused, found[0][0])
        for gradient, whole in zip(gradients, found[0][1:], strict=True):
            assert (gradient - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_one_piece_is_widened_at_a_time(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and backwards too."""
    features = CODECS[codec].encode(torch.randn(6, 2, LAYERS, HEADS, 500, WIDTH // HEADS))
    peaks = []
    for images in (1, 3):
        monkeypatch.setattr("fpt_lightning.methods.fusion._PIECE_BYTES", 2 * 500 * WIDTH * 4)
        some = Features(*(None if part is None else part[: 2 * images] for part in features))
        fusion = small_fusion()
        with LiveTensorBytes() as live:
            torch.stack(fusion(some)).sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] + 500 * WIDTH * 4


def test_pieces_are_small_on_a_cpu_and_where_memory_is_to_be_saved() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert piece_bytes(cpu, False) == piece_bytes(cpu, True) == piece_bytes(gpu, True) < piece_bytes(gpu, False)
    assert FPTPlusModule(3, **TINY, gradient_checkpointing=True).fusion.saving
    assert not FPTPlusModule(3, **TINY).fusion.saving


def test_a_layer_is_fused_when_its_block_asks() -> None:
    """So that the backward pass of a block is followed by that of its prompts, which frees what both keep."""
    both, (features, images, _) = networks(), batch()
    order: list[str] = []
    for index, block in enumerate(both["side"].blocks):
        block.register_forward_hook(lambda *_, index=index: order.append(f"block {index}"))
    fuse = both["fusion"].fuse
    both["fusion"].fuse = lambda *given: order.append("fusion") or fuse(*given)
    both["side"](images, both["fusion"].by_layer(Features(features)))
    assert order == ["fusion", "block 0", "fusion", "block 1", "fusion", "block 2"]


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_of_keys_and_values_is_kept_for_the_backward_pass(codec: str) -> None:
    """What a layer adds to memory does not grow with the tokens."""
    kept = []
    for tokens in (50, 500):
        fusion = small_fusion()
        features = CODECS[codec].encode(torch.randn(2, 2, LAYERS, HEADS, tokens, WIDTH // HEADS))
        with LiveTensorBytes() as live:
            live.count([*fusion.parameters(), *features])
            before = live.current
            fused = fusion(features)
            kept.append(live.current - before)
            del fused
    assert kept[0] == kept[1] > 0


def test_recomputed_blocks_give_the_same_gradients_from_less_memory() -> None:
    features, images, labels = batch()
    found, kept, runs = [], [], [0] * LAYERS

    def count(index: int) -> None:
        runs[index] += 1

    for recomputed in (False, True):
        both, runs[:] = networks(), [0] * LAYERS
        both["side"].gradient_checkpointing = recomputed
        for index, block in enumerate(both["side"].blocks):
            block.register_forward_pre_hook(lambda *_, index=index: count(index))
        with LiveTensorBytes() as live:
            loss = F.cross_entropy(both["side"](images, both["fusion"](Features(features))), labels)
            kept.append(live.current)
        loss.backward()
        found.append(gradients(both))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    assert runs == [2] * (LAYERS - 1) + [1]  # the last block's is at hand when the backward pass starts
    assert kept[1] < 0.65 * kept[0]


def test_autocast_decides_the_arithmetic() -> None:
    features, _, _ = batch()
    keys, values = CODECS["int8"].encode(features).layer(0)
    queries = torch.randn(HEADS, PROMPTS, WIDTH // HEADS, requires_grad=True)
    exact = cross_attention(queries, keys, values)
    (wanted,) = torch.autograd.grad(exact.square().sum(), queries)
    with torch.autocast("cpu", torch.bfloat16):
        attended = cross_attention(queries, keys, values)
    (gradient,) = torch.autograd.grad(attended.float().square().sum(), queries)
    assert (attended.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < (attended.float() - exact).norm() < 0.02 * exact.norm()
    assert 0 < (gradient - wanted).norm() < 0.03 * wanted.norm()


def test_each_layer_reads_its_own_features() -> None:
    both, (features, _, _) = networks(), batch()
    fused = both["fusion"](Features(features))
    changed = features.clone()
    changed[:, :, 1] += 1
    for layer, (before, after) in enumerate(zip(fused, both["fusion"](Features(changed)), strict=True)):
        assert torch.equal(before, after) == (layer != 1)


# ---------------------------------------------------------------------------------------------------- the paper's sizes


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def fpt_plus(prompts: int = 16) -> tuple[FineGrainedFusion, SideViT]:
    """FPT+ on ViT-B/16 with 5 classes."""
    return FineGrainedFusion(6, 12, 768, 96, prompts), SideViT(96, 12, 6, (16, 16), (128, 128), 5)


def test_learnable_parameters_of_fpt_plus() -> None:
    fusion, side = fpt_plus()
    parts = {
        "prompts": fusion.prompts.numel(),
        "LayerNorm": count(fusion.norm.parameters()),
        "out-projector": count(fusion.out.parameters()),
        "class token": side.class_token.numel(),
        "positions": side.positions.numel(),
        "patch embedding": count(side.patch_embed.parameters()),
        "blocks": count(side.blocks.parameters()),
        "final norm": count(side.norm.parameters()),
        "head": count(side.head.parameters()),
    }
    assert parts == {
        "prompts": 73_728,
        "LayerNorm": 1_536,
        "out-projector": 73_824,
        "class token": 96,
        "positions": 6_240,
        "patch embedding": 73_824,
        "blocks": 671_040,
        "final norm": 192,
        "head": 485,
    }
    assert count([*fusion.parameters(), *side.parameters()]) == sum(parts.values()) == 900_965


@pytest.mark.parametrize(
    ("prompts", "total"), [(4, 845_669), (8, 864_101), (16, 900_965), (32, 974_693), (64, 1_122_149), (128, 1_417_061)]
)
def test_learnable_parameters_by_number_of_prompts(prompts: int, total: int) -> None:
    fusion, side = fpt_plus(prompts)
    learnable = [p for module in (fusion, side) for p in module.parameters() if p.requires_grad]
    assert count(learnable) == total
    assert not list(fusion.buffers())
    assert (
        round(100 * total / (86_859_496 + total), 2)
        == {4: 0.96, 8: 0.99, 16: 1.03, 32: 1.11, 64: 1.28, 128: 1.61}[prompts]
    )


@torch.no_grad()
def test_initialisation() -> None:
    torch.manual_seed(0)
    fusion, side = fpt_plus()
    assert abs(float(fusion.prompts.std()) / 1e-6 - 1) < 0.02
    assert abs(float(fusion.prompts.mean())) < 1e-8
    assert fusion.norm.eps == 1e-5
    assert fusion.dropout.p == 0.5
    for name, parameter in side.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            assert abs(float(parameter.std()) / 0.02 - 1) < 0.06, name
            assert abs(float(parameter.mean())) < 2e-3, name
    assert 0.01 < float(side.class_token.std()) < 0.03


# ------------------------------------------------------------------------------------------------------------ behaviour


def test_sequence_length_is_constant() -> None:
    """Prompts join the tokens of one block, and leave before the next one."""
    both, (features, images, _) = networks(), batch()
    fused = both["fusion"](Features(features))
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for block in both["side"].blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    both["side"](images, fused)
    assert len(inputs) == LAYERS
    for x, prompts in zip(inputs, fused, strict=True):
        assert x.shape == (2, 10 + PROMPTS, SIDE_WIDTH)
        assert torch.equal(x[:, 10:], prompts)
    for x, before in zip(inputs[1:], outputs[:-1], strict=True):
        assert torch.equal(x[:, :10], before[:, :10])


def test_one_prompt_set_a_block() -> None:
    both, (features, images, _) = networks(), batch()
    fused = both["fusion"](Features(features))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        both["side"](images, fused[:-1])


def test_dropout_is_active_in_training_only() -> None:
    fusion, (features, _, _) = small_fusion(dropout=0.5), batch()
    randomise(fusion)
    expected = torch.stack(fusion.eval()(Features(features)))
    assert torch.equal(expected, torch.stack(fusion(Features(features))))
    torch.manual_seed(0)
    first, second = (torch.stack(fusion.train()(Features(features))) for _ in range(2))
    kept = first != 0
    assert not torch.equal(first, second)
    assert 0.35 < float(kept.float().mean()) < 0.65
    assert_close(first[kept], 2 * expected[kept])  # dropped after the out-projector, bias included


def test_no_dropout_inside_the_side_network() -> None:
    both, (features, images, _) = networks(), batch()
    fused = both["fusion"](Features(features))
    both.train()
    assert torch.equal(both["side"](images, fused), both["side"](images, fused))


@pytest.mark.parametrize("kind", [FineGrainedFusion, ProjectedFusion])
@pytest.mark.parametrize("prompts", [0, -1])
def test_fusion_without_prompts(kind: type[FineGrainedFusion | ProjectedFusion], prompts: int) -> None:
    with pytest.raises(ConfigurationError, match=f"prompts is {prompts}: give at least 1"):
        kind(LAYERS, HEADS, WIDTH, SIDE_WIDTH, prompts)
