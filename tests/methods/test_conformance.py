"""One suite over all methods and peers: what learns and stays, checkpoints, precision, families, learning, resuming."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from cases import CASES, STORED, TUNING, make
from fpt_lightning import ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning import methods as methods_module
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import build_encoder
from fpt_lightning.errors import CheckpointError, ConfigurationError, EncoderError
from fpt_lightning.methods import (
    AdaLoRAModule,
    AttentiveProbingModule,
    ClassificationModule,
    LoRAModule,
)
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.lora import split_projections
from fpt_lightning.methods.tuning import EncoderModule, build_on_meta
from reference import FAMILIES, randomise
from small import SHALLOW, quiet_trainer, write_images

DataMaker = Callable[..., PreloadedFeatureDataModule]


every_method = pytest.mark.parametrize("name", CASES)
every_tuning = pytest.mark.parametrize("name", TUNING)
every_stored = pytest.mark.parametrize("name", STORED)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def learnable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def batch_for(module: ClassificationModule, size: int = 4, resolution: int = 64) -> dict[str, Any]:
    """Random inputs, as many as the method takes; stored features where it takes them."""
    generator = torch.Generator().manual_seed(size)
    shape = module.encoder_shape
    tokens = int(shape.tokens((resolution, resolution)) * 0.2) or 1
    layers = len(module.encoder_config.tapped_layers)
    side = module.side_resolution or 16
    made = {
        "images": torch.randn(size, 3, resolution, resolution, generator=generator),
        "side_images": torch.randn(size, 3, side, side, generator=generator),
        "features": torch.randn(size, 2, layers, shape.heads, tokens, shape.head_dim, generator=generator),
        "pooled": torch.randn(size, shape.width, generator=generator),
    }
    batch: dict[str, Any] = {key: value for key, value in made.items() if key in module.INPUTS}
    return {**batch, "labels": torch.arange(size) % 3, "ids": [str(i) for i in range(size)]}


def built(name: str, resolution: int = 64, **changes: Any) -> ClassificationModule:
    torch.manual_seed(0)
    module = make(name, **changes)
    if isinstance(module, EncoderModule):
        module.build((resolution, resolution))
    return module


@pytest.fixture(scope="module")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of all tests, beside which their stores stand."""
    return write_images(tmp_path_factory.mktemp("conformance") / "images", {"a": 10, "b": 10, "c": 10})


@pytest.fixture
def data(tiny_data: DataMaker, image_root: Path) -> DataMaker:
    """A maker of data modules, which complete the store for a method that takes stored features."""

    def maker(module: ClassificationModule, **changes: Any) -> PreloadedFeatureDataModule:
        layers = "-".join(str(layer) for layer in module.encoder_config.tapped_layers)
        made = tiny_data(codec="fp32", **changes)
        made.url = str(image_root.parent / f"store-{layers}.zarr")
        if made.uses_store(module):
            made.preload(module, quiet_trainer(image_root.parent))
        return made

    return maker


@dataclass(frozen=True)
class Learned:
    """A method that was fitted for ten epochs; whoever changes it takes a copy, or its checkpoint."""

    module: ClassificationModule
    data: PreloadedFeatureDataModule
    trainer: L.Trainer
    changed: set[str]  # names of its tensors that were not at the end of some epoch as they were at the start
    checkpoint: Path

    def content(self) -> dict[str, Any]:
        """Of the checkpoint."""
        return torch.load(self.checkpoint, weights_only=True)


@pytest.fixture(scope="module")
def fitted() -> dict[str, Learned]:
    """What ``learned`` has fitted so far."""
    return {}


@pytest.fixture
def learned(fitted: dict[str, Learned], data: DataMaker, image_root: Path) -> Callable[[str], Learned]:
    """A method of this name, fitted once for all tests that read it."""

    def fit(name: str) -> Learned:
        L.seed_everything(0)
        module = make(name)
        before: dict[str, Tensor] = {}
        changed: set[str] = set()

        class Compare(L.Callback):
            def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                before.update(state(pl_module))

            def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                changed.update(k for k, value in pl_module.state_dict().items() if not torch.equal(value, before[k]))

        trainer = quiet_trainer(image_root.parent, max_epochs=10, check_val_every_n_epoch=10, callbacks=[Compare()])
        datamodule = data(module)
        trainer.fit(module, datamodule)
        trainer.save_checkpoint(path := image_root.parent / f"{name}.ckpt", weights_only=True)
        return Learned(module, datamodule, trainer, changed, path)

    def find(name: str) -> Learned:
        if name not in fitted:
            fitted[name] = fit(name)
        return fitted[name]

    return find


