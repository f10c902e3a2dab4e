"""What a model looked at: maps, attention, deletion, and the pictures and numbers that the command line leaves."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from commands import fails, run
from fpt_lightning import ImageDataModule, PreloadedFeatureDataModule, cli
from fpt_lightning.data.images import ImageReader
from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.encoder.config import EncoderConfig, EncoderShape, encoder_shape
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.explanation import attention as explain
from fpt_lightning.explanation.pictures import Explanation, outline, write_pictures
from fpt_lightning.explanation.writer import ExplanationWriter, is_right
from fpt_lightning.methods import METHODS
from fpt_lightning.methods.fusion import FineGrainedFusion, Fusion, ProjectedFusion
from fpt_lightning.methods.side import SideViT
from fpt_lightning.store.codecs import CODECS, Features
from fpt_lightning.store.store import FeatureStore
from reference import FAMILIES, naive_fusion, randomise
from small import quiet_trainer, tiny_model, write_images
from threads import at_once, in_lockstep

IMAGES, LAYERS, HEADS, WIDTH, SIDE_WIDTH, PROMPTS, SELECTED = 2, 3, 4, 32, 16, 5, 7
FUSIONS = [FineGrainedFusion, ProjectedFusion]


def small_fusion(kind: Callable[..., Fusion]) -> Fusion:
    fusion = kind(LAYERS, HEADS, WIDTH, SIDE_WIDTH, PROMPTS, 0.0)
    randomise(fusion, seed=1)
    return fusion


def some_features(seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(IMAGES, 2, LAYERS, HEADS, SELECTED, WIDTH // HEADS, generator=generator) * 2


def a_shape(prefix_tokens: int, patch_size: tuple[int, int] = (8, 16)) -> EncoderShape:
    return EncoderShape("some_vit", 32, 4, 2, patch_size, prefix_tokens, prefix_tokens > 0, 0)


# ----------------------------------------------------------------------------------------------------- where tokens lie


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_selected_tokens_lie_where_their_indices_say(prefix: int) -> None:
    """Two layers and two heads on 2 x 4 patches of 8 x 16 pixels."""
    lying = torch.tensor([[[0, 3, 4], [7, 5, 0]], [[6, 2, 1], [1, 0, 7]]]) + prefix
    indices = torch.cat([lying, torch.full((2, 2, 1), max(0, prefix - 1))], -1) if prefix else lying
    found = explain.token_maps(indices.int(), a_shape(prefix), (16, 64))
    expected = torch.zeros(2, 2, 2, 4, dtype=torch.long)
    for layer, head, row, column in (
        *((0, 0, 0, 0), (0, 0, 0, 3), (0, 0, 1, 0)),
        *((0, 1, 1, 3), (0, 1, 1, 1), (0, 1, 0, 0)),
        *((1, 0, 1, 2), (1, 0, 0, 2), (1, 0, 0, 1)),
        *((1, 1, 0, 1), (1, 1, 0, 0), (1, 1, 1, 3)),
    ):
        expected[layer, head, row, column] = 1
    assert torch.equal(found.patches, expected)
    assert found.prefix.shape == (2, 2, prefix)
    assert (found.prefix.sum(-1) == (prefix > 0)).all()
    if prefix:
        assert (found.prefix[..., -1] == 1).all()


@pytest.mark.parametrize("family", ["vit", "vit-register-no-class", "deit-distilled", "dinov2-registers", "siglip"])
def test_every_family_selects_tokens_that_lie_somewhere(family: str) -> None:
    """A bright patch is put where it stands out, and every token is selected: each lies in one place once."""
    name = FAMILIES[family]
    shape = encoder_shape(name)
    resolution = (2 * shape.patch_size[0], 3 * shape.patch_size[1])
    encoder = FrozenEncoder(EncoderConfig(name, pretrained=False, token_ratio=1.0), resolution)
    indices = encoder(torch.randn(1, 3, *resolution)).indices[0]
    found = explain.token_maps(indices, shape, resolution)
    assert found.patches.shape == (*indices.shape[:2], 2, 3)
    assert found.prefix.shape == (*indices.shape[:2], shape.prefix_tokens)
    assert (found.patches == 1).all()
    assert (found.prefix == 1).all()


def test_tokens_of_another_resolution() -> None:
    with pytest.raises(ConfigurationError, match="go from 0 to 9, but some_vit has 9 tokens at 16 x 64 pixels"):
        explain.token_maps(torch.tensor([[0, 9]]), a_shape(1), (16, 64))


# ----------------------------------------------------------------------------------------------- the prompts' attention


def masked_attention(fusion: Any, features: Tensor, keep: Tensor | None = None) -> Tensor:
    """(B, L, H, M, T) in double precision, one query at a time; tokens that are not kept (B, L, H, T) are masked."""
    found = torch.zeros(IMAGES, LAYERS, HEADS, PROMPTS, SELECTED, dtype=torch.float64)
    for image, layer, head, prompt in np.ndindex(IMAGES, LAYERS, HEADS, PROMPTS):
        project = fusion.query if hasattr(fusion, "query") else fusion.norm
        query = project(fusion.prompts[layer, prompt])[head * 8 : (head + 1) * 8]
        scores = features[image, 0, layer, head] @ query / math.sqrt(8)
        if keep is not None:
            scores = scores.masked_fill(~keep[image, layer, head], -math.inf)
        found[image, layer, head, prompt] = scores.softmax(-1)
    return found


@pytest.mark.parametrize("kind", FUSIONS)
def test_the_prompts_attention_is_that_of_the_fusion(kind: Callable[..., Fusion]) -> None:
    fusion, features = small_fusion(kind), some_features()
    found = explain.prompt_attention(fusion, Features(features))
    expected = masked_attention(fusion.double(), features.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


@pytest.mark.parametrize("codec", CODECS)
def test_attention_to_coded_keys(codec: str) -> None:
    fusion, coded = small_fusion(FineGrainedFusion), CODECS[codec].encode(some_features())
    wide = torch.stack([torch.stack([x.widened(torch.float32) for x in coded.layer(i)], 1) for i in range(LAYERS)], 2)
    assert torch.equal(explain.prompt_attention(fusion, coded), explain.prompt_attention(fusion, Features(wide)))


def test_the_overlay_averages_prompts_and_heads_where_tokens_lie() -> None:
    shape, resolution = a_shape(1), (24, 48)  # 3 x 3 patches
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(LAYERS, HEADS, PROMPTS, SELECTED, generator=generator).softmax(-1)
    indices = torch.rand(LAYERS, HEADS, 10, generator=generator).argsort(-1)[..., :SELECTED]
    expected = torch.zeros(LAYERS, 10)
    for layer, head, prompt, token in np.ndindex(*attention.shape):
        place = int(indices[layer, head, token])
        expected[layer, place] += attention[layer, head, prompt, token] / (HEADS * PROMPTS)
    found = explain.overlay(attention, indices, shape, resolution)
    torch.testing.assert_close(found.prefix, expected[:, :1])
    torch.testing.assert_close(found.patches, expected[:, 1:].view(LAYERS, 3, 3))
    torch.testing.assert_close(found.patches.sum((1, 2)) + found.prefix[:, 0], torch.ones(LAYERS))


# --------------------------------------------------------------------------------------------------- the side network's


@pytest.mark.parametrize("fused", [True, False])
def test_side_tokens_share_their_attention_between_prompts_and_themselves(fused: bool) -> None:
    set_fused_attn(fused)
    side = SideViT(SIDE_WIDTH, HEADS, LAYERS, (8, 16), (24, 48), 3)
    set_fused_attn(True)
    randomise(side, seed=1)
    blocks: list[Any] = list(side.blocks)
    images, prompts = torch.randn(IMAGES, 3, 24, 48), list(torch.randn(LAYERS, IMAGES, PROMPTS, SIDE_WIDTH))
    sequences: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda module, args: sequences.append(args[0])) for block in blocks]
    logits = side(images, prompts)
    for hook in hooks:
        hook.remove()
    shared = copy.deepcopy(side)
    in_lockstep(shared.blocks, 2)
    found, _ = at_once(lambda given: explain.side_attention(shared, given, prompts), [images, images.flip(0)])
    assert found.shape == (IMAGES, LAYERS, HEADS, 10, PROMPTS)
    for layer, (block, x) in enumerate(zip(blocks, sequences, strict=True)):
        query, key, _ = block.attn.qkv(block.norm1(x)).view(IMAGES, 15, 3, HEADS, 4).permute(2, 0, 3, 1, 4)
        whole = (query @ key.transpose(-1, -2) / 2).softmax(-1)[:, :, :10]
        torch.testing.assert_close(found[:, layer], whole[..., 10:])
        torch.testing.assert_close(found[:, layer].sum(-1) + whole[..., :10].sum(-1), torch.ones(IMAGES, HEADS, 10))
    assert torch.equal(side(images, prompts), logits)


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of nothing, where others look at what is drawn: drawing takes most of the time."""

    def write(folder: Path, name: str, explanation: Explanation) -> None:
        for kind in ("tokens", "attention", "overlay", "sheet"):
            path = folder / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (1, 1)).save(path)

    monkeypatch.setattr("fpt_lightning.explanation.writer.write_pictures", write)


