"""Views of a whole batch on its device, held against those that albumentations draws one by one."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from fpt_lightning.data import transforms
from fpt_lightning.data.device_views import DeviceViews, crops, jittered, resized_crops
from fpt_lightning.data.transforms import RATIO, SCALE, ViewTransform
from fpt_lightning.errors import ConfigurationError

SIDE, SIZE, COUNT = 64, 32, 4000


def views(
    mirror: bool = True, mean: tuple[float, ...] = (0.0,) * 3, std: tuple[float, ...] = (1.0,) * 3
) -> DeviceViews:
    return DeviceViews(SIZE, SIDE, mirror, mean, std, seed=5)


def photographs(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth images, (count, SIDE, SIDE, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return np.stack([cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for image in coarse])


def library_crops(count: int) -> NDArray[np.float64]:
    """(count, 4): left, top, width, height of albumentations."""
    crop = transforms._albumentations((SIZE, SIZE), "default", True, cv2.INTER_LINEAR)[0]
    crop.set_random_seed(0)
    drawn = [crop.get_params_dependent_on_data({"shape": (SIDE, SIDE, 3)}, {})["crop_coords"] for _ in range(count)]
    left, top, right, bottom = np.array(drawn, float).T
    return np.stack([left, top, right - left, bottom - top], 1)


def test_crops_have_the_librarys_distribution() -> None:
    numbers = views().numbers([(0, index) for index in range(COUNT)])
    ours, theirs = crops(numbers[:, :22], SIDE).double().numpy(), library_crops(COUNT)
    assert (ours == ours.round()).all()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= SIDE).all()
    area, ratio = (ours[:, 2] * ours[:, 3] / SIDE**2), ours[:, 2] / ours[:, 3]
    assert SCALE[0] - 0.02 < area.min() < SCALE[0] + 0.02
    assert area.max() == 1
    assert RATIO[0] < ratio.min() < 0.9
    for measure in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 2] * b[:, 3]):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    assert np.mean((ours[:, 2:] == SIDE).all(1)) == pytest.approx(np.mean((theirs[:, 2:] == SIDE).all(1)), abs=0.01)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_crop_is_resized_as_opencv_does(flipped: bool) -> None:
    images = photographs(6)
    boxes = [(0, 0, 64, 64), (3, 5, 57, 59), (7, 0, 57, 64), (0, 9, 64, 55), (10, 10, 54, 54), (1, 2, 63, 62)]
    expected = np.stack(
        [
            cv2.resize(image[y : y + h, x : x + w].astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
            for image, (x, y, w, h) in zip(images, boxes, strict=True)
        ]
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    found = resized_crops(pixels, torch.tensor(boxes).float(), SIZE, torch.full((6,), flipped)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected[:, :, ::-1] if flipped else expected, atol=0.02)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 0, 2, 3]])
def test_brightness_and_contrast_are_the_librarys(order: list[int]) -> None:
    jitter = transforms._albumentations((SIZE, SIZE), "default", True, cv2.INTER_LINEAR)[-1]
    rng, images = np.random.default_rng(1), photographs(8)
    factors = rng.uniform(0.8, 1.2, (8, 2))
    expected = [
        jitter.apply(image, brightness=b, contrast=c, saturation=1, hue=0, order=order)
        for image, (b, c) in zip(images, factors, strict=True)
    ]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    brightness, contrast = torch.from_numpy(factors).float().unbind(1)
    found = jittered(pixels, brightness, contrast, torch.full((8,), order[0] == 0)).permute(0, 2, 3, 1) * 255
    assert np.abs(found.numpy() - np.stack(expected)).max() < 2.5  # steps of 8 bits, truncated twice
    assert np.abs((found.numpy() - np.stack(expected)).mean()) < 1


def test_views_have_the_librarys_distribution() -> None:
    """Brightness, contrast, left against right, and how much views of one image differ."""
    image = photographs(1, seed=3)
    draw = ViewTransform(SIZE)
    theirs = draw.draw(image.repeat(COUNT // 4, 0), range(COUNT // 4))
    numbers = views().numbers([(1, index) for index in range(COUNT // 4)])
    ours = views()(torch.from_numpy(image.repeat(COUNT // 4, 0)), numbers)
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    for measure in (
        lambda v: v.mean((1, 2, 3)),
        lambda v: v.std((1, 2, 3)),
        lambda v: (v[..., : SIZE // 2] - v[..., SIZE // 2 :]).mean((1, 2, 3)),
        lambda v: (v - v.mean(0)).abs().mean((1, 2, 3)),
    ):
        assert ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.03, rtol=0)


def test_seed_epoch_and_sample_decide_a_view() -> None:
    images = torch.from_numpy(photographs(4))
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    whole = views()(images, views().numbers(keys))
    alone = [views()(images[i : i + 1], views().numbers([key])) for i, key in enumerate(keys)]
    torch.testing.assert_close(whole, torch.cat(alone))
    assert len({row.numpy().tobytes() for row in views().numbers(keys)}) == 4


def test_no_view_is_flipped_where_the_store_has_mirror_images() -> None:
    ramp = np.broadcast_to(np.linspace(50, 150, SIDE).astype(np.uint8)[None, None, :, None], (50, SIDE, SIDE, 3))
    numbers = views().numbers([(0, index) for index in range(50)])
    for mirror in (True, False):
        drawn = views(mirror)(torch.from_numpy(ramp.copy()), numbers)
        falling = (drawn[..., 0] > drawn[..., -1]).float().mean()
        assert 0.3 < falling < 0.7 if mirror else falling == 0


def test_views_are_normalised() -> None:
    images, mean, std = torch.from_numpy(photographs(3)), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    numbers = views().numbers([(0, index) for index in range(3)])
    plain = views()(images, numbers)
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(views(mean=mean, std=std)(images, numbers), expected)


def test_copies_that_shrink_too_much() -> None:
    with pytest.raises(ConfigurationError, match=r"data.image_size is 300 for a side resolution of 128: set it to 256"):
        DeviceViews(128, 300, True, (0.0,), (1.0,), 0)
    DeviceViews(126, 256, True, (0.0,), (1.0,), 0)
