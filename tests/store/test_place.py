"""One place of a store for all ways to write it: one lock, one set of records, one cache, one list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.errors import StoreError
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.lock import lock_store
from fpt_lightning.store.place import is_local, resolve
from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.writing import WritableStore
from small import quiet_trainer, tiny_model
from stores import assert_rows, content, write

SPELLINGS = [
    "{folder}/s.zarr/",
    "{folder}//./s.zarr",
    "{folder}/linked/s.zarr",
    "{folder}/link.zarr",
    "s.zarr",
    "./s.zarr/",
    "~/s.zarr",
    "file://{folder}/s.zarr",
    "file:{folder}/s.zarr",
    "local://{folder}/s.zarr/",
]


@pytest.fixture(params=SPELLINGS)
def spelling(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of ``tmp_path / "s.zarr"``."""
    (tmp_path / "linked").symlink_to(".", target_is_directory=True)
    (tmp_path / "link.zarr").symlink_to("s.zarr", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(request.param).format(folder=tmp_path)


def test_every_spelling_is_one_store(spelling: str, make: Callable[..., FeatureStore], tmp_path: Path) -> None:
    url = str(tmp_path / "s.zarr")
    assert resolve(spelling) == url
    assert resolve(url) == url
    made = make(rows=range(4))
    assert FeatureStore.exists(spelling)
    store = WritableStore.open(spelling)
    assert store.url == made.url == url
    write(store, range(4, 20))
    assert_rows(FeatureStore.open(spelling), range(20))
    store.write([3], content([103]), [FileRecord(1, 2, 3)])
    assert FeatureStore.open(url).records[3, 1] == 1
    WritableStore.delete(spelling)
    assert not FeatureStore.exists(url)


def test_every_spelling_is_one_lock(spelling: str, tmp_path: Path) -> None:
    with lock_store(spelling) as held:
        assert held.name == str(tmp_path / "s.zarr.lock")


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("s3://bucket/a/s.zarr/", "s3://bucket/a/s.zarr"),
        ("s3a://bucket//a/./s.zarr", "s3://bucket/a/s.zarr"),
        ("gcs://bucket/s.zarr", "gs://bucket/s.zarr"),
        ("simplecache::s3://bucket/s.zarr/", "simplecache::s3://bucket/s.zarr"),
        ("sftp://user@host/s.zarr", "sftp://user@host/s.zarr"),
        ("hdfs:///data/s.zarr", "hdfs:///data/s.zarr"),
    ],
)
def test_every_spelling_of_a_url_is_one_place(given: str, canonical: str) -> None:
    assert resolve(given) == resolve(canonical) == canonical
    assert not is_local(canonical)
    assert lock_store(given) is None


def test_no_place() -> None:
    with pytest.raises(StoreError, match=r"\(data\.store\) is empty"):
        resolve("")


def test_a_preload_by_one_spelling_and_a_fit_by_another(
    tiny_data: Callable[..., PreloadedFeatureDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_data(store="./store.zarr/").preload(EncoderConfig("test_vit", pretrained=False))
    data = tiny_data(store=f"file://{tmp_path}/store.zarr")
    quiet_trainer(tmp_path / "run").fit(tiny_model(), data)
    assert data.store is not None
    assert data.url == data.store.url == str(tmp_path / "store.zarr")
    assert sorted(path.name for path in tmp_path.iterdir() if "store" in path.name) == ["store.zarr", "store.zarr.lock"]