class SinglePrecision(TorchDispatchMode):
    """Fails where an operation gives double precision, which ``mps`` does not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert all(leaf.dtype != torch.float64 for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), func
        return out


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "ordinal", "regression"])
@pytest.mark.usefixtures("blank_pictures")
def test_no_stage_asks_the_device_for_double_precision(task: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 4, "b": 4, "c": 4})
    ids = [f"{name}/{i:03d}.png" for name in "abc" for i in range(4)]
    splits = ("train", "val", "test")
    rows = [f"{id},{i % 4 // 2},{i % 2},{splits[i % 3]}" for i, id in enumerate(ids)]
    (tmp_path / "images" / "list.csv").write_text("\n".join(["image,one,other,split", *rows]))
    several = task == "multilabel"
    classes, column = 1 if task == "regression" else 2, ["one", "other"] if several else "one"
    model = tiny_model(num_classes=classes, task=task)
    settings: dict[str, Any] = {"resolution": 64, "mean": [0.4], "std": [0.2], "image_size": 48}
    settings |= {"manifest": "list.csv", "label_column": column}
    data = PreloadedFeatureDataModule(str(tmp_path / "images"), str(tmp_path / "store.zarr"), **settings)
    with SinglePrecision():
        data.preload(model, quiet_trainer(tmp_path))
        trainer = quiet_trainer(tmp_path)
        trainer.fit(model, data)
        trainer.test(model, data, verbose=False)
        trainer.callbacks.append(ExplanationWriter(tmp_path / "out", model, images=1, deletion=task != "regression"))
        trainer.predict(model, data)
    assert (tmp_path / "out" / "explanation.json").is_file()


# ------------------------------------------------------------------------------------------------------------- deletion


@pytest.mark.parametrize("codec", CODECS)
def test_some_tokens_of_coded_features(codec: str) -> None:
    coded = CODECS[codec].encode(some_features())
    positions = torch.rand(IMAGES, LAYERS, HEADS, SELECTED).argsort(-1)[..., :3]
    taken = coded.take(positions)
    for layer in range(LAYERS):
        for part, whole in zip(taken.layer(layer), coded.layer(layer), strict=True):
            expected = whole.widened(torch.float32).gather(2, positions[:, layer, ..., None].expand(-1, -1, -1, 8))
            assert torch.equal(part.widened(torch.float32), expected)


@pytest.mark.parametrize("kind", FUSIONS)
def test_deleted_tokens_are_those_that_a_mask_hides(kind: Callable[..., Fusion]) -> None:
    fusion, features = small_fusion(kind), some_features()
    order = torch.rand(IMAGES, LAYERS, HEADS, SELECTED).argsort(-1)
    found = torch.stack(fusion(explain.without(Features(features), order, 3 / SELECTED)), 1)
    fusion.double()
    keep = torch.ones_like(order, dtype=torch.bool).scatter(-1, order[..., :3], False)
    attention = masked_attention(fusion, features.double(), keep)
    summary = (attention @ features[:, 1].double()).transpose(2, 3).flatten(-2)
    earlier = isinstance(fusion, ProjectedFusion)
    expected = fusion.out(summary) + fusion.prompts if earlier else fusion.out(summary + fusion.prompts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FUSIONS)
def test_without_any_token_there_are_the_prompts_alone(kind: Callable[..., Fusion]) -> None:
    fusion, features = small_fusion(kind), some_features()
    order = explain.prompt_attention(fusion, Features(features)).mean(-2).argsort(-1)
    assert explain.without(Features(features), order, 0.0).features is features
    found = torch.stack(fusion(explain.without(Features(features), order, 1.0)), 1)
    nothing = naive_fusion(fusion.double(), torch.zeros_like(features).double())
    torch.testing.assert_close(found.double(), torch.stack(nothing, 1), rtol=1e-5, atol=1e-5)


def test_each_order_deletes_exactly_its_tokens() -> None:
    """Values are the tokens' numbers; the score says which are left."""
    features = torch.arange(SELECTED).float().view(-1, 1).expand(IMAGES, 2, LAYERS, HEADS, SELECTED, 8).contiguous() + 1
    attention = torch.rand(IMAGES, LAYERS, HEADS, PROMPTS, SELECTED).softmax(-1)
    seen: list[Tensor] = []

    def score(left: Features) -> Tensor:
        seen.append(left.features[:, 1, ..., 0])
        return left.features[:, 1, ..., 0].sum((1, 2, 3))

    steps = [0.0, 2 / SELECTED, 1.0]
    curves = explain.deletion_curves(score, Features(features), attention, [3, 4], draws=2, fractions=steps)
    assert tuple(curves) == explain.ORDERS
    ranked = attention.mean(-2).argsort(-1, descending=True)
    most, first, second, least = seen[:3], seen[3:6], seen[6:9], seen[9:]
    for found, gone in ((most, ranked[..., :2]), (least, ranked[..., -2:])):
        left = found[1].sort(-1).values
        assert torch.equal(left, torch.stack([_others(each) for each in gone.flatten(0, 2)]).view(left.shape))
        assert torch.equal(found[0], features[:, 1, ..., 0])
        assert not found[2].any()
    assert not torch.equal(first[1].sort(-1).values, second[1].sort(-1).values)
    for curve in curves.values():
        assert curve.shape == (IMAGES, 3)
        assert (curve[:, 0] == LAYERS * HEADS * 28).all()
        assert (curve[:, 2] == 0).all()
    assert torch.equal(curves[explain.ORDERS[1]][:, 1], (first[1] + second[1]).sum((1, 2, 3)) / 2)


