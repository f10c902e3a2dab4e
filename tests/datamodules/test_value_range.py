"""The range of 16-bit pictures: measured over the training images, kept in store and checkpoint, met by all stages."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fpt_lightning import ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.data.images import ImageReader
from fpt_lightning.data.transforms import normalise, unit_pixels
from fpt_lightning.deployment.predictor import Predictor
from fpt_lightning.errors import CheckpointError, ConfigurationError, StaleStoreError
from fpt_lightning.store.specification import FeatureSpecification
from small import quiet_trainer, tiny_model

Make = Callable[..., PreloadedFeatureDataModule]
ENCODER = tiny_model().encoder_config
RANGE = (40.0, 3900.0)
NAMES = [f"{label}/{number:03d}.png" for label in "abc" for number in range(10)]


def write_deep(root: Path, top: int = 3900) -> Path:
    """30 pictures of 12 bits in 16, some of each class brighter; the second one alone holds both ends of the range."""
    rng = np.random.default_rng(0)
    for place, name in enumerate(NAMES):
        pixels = rng.integers(200, top - 200, (80, 96)) // (1 + place // 10)
        pixels = np.maximum(pixels, 50)
        if place == 1:
            pixels[:2] = [[40], [top]]
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint16)).save(root / name)
    return root


@pytest.fixture
def make(tmp_path: Path) -> Make:
    root = write_deep(tmp_path / "deep")
    rows = [(name, name[0], ["train", "train", "val", "test"][i % 4]) for i, name in enumerate(NAMES)]
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "split"), *rows])

    def build(**changes: Any) -> PreloadedFeatureDataModule:
        settings: dict[str, Any] = {
            "root": str(root),
            "manifest": "labels.csv",
            "store": str(tmp_path / "store.zarr"),
            "resolution": 64,
            "image_size": 48,
            "batch_size": 8,
        }
        return PreloadedFeatureDataModule(**{**settings, **changes})

    return build


def copies(data: PreloadedFeatureDataModule) -> np.ndarray[Any, Any]:
    store = data.preload(ENCODER)
    return store.read(list(range(len(store.ids))), "images")


def test_twelve_bits_fill_the_stored_copies(make: Make, tmp_path: Path) -> None:
    data = make()
    found = copies(data)
    assert len(np.unique(found)) > 200
    specification = data.preload(ENCODER).specification
    assert specification.value_range == RANGE
    assert specification.range_of.startswith("auto over 16 images")
    assert not Path(f"{tmp_path / 'store.zarr'}.notices.csv").exists()
    again = FeatureSpecification.from_dict(specification.to_dict())
    assert again.reader.value_range == RANGE


def test_the_full_range_leaves_few_levels_and_says_so(make: Make, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="30 images are not shown as their files ask"):
        found = copies(make(value_range="full"))
    assert len(np.unique(found)) <= 17
    with Path(f"{tmp_path / 'store.zarr'}.notices.csv").open(newline="") as file:
        notices = list(csv.DictReader(file))
    assert len(notices) == 30
    assert all("of 256 grey levels of [0, 65535]" in row["notice"] for row in notices)


def test_live_images_are_read_in_the_measured_range(make: Make) -> None:
    data = ImageDataModule(make().root, "labels.csv", resolution=64, image_size=48, side_resolution=32)
    model = tiny_model()
    model.trainer = quiet_trainer(Path("."))
    data.trainer = model.trainer
    data.model = model
    data.setup("fit")
    assert data.specification is not None
    assert data.specification.value_range == RANGE
    reader = ImageReader((64, 64), value_range=RANGE)
    training = [unit_pixels(reader(data.labelled.path(s)), (64, 64)) for s in data.labelled.split("train")]
    assert data.specification.mean[0] == pytest.approx(torch.stack(training).mean().item(), abs=1e-4)
    data.model = None
    data.trainer = None
    data.model = type("Bare", (), {"INPUTS": frozenset({"images"}), "encoder_config": ENCODER})()
    batch = next(iter(data.val_dataloader()))
    pixels = unit_pixels(reader(Path(data.root) / batch["ids"][0]), (64, 64))
    expected = normalise(pixels, data.specification.mean, data.specification.std)
    torch.testing.assert_close(batch["images"][0], expected)


def trained(make: Make, folder: Path, **changes: Any) -> str:
    """A checkpoint."""
    torch.manual_seed(0)
    data, model, trainer = make(**changes), tiny_model(), quiet_trainer(folder)
    data.preload(model, quiet_trainer(folder))
    trainer.fit(model, data)
    path = str(folder / "m.ckpt")
    trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_keeps_the_range_for_prediction(make: Make, tmp_path: Path) -> None:
    path = trained(make, tmp_path)
    new = tmp_path / "new"
    new.mkdir()
    pixels = np.array(Image.open(tmp_path / "deep" / NAMES[0]))
    Image.fromarray(pixels).save(new / "one.png")
    live = ImageDataModule(str(new), resolution=64, image_size=48)
    (batch,) = quiet_trainer(tmp_path).predict(tiny_model(), live, ckpt_path=path) or []
    predictor = Predictor(path)
    assert predictor.specification.value_range == RANGE
    by_path = predictor(new).scores
    assert isinstance(batch, dict)
    np.testing.assert_allclose(by_path, batch["scores"].numpy(), atol=1e-5)
    np.testing.assert_allclose(predictor(pixels).scores, by_path, atol=1e-6)
    stretched = np.rint(np.clip((pixels - 40.0) / 3860, 0, 1) * 65535).astype(np.uint16)
    assert np.abs(predictor(stretched).scores - by_path).max() > 1e-5  # which would be stretched once more


def test_features_of_another_range_are_refused(make: Make, tmp_path: Path) -> None:
    path = trained(make, tmp_path)
    other = make(value_range=(0, 4095), store=str(tmp_path / "other.zarr"))
    other.preload(ENCODER)
    with pytest.raises(CheckpointError, match=r"value_range: \(40.0, 3900.0\), asked for \(0.0, 4095.0\)"):
        quiet_trainer(tmp_path).test(tiny_model(), other, ckpt_path=path, verbose=False)


def test_a_store_of_another_range_is_stale(make: Make) -> None:
    make(value_range="full").preload(ENCODER)
    with pytest.raises(StaleStoreError, match="range_of: 'full', asked for 'auto over 16 images"):
        make().preload(ENCODER)
    with pytest.raises(StaleStoreError, match=r"value_range: full, asked for \(0.0, 4095.0\)"):
        make(value_range=(0, 4095)).preload(ENCODER)


def test_the_range_of_eight_bits_does_not_count(tiny_data: Make) -> None:
    data = tiny_data()
    assert data.preload(ENCODER).specification.range_of == "none"
    asked = tiny_data().asked_store(ENCODER)  # before the images are known
    assert asked.range_of.startswith("auto")
    data = tiny_data()
    data.read_manifest()
    earlier = replace(data.asked_store(ENCODER), range_of="full")
    for other in (replace(earlier, value_range=(1.0, 2.0)), earlier):
        assert other.differences(data.asked_store(ENCODER)) == []
    tiny_data(value_range="full").preload(ENCODER)


def test_other_hospitals_need_the_numbers(make: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"data.value_range: 'auto' is measured over training images"):
        make(external=True, mean=[0.5], std=[0.2]).preload(ENCODER)
    make(external=True, mean=[0.5], std=[0.2], value_range=RANGE).preload(ENCODER)


def test_nobody_knows_the_range(make: Make) -> None:
    data = ImageDataModule(make().root, "labels.csv", resolution=64, mean=[0.5], std=[0.2], side_resolution=32)
    data.setup("test")
    with pytest.raises(ConfigurationError, match=r"data.value_range is 'auto' and there are 16-bit images.*ckpt_path"):
        data.test_dataloader()


def test_images_of_a_complete_store_are_not_opened_to_learn_their_depth(
    make: Make, tiny_data: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a new one of 16 bits overlooked."""
    for build in (make, partial(tiny_data, store=str(tmp_path / "eight.zarr"))):
        build().preload(ENCODER)
        with monkeypatch.context() as patch:
            patch.setattr("fpt_lightning.datamodules.images.deep_pictures", None)
            data = build()
            data.preload(ENCODER)
            data.setup("fit")
    root = Path(tiny_data().root)
    for number in range(10, 20):
        Image.fromarray(np.full((80, 96), 3000 + number, np.uint16)).save(root / "a" / f"{number:03d}.png")
    with pytest.raises(StaleStoreError, match="range_of: 'none', asked for 'auto over"):
        build().preload(ENCODER)