def test_every_method_is_here() -> None:
    public = {getattr(methods_module, name) for name in methods_module.__all__ if name.endswith("Module")}
    assert {case.method for case in CASES.values()} == public - {ClassificationModule}
    assert {name: case.method for name, case in CASES.items()} == methods_module.METHODS


# the paper's ratios

PAPER = {  # table 1, in percent, and what the built module has, in percent
    "full": (100, 100),
    "linear": (0.01, 0.0045),
    "prompt": (0.17, 0.1754),
    "attention": (33.8, 32.9316),
    "adapter": (2.03, 2.0298),
    "bitfit": (0.12, 0.1240),
    "lora": (0.68, 0.6849),
    "adalora": (0.52, 0.5160),
    "fpt": (1.81, 1.8113),
    "fpt_plus": (1.03, 1.0266),
}
NOT_REPRODUCED = {"linear", "prompt", "attention"}
"""The paper prints 0.01 where 3,845 of 86 million are less than half of that, 0.17 where 0.175 rounds up, and 33.8 for
attention tuning: the attention weights and the head are 32.93%, and no plain reading of "attention" gives 33.8."""


def on_vit_b(name: str, **options: Any) -> ClassificationModule:
    method = partial(CASES[name].method, 5, encoder="vit_base_patch16_384", pretrained=False, **options)
    return build_on_meta(method, (384, 384))


@pytest.mark.parametrize("name", PAPER)
def test_learnable_ratio_on_vit_b(name: str) -> None:
    options: dict[str, Any] = {"prompts": 16} if name in ("prompt", "fpt", "fpt_plus") else {}
    if name == "fpt_plus":
        options["prompt_head"] = False
    module = on_vit_b(name, **options)
    paper, exact = PAPER[name]
    ratio = 100 * module.learnable_ratio
    assert ratio == pytest.approx(exact, abs=5e-5)
    assert (round(ratio, 2) == paper) == (name not in NOT_REPRODUCED)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("fpt", 1_602_341),
        ("prompt", 12 * 16 * 768 + 3_845),
        ("attention", 12 * (768 * 2304 + 2304 + 768 * 768 + 768) + 3_845),
        ("adapter", 12 * (2 * 768 * 96 + 96 + 768) + 3_845),
        ("lora", 12 * 2 * (2 * 768 * 16) + 3_845),
        ("adalora", 12 * 2 * (2 * 768 * 12 + 12) + 3_845),
    ],
)
def test_learnable_parameters_on_vit_b(name: str, count: int) -> None:
    module = on_vit_b(name)
    assert module.learnable_parameters == count


# what learns, and what stays


def declared(name: str, module: ClassificationModule) -> set[str]:
    """The parameters that should learn, from timm's own names."""
    case = CASES[name]
    if not isinstance(module, EncoderModule):
        return {parameter for parameter, _ in module.named_parameters()}
    plain = build_encoder(module.encoder_config, (64, 64))
    expected = {f"vit.{own}" for own, _ in plain.named_parameters() if case.learns(own)} | {"vit.head.weight"}
    added = {own for own, _ in module.named_parameters() if any(part in own for part in case.added)}
    return expected | {"vit.head.bias"} | added


@every_method
def test_exactly_what_is_declared_learns(name: str, learned: Callable[[str], Learned]) -> None:
    run = learned(name)
    assert run.changed == declared(name, run.module) == learnable(run.module)
    held = {id(p) for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in run.module.parameters() if p.requires_grad}


@every_method
def test_it_learns_a_separable_problem(name: str, learned: Callable[[str], Learned], tmp_path: Path) -> None:
    run = learned(name)
    assert quiet_trainer(tmp_path).test(run.module, run.data, verbose=False)[0]["test_auc"] == 1.0


@every_tuning
def test_what_is_frozen_is_in_evaluation_mode(name: str) -> None:
    module = built(name).train()
    assert isinstance(module, EncoderModule)
    modes = {part.training for part in module.vit.modules()}
    assert modes == ({True} if name == "full" else {False})
    assert module.training