def _others(gone: Tensor) -> Tensor:
    return torch.tensor([token + 1.0 for token in range(SELECTED) if token not in gone.tolist()])


def test_random_orders_depend_on_the_image_alone() -> None:
    features, attention = Features(some_features()), torch.rand(IMAGES, LAYERS, HEADS, PROMPTS, SELECTED)

    def score(left: Features) -> Tensor:
        return left.features.sum((1, 2, 3, 4, 5))

    def random(images: slice, seeds: list[int]) -> Tensor:
        given = Features(features.features[images])
        return explain.deletion_curves(score, given, attention[images], seeds)[explain.ORDERS[1]]

    both = random(slice(0, 2), [5, 6])
    assert torch.equal(random(slice(1, 2), [6])[0], both[1])
    assert not torch.equal(random(slice(1, 2), [7])[0], both[1])


def test_the_area_between_curves() -> None:
    upper, lower = np.array([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]]), np.array([[1.0, 0.0, 0.0], [1.0, 0.5, 0.0]])
    assert explain.area_between(upper, lower, [0, 0.5, 1]).tolist() == [0.5, 0]


def test_means_keep_groups_whole() -> None:
    values = np.repeat([[0.0], [1.0]], 50, axis=0)
    single = explain.mean_with_interval(values, [str(i) for i in range(100)])[0]
    pairs = explain.mean_with_interval(values, ["a"] * 50 + ["b"] * 50)[0]
    assert single.value == pairs.value == 0.5
    assert 0.35 < single.low < single.high < 0.65
    assert (pairs.low, pairs.high) == (0, 1)
    alone = explain.mean_with_interval(values, ["a"] * 100)[0]
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_outline_runs_around_what_is_selected() -> None:
    mask = np.zeros((2, 3), bool)
    mask[0, 1:] = True
    edges = {tuple(map(tuple, edge)) for edge in outline(mask).tolist()}
    assert edges == {
        *(((1, 0), (2, 0)), ((2, 0), (3, 0)), ((1, 1), (2, 1)), ((2, 1), (3, 1))),
        *(((1, 0), (1, 1)), ((3, 0), (3, 1))),
    }


