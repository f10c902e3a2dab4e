"""A store in an object storage: filled, trained from, verified and repaired; whatever the storage does is one error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
import torch
from torch.utils.data import DataLoader, Dataset

from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.cli import main
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.errors import StoreError
from fpt_lightning.store.damage import check_present, forget_damaged, verify
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.preload import FrozenPass
from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.writing import WritableStore
from object_storage import ObjectStorage, object_storage
from small import SPECIFICATION, quiet_trainer, tiny_model
from stores import IDS, SAMPLE_ARRAYS, SHAPE, assert_rows, content, write

ENCODER = EncoderConfig("test_vit", pretrained=False)
REMEDY = "check the network, the endpoint, the bucket and the credentials"


@pytest.fixture(scope="module")
def storage() -> Iterator[ObjectStorage]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with object_storage() as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # no look for credentials elsewhere
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(s3fs.S3FileSystem, "retries", 2)
        for name, value in started.environment.items():
            patch.setenv(name, value)
        started.make_bucket("bucket")
        yield started


@pytest.fixture
def bucket(storage: ObjectStorage, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty folder."""
    yield f"s3://bucket/{abs(hash(request.node.nodeid))}"
    storage.delay, storage.refusal = 0.0, lambda method, path: None


@pytest.fixture
def url(bucket: str) -> str:
    """Of a complete store."""
    store = WritableStore.create(f"{bucket}/s.zarr", SPECIFICATION, SHAPE, {}).extend(IDS)
    write(store, range(20))
    return store.url