@every_stored
def test_a_method_on_stored_features_holds_no_encoder(name: str, data: DataMaker, tmp_path: Path) -> None:
    module = make(name)
    live = live_twin(data(module))
    quiet_trainer(tmp_path, limit_train_batches=1, limit_val_batches=1).fit(module, live)
    assert isinstance(module, FeatureModule)
    (encoder,) = module.encoders
    assert not any(part.training for part in encoder.modules())
    assert not {id(p) for p in encoder.parameters()} & {id(p) for p in module.parameters()}
    pristine = build_encoder(module.encoder_config, (64, 64)).state_dict()
    assert all(torch.equal(tensor, pristine[key]) for key, tensor in encoder.model.state_dict().items())


def live_twin(data: PreloadedFeatureDataModule, **changes: Any) -> ImageDataModule:
    settings = {"resolution": 64, "mean": [0.4], "std": [0.2], "image_size": 48, "batch_size": 8, **changes}
    return ImageDataModule(data.root, **settings)


@every_stored
def test_stored_and_live_features_give_the_same_logits(name: str, data: DataMaker) -> None:
    module = make(name).eval()
    randomise(module)
    stored = data(module)
    stored.side_resolution = 32
    live = live_twin(stored, side_resolution=32)
    trainer = quiet_trainer(Path(stored.url).parent)
    for one in (stored, live):
        trainer.strategy.connect(module)
        one.trainer = trainer
        one.setup("test")
    for a, b in zip(stored.test_dataloader(), live.test_dataloader(), strict=True):
        assert set(a) == {"ids", "labels", *module.INPUTS}
        assert set(b) == {"ids", "labels", "images", *(module.INPUTS - {"features", "pooled"})}
        with torch.no_grad():
            torch.testing.assert_close(module(a), module(b), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(module(a), module({**a, **{k: a[k].flip(0) for k in module.INPUTS}}))


# checkpoints


@every_method
def test_the_small_checkpoint_round_trips(
    name: str, learned: Callable[[str], Learned], data: DataMaker, tmp_path: Path
) -> None:
    run = learned(name)
    module, trainer = run.module, quiet_trainer(tmp_path)
    assert set(run.content()["state_dict"]) == learnable(module)
    loaded = type(module).load_from_checkpoint(run.checkpoint, weights_only=True)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in module.state_dict().items())
    assert learnable(loaded) == learnable(module)
    batch = batch_for(module)
    with torch.no_grad():
        assert torch.equal(module.eval()(batch), loaded.eval()(batch))
    expected = trainer.test(module, run.data, verbose=False)
    fresh = make(name)
    assert trainer.test(fresh, data(fresh), ckpt_path=run.checkpoint, verbose=False, weights_only=True) == expected


@every_tuning
def test_a_checkpoint_that_does_not_hold_what_learns_is_refused(name: str, learned: Callable[[str], Learned]) -> None:
    content = learned(name).content()
    del content["state_dict"]["vit.head.bias"]
    with pytest.raises(CheckpointError, match=r"what learns here: they differ in vit\.head\.bias"):
        make(name).on_load_checkpoint(content)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_checkpoint_of_another_resolution_is_refused(
    name: str, learned: Callable[[str], Learned], data: DataMaker, tmp_path: Path
) -> None:
    path, other = learned(name).checkpoint, make(name)
    with pytest.raises(CheckpointError, match=r"trained at the resolution \(64, 64\), the data have \(96, 96\)"):
        quiet_trainer(tmp_path).test(other, data(other, resolution=96), ckpt_path=path, weights_only=True)


def test_other_encoder_weights_are_refused(learned: Callable[[str], Learned], monkeypatch: pytest.MonkeyPatch) -> None:
    path = learned("lora").checkpoint
    monkeypatch.setattr("fpt_lightning.methods.tuning.weights_digest", lambda vit: "0" * 64)
    with pytest.raises(CheckpointError, match="trained with other weights of test_vit"):
        LoRAModule.load_from_checkpoint(path, weights_only=True)


def test_a_checkpoint_of_another_method_is_refused(
    learned: Callable[[str], Learned], data: DataMaker, tmp_path: Path
) -> None:
    path, other = learned("bitfit").checkpoint, make("lora")
    with pytest.raises(CheckpointError, match="method: 'BitFitModule' in the checkpoint, 'LoRAModule' here"):
        quiet_trainer(tmp_path).test(other, data(other), ckpt_path=path, verbose=False, weights_only=True)