def test_pictures_keep_the_images_aspect(tmp_path: Path) -> None:
    """The right half alone is selected and attended: it is tinted, and nothing else is."""
    selected = np.zeros((2, 2), np.int64)
    selected[:, 1] = 4
    attention = selected / 8.0
    pixels = np.full((60, 180, 3), 0.5, np.float32)
    given = Explanation(pixels, selected, 4, attention, attention, "a caption", None, "block 1, all heads", "")
    write_pictures(tmp_path, "a/0.png", given)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        f"{kind}/a/0.png.png" for kind in ("attention", "overlay", "sheet", "tokens")
    ]
    for kind in ("tokens", "attention"):
        picture = np.asarray(Image.open(tmp_path / kind / "a" / "0.png.png").convert("RGB")).astype(int)
        plain = abs(picture - 128).max(-1) < 3
        plain &= (plain.sum(1) > 50)[:, None] & (plain.sum(0) > 50)  # without the letters
        grey = plain.nonzero()
        height, width = (int(np.ptp(axis)) + 1 for axis in grey)
        assert width / height == pytest.approx(1.5, rel=0.03), kind
        middle = picture[(grey[0].min() + grey[0].max()) // 2]
        coloured = np.ptp(middle, axis=1)[grey[1].max() + 5 : grey[1].max() + width - 5] > 30
        assert coloured.all(), kind


def test_right_and_wrong_are_said_of_one_known_class() -> None:
    """By its name, as the model's classes may stand in another order than those of the data."""
    module: Any = SimpleNamespace(output_names=("b", "a"))
    manifest = Manifest(Path("/data"), (), ("a", "b"))
    found = [is_right(module, manifest, Sample("x", 0), torch.tensor(scores)) for scores in ([0.1, 0.9], [0.9, 0.1])]
    assert found == [True, False]
    assert is_right(module, manifest, Sample("x"), torch.tensor([0.1, 0.9])) is None
    several = replace(manifest, kind="multi-label")
    assert is_right(module, several, Sample("x", targets=(1, 0)), torch.tensor([0.1, 0.9])) is None


# ------------------------------------------------------------------------------------------------------- through models


def explained(folder: Path, model: nn.Module, data: ImageDataModule, **changes: Any) -> dict[str, Any]:
    """``explanation.json`` of what is written while ``model`` predicts."""
    writer = ExplanationWriter(folder, model, **{"images": 1, "deletion": model.task.KIND != "regression", **changes})
    trainer = quiet_trainer(folder.parent, callbacks=[writer])
    trainer.predict(model, datamodule=data, return_predictions=False)
    content: dict[str, Any] = json.loads((folder / "explanation.json").read_text())
    return content


def pictures_of(folder: Path, kind: str) -> list[str]:
    return sorted(path.relative_to(folder / kind).as_posix() for path in (folder / kind).rglob("*.png"))


@pytest.mark.usefixtures("blank_pictures")
def test_a_store_and_the_encoder_tell_the_same(
    tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    randomise(model, seed=1)
    stored = tiny_data(codec="fp32")
    stored.preload(model)
    live = ImageDataModule(stored.root, resolution=64, mean=[0.4], std=[0.2], image_size=48, batch_size=3, split_seed=0)
    stored.explained = live.explained = "test"
    by_encoder = explained(tmp_path / "encoder", model, live)
    fresh = tiny_model()
    fresh.load_state_dict(model.state_dict())
    monkeypatch.setattr("fpt_lightning.methods.features.FrozenEncoder", _refuse)
    by_store = explained(tmp_path / "store", fresh, stored)
    assert by_store["images"] == by_encoder["images"] == 6
    for name, means in by_store["deletion"]["scores"].items():
        for found, expected in zip(means, by_encoder["deletion"]["scores"][name], strict=True):
            assert found == pytest.approx(expected, abs=1e-4)
    assert len(pictures_of(tmp_path / "store", "sheet")) == 1
    assert pictures_of(tmp_path / "store", "sheet") == pictures_of(tmp_path / "encoder", "sheet")


def _refuse(*args: Any) -> None:
    raise AssertionError("the encoder is not needed")


@pytest.mark.parametrize("evaluated", [1, 4])
@pytest.mark.usefixtures("blank_pictures")
def test_a_store_of_several_orientations_in_memory_tells_of_the_images_as_they_are(
    tiny_data: Callable[..., PreloadedFeatureDataModule], evaluated: int, tmp_path: Path
) -> None:
    model = tiny_model()
    randomise(model, seed=1)
    found = []
    for count in (1, 8):
        model.test_time_orientations = min(evaluated, count)
        data = tiny_data(orientations=count, in_memory=count > 1, store=str(tmp_path / f"{count}.zarr"))
        data.preload(model)
        data.explained = "val"
        found.append(explained(tmp_path / str(count), model, data))
    one, several = found
    assert one["side_attention"] == several["side_attention"]
    if evaluated == 1:  # else another class may be predicted, whose score is followed
        assert one == several


@pytest.mark.parametrize(("task", "num_classes"), [("multilabel", 2), ("regression", 1), ("coral", 3)])
@pytest.mark.usefixtures("blank_pictures")
def test_every_task_is_explained(task: str, num_classes: int, tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 3})
    model = METHODS["fpt"](num_classes, encoder="test_vit", pretrained=False, side_resolution=32, task=task)
    data = ImageDataModule(str(root), resolution=(32, 64), mean=[0.4], std=[0.2], image_size=48, fit="letterbox")
    if task == "regression":
        with pytest.raises(ConfigurationError, match="deletion is true, but a regression has no class"):
            ExplanationWriter(tmp_path / "out", model, deletion=True)
    content = explained(tmp_path / "out", model, data)
    assert list(content["side_attention"]["by_block"]) == [str(block) for block in range(6)]
    assert content["side_attention"]["if_uniform"] == pytest.approx(16 / (16 + 5))
    assert (content["deletion"] is None) == (task == "regression")
    assert (tmp_path / "out" / "deletion.png").exists() == (task != "regression")


def test_a_model_without_registers_or_class_token_in_pictures(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"a": 1})
    for family in ("siglip", "vit-register-no-class"):
        model = tiny_model(encoder=FAMILIES[family], reduction=4)
        data = ImageDataModule(str(root), resolution=(32, 64), mean=[0.4], std=[0.2], image_size=48)
        content = explained(tmp_path / family, model, data, head=1)
        first = next(iter(content["side_attention"]["by_block"].values()))
        assert first["value"] == pytest.approx(content["side_attention"]["if_uniform"], abs=0.02)
        assert first["low"] is None  # of a single image
        assert pictures_of(tmp_path / family, "tokens") == ["a/000.png.png"]


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a configuration, its store and its run of an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    root = write_images(folder / "images", {"a": 10, "b": 10, "c": 10})
    model = {"num_classes": 3, "encoder": "test_vit", "pretrained": False, "side_resolution": 32, "prompts": 4}
    data = {"root": str(root), "store": str(folder / "store.zarr"), "resolution": 64, "image_size": 48}
    data |= {"mean": [0.4], "std": [0.2]}
    content = {
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
        },
        "model": {"class_path": "FPTPlusModule", "init_args": model},
        "data": {"class_path": "PreloadedFeatureDataModule", "init_args": data},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    cli.main(["fit", "--config", str(folder / "config.yaml")])
    return folder


