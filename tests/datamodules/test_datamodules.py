"""Batches: what is in them, in which order, with which views, and what is refused before the first one."""

from __future__ import annotations

import importlib
import json
import random
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fpt_lightning import ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.data.images import ImageReader, read_image
from fpt_lightning.data.statistics import channel_statistics
from fpt_lightning.data.transforms import ViewTransform, normalise, stored_copy, unit_pixels
from fpt_lightning.datamodules.samples import EpochSampler
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.errors import ConfigurationError, DataError, StaleStoreError, StoreError
from fpt_lightning.methods import LoRAModule
from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.writing import WritableStore
from small import quiet_trainer, tiny_model, write_images

ENCODER = EncoderConfig("test_vit", pretrained=False)
MEAN, STD = (0.4, 0.4, 0.4), (0.2, 0.2, 0.2)
SETTINGS: dict[str, Any] = {
    "resolution": 64,
    "mean": [0.4],
    "std": [0.2],
    "image_size": 48,
    "side_resolution": 32,
    "batch_size": 8,
}
Batches = list[dict[str, Any]]
Maker = Callable[..., ImageDataModule]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images``, 30 of 3 classes, and their ``store.zarr``; nothing below it may be changed."""
    folder = tmp_path_factory.mktemp("data")
    root = write_images(folder / "images", {"a": 10, "b": 10, "c": 10})
    PreloadedFeatureDataModule(str(root), str(folder / "store.zarr"), **SETTINGS).preload(ENCODER)
    return folder


@pytest.fixture
def stored(folder: Path) -> Maker:
    return lambda **changes: PreloadedFeatureDataModule(
        **{"root": str(folder / "images"), "store": str(folder / "store.zarr"), **SETTINGS, **changes}
    )


@pytest.fixture
def live(folder: Path) -> Maker:
    return lambda **changes: ImageDataModule(**{"root": str(folder / "images"), **SETTINGS, **changes})


@pytest.fixture(params=["stored", "live"])
def make(request: pytest.FixtureRequest) -> Maker:
    """Either data module."""
    maker: Maker = request.getfixturevalue(request.param)
    return maker


def ready(data: ImageDataModule, seed: int = 3, stage: str = "fit") -> ImageDataModule:
    torch.manual_seed(seed)
    data.setup(stage)
    return data


class RankTrainer(L.Trainer):
    """A trainer that is about to run a model, as one process of several."""

    def __init__(self, model: Any, rank: int, world_size: int) -> None:
        super().__init__(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        self.model_to_run, self.ranks = model, (rank, world_size)

    lightning_module = property(lambda self: self.model_to_run)
    global_rank = property(lambda self: self.ranks[0])
    world_size = property(lambda self: self.ranks[1])


def attach(data: ImageDataModule, rank: int = 0, world_size: int = 1, **declared: Any) -> ImageDataModule:
    """A trainer, and a model with what it declares."""
    model = SimpleNamespace(**{"num_classes": 3, "side_resolution": 32, "encoder_config": ENCODER, **declared})
    data.trainer = RankTrainer(model, rank, world_size)
    return data


@pytest.mark.parametrize("device", ["cpu", "cuda:1", None])
def test_memory_is_pinned_for_the_trainers_device(
    live: Maker, device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not because there is a GPU."""
    data = ready(live(side_resolution=32))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if device is not None:
        attach(data)
        monkeypatch.setattr(type(data.trainer.strategy), "root_device", torch.device(device))
    assert data.test_dataloader().pin_memory == (device == "cuda:1")


def epoch(loader: DataLoader[Any], number: int = 0) -> Batches:
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def by_id(batches: Batches, key: str = "side_images") -> dict[str, Tensor]:
    return {id: row for batch in batches for id, row in zip(batch["ids"], batch[key], strict=True)}


def ids(batches: Batches) -> list[str]:
    return [id for batch in batches for id in batch["ids"]]


def equal(first: Batches, second: Batches) -> bool:
    """Bit by bit, in the same order."""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a)
        for a, b in zip(first, second, strict=True)
    )


# What a batch holds


def test_a_batch_of_stored_features(stored: Maker, folder: Path) -> None:
    data = ready(stored())
    batches = list(data.train_dataloader())
    assert [len(batch["ids"]) for batch in batches] == [8, 8, 5]
    assert set(batches[0]) == {"ids", "labels", "side_images", "features", "key_scales", "value_scales"}
    assert batches[0]["labels"].dtype == torch.int64
    assert (batches[0]["side_images"].shape, batches[0]["side_images"].dtype) == ((8, 3, 32, 32), torch.float32)
    assert (batches[0]["features"].shape, batches[0]["features"].dtype) == ((8, 2, 3, 2, 3, 32), torch.int8)
    store = FeatureStore.open(str(folder / "store.zarr"))
    for id, features in by_id(batches, "features").items():
        np.testing.assert_array_equal(features.numpy(), store.read([store.rows[id]], "features")[0])