@every_method
def test_copies_of_a_module_that_has_run(name: str) -> None:
    """As weight averaging, ``ddp_spawn`` and ``torch.save`` make them."""
    module = built(name)
    randomise(module)
    batch = {**batch_for(module.eval()), "images": torch.randn(4, 3, 64, 64)}
    for stored in ("features", "pooled"):  # so that the encoder runs
        batch.pop(stored, None)
    with torch.no_grad():
        expected = module(batch)
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)
        for other in copies:
            assert torch.equal(other(batch), expected)
            assert learnable(other) == learnable(module)
            assert not {id(p) for p in other.parameters()} & {id(p) for p in module.parameters()}
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(module(batch), expected)


# precision, and learning


@every_method
def test_half_precision_trains(name: str, data: DataMaker, tmp_path: Path) -> None:
    L.seed_everything(0)
    module = make(name, encoder=SHALLOW)
    losses: list[Tensor] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].float())

    trainer = quiet_trainer(
        tmp_path, precision="bf16-mixed", max_epochs=4, check_val_every_n_epoch=4, callbacks=[Losses()]
    )
    trainer.fit(module, data(module))
    assert all(loss.isfinite() for loss in losses)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert sum(losses[-3:]) < sum(losses[:3])


@every_method
def test_resuming_ends_as_not_stopping(name: str, data: DataMaker, tmp_path: Path) -> None:
    """AdaLoRA's importance of the ranks included: it stops before they are fixed, and has many to choose from."""
    changes = {"encoder": SHALLOW, **({"initial_rank": 12} if name == "adalora" else {})}

    def run(folder: Path, epochs: int, **fit: Any) -> ClassificationModule:
        L.seed_everything(7)

        class Stop(L.Callback):
            def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                if trainer.current_epoch == epochs:
                    raise KeyboardInterrupt

        module = make(name, **changes)
        last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        trainer = quiet_trainer(folder, max_epochs=3, callbacks=[last, Stop()], enable_checkpointing=True)
        if epochs < 3:
            with pytest.raises(SystemExit):
                trainer.fit(module, data(module), **fit)
        else:
            trainer.fit(module, data(module), **fit)
        return module

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "part", 1)
    resumed = run(tmp_path / "part", 3, ckpt_path=tmp_path / "part" / "last.ckpt", weights_only=True)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


# every encoder family

UNUSUAL = {"vit-dynamic-size", "vit-register-no-class", "vit-register-map-pool", "beit", "eva02-separate", "dinov3"}
"""Families for every method; the methods that change the attention are held against all in the tests below."""


@pytest.mark.parametrize("family", sorted(UNUSUAL))
@every_method
def test_every_method_trains_on_every_kind_of_encoder(name: str, family: str) -> None:
    resolution = 6 * encoder_patch(family)
    options = {"side_resolution": 2 * encoder_patch(family)} if name in ("fpt", "fpt_plus") else {}
    if name in ("fpt", "fpt_plus", "adapter", "query_tokens"):
        options["reduction"] = 2
    module = built(name, resolution, encoder=FAMILIES[family], **options).train()
    batch = batch_for(module, resolution=resolution)
    loss = module.task.loss(module(batch), batch["labels"])
    loss.backward()
    dead = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not dead
    assert not [n for n, p in module.named_parameters() if not p.requires_grad and p.grad is not None]