@pytest.fixture
def command(trained: Path) -> list[object]:
    return ["explain", "--config", trained / "config.yaml", "--ckpt_path", trained / "run" / "best.ckpt"]


def test_explain_a_split_from_the_store(command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpt_lightning.methods.features.FrozenEncoder", _refuse)
    out = tmp_path / "pictures"
    run(*command, "--out", out, "--split", "test", "--images", 1, "--layer", 4, "--head", 1, "--deletion", "true")
    assert {path.name for path in out.iterdir()} == {
        *("attention", "overlay", "sheet", "tokens"),
        *("deletion.png", "side_attention.png", "explanation.json"),
    }
    assert len(pictures_of(out, "sheet")) == len(pictures_of(out, "tokens")) == 1
    content = json.loads((out / "explanation.json").read_text())
    assert (content["images"], content["groups"]) == (6, 6)
    assert list(content["side_attention"]["by_block"]) == ["3", "4", "5"]
    curves = content["deletion"]["scores"]
    assert tuple(curves) == explain.ORDERS
    assert len({tuple(round(means[place]["value"], 6) for place in (0, -1)) for means in curves.values()}) == 1
    assert set(content["deletion"]["areas"]) == {"random - most attended", "least - most attended"}


@pytest.mark.usefixtures("blank_pictures")
def test_explain_new_images_with_the_configuration_of_a_run(
    command: list[object], trained: Path, tmp_path: Path
) -> None:
    root = write_images(tmp_path / "new", {"some": 3}, size=(40, 100))
    command[2] = trained / "run" / "config.yaml"
    given = ["--data.root", root, "--out", tmp_path / "out"]
    run(*command, *given, "--images", 0, "--deletion", "true", "--trainer.precision", "bf16-true")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("deletion.png", "side_attention.png", "explanation.json")
    }
    run(*command, *given)
    assert pictures_of(tmp_path / "out", "sheet") == [f"some/{i:03d}.png.png" for i in range(3)]


