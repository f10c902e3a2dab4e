"""Orientations: the symmetries of a square, alike for arrays and tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fpt_lightning.data.orientations import (
    COUNTS,
    check_orientations,
    check_zoom,
    evaluated_at_once,
    oriented,
    oriented_pixels,
    parts_shown,
    zoomed,
    zoomed_pixels,
)
from fpt_lightning.errors import ConfigurationError

IMAGE = np.arange(9).reshape(3, 3)


def all_of(image: np.ndarray, count: int = 8) -> set[bytes]:
    return {oriented(image, each).tobytes() for each in range(count)}


def test_they_are_what_they_are_called() -> None:
    assert oriented(IMAGE, 0) is IMAGE
    for each, wanted in (
        (1, np.fliplr(IMAGE)),
        (2, np.flipud(IMAGE)),
        (3, np.rot90(IMAGE, 2)),
        (4, IMAGE.T),
        (5, np.rot90(IMAGE, -1)),
        (6, np.rot90(IMAGE)),
        (7, np.rot90(IMAGE, 2).T),
    ):
        np.testing.assert_array_equal(oriented(IMAGE, each), wanted)


@pytest.mark.parametrize("count", COUNTS)
def test_those_of_one_are_those_of_each(count: int) -> None:
    found = all_of(IMAGE, count)
    assert len(found) == count
    assert all(all_of(oriented(IMAGE, each), count) == found for each in range(count))


def test_tensors_and_images_are_turned_alike() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (4, 6, 3))
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    for each in range(8):
        turned = oriented_pixels(pixels, each)[0].permute(1, 2, 0)
        np.testing.assert_array_equal(turned.numpy(), oriented(picture, each))
    assert oriented(picture, 5).shape == (6, 4, 3)


def test_zoomed_each_shows_a_part_of_its_own() -> None:
    picture = np.arange(100 * 200).reshape(100, 200)
    parts = [zoomed(picture, each, 0.6) for each in range(8)]
    assert np.array_equal(parts[0], picture)
    assert sorted({part.shape for part in parts[1:]}) == [(side, 2 * side) for side in (60, 64, 66, 68, 72, 80, 82)]
    assert len({int(part[0, 0]) for part in parts[1:]}) == 7
    assert all(zoomed(picture, each, 1.0).shape == (100, 200) for each in range(8))


def test_zoomed_tensors_show_the_parts_of_images_at_their_size() -> None:
    down, right = torch.meshgrid(torch.arange(50.0), torch.arange(80.0), indexing="ij")
    pixels = torch.stack([down, right])[None]
    assert zoomed_pixels(pixels, 0, 0.6) is zoomed_pixels(pixels, 3, 1.0) is pixels
    for each in range(1, 8):
        found, part = zoomed_pixels(pixels, each, 0.6)[0], zoomed(pixels[0].permute(1, 2, 0).numpy(), each, 0.6)
        assert found.shape == (2, 50, 80)
        for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            np.testing.assert_allclose(found[(slice(None), *corner)], part[corner], atol=0.6)


def test_parts_are_those_of_the_orientations_that_there_are() -> None:
    assert parts_shown(2, 0.6) == pytest.approx([0.8])
    assert parts_shown(4, 0.6) == pytest.approx([0.64, 0.72, 0.8])
    parts = parts_shown(8, 0.6)
    assert (len(parts), parts[0], parts[-1]) == (7, pytest.approx(0.6), pytest.approx(0.82))


def test_what_there_is_not_is_refused() -> None:
    for count in (0, 3, 16):
        with pytest.raises(ConfigurationError, match=rf"data\.orientations is {count}: choose one of 1, 2, 4, 8"):
            check_orientations("data.orientations", count)
    check_orientations("data.orientations", 4, (64, 96))
    check_orientations("data.orientations", 8, (64, 64))
    with pytest.raises(ConfigurationError, match=r"is 8, quarter turns among them, but images have 64 x 96 pixels"):
        check_orientations("data.orientations", 8, (64, 96))


def test_parts_that_cannot_be_shown_are_refused() -> None:
    for zoom in (0.1, 1.5, -1, float("nan")):
        with pytest.raises(ConfigurationError, match=r"data\.zoom is .*: give the smallest part of each side"):
            check_zoom("data.zoom", zoom, 8)
    with pytest.raises(ConfigurationError, match=r"data\.zoom is 0\.6, .* give data\.orientations 2, 4 or 8"):
        check_zoom("data.zoom", 0.6, 1)
    check_zoom("data.zoom", 1.0, 1)


def test_an_evaluated_batch_has_no_more_features_than_a_training_step() -> None:
    assert [evaluated_at_once(16, count) for count in COUNTS] == [16, 8, 4, 2]
    assert evaluated_at_once(4, 8) == 1
