"""What the evidence benchmark adds to query tokens: each idea is what it says, and trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from candidates import CANDIDATES, LayersNormalised, MixedPrompts, PromptsAtOwnRate, PromptsFromKeys, centres
from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.methods import QueryTokensModule
from small import quiet_trainer, tiny_model

SETTINGS: dict[str, Any] = {"encoder": "test_vit", "pretrained": False, "reduction": 2, "prompts": 4, "dropout": 0.0}


@pytest.fixture
def data(tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path) -> PreloadedFeatureDataModule:
    made = tiny_data(codec="fp32", side_resolution=32)
    made.preload(tiny_model(), quiet_trainer(tmp_path))
    return made


def made(method: type[QueryTokensModule], **changes: Any) -> Any:
    torch.manual_seed(0)
    return method(3, **{**SETTINGS, **changes})


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_candidate_trains_and_is_no_query_tokens(name: str, data: PreloadedFeatureDataModule, tmp_path: Path) -> None:
    after = []
    for method in (QueryTokensModule, CANDIDATES[name]):
        module = made(method)
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