@pytest.mark.parametrize("kind", ["store", "split", "folder"])
@pytest.mark.parametrize("deletion", [False, True])
@pytest.mark.usefixtures("blank_pictures")
def test_images_that_are_not_drawn_are_not_read(
    kind: str, deletion: bool, command: list[object], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the store, or from files that are all held to be readable first; all are read for the deletion test."""
    root, read = trained / "images", list[str]()
    command += {
        "store": ["--split", "test"],
        "split": ["--split", "test", "--data", "ImageDataModule", "--data.on_error", "skip"],
        "folder": ["--data.root", root, "--data.on_error", "skip"],
    }[kind]
    monkeypatch.setattr(
        ImageReader,
        "__call__",
        lambda self, path, *args, _call=ImageReader.__call__: read.append(str(path)) or _call(self, path, *args),
    )
    rows = FeatureStore.read_into
    stored = list[int]()
    monkeypatch.setattr(
        FeatureStore, "read_into", lambda self, asked, out: stored.extend(asked) or rows(self, asked, out)
    )
    run(*command, "--out", tmp_path / "out", "--images", 2, "--deletion", str(deletion).lower())
    expected = 2 if not deletion else 30 if kind == "folder" else 6
    content = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert content["images"] == expected
    assert (content["deletion"] is not None) == (tmp_path / "out" / "deletion.png").exists() == deletion
    drawn = pictures_of(tmp_path / "out", "sheet")
    assert len(drawn) == 2
    if kind == "store":
        assert (len(set(stored)), len(set(read))) == (expected, 2)
    else:
        assert (len(set(stored)), len(set(read))) == (0, expected)
    everything = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    if kind == "folder":
        assert drawn == [f"{everything[0]}.png", f"{everything[-1]}.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", 2], r"layer is 2: choose one of the tapped blocks \[3, 4, 5\]"),
        (["--head", 2], "head is 2: test_vit has heads 0 to 1"),
        (["--images", -1], "images is -1: give the number of images to draw"),
        (["--images", 0], "images is 0: give how many to draw, or ask for the deletion test"),
        (["--data.resolution", 80], "made with other settings"),
        (["--data.split_seed", 5], "is split at random, and not as it was in training"),
    ],
)
def test_what_cannot_be_explained(
    arguments: list[object],
    message: str,
    command: list[object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = fails(capsys, *command, "--out", tmp_path / "out", "--split", "test", *arguments)
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_for_pictures(
    command: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert "which is a file: give a folder" in fails(capsys, *command, "--out", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_checkpoint_of_another_encoder(
    command: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, *command, "--out", tmp_path / "out", "--model.encoder", "test_vit2")
    assert "encoder: 'test_vit' in the checkpoint, 'test_vit2' here" in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_needed(command: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "explain needs a trained model: give --ckpt_path" in fails(capsys, *command[:3], "--out", tmp_path / "out")


def test_a_method_without_prompts(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    content = yaml.safe_load((trained / "config.yaml").read_text())
    content["model"]["class_path"] = "StoredLinearProbingModule"
    for name in ("side_resolution", "prompts"):
        del content["model"]["init_args"][name]
    config.write_text(yaml.safe_dump(content))
    given = ["--config", config, "--ckpt_path", trained / "run" / "best.ckpt", "--out", tmp_path / "out"]
    assert "has no fine-grained prompts whose attention could be shown" in fails(capsys, "explain", *given)
