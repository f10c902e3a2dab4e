"""``test_time_orientations``: evaluation takes several orientations of an image, from a store as from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fpt_lightning import ImageDataModule, Predictor, PreloadedFeatureDataModule
from fpt_lightning.data.images import read_image
from fpt_lightning.data.orientations import oriented, oriented_pixels
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.deployment.export import Classifier
from fpt_lightning.errors import CheckpointError, ConfigurationError
from fpt_lightning.methods import METHODS
from fpt_lightning.methods.base import as_stored, in_orientations
from small import quiet_trainer, save_trained, tiny_model, write_images

MakeData = Callable[..., PreloadedFeatureDataModule]
SIDE = {"fpt_plus": {"side_resolution": 32}, "fpt": {"side_resolution": 32}}
SIZE = (64, 64)


@pytest.fixture
def pictures(tmp_path: Path) -> list[NDArray[np.uint8]]:
    """Six images at the resolution: nothing is resized but the side network's copy."""
    root = write_images(tmp_path / "pictures", {"a": 3, "b": 3}, SIZE)
    return [np.asarray(read_image(path)) for path in sorted(root.rglob("*.png"))]


@pytest.mark.parametrize(
    ("method", "count"),
    [("fpt_plus", 8), ("query_tokens", 2), ("query_tokens", 4), ("stored_linear", 8), ("linear", 8), ("lora", 2)],
)
def test_all_orientations_of_an_image_get_one_answer(
    method: str, count: int, pictures: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    settings = {"encoder": "test_vit", **SIDE.get(method, {})}
    plain = Predictor(save_trained(METHODS[method], tmp_path / "plain.ckpt", SIZE, **settings))
    path = save_trained(METHODS[method], tmp_path / "all.ckpt", SIZE, test_time_orientations=count, **settings)
    together = Predictor(path)
    turned = [[np.ascontiguousarray(oriented(picture, each)) for picture in pictures] for each in range(count)]
    logs = np.log([plain(each).scores for each in turned])
    assert np.abs(logs - logs[0]).max() > 1e-3
    mean = np.exp(logs.mean(0))
    expected = mean / mean.sum(1, keepdims=True)  # softmax of the mean of log-softmaxes, and of logits, are the same
    # the tokens that are kept of an image are those of its other orientations but where two are equally attended
    near = 2e-3 if count == 8 and method in SIDE else 1e-4  # side copies are resized, and rounded, along rows first
    np.testing.assert_allclose(together(pictures).scores, expected, atol=near)
    np.testing.assert_allclose(together(turned[-1]).scores, expected, atol=near)

    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    (exported,) = Classifier(*load_trained(path))(images)
    np.testing.assert_allclose(exported.numpy(), together(pictures).scores, atol=5e-3 if method in SIDE else 1e-4)


@pytest.mark.parametrize(("count", "zoom", "workers"), [(8, 1.0, 0), (8, 0.6, 0), (2, 0.6, 2)])
def test_a_store_answers_as_the_files_do(
    count: int, zoom: float, workers: int, tiny_data: MakeData, image_root: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    data = tiny_data(orientations=count, zoom=zoom, codec="fp32", num_workers=workers)
    model = tiny_model(test_time_orientations=count, learning_rate=3e-3)
    data.preload(model)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "m.ckpt")

    def scores(datamodule: ImageDataModule, orientations: int) -> dict[str, list[float]]:
        model.test_time_orientations = orientations
        found = trainer.predict(model, dataloaders=_test_batches(datamodule, trainer, model))
        return {id: row for part in found for id, row in zip(part["ids"], part["scores"].tolist(), strict=True)}

    stored, once = scores(data, count), scores(data, 1)
    live = Predictor(tmp_path / "m.ckpt")(image_root)
    by_id = dict(zip(live.ids, live.scores.tolist(), strict=True))
    assert len(stored) == 6
    for id, row in stored.items():
        np.testing.assert_allclose(row, by_id[id], atol=2e-3)  # the side copies are made of other pixels when turned
        assert np.abs(np.array(row) - once[id]).max() > 1e-5


def _test_batches(data: ImageDataModule, trainer: object, model: object) -> object:
    data.setup("test")
    return data.test_dataloader()


def test_fit_validates_and_tests_all_of_them(tiny_data: MakeData, tmp_path: Path) -> None:
    data = tiny_data(orientations=8)
    model = tiny_model(test_time_orientations=4)
    data.preload(model)
    seen: list[tuple[bool, int, int]] = []
    forward = model.evaluated

    def spy(batch: dict[str, object]) -> torch.Tensor:
        seen.append((model.training, len(batch["features"]), len(batch["ids"])))  # type: ignore[arg-type]
        return forward(batch)

    model.evaluated = spy  # type: ignore[method-assign,assignment]
    trainer = quiet_trainer(tmp_path, num_sanity_val_steps=0)
    trainer.fit(model, data)
    trainer.test(model, data)
    assert seen == [(False, 8, 2), (False, 4, 1), *[(False, 8, 2)] * 3]  # 3 and 6 images, 8 / 4 at once
    trained = next(iter(data.train_dataloader()))
    assert len(trained["features"]) == len(trained["ids"])


def test_a_store_of_fewer_is_refused(tiny_data: MakeData, tmp_path: Path) -> None:
    data, model = tiny_data(), tiny_model(test_time_orientations=2)
    words = r"test_time_orientations is 2, but data\.orientations 1: make the feature store .*store\.zarr with"
    with pytest.raises(ConfigurationError, match=words):
        data.preload(model)
    data.preload(model.encoder_config)
    with pytest.raises(ConfigurationError, match=words):
        quiet_trainer(tmp_path).fit(model, data)
    batch = {"features": torch.zeros(4), "labels": torch.zeros(4)}
    with pytest.raises(ConfigurationError, match="is 2, but there are 4 stored features of 4 images: make the store"):
        in_orientations(batch, 2)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_checkpoint_of_before_there_were_more_is_read(mirrored: bool, tmp_path: Path) -> None:
    path = save_trained(METHODS["query_tokens"], tmp_path / "m.ckpt", SIZE, encoder="test_vit")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["hyper_parameters"]["test_time_orientations"]
    checkpoint["hyper_parameters"]["test_time_mirroring"] = mirrored
    torch.save(checkpoint, path)
    model, _ = load_trained(path)
    assert (model.test_time_orientations, model.hparams["test_time_orientations"]) == (1 + mirrored, 1 + mirrored)


def test_quarter_turns_are_of_square_images(tiny_data: MakeData, image_root: Path, tmp_path: Path) -> None:
    data, model = tiny_data(orientations=8, resolution=[64, 96]), tiny_model()
    with pytest.raises(ConfigurationError, match=r"data\.orientations is 8.* images have 64 x 96 pixels: give 4"):
        data.preload(model)
    images = ImageDataModule(str(image_root), resolution=[64, 96], mean=[0.4], std=[0.2])
    with pytest.raises(ConfigurationError, match=r"model\.test_time_orientations is 8.* 64 x 96"):
        quiet_trainer(tmp_path).fit(tiny_model(test_time_orientations=8), images)
    with pytest.raises(ConfigurationError, match=r"model\.test_time_orientations is 3: choose one of 1, 2, 4, 8"):
        tiny_model(test_time_orientations=3)


def test_features_of_the_image_are_not_taken_for_those_of_another_orientation() -> None:
    batch = {
        "images": torch.arange(4.0).view(1, 1, 2, 2),
        "features": torch.ones(1),
        "pooled": torch.ones(1),
        "ids": ["a"],
    }
    found = in_orientations(batch, 2)
    assert set(found) == {"images", "ids"}
    assert found["ids"] == ["a", "a"]
    assert found["images"].flatten(1).tolist() == [[0, 1, 2, 3], [1, 0, 3, 2]]


def test_stored_features_and_side_images_are_of_the_same_orientations() -> None:
    side = torch.arange(8.0).view(2, 1, 2, 2)
    batch = {"side_images": side, "pooled": torch.arange(8.0), "labels": torch.zeros(2), "ids": ["a", "b"]}
    found = in_orientations(batch, 4)
    assert found["pooled"] is batch["pooled"]
    assert found["ids"] == ["a", "b"] * 4
    expected = [oriented_pixels(side, orientation)[image] for orientation in range(4) for image in range(2)]
    assert torch.equal(found["side_images"], torch.stack(expected))
    assert as_stored(batch, 2)["pooled"].tolist() == [0, 1]


def test_images_without_further_orientations_serve_a_model_of_zoomed_ones(
    tiny_data: MakeData, image_root: Path, tmp_path: Path
) -> None:
    data, model = tiny_data(orientations=2, zoom=0.8), tiny_model()
    data.preload(model)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(model, data)
    trainer.test(model, tiny_data(orientations=2, zoom=0.8))
    plain = tiny_data(orientations=2, store=str(tmp_path / "plain.zarr"))
    plain.preload(model.encoder_config)
    with pytest.raises(CheckpointError, match=r"zoom: 0\.8, asked for 1\.0"):
        trainer.test(model, plain)
    trainer.test(model, ImageDataModule(str(image_root), resolution=64, mean=[0.4], std=[0.2], image_size=48))