def encoder_patch(family: str) -> int:
    return EncoderConfig(FAMILIES[family], False).shape.patch_size[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_splitting_the_projection_changes_no_output(family: str) -> None:
    resolution = (6 * encoder_patch(family),) * 2
    vit: Any = build_encoder(EncoderConfig(FAMILIES[family], False), resolution)
    randomise(vit)
    images = torch.randn(2, 3, *resolution)
    with torch.no_grad():
        before = vit.eval()(images)
        split_projections(vit)
        torch.testing.assert_close(vit(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "adalora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_queries_and_values_are_adapted(name: str, family: str) -> None:
    module = built(name, 6 * encoder_patch(family), encoder=FAMILIES[family])
    assert isinstance(module, EncoderModule)
    adapted = {n.split(".lora_")[0] for n in learnable(module) if "lora_" in n}
    assert {n.rpartition(".")[2] for n in adapted} in ({"q", "v"}, {"q_proj", "v_proj"})
    assert len(adapted) == 2 * module.encoder_shape.depth
    taken: dict[str, Tensor] = {}
    for part in adapted:
        module.get_submodule(part).register_forward_hook(lambda m, a, out, part=part: taken.update({part: out}))
    module(batch_for(module, resolution=6 * encoder_patch(family)))
    assert set(taken) == adapted, "timm went around an adapted projection"


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_act_as_tokens_of_the_full_sequence(family: str) -> None:
    """Against VPT-deep as written: the block runs over [prefix; prompts; patches], and the prompts are cut off."""
    if family in ("beit", "beitv2"):
        pytest.skip("its position bias has no room for tokens in the sequence: the next test")
    patch = encoder_patch(family)
    module = built("prompt", 6 * patch, encoder=FAMILIES[family], prompts=3)
    assert isinstance(module, EncoderModule)
    randomise(module)
    module.eval()
    reference: Any = build_encoder(module.encoder_config, (6 * patch, 6 * patch)).eval()
    reference.reset_classifier(3)
    own = {k.removeprefix("vit.").replace(".attention.", "."): v for k, v in module.state_dict().items()}
    prompts = [own.pop(f"blocks.{i}.attn.prompts") for i in range(module.encoder_shape.depth)]
    reference.load_state_dict(own)
    prefix = module.encoder_shape.prefix_tokens
    for block, prompt in zip(reference.blocks, prompts, strict=True):
        for part in block.attn.modules():
            if hasattr(part, "num_prefix_tokens"):
                part.num_prefix_tokens += 3

        def insert(m: nn.Module, args: Any, kwargs: Any, prompt: Tensor = prompt) -> Any:
            x = args[0]
            return (torch.cat([x[:, :prefix], prompt.expand(len(x), -1, -1), x[:, prefix:]], 1), *args[1:]), kwargs

        def remove(m: nn.Module, args: Any, out: Tensor) -> Tensor:
            return torch.cat([out[:, :prefix], out[:, prefix + 3 :]], 1)

        block.register_forward_pre_hook(insert, with_kwargs=True)
        block.register_forward_hook(remove)
    batch = batch_for(module, resolution=6 * patch)
    with torch.no_grad():
        actual, expected = module(batch), reference(batch["images"])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(actual, build_without(module, own)(batch["images"]), atol=1e-3)


def build_without(module: EncoderModule, own: dict[str, Tensor]) -> nn.Module:
    plain: Any = build_encoder(module.encoder_config, module.vit.patch_embed.img_size).eval()
    plain.reset_classifier(3)
    plain.load_state_dict(own)
    return plain


@pytest.mark.parametrize("family", ["beit", "beitv2"])
def test_prompts_beside_a_position_bias(family: str) -> None:
    """Prompts of value 0 that nobody can attend to change nothing; ordinary ones do."""
    module = built("prompt", 96, encoder=FAMILIES[family], prompts=3)
    assert isinstance(module, EncoderModule)
    randomise(module)
    own = {k.removeprefix("vit.").replace(".attention.", "."): v for k, v in module.eval().state_dict().items()}
    plain = build_without(module, {k: v for k, v in own.items() if "prompts" not in k})
    batch = batch_for(module, resolution=96)
    with torch.no_grad():
        assert not torch.allclose(module(batch), plain(batch["images"]), atol=1e-3)


# what is special to each


def gradients(module: ClassificationModule, batch: dict[str, Any]) -> dict[str, Tensor]:
    module.zero_grad()
    module.task.loss(module(batch), batch["labels"]).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["vit-dynamic-size", "eva02-fused", "beit"])
@pytest.mark.parametrize("name", [name for name in TUNING if name != "linear"])
def test_gradient_checkpointing_changes_no_gradient(name: str, family: str) -> None:
    resolution = 6 * encoder_patch(family)
    options = {"encoder": FAMILIES[family], **({"reduction": 2} if name == "adapter" else {})}
    plain, saving = (built(name, resolution, gradient_checkpointing=flag, **options) for flag in (False, True))
    randomise(plain)
    saving.load_state_dict(plain.state_dict())
    batch = batch_for(plain, resolution=resolution)
    a, b = gradients(plain, batch), gradients(saving, batch)
    assert a.keys() == b.keys() == learnable(plain)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_linear_probing_has_no_gradient_checkpointing() -> None:
    with pytest.raises(TypeError, match="gradient_checkpointing"):
        make("linear", gradient_checkpointing=True)


def test_a_new_adapter_and_a_new_lora_change_nothing() -> None:
    images = batch_for(make("full"))
    with torch.no_grad():
        plain = built("linear").eval()(images)
        for name in ("adapter", "lora", "adalora", "bitfit", "attention", "full"):
            module = built(name).eval()
            module.vit.head.load_state_dict(built("linear").vit.head.state_dict())  # type: ignore[attr-defined]
            torch.testing.assert_close(module(images), plain, rtol=1e-5, atol=1e-5)


def test_the_ranks_of_adalora_fall_to_the_budget(data: DataMaker, tmp_path: Path) -> None:
    L.seed_everything(0)
    module = make("adalora")
    assert isinstance(module, AdaLoRAModule)
    totals: list[int] = []

    class Ranks(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            assert isinstance(pl_module, AdaLoRAModule)
            totals.append(sum(pl_module.ranks.values()))

    trainer = quiet_trainer(tmp_path, max_epochs=14, limit_val_batches=0, callbacks=[Ranks()])
    trainer.fit(module, data(module))
    updates = 2 * module.encoder_shape.depth
    assert len(module.ranks) == updates
    steps = len(totals)
    assert totals[0] == 0  # singular values start at 0
    assert totals[2] == 4 * updates
    assert totals[1:] == sorted(totals[1:], reverse=True)
    assert totals[steps // 2] == totals[-1] == sum(module.ranks.values()) == 2 * updates
    assert len(set(module.ranks.values())) > 1, "all updates kept the same rank"


def test_steps_that_overflow_do_not_keep_the_ranks_of_adalora_up(data: DataMaker, tmp_path: Path) -> None:
    """As in ``16-mixed``, whose scaler leaves such steps out: here the first ones, and others as its scale grows."""
    L.seed_everything(0)
    module = make("adalora")
    assert isinstance(module, AdaLoRAModule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_factor=2.0**8, growth_interval=8)
    overflowed: list[bool] = []

    class Overflows(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            overflowed.append(not all(gradient.isfinite().all() for gradient in gradients))

    precision = MixedPrecision("16-mixed", "cpu", scaler)
    rest = {"limit_val_batches": 0, "plugins": [precision]}
    trainer = quiet_trainer(tmp_path, max_epochs=14, callbacks=[Overflows()], **rest)
    trainer.fit(module, data(module))
    half = len(overflowed) // 2
    assert any(overflowed[:half])
    assert not all(overflowed[:half])
    assert sum(module.ranks.values()) == 2 * 2 * module.encoder_shape.depth
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_the_importance_of_a_checkpoint_follows_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = built("adalora")
    assert isinstance(module, AdaLoRAModule)
    for table in module._importance:
        table["as loaded"] = torch.ones(2)
    module.to("meta")
    module._trainer = SimpleNamespace(estimated_stepping_batches=10, global_step=0)  # type: ignore[assignment]
    monkeypatch.setattr(ClassificationModule, "on_train_start", lambda self: None)
    module.on_train_start()
    assert {tensor.device.type for table in module._importance for tensor in table.values()} == {"meta"}


def test_the_orthogonal_loss_is_pefts() -> None:
    """peft adds it itself where a model's output has a loss."""
    module = built("adalora", orthogonality=0.3)
    assert isinstance(module, AdaLoRAModule)
    (tuner,) = module._tuner
    original = module.vit.forward
    module.vit.forward = lambda images: SimpleNamespace(loss=original(images).sum() * 0)
    batch = batch_for(module)
    torch.testing.assert_close(tuner(batch["images"]).loss, module.orthogonal_loss())
    module.vit.forward = original
    plain = ClassificationModule.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationModule, "training_step", lambda *_: torch.zeros(()))
        torch.testing.assert_close(module.training_step(batch, 0), module.orthogonal_loss())
    assert ClassificationModule.training_step is plain


def test_efficient_probing_against_a_loop() -> None:
    module = built("attentive", queries=2)
    assert isinstance(module, AttentiveProbingModule)
    randomise(module)
    batch = batch_for(module, size=2)
    keys, values = batch["features"][:, 0, -1], batch["features"][:, 1, -1]
    heads, width = module.encoder_shape.heads, module.encoder_shape.head_dim
    for image in range(2):
        feature = torch.empty(heads, width)
        for head in range(heads):
            for query in range(2):
                weights = (keys[image, head] @ module.queries[head, query] / width**0.5).softmax(0)
                channels = slice(query * width // 2, (query + 1) * width // 2)
                feature[head, channels] = weights @ values[image, head][:, channels]
        flat = feature.flatten()
        normal = (flat - flat.mean()) / (flat.var(unbiased=False) + 1e-5).sqrt()
        expected = module.head.weight @ normal + module.head.bias
        torch.testing.assert_close(module(batch)[image], expected, rtol=1e-4, atol=1e-4)


# bad use


def test_a_module_that_is_not_built_says_so() -> None:
    module = make("lora")
    with pytest.raises(ConfigurationError, match=r"LoRAModule is not built: call build\(\(height, width\)\) first"):
        module(batch_for(module))


def test_images_of_another_resolution_than_built() -> None:
    module = built("lora", 64)
    with pytest.raises(ConfigurationError, match=r"are 96 x 96 pixels, but LoRAModule was built for .*\(64, 64\)"):
        module(batch_for(module, resolution=96))


def test_a_foreign_data_module_does_not_say_the_resolution(tmp_path: Path) -> None:
    class Foreign(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return iter([])

    with pytest.raises(ConfigurationError, match="BitFitModule does not know the resolution of its images"):
        quiet_trainer(tmp_path).fit(make("bitfit"), Foreign())


def test_images_of_a_resolution_that_patches_do_not_divide() -> None:
    with pytest.raises(ConfigurationError, match="resolution 70 x 70 is not a multiple of the patch size"):
        built("lora", 70)


def test_bitfit_without_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    build = build_encoder

    def without_biases(*args: Any, **kwargs: Any) -> nn.Module:
        vit = build(*args, **kwargs)
        for part in vit.modules():
            if getattr(part, "bias", None) is not None:
                part.bias = None
        return vit

    monkeypatch.setattr("fpt_lightning.methods.tuning.build_encoder", without_biases)
    with pytest.raises(ConfigurationError, match="test_vit has no biases in its blocks: BitFit has nothing to tune"):
        built("bitfit")


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_lora_without_peft(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when the method is made, before images are read."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match=r"need peft: pip install 'fpt-lightning\[peft\]'"):
        make(name)


def test_projections_that_lora_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def hide(vit: Any) -> None:
        split_projections(vit)
        projection = vit.blocks[2].attn.qkv
        projection.query = projection.q
        del projection.q

    monkeypatch.setattr("fpt_lightning.methods.lora.split_projections", hide)
    with pytest.raises(EncoderError, match=r"has 11 query and value projections that LoRA can reach.*should have 12"):
        built("lora")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("prompt", {"prompts": 0}, "prompts is 0"),
        ("fpt", {"prompts": 0}, "prompts is 0"),
        ("query_tokens", {"prompts": 0}, "prompts is 0"),
        ("query_tokens", {"reduction": 5}, "reduction is 5: give a divisor of the encoder's width 64"),
        ("adapter", {"reduction": 0}, "reduction is 0"),
        ("adapter", {"reduction": 65}, "reduction is 65: give 1 to 64"),
        ("lora", {"rank": 0}, "rank is 0"),
        ("adalora", {"rank": 4}, "rank is 4, initial_rank 4: give 1 <= rank < initial_rank"),
        ("attentive", {"queries": 3}, "queries is 3: give a divisor of the 32 channels"),
    ],
)
def test_settings_that_cannot_work(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(name, **changes)


@pytest.mark.parametrize("name", ["attentive", "stored_linear"])
def test_features_of_another_encoder_are_refused(name: str) -> None:
    module = make(name)
    batch = {"features": torch.zeros(2, 2, 3, 4, 5, 32), "pooled": torch.zeros(2, 128)}
    with pytest.raises(ConfigurationError, match=r"test_vit.* gives \(B, "):
        module(batch)


def test_nothing_to_preload_for_a_method_on_images(tiny_data: DataMaker) -> None:
    with pytest.raises(ConfigurationError, match="LoRAModule trains on images, not on stored features"):
        tiny_data().preload(make("lora"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are faster so, and give the same sums each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