def test_a_batch_of_images(live: Maker, folder: Path) -> None:
    batches = list(ready(live(resolution=(32, 64))).train_dataloader())
    assert set(batches[0]) == {"ids", "labels", "side_images", "images"}
    assert (batches[0]["side_images"].shape, batches[0]["side_images"].dtype) == ((8, 3, 32, 32), torch.float32)
    assert (batches[0]["images"].shape, batches[0]["images"].dtype) == ((8, 3, 32, 64), torch.float32)
    for id, image in by_id(batches, "images").items():
        assert torch.equal(image, normalise(unit_pixels(read_image(folder / "images" / id), (32, 64)), MEAN, STD))


def test_every_sample_of_a_split_with_its_label(make: Maker) -> None:
    data = ready(make())
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    for split, loader in loaders.items():
        batches = list(loader)
        labels = {sample.id: sample.label for sample in data.labelled.split(split)}
        assert {id: int(label) for id, label in by_id(batches, "labels").items()} == labels
        assert len(ids(batches)) == len(labels) == {"train": 21, "val": 3, "test": 6}[split]
    assert data.class_names == ("a", "b", "c")
    assert data.labelled.class_counts("train") == [7, 7, 7]
    assert torch.equal(torch.bincount(data.training_labels), torch.tensor([7, 7, 7]))


def test_stored_and_live_views_are_the_same(stored: Maker, live: Maker) -> None:
    first, second = (by_id(list(ready(make()).train_dataloader())) for make in (stored, live))
    assert list(first) == list(second)
    assert all(torch.equal(first[id], second[id]) for id in first)


@pytest.mark.parametrize("fit", ["squash", "letterbox"])
def test_stored_and_live_views_are_cropped_and_fitted_alike(tmp_path: Path, fit: str) -> None:
    root = write_images(tmp_path / "images", {"a": 10, "b": 10, "c": 10})
    for path in root.rglob("*.png"):
        Image.fromarray(np.pad(np.asarray(Image.open(path)), ((20, 30), (10, 0), (0, 0)))).save(path)
    settings = {**SETTINGS, "root": str(root), "fit": fit, "crop_border": True}
    stored = PreloadedFeatureDataModule(store=str(tmp_path / "store.zarr"), **settings)
    stored.preload(ENCODER)
    first, second = (list(ready(data).train_dataloader()) for data in (stored, ImageDataModule(**settings)))
    views, live_views = by_id(first), by_id(second)
    assert all(torch.equal(views[id], live_views[id]) for id in views)
    for id, image in by_id(second, "images").items():
        read = ImageReader((64, 64), fit, crop_border=True)(root / id)
        assert read.shape[:2] == ((80, 96) if fit == "squash" else (96, 96))
        assert torch.equal(image, normalise(unit_pixels(read, (64, 64)), MEAN, STD))


@pytest.mark.parametrize("number", [0, 5])
def test_evaluation_neither_shuffles_nor_augments(make: Maker, folder: Path, number: int) -> None:
    data = ready(make(augmentation="strong"))
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = epoch(loader, number)
        assert ids(batches) == [sample.id for sample in data.labelled.split(split)]
        for id, view in by_id(batches).items():
            copy = stored_copy(read_image(folder / "images" / id), 48)
            torch.testing.assert_close(view, normalise(ViewTransform(32, "none")(copy, 0), MEAN, STD))


# Order and views


def test_the_seed_and_the_epoch_decide_order_and_views(make: Maker) -> None:
    loader = ready(make()).train_dataloader()
    first, second, other = epoch(loader, 0), epoch(loader, 1), epoch(ready(make(), seed=4).train_dataloader(), 0)
    for changed in (second, other):
        assert sorted(ids(changed)) == sorted(ids(first))
        assert ids(changed) != ids(first)
        assert not any(torch.equal(by_id(changed)[id], view) for id, view in by_id(first).items())
    assert equal(epoch(loader, 0), first)
    assert equal(epoch(ready(make()).train_dataloader(), 1), second)


def test_no_augmentation_still_shuffles(make: Maker) -> None:
    loader = ready(make(augmentation="none")).train_dataloader()
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert ids(first) != ids(second)
    assert all(torch.equal(by_id(second)[id], view) for id, view in by_id(first).items())


@pytest.mark.parametrize("again", [False, True], ids=["one loader", "a loader each"])
def test_a_plain_loop_gets_new_views_each_epoch(make: Maker, again: bool) -> None:
    """As no trainer says which epoch it is."""
    data = ready(make())
    loader = data.train_dataloader()
    passes = [list(data.train_dataloader() if again and number else loader) for number in range(3)]
    expected = ready(make()).train_dataloader()
    for number, batches in enumerate(passes):
        assert equal(batches, epoch(expected, number))


