"""What the evidence benchmark adds to the methods: each idea is what it says, and trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer

from candidates import (
    CANDIDATES,
    LayersNormalised,
    MixedPrompts,
    PromptsAtOwnRate,
    PromptsFromKeys,
    SideFromEncoder,
    centres,
    start_from,
)
from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.encoder.frozen import build_encoder
from fpt_lightning.methods import FPTPlusModule, QueryTokensModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.side import SideViT
from small import quiet_trainer, tiny_model

SETTINGS: dict[str, Any] = {"encoder": "test_vit", "pretrained": False, "reduction": 2, "prompts": 4, "dropout": 0.0}


@pytest.fixture
def data(tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path) -> PreloadedFeatureDataModule:
    made = tiny_data(codec="fp32", side_resolution=32)
    made.preload(tiny_model(), quiet_trainer(tmp_path))
    return made


def made(method: type[FeatureModule], **changes: Any) -> Any:
    torch.manual_seed(0)
    return method(3, **{**SETTINGS, **changes})


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_candidate_trains_and_is_not_what_it_adds_to(
    name: str, data: PreloadedFeatureDataModule, tmp_path: Path
) -> None:
    after = []
    for method in (CANDIDATES[name].__mro__[1], CANDIDATES[name]):
        module = made(method, **({"side_resolution": 32} if issubclass(method, FPTPlusModule) else {}))
        quiet_trainer(tmp_path, max_epochs=2).fit(module, data)
        after.append(module.fusion.prompts.detach())
    assert after[1].isfinite().all()
    assert not torch.equal(*after)


def test_prompts_learn_ten_times_as_fast_through_the_whole_schedule(
    data: PreloadedFeatureDataModule, tmp_path: Path
) -> None:
    rates: list[list[float]] = []

    class Watch(PromptsAtOwnRate):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            rates.append([group["lr"] for group in self.optimizers().optimizer.param_groups])  # type: ignore[union-attr]

    module = made(Watch, learning_rate=1e-3)
    quiet_trainer(tmp_path, max_epochs=2).fit(module, data)
    assert len(rates) > 2
    assert all(prompts == pytest.approx(10 * rest) for prompts, rest in rates)
    assert rates[-1][1] < rates[0][1] <= 1e-3
    groups = [group["params"] for group in module.optimizers().optimizer.param_groups]
    assert groups[0] == [module.fusion.prompts]
    assert {id(each) for group in groups for each in group} == {id(each) for each in module.parameters()}


def test_prompts_start_at_centres_of_the_keys(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    module = made(PromptsFromKeys, learning_rate=0.0)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, data)
    data.setup("fit")
    batches = [module.features(batch).layer(0)[0].widened(torch.float32) for batch in data.train_dataloader()]
    keys = torch.cat(batches)  # (N, H, T, channels)
    prompts = module.fusion.queries(module.fusion.prompts[0])
    assert module.fusion.prompts.abs().max() > 0.1  # they start at 1e-6 otherwise
    raw = module.fusion.prompts[0].view(4, keys.shape[1], -1).transpose(0, 1)  # before the LayerNorm
    assert raw.shape == prompts.shape
    for head in range(keys.shape[1]):
        points = keys[:, head].flatten(0, 1)
        assert (raw[head] >= points.amin(0) - 1e-4).all()
        assert (raw[head] <= points.amax(0) + 1e-4).all()


def test_centres_are_of_the_groups_of_points() -> None:
    torch.manual_seed(0)
    points = torch.cat(
        [torch.randn(100, 2) * 0.01 + place for place in (torch.tensor([0.0, 0]), torch.tensor([5.0, 5]))]
    )
    found = centres(points, 2)
    assert torch.allclose(found[found[:, 0].argsort()], torch.tensor([[0.0, 0], [5.0, 5]]), atol=0.01)


def test_half_mixed_prompts_have_the_losses_of_both_images(
    data: PreloadedFeatureDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made(MixedPrompts)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(0.25))
    monkeypatch.setattr(torch, "randperm", lambda count: torch.arange(count).flip(0))
    fused, labels = torch.stack(module.fusion(module.features(batch))), batch["labels"]
    logits = module.head(list(0.25 * fused + 0.75 * fused.flip(1)))
    expected = 0.25 * module.task.loss(logits, labels) + 0.75 * module.task.loss(logits, labels.flip(0))
    assert torch.allclose(module.training_step(batch, 0), expected)


def test_the_scale_of_a_layer_does_not_matter_once_layers_are_normalised(data: PreloadedFeatureDataModule) -> None:
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    changed = {}
    for method in (QueryTokensModule, LayersNormalised):
        module = made(method).eval()
        before = module(batch)
        whole = module.fusion.forward
        module.fusion.forward = lambda features, whole=whole: [
            10 * (n == 0) * x + x for n, x in enumerate(whole(features))
        ]
        changed[method] = float((module(batch) - before).abs().max().detach())
    assert changed[LayersNormalised] < 1e-3 < 1e-2 < changed[QueryTokensModule]


def test_a_side_network_of_the_encoders_own_width_starts_as_the_encoder() -> None:
    encoder = VisionTransformer(64, 16, embed_dim=64, depth=2, num_heads=2, init_values=0.5).eval()
    side = SideViT(64, 2, 2, (16, 16), (64, 64), outputs=3)
    start_from(side, encoder)
    images = torch.randn(2, 3, 64, 64)
    nothing = torch.zeros(2, 0, encoder.embed_dim)
    with torch.no_grad():
        expected = side.head(encoder.forward_features(images)[:, 0])
        assert torch.allclose(side(images, [nothing] * 2), expected, atol=1e-3)


def test_a_pruned_side_network_keeps_the_largest_channels(data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    module = made(SideFromEncoder, learning_rate=0.0, side_resolution=32)
    encoder: Any = build_encoder(module.encoder_config, (32, 32))
    quiet_trainer(tmp_path, max_epochs=1).fit(module, data)
    (embedding, kept), whole = (module.side.class_token, module.side.norm.weight.numel()), encoder.cls_token.flatten()
    places = [int((whole == value).nonzero()) for value in embedding.flatten()]
    assert places == sorted(places)
    assert len({*places}) == kept < len(whole)
    written = sum(part.weight.abs().sum(1) for block in encoder.blocks for part in (block.attn.proj, block.mlp.fc2))
    assert written[places].mean() > written.mean()