def flip(url: str, shard: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(f"{url}/{shard}")
    content = bytearray(filesystem.cat_file(path))
    content[3] ^= 1
    filesystem.pipe_file(path, bytes(content))


def test_what_was_written_is_read_and_verified(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = FeatureStore.open(url + "/")
    assert_rows(store, range(20))
    check_present(store)
    store.load(["pooled"])
    np.testing.assert_array_equal(store.read([19, 3], "pooled"), content([19, 3])["pooled"])
    main(["store", "verify", url])
    assert "is sound: 20 rows were read" in capsys.readouterr().out


def test_damage_is_found_and_repaired(url: str) -> None:
    flip(url, "pooled/c/0/0")
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.copy(f"{path}/images/c/0/0/0/0", f"{path}/images/c/1/0/0/0")
    with pytest.raises(StoreError, match=f"cannot give the pooled of {IDS[0]}: ValueError: its checksum is wrong"):
        FeatureStore.open(url).read([0], "pooled")
    store = WritableStore.open(url, tolerant=True)
    assert {(d.row, d.array) for d in verify(store)} == {(0, "pooled"), *((row, "images") for row in range(16, 20))}
    assert forget_damaged(store) == [IDS[0], *IDS[16:]]
    write(store, [0, *range(16, 20)])
    assert verify(FeatureStore.open(url)) == []
    assert_rows(FeatureStore.open(url), range(20))


class Pooled(Dataset[Any]):
    """Of each row."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, row: int) -> Any:
        return self.store.read([row], "pooled")[0].copy()


def test_worker_processes_read_it(url: str) -> None:
    """Forked ones too, after this process has read it."""
    store = FeatureStore.open(url)
    store.read([0], "pooled")
    batches = list(DataLoader(Pooled(store), batch_size=10, num_workers=1, multiprocessing_context="fork"))
    np.testing.assert_array_equal(torch.cat(batches).numpy(), content(range(20))["pooled"])


@pytest.mark.slow
def test_a_pass_that_was_stopped_goes_on_and_training_reads_it(
    bucket: str, tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FrozenPass.predict_step

    def stopped(self: FrozenPass, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 5:
            raise RuntimeError("stopped")
        return step(self, batch, batch_idx)

    data = tiny_data(store=f"{bucket}/store.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(FrozenPass, "predict_step", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            data.preload(ENCODER)
    assert FeatureStore.open(data.url).done.sum() == SHARD + 4
    far = data.preload(ENCODER)
    near = tiny_data(store=str(tmp_path / "near.zarr")).preload(ENCODER)
    for name in near.sample_arrays:
        np.testing.assert_array_equal(far.read(range(30), name), near.read(range(30), name))
    for settings in ({"num_workers": 0}, {"num_workers": 2}, {"cache": str(tmp_path / "cache")}):
        data = tiny_data(store=f"{bucket}/store.zarr", **settings)
        quiet_trainer(tmp_path / "run").fit(tiny_model(), data)


def test_a_batch_takes_few_requests(url: str, storage: ObjectStorage) -> None:
    store = FeatureStore.open(url)
    store.read_all([0, SHARD], SAMPLE_ARRAYS)  # with the indices of both shards, which stay
    storage.requests.clear()
    read = store.read_all([*range(SHARD), 17, 19], SAMPLE_ARRAYS)
    assert len(storage.requests) == 3 * len(SAMPLE_ARRAYS)  # a whole shard, and two rows apart
    for name, block in content([*range(SHARD), 17, 19]).items():
        np.testing.assert_array_equal(read[name], block)


def test_a_shard_that_was_written_again_is_read_again(url: str) -> None:
    store = FeatureStore.open(url)
    store.read([17], "features")
    again = WritableStore.open(url)
    again.forget(IDS[16:])
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.rm(f"{path}/features/c/1", recursive=True)
    write(again, [18, 19])
    write(again, [16, 17])
    np.testing.assert_array_equal(store.read([17], "features"), content([17])["features"])
    again.write([17], content([117]), [FileRecord(1, 2, 3)])
    with pytest.raises(StoreError, match=f"features of {IDS[17]}: ValueError: it belongs to another row"):
        store.read([17], "features")


# What the storage does


@pytest.mark.slow
def test_requests_that_are_refused_now_and_then_are_repeated(
    bucket: str, storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"max_attempts": 5}}})
    asked = iter(range(10**6))
    storage.refusal = lambda method, path: None if next(asked) % 5 else "503 Slow Down"
    store = WritableStore.create(f"{bucket}/s.zarr", SPECIFICATION, SHAPE, {}).extend(IDS)
    write(store, range(20))
    assert_rows(FeatureStore.open(store.url), [0, 19])


def test_what_is_refused_for_good_is_one_error(url: str, storage: ObjectStorage) -> None:
    """And never damage, which a repair would compute again."""
    reading, writing = FeatureStore.open(url, tolerant=True), WritableStore.open(url)
    storage.refusal = lambda method, path: "403 Forbidden"
    for call in (
        lambda: FeatureStore.open(url),
        lambda: WritableStore.open(url, tolerant=True),
        lambda: reading.read([1], "pooled"),
        lambda: reading.present("pooled", 0),
        lambda: verify(reading),
        lambda: forget_damaged(writing),
    ):
        with pytest.raises(StoreError, match=rf"{url} cannot be read \(PermissionError: .*\): {REMEDY}"):
            call()
    for call in (lambda: write(writing, [3]), lambda: writing.forget(IDS[:1])):
        with pytest.raises(StoreError, match=rf"{url} cannot be written: PermissionError: .* {REMEDY}, and preload"):
            call()
    storage.refusal = lambda method, path: None
    assert verify(FeatureStore.open(url)) == []


@pytest.mark.slow
def test_what_is_refused_again_and_again_is_one_error(url: str, storage: ObjectStorage) -> None:
    store = FeatureStore.open(url)
    storage.refusal = lambda method, path: "503 Slow Down"
    with pytest.raises(StoreError, match=rf"{url} cannot be read \(OSError: .*\): {REMEDY}"):
        store.read([1], "pooled")


def test_a_bucket_that_is_not_there(bucket: str, tiny_data: Callable[..., PreloadedFeatureDataModule]) -> None:
    url = "s3://nowhere/s.zarr"
    with pytest.raises(StoreError, match=f"there is no feature store at {url}"):
        FeatureStore.open(url)
    with pytest.raises(
        StoreError, match=rf"{url} cannot be written: FileNotFoundError: The specified bucket .*{REMEDY}"
    ):
        tiny_data(store=url).preload(ENCODER)


@pytest.mark.slow
def test_a_storage_that_stops(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    with object_storage() as other:
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": other.environment["AWS_ENDPOINT_URL"]})
        other.make_bucket("bucket")
        store = WritableStore.create(f"{bucket}/s.zarr", SPECIFICATION, SHAPE, {}).extend(IDS)
        write(store, range(SHARD))
        assert_rows(store, [3])
    with pytest.raises(StoreError, match=rf"{store.url} cannot be read \(EndpointConnectionError: .*{REMEDY}"):
        store.read([3], "features")
    with pytest.raises(StoreError, match=rf"{store.url} cannot be written: EndpointConnectionError: .*{REMEDY}"):
        write(store, range(SHARD, 20))


@pytest.mark.parametrize(
    ("url", "words"), [("foo://bucket/s.zarr", "Protocol not known: foo"), ("gs://bucket/s.zarr", "install gcsfs")]
)
def test_a_place_that_nothing_here_can_reach(url: str, words: str) -> None:
    with pytest.raises(StoreError, match=f"{url} cannot be reached: .*{words}"):
        FeatureStore.open(url)