def test_workers_change_nothing_in_any_epoch(make: Maker) -> None:
    """They live through all epochs, and yet no epoch repeats another."""
    alone, workers = (ready(make(num_workers=count)).train_dataloader() for count in (0, 2))
    for number in (0, 1, 0):
        assert equal(epoch(workers, number), epoch(alone, number))


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_threads_change_nothing_in_any_epoch(make: Maker, threads: int) -> None:
    alone, several = (ready(make(decoding_threads=count)).train_dataloader() for count in (1, threads))
    for number in (0, 1, 0):
        assert equal(epoch(several, number), epoch(alone, number))


@pytest.mark.parametrize("workers", [0, 2])
def test_equal_images_get_different_views(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for number in range(10):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{number}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    data = ready(
        ImageDataModule(str(tmp_path), **{**SETTINGS, "batch_size": 2, "num_workers": workers}, allow_overlap=True)
    )
    loader = data.train_dataloader()
    views = [view.numpy().tobytes() for number in (0, 1) for view in by_id(epoch(loader, number)).values()]
    assert len(set(views)) == len(views) == 28


def test_loaders_leave_the_global_generators_alone(make: Maker) -> None:
    data = ready(make())
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_the_seed_is_kept_for_a_resumed_run(make: Maker) -> None:
    data = ready(make(), seed=11)
    assert data.state_dict() == {"seed": 11}
    resumed = make()
    resumed.load_state_dict(data.state_dict())
    assert equal(list(ready(resumed, seed=12).train_dataloader()), list(data.train_dataloader()))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "world_size"), [(21, 1), (21, 2), (21, 4), (20, 4), (3, 4), (1, 4)])
