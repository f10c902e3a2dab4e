"""The frozen pass: what it stores, what it refuses, and that whatever stops it, the next one goes on."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import zarr
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dicom_files import dataset
from dicom_files import write as write_dicom
from fpt_lightning import ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.data import image_files, images, statistics
from fpt_lightning.data.image_files import short_digest
from fpt_lightning.data.images import read_image
from fpt_lightning.data.orientations import oriented, zoomed
from fpt_lightning.data.statistics import channel_statistics
from fpt_lightning.data.transforms import normalise, stored_copy, unit_pixels
from fpt_lightning.datamodules import preloaded
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.errors import ConfigurationError, DataError, ImageError, StaleStoreError, StoreError
from fpt_lightning.methods.base import in_orientations
from fpt_lightning.store import preload
from fpt_lightning.store.codecs import CODECS
from fpt_lightning.store.damage import check_present, verify
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.preload import FrozenPass, feature_shape
from fpt_lightning.store.specification import FeatureSpecification
from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.writing import WritableStore
from small import quiet_trainer, tiny_model, write_images

ENCODER = EncoderConfig("test_vit", pretrained=False)
IDS = [f"{name}/{i:03d}.png" for name in "abc" for i in range(10)]  # of ``image_root``, in the order of their rows

MakeData = Callable[..., PreloadedFeatureDataModule]


def arrays(url: str) -> dict[str, np.ndarray]:
    """Everything in a store, by plain Zarr."""
    group = zarr.open_group(url, mode="r")
    return {name: group[name][:] for name in group.array_keys()}


def numbers(url: str) -> dict[str, np.ndarray]:
    """What the encoder gave, without the records, whose checksums differ where it rounds differently."""
    return {name: array for name, array in arrays(url).items() if name != "row_records"}


def assert_equal(url: str, reference: dict[str, np.ndarray]) -> None:
    for name, array in arrays(url).items():
        if name == "row_records":  # but the time of change, of other files alike
            array[:, 2] = reference[name][:, 2]
        np.testing.assert_array_equal(array, reference[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of images and of the store of an undisturbed pass over them with the settings of ``tiny_data``."""
    folder = tmp_path_factory.mktemp("undisturbed")
    root = write_images(folder / "images", {"a": 10, "b": 10, "c": 10})
    url = str(folder / "store.zarr")
    PreloadedFeatureDataModule(root=str(root), store=url, resolution=64, mean=[0.4], std=[0.2], image_size=48).preload(
        ENCODER
    )
    return folder


@pytest.fixture(scope="module")
def reference(undisturbed: Path) -> dict[str, np.ndarray]:
    """The store of an undisturbed pass over ``image_root`` with the settings of ``tiny_data``."""
    return arrays(str(undisturbed / "store.zarr"))


@pytest.fixture
def image_root(undisturbed: Path, tmp_path: Path) -> Path:
    """Copies of these images, with their times of change."""
    return Path(shutil.copytree(undisturbed / "images", tmp_path / "images"))


