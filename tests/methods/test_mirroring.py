"""``test_time_mirroring``: evaluation takes an image and its mirror image, from a store as from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fpt_lightning import ImageDataModule, Predictor, PreloadedFeatureDataModule
from fpt_lightning.data.images import read_image
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.deployment.export import Classifier
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.methods import METHODS
from fpt_lightning.methods.base import mirrored
from small import quiet_trainer, save_trained, tiny_model, write_images

MakeData = Callable[..., PreloadedFeatureDataModule]
SIDE = {"fpt_plus": {"side_resolution": 32}, "fpt": {"side_resolution": 32}}
SIZE = (64, 96)


@pytest.fixture
def pictures(tmp_path: Path) -> list[NDArray[np.uint8]]:
    """Six images at the resolution: nothing is resized but the side network's copy."""
    root = write_images(tmp_path / "pictures", {"a": 3, "b": 3}, SIZE)
    return [np.asarray(read_image(path)) for path in sorted(root.rglob("*.png"))]


@pytest.mark.parametrize("method", ["fpt_plus", "query_tokens", "stored_linear", "linear", "lora"])
def test_an_image_and_its_mirror_image_get_one_answer(
    method: str, pictures: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    settings = {"encoder": "test_vit", **SIDE.get(method, {})}
    plain = Predictor(save_trained(METHODS[method], tmp_path / "plain.ckpt", SIZE, **settings))
    path = save_trained(METHODS[method], tmp_path / "both.ckpt", SIZE, test_time_mirroring=True, **settings)
    both, flipped = Predictor(path), [np.ascontiguousarray(picture[:, ::-1]) for picture in pictures]
    here, there = (np.log(plain(each).scores) for each in (pictures, flipped))
    assert np.abs(here - there).max() > 1e-3
    mean = np.exp((here + there) / 2)
    expected = mean / mean.sum(1, keepdims=True)  # softmax of the mean of log-softmaxes, and of logits, are the same
    # the tokens that are kept of an image are its mirror image's but where two are equally attended
    np.testing.assert_allclose(both(pictures).scores, expected, atol=1e-4)
    np.testing.assert_allclose(both(flipped).scores, expected, atol=1e-4)

    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    (exported,) = Classifier(*load_trained(path))(images)
    np.testing.assert_allclose(exported.numpy(), both(pictures).scores, atol=5e-3 if method in SIDE else 1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mirrored_store_answers_as_the_files_do(
    workers: int, tiny_data: MakeData, image_root: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    data = tiny_data(mirrored=True, codec="fp32", num_workers=workers)
    model = tiny_model(test_time_mirroring=True, learning_rate=3e-3)
    data.preload(model)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "m.ckpt")

    def scores(datamodule: ImageDataModule, average: bool) -> dict[str, list[float]]:
        model.test_time_mirroring = average
        found = trainer.predict(model, dataloaders=_test_batches(datamodule, trainer, model))
        return {id: row for part in found for id, row in zip(part["ids"], part["scores"].tolist(), strict=True)}

    stored, once = scores(data, True), scores(data, False)
    live = Predictor(tmp_path / "m.ckpt")(image_root)
    by_id = dict(zip(live.ids, live.scores.tolist(), strict=True))
    assert len(stored) == 6
    for id, row in stored.items():
        np.testing.assert_allclose(row, by_id[id], atol=2e-3)  # the side copies are made of other pixels when flipped
        assert np.abs(np.array(row) - once[id]).max() > 1e-5


def _test_batches(data: ImageDataModule, trainer: object, model: object) -> object:
    data.setup("test")
    return data.test_dataloader()


def test_fit_validates_and_tests_both_views(tiny_data: MakeData, tmp_path: Path) -> None:
    data = tiny_data(mirrored=True)
    model = tiny_model(test_time_mirroring=True)
    data.preload(model)
    seen: list[tuple[bool, bool]] = []
    forward = model.evaluated

    def spy(batch: dict[str, object]) -> torch.Tensor:
        seen.append((model.training, "mirrored" in batch))
        return forward(batch)

    model.evaluated = spy  # type: ignore[method-assign,assignment]
    trainer = quiet_trainer(tmp_path, num_sanity_val_steps=0)
    trainer.fit(model, data)
    trainer.test(model, data)
    assert seen == [(False, True)] * 2
    assert "mirrored" not in next(iter(data.train_dataloader()))


def test_a_store_without_mirror_images_is_refused(tiny_data: MakeData, tmp_path: Path) -> None:
    data, model = tiny_data(), tiny_model(test_time_mirroring=True)
    words = r"store\.zarr has no mirror images: make it with data\.mirrored true"
    with pytest.raises(ConfigurationError, match=words):
        data.preload(model)
    data.preload(model.encoder_config)
    with pytest.raises(ConfigurationError, match=words):
        quiet_trainer(tmp_path).fit(model, data)
    with pytest.raises(ConfigurationError, match="without those of the mirror images"):
        mirrored({"features": torch.zeros(1)})


def test_features_of_the_image_are_not_taken_for_the_mirror_images() -> None:
    batch = {
        "images": torch.arange(4.0).view(1, 1, 2, 2),
        "features": torch.ones(1),
        "pooled": torch.ones(1),
        "ids": ["a"],
    }
    found = mirrored(batch)
    assert set(found) == {"images", "ids"}
    assert found["images"].flatten().tolist() == [1, 0, 3, 2]
    given = mirrored({**batch, "mirrored": {"features": torch.zeros(1), "pooled": torch.zeros(1)}})
    assert (given["features"].item(), given["pooled"].item()) == (0, 0)