def test_ranks_share_the_samples(count: int, world_size: int, shuffle: bool) -> None:
    if not shuffle and count < world_size:
        with pytest.raises(ConfigurationError, match=rf"^{count} image.s. are to be evaluated in {world_size} proc"):
            EpochSampler(count, 0, world_size, shuffle, seed=5)
        return
    shares = []
    for rank in range(world_size):
        sampler = EpochSampler(count, rank, world_size, shuffle, seed=5)
        sampler.set_epoch(7)
        share = list(sampler)
        assert len(sampler) == len(share)
        assert {number for number, _ in share} <= {7}
        shares.append([index for _, index in share])
    drawn = [index for share in shares for index in share]
    assert set(drawn) == set(range(count))
    if shuffle:  # all ranks take equally many steps
        assert {len(share) for share in shares} == {-(-count // world_size)}
    else:
        assert len(drawn) == count
        assert shares[0] == sorted(shares[0])


def test_ranks_draw_from_one_order() -> None:
    whole = [index for _, index in EpochSampler(20, 0, 1, True, 5)]
    assert [[index for _, index in EpochSampler(20, rank, 2, True, 5)] for rank in range(2)] == [
        whole[::2],
        whole[1::2],
    ]


def test_loaders_take_their_rank_from_the_trainer(stored: Maker) -> None:
    shares = []
    for rank in range(2):
        data = ready(attach(stored(), rank, 2))
        shares.append((ids(list(data.train_dataloader())), ids(list(data.test_dataloader()))))
    assert [len(train) for train, _ in shares] == [11, 11]
    assert sorted(shares[0][1] + shares[1][1]) == [sample.id for sample in data.labelled.split("test")]


# With Lightning, and without this package's models


class Foreign(L.LightningModule):
    """Somebody's own model, which declares nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.seen: dict[str, Batches] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen.setdefault(f"train {self.current_epoch}", []).append(batch)
        return nn.functional.cross_entropy(self.head(batch["side_images"].mean((2, 3))), batch["labels"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.setdefault("val", []).append(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.setdefault("test", []).append(batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        return list(batch["ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("changes", [{}, {"reload_dataloaders_every_n_epochs": 1}], ids=["kept", "reloaded"])
def test_a_foreign_model_in_a_trainer(make: Maker, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = Foreign()
    trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, **changes)
    torch.manual_seed(3)
    trainer.fit(model, datamodule=make())
    trainer.test(model, datamodule=make(), verbose=False)
    alone = ready(make())
    loader = alone.train_dataloader()
    assert equal(model.seen["train 0"], epoch(loader, 0))
    assert equal(model.seen["train 1"], epoch(loader, 1))
    assert equal(model.seen["test"], list(alone.test_dataloader()))
    assert len(model.seen["val"]) == 2


def test_a_foreign_model_that_hides_its_encoder(tiny_data: Maker, tmp_path: Path) -> None:
    """Its store is held against nothing."""
    tiny_data().preload(EncoderConfig("test_vit", pretrained=False))
    with pytest.warns(UserWarning, match=r"Foreign does not say its encoder: the features of .* are not held"):
        quiet_trainer(tmp_path).fit(Foreign(), datamodule=tiny_data(side_resolution=32))


def test_predict_gives_every_image_below_the_root(make: Maker, tmp_path: Path) -> None:
    root = write_images(tmp_path / "new", {"x": 3, "y/z": 2})
    shutil.copy(root / "x/000.png", root / "top.png")
    data = make(root=str(root), manifest="not read.csv", preload_batch_size=4)
    batches = quiet_trainer(tmp_path).predict(Foreign(), datamodule=data)
    assert batches == [["top.png", "x/000.png", "x/001.png", "x/002.png"], ["y/z/000.png", "y/z/001.png"]]
    batch = next(iter(data.predict_dataloader()))
    assert set(batch) == {"ids", "labels", "side_images", "images"}
    assert batch["labels"].tolist() == [-1] * 4
    copy = stored_copy(stored_copy(read_image(root / "top.png"), 48), 32)
    wanted = normalise(torch.from_numpy(copy).permute(2, 0, 1) / 255, MEAN, STD)
    torch.testing.assert_close(batch["side_images"][0], wanted)


def test_predict_without_an_image(make: Maker, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no image below {tmp_path}"):
        make(root=str(tmp_path)).setup("predict")


def test_the_model_gives_the_side_resolution(make: Maker) -> None:
    data = ready(attach(make(side_resolution=None), side_resolution=40))
    assert next(iter(data.val_dataloader()))["side_images"].shape == (3, 3, 40, 40)


# Normalisation


@pytest.mark.parametrize(
    ("mean", "std"), [([0.1], [0.2]), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), ([0.1], [0.4, 0.5, 0.6])]
)
def test_given_statistics(mean: list[float], std: list[float]) -> None:
    data = ImageDataModule("/", mean=mean, std=std)
    assert data.mean == tuple(np.broadcast_to(mean, 3))
    assert data.std == tuple(np.broadcast_to(std, 3))
    assert data.asked(ENCODER).statistics == "given"


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ("auto", [0.2], "data.mean is 'auto'"),
        ([0.2], "auto", "data.std is 'auto'"),
        ("imagenet", "auto", "data.mean is 'imagenet'"),
        ([0.1, 0.2], [0.2], r"data.mean is \[0.1, 0.2\]"),
        ([], [0.2], r"data.mean is \[\]"),
        ([0.1], [0.2, 0.0, 0.2], r"data.std is \[0.2, 0.0, 0.2\]"),
        ([0.1], [-0.2], r"data.std is \[-0.2\]"),
    ],
)
def test_statistics_that_cannot_work(mean: Any, std: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{words}: give one number.*or 'auto' for both"):
        ImageDataModule("/", mean=mean, std=std)


def test_live_statistics_are_computed_over_the_training_images(live: Maker) -> None:
    data = ready(attach(live(mean="auto", std="auto")))
    paths = [data.labelled.path(sample) for sample in data.labelled.split("train")]
    assert data.specification is not None
    statistics = channel_statistics(paths, (64, 64))
    assert (data.specification.mean, data.specification.std) == statistics
    for id, image in by_id(list(data.val_dataloader()), "images").items():
        pixels = unit_pixels(read_image(Path(data.root) / id), (64, 64))
        assert torch.equal(image, normalise(pixels, *statistics))


def test_a_trained_models_statistics_go_first(make: Maker) -> None:
    given = attach(make())
    trained = replace(given.asked(ENCODER), mean=(0.5,) * 3, std=(0.1,) * 3)
    ready(attach(given, specification=trained), stage="predict")
    batch = next(iter(given.predict_dataloader()))
    image = unit_pixels(read_image(Path(given.root) / batch["ids"][0]), (64, 64))
    torch.testing.assert_close(batch["images"][0], normalise(image, (0.5,) * 3, (0.1,) * 3))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_auto_without_a_trained_model(live: Maker, stage: str) -> None:
    data = ready(attach(live(mean="auto", std="auto")), stage=stage)
    with pytest.raises(ConfigurationError, match=r"'auto', which only fit computes: .*ckpt_path"):
        data.predict_dataloader() if stage == "predict" else data.val_dataloader()


def test_stored_statistics_are_used(tiny_data: Callable[..., PreloadedFeatureDataModule]) -> None:
    auto = {"mean": "auto", "std": "auto", "side_resolution": 32}
    specification = tiny_data(**auto).preload(ENCODER).specification
    data = ready(tiny_data(**auto))
    id, view = next(iter(by_id(list(data.val_dataloader())).items()))
    copy = stored_copy(stored_copy(read_image(Path(data.root) / id), 48), 32)
    wanted = normalise(torch.from_numpy(copy).permute(2, 0, 1) / 255, specification.mean, specification.std)
    torch.testing.assert_close(view, wanted)


# The model and the data


@pytest.mark.parametrize(
    ("settings", "declared", "words"),
    [
        ({"side_resolution": None}, {"side_resolution": None}, "data.side_resolution is not given"),
        ({}, {"side_resolution": 40}, "data.side_resolution is 32, but model.side_resolution is 40"),
        (
            {"side_resolution": None},
            {"side_resolution": 64},
            "resolution is 64.* 48 pixels.*data.image_size to at least 64",
        ),
        ({}, {"num_classes": 5}, r"model.num_classes is 5.* 3 classes \(a, b, c\).*to 3"),
        ({"resolution": 72}, {}, "data.resolution"),
    ],
)
def test_a_model_that_does_not_fit_the_data(
    make: Maker, settings: dict[str, Any], declared: dict[str, Any], words: str
) -> None:
    data = attach(make(**settings), **declared)
    with pytest.raises(ConfigurationError, match=words):
        ready(data).train_dataloader()


def test_without_a_model_the_side_resolution_must_be_given(make: Maker) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.side_resolution is not given"):
        ready(make(side_resolution=None)).train_dataloader()


@pytest.mark.parametrize(("encoder", "side"), [("vit_small_patch14_dinov2", 518), ("vit_base_patch32_224", 512)])
def test_a_resolution_that_nobody_gives_fits_the_patches(make: Maker, encoder: str, side: int) -> None:
    data = make(resolution=None)
    assert data.resolution == (512, 512)
    data.take_encoder(EncoderConfig(encoder, pretrained=False))
    assert data.resolution == (side, side)


def test_an_unknown_augmentation(make: Maker) -> None:
    with pytest.raises(ConfigurationError, match="augmentation is 'weak'"):
        ready(make(augmentation="weak")).train_dataloader()


def test_a_class_absent_from_a_split_is_announced(tmp_path: Path) -> None:
    for seed, (split, classes) in enumerate([("train", "abc"), ("val", "ab"), ("test", "abc")]):
        write_images(tmp_path / split, dict.fromkeys(classes, 2), size=(8, 8), seed=seed)
    with pytest.warns(UserWarning, match="the split val has no image of c: its AUC leaves them out"):
        ImageDataModule(str(tmp_path)).setup("fit")


def test_the_manifest_before_setup(make: Maker) -> None:
    with pytest.raises(DataError, match=r"DataModule has not read its manifest: call setup\('fit'\)"):
        _ = make().class_names


def test_settings_of_the_manifest_reach_it(folder: Path, tmp_path: Path) -> None:
    rows = [f"{label}/{i:03d}.png;{label};{i}".replace(";", ",") for label in "abc" for i in range(10)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["file,grade,patient", *rows]))
    columns = {"image_column": "file", "label_column": "grade", "group_column": "patient"}
    data = ImageDataModule(str(folder / "images"), str(table), classes=["c", "b", "a"], split_seed=5, **columns)
    manifest = data.read_manifest()
    assert manifest.classes == ("c", "b", "a")
    assert [manifest.class_counts(split) for split in ("train", "val", "test")] == [[7] * 3, [1] * 3, [2] * 3]
    assert manifest.samples[0].group == "0"
    assert data.read_manifest() is manifest


# Stores that are refused


def refused(data: ImageDataModule, kind: type[StoreError], *words: str) -> None:
    with pytest.raises(kind) as error:
        data.setup("fit")
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_no_store(stored: Maker, tmp_path: Path) -> None:
    url = str(tmp_path / "none.zarr")
    refused(stored(store=url), StoreError, url, "data.store", "fpt-lightning preload", "data.preload(model)")


@pytest.mark.parametrize("attached", [False, True])
def test_an_incomplete_store(stored: Maker, folder: Path, tmp_path: Path, attached: bool) -> None:
    url = str(shutil.copytree(folder / "store.zarr", tmp_path / "store.zarr"))
    WritableStore.open(url).forget(["b/003.png", "c/004.png"])
    data = attach(stored(store=url)) if attached else stored(store=url)
    refused(
        data, StoreError, url, "lacks 2 of 30 samples", "0 images have changed", "b/003.png", "c/004.png", "preload"
    )


def test_a_store_without_new_images(folder: Path, stored: Maker, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    shutil.copy(tmp_path / "images/a/000.png", tmp_path / "images/a/010.png")
    refused(stored(root=str(tmp_path / "images")), StoreError, "lacks 1 of 31 samples", "a/010.png")


def test_changed_images(folder: Path, stored: Maker, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images/c/001.png").write_bytes(b"other")
    refused(stored(root=str(tmp_path / "images")), StoreError, "lacks 0 of 30", "1 images have changed", "c/001.png")


def test_a_store_that_lost_a_shard(folder: Path, stored: Maker, tmp_path: Path) -> None:
    url = shutil.copytree(folder / "store.zarr", tmp_path / "store.zarr")
    shutil.rmtree(url / "features/c/1")
    refused(stored(store=str(url)), StoreError, str(url), "lost the features of b/006.png")


@pytest.mark.parametrize(
    ("settings", "declared", "field"),
    [
        ({}, {"encoder_config": replace(ENCODER, token_ratio=0.5)}, "token_ratio: 0.2, asked for 0.5"),
        ({"resolution": 96}, {}, "resolution: (64, 64), asked for (96, 96)"),
        ({"mean": [0.3]}, {}, "mean: (0.4, 0.4, 0.4), asked for (0.3, 0.3, 0.3)"),
        ({"codec": "fp32"}, {}, "codec: 'int8', asked for 'fp32'"),
    ],
)
def test_a_stale_store(stored: Maker, settings: dict[str, Any], declared: dict[str, Any], field: str) -> None:
    refused(attach(stored(**settings), **declared), StaleStoreError, field, stored().rebuild)


def test_an_unknown_codec(stored: Maker) -> None:
    with pytest.raises(ConfigurationError, match="codec is 'int2'"):
        stored(codec="int2")


def test_a_damaged_sample_is_named_when_it_is_read(folder: Path, stored: Maker, tmp_path: Path) -> None:
    url = shutil.copytree(folder / "store.zarr", tmp_path / "store.zarr")
    (shard,) = (path for path in (url / "features/c/0").rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    data = ready(stored(store=str(url)))
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    with pytest.raises(StoreError, match=rf"{url} cannot give the features of a/000\.png"):
        list(chain(*loaders))


def test_preload_takes_a_model_or_its_encoder(stored: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpt_lightning.store.preload.FrozenEncoder", None)
    data = stored()
    assert isinstance(data, PreloadedFeatureDataModule)
    models: Sequence[Any] = (tiny_model(), ENCODER)
    assert all(data.preload(model).missing(["a/000.png"]) == [] for model in models)


def test_the_input_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small encoder, beside a stand-in that gives nothing but labels."""
    benchmark = importlib.import_module("input_pipeline")
    monkeypatch.setattr("environment.RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "ENCODER", EncoderConfig("test_vit", pretrained=False))
    loaders = {"1 thread": {"decoding_threads": 1}, "2 threads": {"decoding_threads": 2}}
    for name, value in {"SAMPLES": 40, "LOADERS": loaders, "RESOLUTION": 64, "GROWTH": (20, 40)}.items():
        monkeypatch.setattr(benchmark, name, value)
    (tmp_path / "published_loader.py").write_text("def PublishedDataset(folder):\n    return [(0, 0)] * 8\n")
    benchmark.main(["--published", str(tmp_path), "--rounds", "1"])
    result = json.loads((tmp_path / "input_pipeline.json").read_text())
    assert set(result["rates"]) == {"published"} | {
        f"{codec}, {reader}" for codec in benchmark.CODECS for reader in (*loaders, "memory-mapped gather")
    }
    assert all(rate["median"] > 0 for rate in result["rates"].values())
    assert len(result["growth"]["opening_seconds"]) == 2
    assert "| int8, 2 threads |" in (tmp_path / "input_pipeline.md").read_text()


def test_the_views_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = importlib.import_module("training_views")
    for module in ("environment", "training_views"):
        monkeypatch.setattr(f"{module}.RESULTS", tmp_path)
    monkeypatch.setattr("store_codecs.NATIVE", 64)
    monkeypatch.setitem(benchmark.ENCODERS, benchmark.LABEL, "test_vit")
    write_images(tmp_path / "images", {"a": 12, "b": 12})
    small = ["--resolution", "64", "--epochs", "1", "--tuning-epochs", "1", "--seeds", "2"]
    benchmark.main(["--data", str(tmp_path / "images"), "--out", str(tmp_path / "out"), *small])
    ways = json.loads((tmp_path / "training_views.json").read_text())["ways"]
    assert {way: len(rows) for way, rows in ways.items()} == dict.fromkeys(benchmark.WAYS, 2)
    assert "| mirrored | " in (tmp_path / "training_views.md").read_text()


# Orientations


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Images that get brighter to the right, and their mirror images."""
    folder = tmp_path_factory.mktemp("mirrored")
    rng = np.random.default_rng(0)
    for id in [f"{name}/{number:03d}.png" for name in "abc" for number in range(10)]:
        (folder / "images" / id).parent.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(20, 200, 96) + rng.integers(0, 40, (80, 96))
        Image.fromarray(ramp.astype(np.uint8)).save(folder / "images" / id)

    def make(**changes: Any) -> ImageDataModule:
        settings = {"orientations": 2, **SETTINGS, **changes}
        url = folder / f"orientations-{settings['orientations']}.zarr"
        return PreloadedFeatureDataModule(str(folder / "images"), str(url), **settings)

    for data in make(), make(orientations=1):
        assert isinstance(data, PreloadedFeatureDataModule)
        data.preload(ENCODER)
    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_and_side_image_are_of_the_view_that_was_drawn(mirrored: Maker, workers: int) -> None:
    data = ready(mirrored(num_workers=workers))
    assert isinstance(data, PreloadedFeatureDataModule)
    store, loader = data.store, data.train_dataloader()
    assert store is not None
    drawn = Counter[tuple[str, bool]]()
    for number in range(4):
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        for batch in loader:
            for id, features, view in zip(batch["ids"], batch["features"], batch["side_images"], strict=True):
                falls = bool(view[0, :, 0].mean() > view[0, :, -1].mean())
                np.testing.assert_array_equal(features, store.read([store.rows[id] + falls], "features")[0])
                drawn[id, falls] += 1
    assert len({id for id, _ in drawn}) == 21
    assert len(drawn) > 30  # most samples were seen from both sides
    assert 25 < sum(count for (_, falls), count in drawn.items() if falls) < 59  # of 84


def test_any_orientation_is_drawn_of_tokens_and_side_image_alike(mirrored: Maker) -> None:
    data = mirrored(orientations=8)
    assert isinstance(data, PreloadedFeatureDataModule)
    data.preload(ENCODER)
    loader, store = ready(data).train_dataloader(), data.store
    assert store is not None
    drawn = Counter[int]()
    for number in range(4):
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        for batch in loader:
            for id, features, view in zip(batch["ids"], batch["features"], batch["side_images"], strict=True):
                rows = store.read(range(store.rows[id], store.rows[id] + 8), "features")
                (orientation,) = (each for each in range(8) if np.array_equal(rows[each], features))
                edges = {"left": view[0, :, 0], "right": view[0, :, -1], "top": view[0, 0], "bottom": view[0, -1]}
                brightest = max(edges, key=lambda edge: float(edges[edge].mean()))
                falls = orientation & (2 if orientation >= 4 else 1)
                assert brightest == (("bottom", "top") if orientation >= 4 else ("right", "left"))[bool(falls)]
                drawn[orientation] += 1
    assert len(drawn) == 8
    assert max(drawn.values()) < 25  # of 84


def test_evaluation_and_plain_training_take_the_images_themselves(mirrored: Maker) -> None:
    one, other = (ready(mirrored(orientations=count, augmentation="none")) for count in (2, 1))
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        assert equal(list(getattr(one, name)()), list(getattr(other, name)()))


# Views that the device draws


@pytest.mark.parametrize("asked", [1, 2])
def test_the_device_draws_side_images_of_the_tokens_view(asked: int, mirrored: Maker) -> None:
    """Whatever is asked for, as the store of a model that does not say its encoder is taken as it is."""
    data = mirrored(augment_on="device")
    assert isinstance(data, PreloadedFeatureDataModule)
    data.orientations = asked
    ready(data)
    assert data.store is not None
    sides = Counter[bool]()
    for batch in data.train_dataloader():
        assert "side_images" not in batch
        batch = data.on_after_batch_transfer(batch, 0)
        assert not {"copies", "view_numbers"} & batch.keys()
        assert batch["side_images"].shape[1:] == (3, 32, 32)
        for id, features, view in zip(batch["ids"], batch["features"], batch["side_images"], strict=True):
            falls = bool(view[0, :, 0].mean() > view[0, :, -1].mean())
            np.testing.assert_array_equal(features, data.store.read([data.store.rows[id] + falls], "features")[0])
            sides[falls] += 1
    assert min(sides.values()) > 3
    assert "side_images" in next(iter(data.val_dataloader()))


def test_the_device_draws_views_by_seed_and_epoch(stored: Maker) -> None:
    runs = []
    for threads in (1, 3):
        data = ready(stored(augment_on="device", decoding_threads=threads, image_size=64))
        loader = data.train_dataloader()
        runs.append([[data.on_after_batch_transfer(b, 0) for b in epoch(loader, number)] for number in (0, 1, 0)])
    first, second, again = runs[0]
    assert equal(first, again)
    views = by_id(first), by_id(second)
    assert not any(torch.equal(view, views[1][id]) for id, view in views[0].items())
    assert all(equal(a, b) for a, b in zip(*runs, strict=True))


def test_training_takes_views_of_the_device(
    tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path
) -> None:
    model, trainer = tiny_model(), quiet_trainer(tmp_path)
    data = tiny_data(side_resolution=32, image_size=64, augment_on="device")
    data.preload(model, trainer)
    seen = list[Tensor]()
    model.side.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer.fit(model, data)
    assert {tuple(images.shape[1:]) for images in seen} == {(3, 32, 32)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augmentation": "strong"}, "data.augmentation 'strong' is not made"),
        ({"image_size": 256}, "data.image_size is 256 for a side resolution of 32: set it to 64"),
    ],
)
def test_what_the_device_cannot_draw_is_refused_first(stored: Maker, changes: dict[str, Any], words: str) -> None:
    data = attach(stored(augment_on="device", **{"image_size": 64, **changes}))
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        data.check("fit")
    with pytest.raises(ConfigurationError, match=r"data\.augment_on is 'gpu': choose 'loader' or 'device'"):
        stored(augment_on="gpu")


def test_threads_part_all_orientations_of_a_batch(mirrored: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    readers, read_into = set[str](), FeatureStore.read_into

    def noted(*args: Any) -> None:
        readers.add(threading.current_thread().name)
        time.sleep(0.01)  # so that no thread does the other's share
        read_into(*args)

    monkeypatch.setattr(FeatureStore, "read_into", noted)
    alone, several = (
        list(ready(attach(mirrored(decoding_threads=count), test_time_orientations=2)).val_dataloader())
        for count in (1, 3)
    )
    assert all(len(batch["features"]) == 2 * len(batch["ids"]) for batch in alone)
    assert equal(alone, several)
    assert readers - {"prefetch"} <= {f"decoding_{number}" for number in range(3)}
    assert len(readers) > 2


def test_a_batch_is_read_from_the_store_at_once(mirrored: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read of a store that is far away takes its time; further orientations, of evaluation alone, are another."""
    data, names, read_into = (
        ready(attach(mirrored(decoding_threads=1), test_time_orientations=2)),
        [],
        FeatureStore.read_into,
    )

    def noted(store: FeatureStore, rows: Any, blocks: dict[str, Any]) -> None:
        names.append("images" in blocks)
        read_into(store, rows, blocks)

    monkeypatch.setattr(FeatureStore, "read_into", noted)
    train = data.train_dataloader().dataset
    train.__getitems__([(0, 0), (0, 1)])
    assert names == [True]
    names.clear()
    data.val_dataloader().dataset.__getitems__([(0, 0)])
    assert names == [True, False]


# Where the store is in memory, and where worker processes start in different ways


def batches_of(data: PreloadedFeatureDataModule, start_method: str | None = None) -> list[dict[str, Any]]:
    """Of the training images; by a worker process of a start method."""
    data.seed = 3
    data.setup("fit")
    loader = data.train_dataloader()
    if start_method is not None:
        loader.multiprocessing_context = start_method
    return [{name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in batch.items()} for batch in loader]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys()
        and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("start_method", "in_memory"), [("fork", False), ("fork", True), ("spawn", True), ("forkserver", False)]
)  # a process that is not forked is sent all of the data set, whichever starts it
def test_worker_processes_give_what_the_thread_gives(
    start_method: str, in_memory: bool, tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path
) -> None:
    tiny_data(side_resolution=32).preload(tiny_model(), quiet_trainer(tmp_path))
    expected = batches_of(tiny_data(side_resolution=32))
    data = tiny_data(side_resolution=32, num_workers=1, in_memory=in_memory)
    assert same(expected, batches_of(data, start_method))


@pytest.mark.parametrize("start_method", [None, "spawn"])
def test_a_store_far_away_is_read_through_copies(
    start_method: str | None, tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path
) -> None:
    tiny_data(side_resolution=32).preload(tiny_model(), quiet_trainer(tmp_path))
    expected = batches_of(tiny_data(side_resolution=32))
    far = {"store": f"file://{tmp_path / 'store.zarr'}", "cache": str(tmp_path / "cache")}
    data = tiny_data(side_resolution=32, num_workers=int(start_method is not None), **far)
    assert same(expected, batches_of(data, start_method))
    assert {path.name.split(".")[0] for path in (tmp_path / "cache").rglob("*-*")} >= {"features", "images"}


def test_a_store_in_memory_is_read_once(tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path) -> None:
    data = tiny_data(side_resolution=32, in_memory=True)
    data.preload(tiny_model(), quiet_trainer(tmp_path))
    expected = batches_of(tiny_data(side_resolution=32))
    data.seed = 3
    data.setup("fit")
    assert data.store is not None
    for array in data.store.sample_arrays:
        shutil.rmtree(tmp_path / "store.zarr" / array / "c")
    loader = data.train_dataloader()
    found = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in loader]
    assert same(expected, found)


def test_a_second_stage_takes_over_what_is_in_memory(
    tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_data(side_resolution=32, in_memory=True)
    data.preload(tiny_model(), quiet_trainer(tmp_path))
    data.setup("fit")
    monkeypatch.setattr("fpt_lightning.store.reader.ShardReader.read", None)  # nothing is to be read again
    data.setup("test")
    assert len(next(iter(data.test_dataloader()))["ids"]) == 6


def test_a_store_that_does_not_fit_memory(
    tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_data(side_resolution=32, in_memory=True)
    data.preload(tiny_model(), quiet_trainer(tmp_path))
    monkeypatch.setattr("fpt_lightning.store.store.available_memory", lambda shared: 1000)
    with pytest.raises(StoreError, match=r"GB in memory, of which 0.0 GB are free: set data.in_memory to false"):
        data.setup("fit")


def test_predict_has_as_many_images_at_once_as_the_encoder_takes(make: Maker, tmp_path: Path) -> None:
    """Of a method with a frozen encoder; one that trains it takes whole batches. A training learns the number too."""
    for model, size in ((tiny_model(), 3), (LoRAModule(3, encoder="test_vit", pretrained=False), 8)):
        data = make(preload_batch_size=3)
        data.model = model
        data.setup("predict")
        assert data.predict_dataloader().batch_size == size
    data, model = make(preload_batch_size=3), tiny_model()
    quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(model, data)
    assert model.images_at_once == 3