@pytest.fixture
def finished(tiny_data: MakeData, undisturbed: Path, tmp_path: Path) -> MakeData:
    """``tiny_data``, whose store is complete: a copy."""
    shutil.copytree(undisturbed / "store.zarr", tmp_path / "store.zarr")
    return tiny_data


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, image_root: Path) -> Iterator[Counter[str]]:
    """How often the pass has read each image, apart from the one that it measures its speed with."""
    counts: Counter[str] = Counter()

    def counted(path: Path, *asked: Any) -> Any:
        counts[path.relative_to(image_root).as_posix()] += 1
        return read_image(path, *asked)

    monkeypatch.setattr(images, "read_image", counted)
    monkeypatch.setattr(FrozenPass, "_seconds_per_pass", lambda *_: 1.0)
    return counts


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to load weights fails."""

    def fail(*args: Any) -> None:
        raise AssertionError("the encoder was built")

    monkeypatch.setattr(preload, "FrozenEncoder", fail)


# What is stored


def test_features_are_those_of_the_encoder(image_root: Path, tiny_data: MakeData) -> None:
    store = tiny_data(codec="fp32").preload(ENCODER)
    assert store.ids == tuple(IDS)
    encoder = FrozenEncoder(ENCODER, (64, 64))
    for rows in (range(0, 4), range(8, 12), range(16, 20), range(28, 30)):  # batches of the pass, for equal rounding
        images = [read_image(image_root / IDS[row]) for row in rows]
        pixels = torch.stack([unit_pixels(image, (64, 64)) for image in images])
        features, indices, pooled = encoder(normalise(pixels, [0.4] * 3, [0.2] * 3))
        for position, row in enumerate(rows):
            np.testing.assert_array_equal(store.read([row], "features")[0], features[position].numpy())
            np.testing.assert_array_equal(store.read([row], "indices")[0], indices[position].numpy())
            np.testing.assert_array_equal(store.read([row], "pooled")[0], pooled[position].numpy())
            np.testing.assert_array_equal(store.read([row], "images")[0], stored_copy(images[position], 48))
    assert store.specification.weights_digest == encoder.digest
    assert store.specification.resolution == (64, 64)
    assert store.made_with.keys() >= {"torch", "timm", "fpt-lightning", "device"}


def test_a_store_names_the_device_that_made_it(
    tiny_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is not every GPU that is there."""
    trainer = quiet_trainer(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert tiny_data().preload(ENCODER, trainer).made_with["device"] == "cpu"
    assert preload._made_with(torch.device("cuda", 1))["device"] == "GPU cuda:1"


def test_the_size_of_every_image_file_is_stored(image_root: Path, reference: dict[str, np.ndarray]) -> None:
    assert reference["row_records"][:, :2].tolist() == [[1, (image_root / id).stat().st_size] for id in IDS]


def test_a_black_image_is_stored(image_root: Path, tiny_data: MakeData) -> None:
    Image.fromarray(np.zeros((80, 96, 3), np.uint8)).save(image_root / IDS[20])
    store = tiny_data().preload(ENCODER)
    assert not store.read([20], "images")[0].any()
    check_present(store)


@pytest.mark.parametrize("layers", [None, (1, 4)])
@pytest.mark.parametrize("resolution", [(64, 64), (32, 96)])
def test_the_announced_shape_is_the_encoders(layers: tuple[int, ...] | None, resolution: tuple[int, int]) -> None:
    config = EncoderConfig("test_vit", pretrained=False, layers=layers, token_ratio=0.3)
    shape = feature_shape(config, resolution)
    features, indices, pooled = FrozenEncoder(config, resolution)(torch.zeros(1, 3, *resolution))
    assert pooled.shape[1:] == (shape.width,)
    assert features.shape[1:] == (2, shape.layers, shape.heads, shape.tokens, shape.head_dim)
    assert indices.shape[1:] == (shape.layers, shape.heads, shape.tokens)


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_a_codec_codes_what_single_precision_has(tiny_data: MakeData, tmp_path: Path, codec: str) -> None:
    single, coded = (
        numbers(tiny_data(codec=name, store=str(tmp_path / name)).preload(ENCODER).url) for name in ("fp32", codec)
    )
    expected = CODECS[codec].encode(torch.from_numpy(single.pop("features")))
    assert coded.pop("features").dtype == {"fp16": np.float16, "int8": np.int8, "int4": np.uint8}[codec]
    for name, part in expected._asdict().items():
        if name != "features" and part is not None:
            np.testing.assert_array_equal(coded.pop(name), part.numpy())
    for name, array in single.items():
        np.testing.assert_array_equal(coded.pop(name), array)
    assert not coded


@pytest.mark.parametrize(
    ("settings", "precision"), [({"decoding_threads": 3}, "32-true"), ({}, "bf16-mixed")], ids=["threads", "autocast"]
)
def test_threads_and_precision_change_nothing(
    tiny_data: MakeData, tmp_path: Path, settings: dict[str, Any], precision: str, reference: dict[str, np.ndarray]
) -> None:
    data = tiny_data(**settings)
    data.preload(ENCODER, quiet_trainer(tmp_path, precision=precision))
    assert_equal(data.url, reference)


def test_mean_and_std_are_those_of_the_training_images(image_root: Path, tiny_data: MakeData) -> None:
    data = tiny_data(mean="auto", std="auto")
    specification = data.preload(ENCODER).specification
    paths = {split: [image_root / s.id for s in data.read_manifest().split(split)] for split in ("train", "test")}
    assert (specification.mean, specification.std) == channel_statistics(paths["train"], (64, 64))
    assert specification.mean != channel_statistics(paths["train"] + paths["test"], (64, 64))[0]
    assert specification.statistics.startswith("auto over 21 images ")


@pytest.mark.parametrize("given", [False, True])
def test_one_store_serves_every_fold(given: bool, image_root: Path, tiny_data: MakeData, tmp_path: Path) -> None:
    """Mean and std are those of all images but test images that are given, whatever the fold."""
    rows = [f"{id},{id[0]},{'test' if given and id.endswith('9.png') else 'train'}" for id in IDS]
    table, column = tmp_path / "t.csv", "split" if given else "site"
    table.write_text("\n".join([f"image,label,{column}", *rows]))
    settings: dict[str, Any] = {"manifest": str(table), "mean": "auto", "std": "auto", "folds": 3}
    made = tiny_data(**settings, fold=1).preload(ENCODER).specification
    measured = [image_root / id for id in IDS if not (given and id.endswith("9.png"))]
    assert (made.mean, made.std) == channel_statistics(measured, (64, 64))
    assert made.statistics.startswith(f"auto over {len(measured)} images ")
    for fold in (2, 3):
        data = tiny_data(**settings, fold=fold)
        assert data.preload(ENCODER).specification == made
        data.setup("fit")
    with pytest.raises(StaleStoreError, match=f"statistics: 'auto over {len(measured)} images"):
        tiny_data(**settings).preload(ENCODER)  # as test images have a share in them


def test_the_store_of_one_split_serves_every_fold_of_its_images(
    image_root: Path, tiny_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"mean": "auto", "std": "auto", "folds": 3}
    monkeypatch.setattr(statistics, "SAMPLED", 5)
    made = tiny_data(**settings).preload(ENCODER).specification
    for fold in (1, 2):
        data = tiny_data(**settings, fold=fold)
        assert data.preload(ENCODER).specification == made
        data.setup("fit")
    with pytest.raises(StaleStoreError, match="statistics: 'auto over 21 images"):
        tiny_data(**settings, fold=1, split_seed=1).preload(ENCODER)
    anew = tiny_data(**settings, fold=1)
    assert anew.preload(ENCODER, overwrite=True).specification.statistics.startswith("auto over 30 images ")
    write_images(image_root, {"a": 11})
    with pytest.raises(StaleStoreError, match="statistics: 'auto over 30 images"):
        tiny_data(**settings, fold=1).preload(ENCODER)


def test_many_training_images_are_measured_by_a_sample(
    image_root: Path, tiny_data: MakeData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which the store says; one that was measured over all of the same images is as good."""
    auto: dict[str, Any] = {"mean": "auto", "std": "auto"}
    whole = tiny_data(**auto, store=str(tmp_path / "whole.zarr")).preload(ENCODER).specification
    monkeypatch.setattr(statistics, "SAMPLED", 5)
    data = tiny_data(**auto)
    made = data.preload(ENCODER).specification
    paths = [image_root / s.id for s in data.read_manifest().split("train")]
    assert (made.mean, made.std) == channel_statistics(statistics.draw_sample(paths, image_root), (64, 64))
    assert made.mean != whole.mean
    assert made.statistics == f"{whole.statistics}, from 5 of 21"
    live = ImageDataModule(str(image_root), resolution=64, image_size=48, **auto)
    live.setup("fit")
    assert live.computed == (made.mean, made.std)
    assert tiny_data(**auto, store=str(tmp_path / "whole.zarr")).preload(ENCODER).specification == whole
    monkeypatch.setattr(statistics, "SAMPLED", 1000)
    assert tiny_data(**auto).preload(ENCODER).specification == made


# What stopped it does not matter


@pytest.mark.parametrize(("broken", "threads"), [([0], 1), ([2, 9, 29], 2), ([16, 29], 3), (range(8, 12), 2)])
def test_broken_images_are_listed_and_nothing_is_computed_twice(
    image_root: Path,
    tiny_data: MakeData,
    reads: Counter[str],
    reference: dict[str, np.ndarray],
    broken: Sequence[int],
    threads: int,
) -> None:
    paths = [image_root / IDS[row] for row in broken]
    contents = [path.read_bytes() for path in paths]
    for length, path in enumerate(paths, 100):
        path.write_bytes(contents[0][:length])
    data = tiny_data(decoding_threads=threads)
    with pytest.raises(ImageError) as error:
        data.preload(ENCODER)
    assert f"{len(paths)} of 30 images cannot be read" in str(error.value)
    assert not [path for path in paths if str(path) not in str(error.value)]
    stopped = FeatureStore.open(data.url)
    assert stopped.left_out(IDS) == [IDS[row] for row in broken]
    check_present(stopped)
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    reads.clear()
    again = tiny_data(preload_batch_size=len(paths)).preload(ENCODER)
    assert reads == Counter(IDS[row] for row in broken)
    for name, array in numbers(again.url).items():  # batches of other images round differently
        if name != "features":
            np.testing.assert_allclose(array, reference[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_keyboard_interrupt_keeps_what_was_computed(
    tiny_data: MakeData, reads: Counter[str], reference: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, batches = FrozenEncoder.forward, iter(range(100))

    def interrupted(self: FrozenEncoder, images: Tensor) -> Any:
        if next(batches) == 5:  # rows 20 to 23
            raise KeyboardInterrupt
        return forward(self, images)

    data = tiny_data()
    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "forward", interrupted)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            data.preload(ENCODER)
    assert FeatureStore.open(data.url).missing(IDS) == IDS[20:]
    reads.clear()
    tiny_data().preload(ENCODER)
    assert reads == Counter(IDS[20:])
    assert_equal(data.url, reference)


@pytest.mark.parametrize("written", ["features", "images"])
def test_a_shard_that_was_half_written_is_written_again(
    tiny_data: MakeData,
    reads: Counter[str],
    reference: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    written: str,
) -> None:
    """As a killed process or a full disk leaves it: some arrays hold other numbers, and nothing is marked as done."""
    write = WritableStore.write

    def killed(self: WritableStore, rows: Sequence[int], *content: Any) -> None:
        if rows[0] >= SHARD:
            group = zarr.open_group(self.url, mode="r+")
            group[written][rows[0] :] = np.full_like(group[written][rows[0] :], 7)
            raise OSError(28, "No space left on device")
        write(self, rows, *content)

    data = tiny_data()
    with monkeypatch.context() as patch:
        patch.setattr(WritableStore, "write", killed)
        with pytest.raises(OSError, match="No space left"):
            data.preload(ENCODER)
    assert FeatureStore.open(data.url).missing(IDS) == IDS[SHARD:]
    reads.clear()
    tiny_data().preload(ENCODER)
    assert reads == Counter(IDS[SHARD:])
    assert_equal(data.url, reference)


def test_a_store_that_was_only_created_is_filled(
    tiny_data: MakeData, reference: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: WritableStore, ids: Sequence[str]) -> None:
        raise OSError("killed")

    data = tiny_data()
    with monkeypatch.context() as patch:
        patch.setattr(WritableStore, "extend", killed)
        with pytest.raises(OSError, match="killed"):
            data.preload(ENCODER)
    tiny_data().preload(ENCODER)
    assert_equal(data.url, reference)


@pytest.mark.usefixtures("no_encoder")
def test_a_complete_store_is_returned_at_once(
    tiny_data: MakeData, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preload, "FrozenEncoder", FrozenEncoder)
        tiny_data().preload(ENCODER)
    reads.clear()
    assert tiny_data().preload(ENCODER).missing(IDS) == []
    assert not reads


def test_new_images_are_added(image_root: Path, finished: MakeData, reads: Counter[str]) -> None:
    before = arrays(finished().url)
    new = ["a/0005.png", "b/x/010.png", "d/000.png"]  # between the others, in a folder, and of a new class
    for seed, id in enumerate(new):
        write_images((image_root / id).parent.parent, {(image_root / id).parent.name: 0})
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image_root / id)
    store = finished().preload(ENCODER)
    assert reads == Counter(new)
    assert store.ids == (*IDS, *new)
    assert_equal(
        store.url, {name: np.concatenate([array, arrays(store.url)[name][30:]]) for name, array in before.items()}
    )
    assert store.missing(new) == []


@pytest.mark.usefixtures("no_encoder")
def test_removed_images_leave_a_complete_store(image_root: Path, tiny_data: MakeData) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preload, "FrozenEncoder", FrozenEncoder)
        tiny_data().preload(ENCODER)
    (image_root / IDS[3]).unlink()
    assert tiny_data().preload(ENCODER).ids == tuple(IDS)


def test_a_changed_image_is_computed_again(image_root: Path, finished: MakeData, reads: Counter[str]) -> None:
    before = arrays(finished().url)
    Image.fromarray(np.full((50, 50, 3), 9, np.uint8)).save(image_root / IDS[20])
    store = finished().preload(ENCODER)
    assert reads == Counter([IDS[20]])
    after = arrays(store.url)
    assert after["row_records"][20, 1] == (image_root / IDS[20]).stat().st_size
    for name in ("features", "indices", "images"):
        equal = [np.array_equal(old, new) for old, new in zip(before[name], after[name], strict=True)]
        assert [row for row, same in enumerate(equal) if not same] == [20], name
    check_present(store)


def test_each_preload_of_a_data_module_looks_at_the_files(image_root: Path, tiny_data: MakeData) -> None:
    data = tiny_data()
    before = data.preload(ENCODER).records.copy()
    data.setup("fit")
    for value in (9, 8):
        Image.fromarray(np.full((50, 50, 3), value, np.uint8)).save(image_root / IDS[20])
        after = data.preload(ENCODER).records
        assert np.flatnonzero((after != before).any(1)).tolist() == [20]
        data.setup("fit")
        before = after.copy()


def test_a_complete_store_is_opened_and_checked_once(finished: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, checked = list[str](), list[str]()
    opens, checks = FeatureStore.__init__, preloaded.check_present
    monkeypatch.setattr(FeatureStore, "__init__", lambda *args: (opened.append(args[1]), opens(*args))[1])
    monkeypatch.setattr(preloaded, "check_present", lambda store: (checked.append(store.url), checks(store))[1])
    data = finished()
    data.check("fit")
    data.preload(ENCODER)
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    assert opened == checked == [data.url]


def test_a_store_that_was_refused_is_opened_again_when_it_is_mended(finished: MakeData, tmp_path: Path) -> None:
    data = finished()
    shard = tmp_path / "store.zarr/pooled/c/1/0"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(StoreError, match=r"lost the pooled of b/006\.png"):
        data.setup("fit")
    WritableStore.open(data.url).forget(IDS[:1])
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="lacks 1 of 30 samples"):
        data.setup("fit")
    data.preload(ENCODER)
    data.setup("fit")


def test_what_a_store_knows_of_its_images_tells_copies_apart_unread(
    image_root: Path, tiny_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, id in enumerate(IDS):  # all of one size
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image_root / id, format="bmp")
    split = {split: [s.id for s in tiny_data().read_manifest().split(split)] for split in ("train", "val", "test")}
    copies = {split["test"][1]: split["train"][1], split["test"][2]: split["val"][0]}
    shutil.copy(image_root / copies[split["test"][1]], image_root / split["test"][1])
    with pytest.warns(UserWarning, match="1 images are also in another split"):
        tiny_data(allow_overlap=True).preload(ENCODER)
    with monkeypatch.context() as patch:
        patch.setattr("fpt_lightning.data.splits._ends", None)
        patch.setattr("fpt_lightning.data.image_files.file_digest", None)
        with pytest.raises(DataError, match="1 images are also in another split"):
            tiny_data().read_manifest()
    shutil.copy(image_root / copies[split["test"][2]], image_root / split["test"][2])  # which the store does not know
    with pytest.raises(DataError, match="2 images are also in another split"):
        tiny_data().read_manifest()


def test_a_changed_image_that_is_no_longer_in_the_data_set(
    image_root: Path, finished: MakeData, reads: Counter[str]
) -> None:
    rows = [f"{id},{id[0]}" for id in IDS if id != IDS[20]]
    (image_root / "table.csv").write_text("\n".join(["image,label", *rows]))
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(image_root / IDS[20])
    assert finished(manifest="table.csv").preload(ENCODER).missing(IDS[:20]) == []
    assert not reads


# Other settings


@pytest.mark.parametrize(
    ("encoder", "settings", "fields"),
    [
        (
            {"name": "test_vit2", "layers": (3, 4, 5)},
            {},
            ["encoder: 'test_vit', asked for 'test_vit2'"],
        ),
        ({"token_ratio": 0.3}, {}, ["token_ratio: 0.2, asked for 0.3"]),
        ({"layers": (2, 5)}, {}, ["layers: (3, 4, 5), asked for (2, 5)"]),
        ({"criterion": "class_token"}, {}, ["criterion: 'global', asked for 'class_token'"]),
        ({"pretrained": True}, {}, ["weights: 'random', asked for 'timm:test_vit."]),
        ({}, {"resolution": (64, 96)}, ["resolution: (64, 64), asked for (64, 96)"]),
        ({}, {"mean": [0.5]}, ["mean: (0.4, 0.4, 0.4), asked for (0.5, 0.5, 0.5)"]),
        ({}, {"std": [0.1, 0.2, 0.3]}, ["std: (0.2, 0.2, 0.2), asked for (0.1, 0.2, 0.3)"]),
        ({}, {"mean": "auto", "std": "auto"}, ["statistics: 'given', asked for 'auto over 21 images "]),
        ({}, {"image_size": 64}, ["image_size: 48, asked for 64"]),
        ({}, {"codec": "fp32"}, ["codec: 'int8', asked for 'fp32'"]),
        ({"token_ratio": 0.3}, {"codec": "fp32"}, ["token_ratio: 0.2", "codec: 'int8'"]),
    ],
)
def test_a_store_of_other_settings_is_refused(
    finished: MakeData,
    monkeypatch: pytest.MonkeyPatch,
    encoder: dict[str, Any],
    settings: dict[str, Any],
    fields: list[str],
) -> None:
    monkeypatch.setattr(preload, "FrozenEncoder", None)
    config = EncoderConfig(**{"name": "test_vit", "pretrained": False, **encoder})
    with pytest.raises(StaleStoreError) as error:
        finished(**settings).preload(config)
    message = str(error.value)
    assert not [field for field in fields if field not in message], message
    assert message.count("asked for") == len(fields)
    assert finished().url in message
    assert "fpt-lightning preload --config CONFIG --overwrite true" in message


def weights_file(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit").state_dict(), path)
    return str(path)


def test_another_weights_file_is_refused(tiny_data: MakeData, tmp_path: Path) -> None:
    """Its content counts, not its name."""
    first, second = weights_file(tmp_path / "1.safetensors", 1), weights_file(tmp_path / "2.safetensors", 2)
    tiny_data().preload(EncoderConfig("test_vit", pretrained=first))
    shutil.copy(first, tmp_path / "renamed.safetensors")
    tiny_data().preload(EncoderConfig("test_vit", pretrained=str(tmp_path / "renamed.safetensors")))
    with pytest.raises(StaleStoreError, match=r"weights: 'sha256:[0-9a-f]{64}', asked for 'sha256:"):
        tiny_data().preload(EncoderConfig("test_vit", pretrained=second))


def test_other_weights_of_the_same_name_are_refused(finished: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release of timm may initialise, or publish, other numbers under one name."""
    store = WritableStore.open(finished().url)
    store.forget(IDS[:1])

    class OtherWeights(FrozenEncoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.digest = "0123"

    monkeypatch.setattr(preload, "FrozenEncoder", OtherWeights)
    digest = store.specification.weights_digest
    with pytest.raises(StaleStoreError, match=f"weights_digest: '{digest}', asked for '0123'"):
        finished().preload(ENCODER)
    assert FeatureStore.open(store.url).missing(IDS) == IDS[:1]


def test_other_training_images_do_not_silently_change_the_normalisation(image_root: Path, tiny_data: MakeData) -> None:
    auto = {"mean": "auto", "std": "auto"}
    made = tiny_data(**auto).preload(ENCODER).specification
    write_images(image_root, {"a": 20, "b": 20, "c": 20}, seed=1)
    with pytest.raises(StaleStoreError) as error:
        tiny_data(**auto).preload(ENCODER)
    message = str(error.value)
    assert "statistics: 'auto over 21 images" in message
    assert "asked for 'auto over 42 images" in message
    assert f"give data.mean {list(made.mean)} and data.std {list(made.std)}" in message
    kept = tiny_data(mean=list(made.mean), std=list(made.std)).preload(ENCODER)
    assert len(kept.ids) == 60
    assert kept.specification == made


# Refusals


@pytest.mark.usefixtures("no_encoder")
def test_a_resolution_that_the_patches_do_not_divide(tiny_data: MakeData) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.resolution"):
        tiny_data(resolution=72).preload(ENCODER)


def test_no_space_on_the_disk(tiny_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=1000)

    monkeypatch.setattr(preload.shutil, "disk_usage", usage)
    url = str(tmp_path / "new/folder/store.zarr")
    with pytest.raises(StoreError, match=rf"{url} needs 0\.0 GB.*0\.0 GB free.*data\.store.*token_ratio.*codec"):
        tiny_data(store=url).preload(ENCODER)
    assert asked == [tmp_path / "new/folder"]
    assert [path.name for path in asked[0].iterdir()] == ["store.zarr.lock"]


def test_features_out_of_range_name_the_image(
    image_root: Path, tiny_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FrozenEncoder.forward

    def overflowing(self: FrozenEncoder, images: Tensor) -> Any:
        encoded = forward(self, images)
        if len(images) == 2:  # the last batch
            encoded.features[1] *= 1e6
        return encoded

    monkeypatch.setattr(FrozenEncoder, "forward", overflowing)
    data = tiny_data(codec="fp16")
    with pytest.raises(StoreError, match=rf"the features of {image_root / IDS[29]} do not fit fp16.*use codec fp32"):
        data.preload(ENCODER)
    assert FeatureStore.open(data.url).missing(IDS) == IDS[28:]


# What is announced, and who computes what


def test_the_announcement(tiny_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(preload, "rank_zero_info", lines.append)
    monkeypatch.setattr(FrozenPass, "_seconds_per_pass", lambda *_: 20.0)
    url = str(tmp_path / "store.zarr")
    store = tiny_data(image_size=256).preload(ENCODER)
    megabytes = 30 * store.bytes_per_row / 1e6
    (line,) = lines
    assert line.startswith(f"preload: 30 of 30 images through test_vit at 64 x 64 into {url}: {megabytes:.0f} MB ")
    assert "10 min on 1 device" in line
    WritableStore.open(url).forget(IDS[:2])
    tiny_data(image_size=256).preload(ENCODER)
    assert lines[1].startswith("preload: 2 of 30 images")
    assert "about 40 s" in lines[1]


def test_orientations_are_announced_as_parts_of_images(
    tiny_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(preload, "rank_zero_info", lines.append)
    monkeypatch.setattr(FrozenPass, "_seconds_per_pass", lambda *_: 10.0)
    store = tiny_data(orientations=8, image_size=256).preload(ENCODER)
    size = 8 * store.bytes_per_row / 1e6
    assert lines[0].startswith("preload: 30 of 30 images in 8 orientations through test_vit")
    assert f": {30 * size:.0f} MB ({size:.2f} MB an image), about 40 min on" in lines[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_the_shards(tiny_data: MakeData, image_root: Path, tmp_path: Path, world_size: int) -> None:
    write_images(image_root, {"a": 25, "b": 25})
    data = tiny_data()
    arguments = (data.read_manifest(), ENCODER, replace(data.asked(ENCODER), codec="fp16"), data.url, 5)
    first = FrozenPass(*arguments)
    first.trainer = quiet_trainer(tmp_path)
    first.prepare_data()
    shares = []
    for rank in range(world_size):
        frozen_pass = FrozenPass(*arguments)
        frozen_pass.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, num_devices=1)  # type: ignore[assignment]
        frozen_pass.setup("predict")
        batches = [batch.rows for batch in frozen_pass.predict_dataloader()]
        assert all(len(batch) <= 5 and len({row // SHARD for row in batch}) == 1 for batch in batches)
        shares.append([row for batch in batches for row in batch])
        assert shares[-1] == sorted(shares[-1])
    assert sorted(row for share in shares for row in share) == list(range(60))
    shards = [{row // SHARD for row in share} for share in shares]
    assert sum(len(share) for share in shards) == 4
    assert max(len(share) for share in shards) == -(-4 // world_size)


# Writing


def test_a_shard_is_written_beside_the_next_batches(tiny_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is not done before the encoder has had an image of the second."""
    write, step, second = WritableStore.write, FrozenPass.predict_step, threading.Event()

    def waiting(self: WritableStore, rows: Sequence[int], *given: Any) -> None:
        assert rows[0] or second.wait(30)
        write(self, rows, *given)

    def noticed(self: FrozenPass, batch: Any, batch_idx: int) -> Any:
        if batch.rows[0] > SHARD:
            second.set()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(WritableStore, "write", waiting)
    monkeypatch.setattr(FrozenPass, "predict_step", noticed)
    assert not tiny_data().preload(ENCODER).missing(IDS)


def test_an_error_in_writing_ends_the_pass_and_nothing_is_written_after_it(
    tiny_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(self: WritableStore, rows: Sequence[int], *given: Any) -> None:
        tried.append(rows[0])
        raise StoreError("the disk is full")

    monkeypatch.setattr(WritableStore, "write", full)
    with pytest.raises(StoreError, match="the disk is full"):
        tiny_data().preload(ENCODER)
    assert tried == [0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("writing", "decoding"))]


# The benchmarks


def test_the_decoding_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = importlib.import_module("decoding")
    for name, value in {
        "RESULTS": tmp_path,
        "SIZE": (320, 320),
        "DRAWN": 1,
        "RESOLUTION": 64,
        "ENCODER": "test_vit",
    }.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr("environment.RESULTS", tmp_path)
    benchmark.main(["--out", str(tmp_path / "run"), "--images", "30", "--turns", "1", "--threads", "2"])
    result = json.loads((tmp_path / "decoding.json").read_text())
    assert [row["threads"] for row in result["rows"]] == [2]
    assert all(row[way] > 0 for row in result["rows"] for way in ("loader", "processes", "pass"))
    assert (tmp_path / "decoding.md").read_text().count("\n| ") == 2


def test_the_frozen_pass_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small encoder, beside a stand-in that is no more than a linear layer."""
    benchmark = importlib.import_module("frozen_pass")
    monkeypatch.setattr("environment.RESULTS", tmp_path)
    settings = {"RESULTS": tmp_path, "ENCODER": "test_vit", "RESOLUTIONS": (64, 128), "LARGEST": 128}
    for name, value in {**settings, "TIMED": (32, 64, 96), "PREDICTED": (32, 64, 96, 128)}.items():
        monkeypatch.setattr(benchmark, name, value)
    (tmp_path / "published_encoder.py").write_text(
        "import torch\n"
        "class PublishedEncoder(torch.nn.Module):\n"
        "    def __init__(self, resolution):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(resolution, 1000)\n"
        "    @torch.no_grad()\n"
        "    def forward(self, images):\n"
        "        return self.layer(images)\n"
    )
    benchmark.main(["--published", str(tmp_path), "--rounds", "1"])
    result = json.loads((tmp_path / "frozen_pass.json").read_text())
    assert [(row["pass"], row["resolution"]) for row in result["passes"]] == [
        (name, side) for side in (64, 128) for name in ("FPT+", "plain", "published")
    ]
    ours = result["passes"][3]["bytes"]
    assert ours == result["largest"]["bytes"] == result["growth"]["bytes"]["128"]
    assert result["passes"][5]["bytes"] == 4 * (1000 * 129 + 3 * 128 * 128 + 3 * 128 * 1000)
    assert "| 128 | published |" in (tmp_path / "frozen_pass.md").read_text()


# Orientations, and another precision


def turned(root: Path, to: Path, how: Image.Transpose) -> Path:
    for path in root.rglob("*.png"):
        (to / path.parent.relative_to(root)).mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(how).save(to / path.relative_to(root))
    return to


def test_a_store_holds_all_orientations(
    tiny_data: MakeData, image_root: Path, tmp_path: Path, reference: dict[str, np.ndarray]
) -> None:
    data = tiny_data(orientations=8)
    store = data.preload(ENCODER)
    found = arrays(data.url)
    assert len(found["row_records"]) == 240
    ways = {1: Image.Transpose.FLIP_LEFT_RIGHT, 6: Image.Transpose.ROTATE_90}
    wanted = {0: reference}
    for orientation, how in ways.items():
        other = tiny_data(root=str(turned(image_root, tmp_path / how.name, how)), store=str(tmp_path / f"{how}.zarr"))
        other.preload(ENCODER)
        wanted[orientation] = arrays(other.url)
    for orientation, each in wanted.items():
        for name in numbers(data.url):  # batches of other images round differently
            part = found[name][orientation::8]
            np.testing.assert_allclose(part, each[name], rtol=1e-5, atol=1e-7, err_msg=f"{orientation} {name}")
    np.testing.assert_array_equal(found["row_records"][:, 1], np.repeat(reference["row_records"][:, 1], 8))
    assert [store.source(row) for row in (0, 1, 239)] == [(IDS[0], 0), (IDS[0], 1), (IDS[29], 7)]
    assert store.rows[IDS[3]] == 24


@pytest.mark.parametrize("zoom", [1.0, 0.6])
def test_stored_orientations_are_those_that_images_are_evaluated_in(
    zoom: float, tiny_data: MakeData, image_root: Path
) -> None:
    """Tokens and copies of a store; zoomed, they differ far more than by rounding."""
    data = tiny_data(orientations=8, zoom=zoom, codec="fp32")
    store = data.preload(ENCODER)
    image = read_image(image_root / IDS[0])
    pixels = normalise(unit_pixels(image, (64, 64)), [0.4] * 3, [0.2] * 3)
    of = {each: in_orientations({"images": pixels[None]}, 8, each)["images"] for each in (1.0, 0.6)}
    encoder = FrozenEncoder(ENCODER, (64, 64))
    pooled = {each: encoder(images).pooled.numpy() for each, images in of.items()}
    np.testing.assert_allclose(
        store.read(range(8), "pooled"), pooled[zoom], atol=2e-3
    )  # turned, resizing rounds otherwise
    assert (np.abs(pooled[0.6] - pooled[1.0]).max(1) > 1e-2).tolist() == [False] + [True] * 7
    for orientation, copy in enumerate(store.read(range(8), "images")):
        view = oriented(image, orientation)
        np.testing.assert_array_equal(copy, stored_copy(zoomed(view, orientation, zoom), 48))


def test_a_store_that_is_not_zoomed_is_stale(tiny_data: MakeData) -> None:
    tiny_data(orientations=8, zoom=0.6).preload(ENCODER)
    with pytest.raises(StaleStoreError, match=r"zoom: 0\.6, asked for 1\.0"):
        tiny_data(orientations=8).preload(ENCODER)


def test_only_further_orientations_are_zoomed(tiny_data: MakeData) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.zoom is 0\.6.* give data\.orientations 2, 4 or 8"):
        tiny_data(zoom=0.6)


def test_a_store_of_before_there_were_more_is_read(tiny_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    to_dict = FeatureSpecification.to_dict

    def as_before(self: FeatureSpecification) -> dict[str, Any]:
        content = to_dict(self)
        del content["zoom"]
        return {**content, "mirrored": content.pop("orientations") == 2}

    data = tiny_data(orientations=2)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureSpecification, "to_dict", as_before)
        data.preload(ENCODER)
    assert "mirrored" in zarr.open_group(data.url).attrs["specification"]
    again = tiny_data(orientations=2)
    assert again.preload(ENCODER).orientations == 2
    with pytest.raises(StaleStoreError, match="orientations: 2, asked for 1"):
        tiny_data().preload(ENCODER)


def test_an_image_is_read_once_for_all_orientations(tiny_data: MakeData, reads: Counter[str]) -> None:
    tiny_data(orientations=2).preload(ENCODER)
    assert reads == Counter(IDS)


def test_a_preload_of_several_orientations_goes_on_where_it_stopped(
    tiny_data: MakeData, image_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = tiny_data(orientations=2, store=str(tmp_path / "whole.zarr"))
    whole.preload(ENCODER)
    data = tiny_data(orientations=2, preload_batch_size=3)  # a batch ends between the two orientations of a sample
    forward, batches = FrozenEncoder.forward, iter(range(100))

    def interrupted(self: FrozenEncoder, images: Tensor) -> Any:
        if next(batches) == 7:
            raise OSError("the computer is on fire")
        return forward(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "forward", interrupted)
        with pytest.raises(OSError, match="fire"):
            data.preload(ENCODER)
    stopped = FeatureStore.open(data.url)
    assert 0 < stopped.done.sum() < 60
    assert stopped.done.sum() % 2 == 1, "the test wants a sample with one orientation only"
    first = int(np.flatnonzero(~stopped.done)[0]) // 2
    assert stopped.missing(IDS) == IDS[first:]
    data.preload(ENCODER)
    for name, array in numbers(whole.url).items():  # batches of other images round differently
        np.testing.assert_allclose(arrays(data.url)[name], array, rtol=1e-5, atol=1e-7, err_msg=name)


def test_an_orientation_that_was_lost_is_named(tiny_data: MakeData) -> None:
    data = tiny_data(orientations=2)
    store = data.preload(ENCODER)
    shutil.rmtree(Path(data.url) / "pooled/c/3")
    with pytest.raises(StoreError, match=r"lost the pooled of c/004.png \(shard 3\)"):
        check_present(store)
    with pytest.raises(StoreError, match=r"cannot give the pooled of orientation 1 of c/005.png"):
        store.read([51], "pooled")


def test_a_store_of_other_orientations_is_stale(tiny_data: MakeData) -> None:
    tiny_data().preload(ENCODER)
    with pytest.raises(StaleStoreError, match="orientations: 1, asked for 2"):
        tiny_data(orientations=2).preload(ENCODER)


def test_a_store_of_another_precision_is_stale_and_close(
    tiny_data: MakeData, reference: dict[str, np.ndarray], tmp_path: Path
) -> None:
    bf16 = replace(ENCODER, precision="bf16")
    tiny_data().preload(ENCODER)
    with pytest.raises(StaleStoreError, match="precision: 'fp32', asked for 'bf16'"):
        tiny_data().preload(bf16)
    data = tiny_data(store=str(tmp_path / "bf16.zarr"))
    data.preload(bf16)
    pooled = arrays(data.url)["pooled"]
    difference = np.abs(pooled - reference["pooled"]).max() / np.abs(reference["pooled"]).max()
    assert 0 < difference < 0.05


# What training would refuse


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"side_resolution": 64}, {}, "side network's resolution is 64, but the low-resolution copies have 48"),
        ({"num_classes": 4}, {}, "model.num_classes is 4, but the data set .* has 3 classes"),
        ({"task": "ordinal"}, {}, "a, b, c are words"),
        ({}, {"side_resolution": 48}, "data.side_resolution is 48, but model.side_resolution is 32"),
    ],
)
def test_what_training_would_refuse_is_refused_before_the_pass(
    model: dict[str, Any], data: dict[str, Any], message: str, tiny_data: MakeData, no_encoder: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny_data(**data).preload(tiny_model(**model))
    assert not (tmp_path / "store.zarr").exists()


# Notices

PIXELS = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)


def test_images_that_are_not_shown_as_they_ask_are_counted_and_listed(
    image_root: Path, tiny_data: MakeData, tmp_path: Path
) -> None:
    """Of three DICOM files with a window without width; one is preloaded later, and the earlier ones stay listed."""
    for folder in ("a", "c"):
        write_dicom(image_root / folder / "scan.dcm", dataset(PIXELS, WindowCenter=5, WindowWidth=0))
    listed = tmp_path / "store.zarr.notices.csv"

    def preloaded(count: int) -> list[dict[str, str]]:
        with pytest.warns(UserWarning, match=rf"^{count} images are not shown as their files ask: {listed}"):
            tiny_data(decoding_threads=2).preload(ENCODER)
        return list(csv.DictReader(listed.open(newline="")))

    rows = preloaded(2)
    assert [row["image"] for row in rows] == ["a/scan.dcm", "c/scan.dcm"]
    assert all("is 0 wide: its whole range is shown" in row["notice"] for row in rows)
    write_dicom(image_root / "b" / "scan.dcm", dataset(PIXELS, WindowCenter=5, WindowWidth=-3))
    assert [row["image"] for row in preloaded(3)] == ["a/scan.dcm", "b/scan.dcm", "c/scan.dcm"]
    assert [path.name for path in tmp_path.glob("*.notices.csv*")] == ["store.zarr.notices.csv"]


def test_a_pass_that_was_stopped_loses_no_notice(
    image_root: Path, tiny_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard is stored, and its images are not read again; a list that a kill cut off is left alone."""
    for folder in ("a", "c"):
        write_dicom(image_root / folder / "000.dcm", dataset(PIXELS, WindowCenter=5, WindowWidth=0))
    data = tiny_data(preload_batch_size=2)
    real = FrozenPass.predict_step

    def stopped(self: FrozenPass, batch: Any, batch_idx: int) -> Any:
        if batch_idx * 2 > SHARD:
            raise RuntimeError("stopped")
        return real(self, batch, batch_idx)

    monkeypatch.setattr(FrozenPass, "predict_step", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        data.preload(ENCODER)
    (tmp_path / "store.zarr.notices.csv.0.partial").write_text('image,"cut')
    monkeypatch.setattr(FrozenPass, "predict_step", real)
    with pytest.warns(UserWarning, match="^2 images are not shown as their files ask"):
        data.preload(ENCODER)


@pytest.mark.parametrize("orientations", [1, 2])
def test_images_that_were_copied_are_read_once(
    tiny_data: MakeData, image_root: Path, monkeypatch: pytest.MonkeyPatch, orientations: int
) -> None:
    """They have other times of change, which the store takes over when their content is found to be the same."""
    read = list[Path]()

    def counted(path: Path) -> int:
        read.append(path)
        return short_digest(path)

    tiny_data(orientations=orientations).preload(ENCODER)
    for image in image_root.rglob("*.png"):
        os.utime(image, (1, 1))
    monkeypatch.setattr(image_files, "short_digest", counted)
    store = tiny_data(orientations=orientations).preload(ENCODER)
    assert len(read) == 30
    assert not store.missing(IDS)
    tiny_data(orientations=orientations).preload(ENCODER)
    (image_root / IDS[3]).write_bytes((image_root / IDS[4]).read_bytes())
    tiny_data(orientations=orientations, allow_overlap=True).preload(ENCODER)
    assert len(read) < 35  # that one, and what may be its copy
    assert verify(FeatureStore.open(store.url, tolerant=True)) == []
