"""The feature store: what is written is read again, what is lost or damaged is noticed, what differs is named."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from fsspec.implementations.memory import MemoryFileSystem

from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.errors import ConfigurationError, StaleStoreError, StoreError
from fpt_lightning.store.codecs import CODECS, Features, check_codec, encode, relative_error
from fpt_lightning.store.damage import check_present
from fpt_lightning.store.index import FileRecord, open_group
from fpt_lightning.store.layout import SHARD
from fpt_lightning.store.specification import FORMAT, FeatureSpecification
from fpt_lightning.store.store import FeatureStore, bytes_per_row
from fpt_lightning.store.writing import WritableStore
from small import SPECIFICATION, write_images
from stores import IDS, SAMPLE_ARRAYS, SHAPE, SIZE, assert_rows, content, shard_file, write

CHANGES: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "weights": "timm:test_vit.r160_in1k",
    "layers": (0, 5),
    "token_ratio": 0.3,
    "criterion": "class_token",
    "resolution": (96, 64),
    "mean": (0.1, 0.2, 0.4),
    "std": (0.4, 0.5, 0.7),
    "statistics": "auto over 7 images 0123",
    "image_size": 256,
    "codec": "fp32",
    "precision": "bf16",
    "orientations": 2,
    "zoom": 0.6,
    "weights_digest": "4567",
    "interpolation": "bilinear",
    "fit": "letterbox",
    "crop_border": True,
    "border": 7,
    "window": "full",
    "value_range": (40.0, 3900.0),
    "range_of": "auto over 7 images 0123",
    "format": 98,
}


# Writing and reading


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_written_is_read(make: Callable[..., FeatureStore], codec: str) -> None:
    store = FeatureStore.open(make(codec).url)
    assert store.specification == replace(SPECIFICATION, codec=codec)
    assert store.made_with == {"torch": "9"}
    assert store.shape == SHAPE
    assert store.ids == tuple(IDS)
    assert store.missing(IDS) == []
    assert_rows(store, range(20))
    check_present(store)


@pytest.mark.parametrize("codec", CODECS)
def test_plain_zarr_reads_the_same(make: Callable[..., FeatureStore], codec: str) -> None:
    store = make(codec)
    group = zarr.open_group(store.url, mode="r")
    arrays = content(range(20), codec)
    checksums = [[google_crc32c.value(array[row].tobytes()) for array in arrays.values()] for row in range(20)]
    files = [[1, 1000 + row, 7, 8] for row in range(20)]
    arrays |= {"row_records": np.column_stack([files, store.owners, checksums])}
    for name, wanted in arrays.items():
        np.testing.assert_array_equal(group[name][:], wanted)
        assert group[name].dtype == wanted.dtype
    assert list(group.attrs["ids"]) == IDS
    assert group.attrs["specification"]["resolution"] == [64, 96]


def test_rows_are_keyed_by_the_whole_id(make: Callable[..., FeatureStore]) -> None:
    store = make()
    assert store.rows["a/003.png"] == 3
    assert store.rows["b/003.png"] == 13
    assert not np.array_equal(store.read([3], "features")[0], store.read([13], "features")[0])


def test_parts_of_a_shard_are_written_at_different_times(make: Callable[..., FeatureStore]) -> None:
    store = make(rows=range(4))
    assert store.missing(IDS) == IDS[4:]
    store = WritableStore.open(store.url)
    write(store, [4, 6, 7, 11, 15, 17])
    assert_rows(FeatureStore.open(store.url), [0, 1, 2, 3, 4, 6, 7, 11, 15, 17])
    store = WritableStore.open(store.url)
    write(store, [5, 8, 9, 10, 12, 13, 14, 16, 18, 19])
    store = FeatureStore.open(store.url)
    assert_rows(store, range(20))
    assert store.missing(IDS) == []
    check_present(store)


def test_an_extended_store_keeps_its_rows(make: Callable[..., FeatureStore]) -> None:
    store = make(ids=IDS[:10], rows=range(10))
    extended = store.extend([*IDS[5:], "c/000.png"])
    assert extended.ids == (*IDS, "c/000.png")
    assert extended.missing(extended.ids) == [*IDS[10:], "c/000.png"]
    write(extended, range(10, 21))
    reopened = FeatureStore.open(store.url)
    assert_rows(reopened, range(21))
    assert WritableStore.open(store.url).extend(IDS).ids == reopened.ids


def test_missing_keeps_the_order_asked(make: Callable[..., FeatureStore]) -> None:
    store = make(rows=range(0, 20, 2))
    assert store.missing(["z.png", "b/003.png", "b/002.png", "a/001.png"]) == ["z.png", "b/003.png", "a/001.png"]


def test_forgotten_samples_are_missing_and_others_stay(make: Callable[..., FeatureStore]) -> None:
    store = make()
    store.forget(["a/003.png", "b/009.png"])
    for again in (store, FeatureStore.open(store.url)):
        assert again.missing(IDS) == ["a/003.png", "b/009.png"]
    assert_rows(store, [2, 4, 18])
    check_present(store)


def test_changed_images_are_those_of_other_content(make: Callable[..., FeatureStore], tmp_path: Path) -> None:
    store = make(rows=[])
    for id in IDS:
        (tmp_path / id).parent.mkdir(exist_ok=True)
        (tmp_path / id).write_bytes(b"content")
    for rows in (range(15), range(17, 20)):
        store.write(rows, content(rows), [FileRecord.of(tmp_path / IDS[row]) for row in rows])
    (tmp_path / IDS[2]).touch()  # a later time, and the same content
    (tmp_path / IDS[3]).write_bytes(b"another size")
    (tmp_path / IDS[4]).unlink()  # an image that is gone has not changed
    (tmp_path / IDS[11]).write_bytes(b"CONTENT")
    (tmp_path / IDS[16]).write_bytes(b"not complete")
    files = ImageFiles.look(tmp_path, IDS)
    assert store.changed(files) == [IDS[3], IDS[11]]
    assert FeatureStore.open(store.url).changed(files) == [IDS[3], IDS[11]]


def test_nothing_is_written_through_a_store_opened_to_read(make: Callable[..., FeatureStore]) -> None:
    url = make(rows=[]).url
    assert not hasattr(FeatureStore.open(url), "write")
    with pytest.raises(ValueError, match="read"):
        write(WritableStore(url, open_group(url)), [0])


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        ("fp16", 2 * 2 * 3 * 4 * 6 * 2),
        ("fp32", 2 * 2 * 3 * 4 * 6 * 4),
        ("int8", 2 * 2 * 3 * 4 * (6 + 2)),  # a scale a token
        (
            "int4",
            2 * 2 * 3 * 4 * 3 + 2 * 3 * (6 * 2 * 2 + 4 * 2 * 2),
        ),  # scale and offset a key's channel, a value's token
    ],
)
def test_the_bytes_announced_are_those_on_the_disk(make: Callable[..., FeatureStore], codec: str, size: int) -> None:
    store = make(codec, ids=IDS[:SHARD], rows=range(SHARD))
    announced = bytes_per_row(codec, SHAPE, SIZE)
    assert (
        announced
        == store.bytes_per_row
        == size + 2 * 3 * 4 * 4 + 18 * 4 + SIZE * SIZE * 3 + 8 * (5 + len(store.sample_arrays))
    )
    files = [file for file in Path(store.url).rglob("*") if file.is_file() and file.name != "zarr.json"]
    arrays = len(store.sample_arrays)
    overhead = arrays * SHARD * 4 + arrays * (16 * SHARD + 4) + 4  # checksums, the shards' indices, the records'
    assert sum(file.stat().st_size for file in files) == SHARD * announced + overhead


# Lost and damaged data


@pytest.mark.parametrize("name", SAMPLE_ARRAYS)
@pytest.mark.parametrize("shard", [0, 1])
def test_a_deleted_shard_is_noticed(make: Callable[..., FeatureStore], name: str, shard: int) -> None:
    store = make()
    shard_file(store.url, name, shard).unlink()
    with pytest.raises(StoreError, match=rf"s\.zarr has lost the {name} of {IDS[16 * shard]}.*rebuild"):
        check_present(FeatureStore.open(store.url))


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
@pytest.mark.parametrize("name", SAMPLE_ARRAYS)
def test_a_truncated_shard_is_noticed(make: Callable[..., FeatureStore], name: str, share: float) -> None:
    store = make()
    file = shard_file(store.url, name, 0)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(StoreError, match=f"lost the {name} of a/000.png"):
        check_present(FeatureStore.open(store.url))


def test_a_sample_lost_from_a_shard_is_noticed(make: Callable[..., FeatureStore]) -> None:
    """A shard of an earlier copy of the store: whole, but without its last samples."""
    store = make(rows=range(4))
    file = shard_file(store.url, "features", 0)
    earlier = file.read_bytes()
    write(store, range(4, 20))
    file.write_bytes(earlier)
    with pytest.raises(StoreError, match=r"lost the features of a/004\.png"):
        check_present(FeatureStore.open(store.url))


@pytest.mark.parametrize("lists", [True, False])
def test_shards_far_away_are_listed_and_not_read(
    make: Callable[..., FeatureStore], monkeypatch: pytest.MonkeyPatch, lists: bool
) -> None:
    """Or each is asked for, where a server lists nothing."""
    memory = fsspec.filesystem("memory")
    memory.put(make().url, "/far.zarr", recursive=True)
    try:
        store, reads = FeatureStore.open("memory://far.zarr"), list[str]()
        monkeypatch.setattr(store, "present", lambda name, shard: reads.append(name) or np.ones(SHARD, bool))
        if not lists:
            monkeypatch.setattr(MemoryFileSystem, "find", None)
        check_present(store)
        assert reads == ([] if lists else [name for name in SAMPLE_ARRAYS for _ in range(2)])
        monkeypatch.undo()
        memory.rm("/far.zarr/pooled/c/1", recursive=True)
        if not lists:
            monkeypatch.setattr(MemoryFileSystem, "find", None)
        with pytest.raises(StoreError, match=r"lost the pooled of b/006\.png \(shard 1\)"):
            check_present(FeatureStore.open("memory://far.zarr"))
    finally:
        monkeypatch.undo()
        memory.rm("/far.zarr", recursive=True)


def test_shards_without_a_complete_sample_may_be_absent(make: Callable[..., FeatureStore]) -> None:
    store = make(rows=range(SHARD))
    assert not (Path(store.url) / "features/c/1").exists()
    check_present(store)


@pytest.mark.parametrize("reopen", [False, True])
def test_zeros_are_data(make: Callable[..., FeatureStore], reopen: bool) -> None:
    """A black image, or one token a head that is always the first: Zarr leaves such chunks out unless it is told to."""
    store = make(rows=[0])
    store = WritableStore.open(store.url) if reopen else store
    store.write([1], {name: np.zeros_like(array) for name, array in content([1]).items()}, [FileRecord(1001, 7, 8)])
    store = FeatureStore.open(store.url)
    assert not any(store.read([1], name)[0].any() for name in SAMPLE_ARRAYS)
    check_present(store)


@pytest.mark.parametrize("name", SAMPLE_ARRAYS)
def test_a_flipped_bit_is_noticed_on_reading(make: Callable[..., FeatureStore], name: str) -> None:
    store = make()
    file = shard_file(store.url, name, 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 4] ^= 1
    file.write_bytes(content)
    damaged = (
        len(content) // 4 * SHARD // (len(content) - 16 * SHARD - 4)
    )  # in a shard, chunks lie in the order of rows
    with pytest.raises(StoreError, match=rf"{store.url} cannot give the {name} of {IDS[damaged]}: ") as error:
        store.read([damaged], name)[0]
    assert error.value.__cause__ is not None
    assert_rows(store, [row for row in range(20) if row != damaged])


def test_truncated_records_name_their_samples(make: Callable[..., FeatureStore]) -> None:
    store = make()
    file = Path(store.url) / "row_records/c/1/0"
    file.write_bytes(file.read_bytes()[:3])
    with pytest.raises(StoreError, match=r"records of b/006.png and of 3 more in the feature store .*s\.zarr.*repair"):
        FeatureStore.open(store.url)
    assert FeatureStore.open(store.url, tolerant=True).missing(IDS) == IDS[16:]


# Opening, creating, deleting


def test_nothing_is_created_over_something(make: Callable[..., FeatureStore], tmp_path: Path) -> None:
    store = make()
    with pytest.raises(StoreError, match=r"something at .*s\.zarr already"):
        WritableStore.create(store.url, SPECIFICATION, SHAPE, {})
    assert_rows(FeatureStore.open(store.url), range(20))


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    url = str(tmp_path / "none.zarr")
    assert not FeatureStore.exists(url)
    with pytest.raises(StoreError, match=f"there is no feature store at {url}"):
        FeatureStore.open(url)


def test_whether_a_store_exists(make: Callable[..., FeatureStore]) -> None:
    url = make(rows=[]).url
    assert FeatureStore.exists(url)
    assert FeatureStore.exists(f"file://{url}")
    assert_rows(WritableStore.open(f"file://{url}"), [])


def foreign_group(folder: Path) -> str:
    zarr.open_group(str(folder / "foreign.zarr"), mode="w").create_array("features", shape=(1,), dtype="f4")
    return str(folder / "foreign.zarr")


def foreign_array(folder: Path) -> str:
    zarr.create_array(str(folder / "array.zarr"), shape=(1,), dtype="f4")
    return str(folder / "array.zarr")


def foreign_folder(folder: Path) -> str:
    (folder / "images").mkdir()
    (folder / "images/1.png").touch()
    return str(folder / "images")


def broken_metadata(folder: Path) -> str:
    (folder / "broken.zarr").mkdir()
    (folder / "broken.zarr/zarr.json").write_text("{")
    return str(folder / "broken.zarr")


@pytest.mark.parametrize("build", [foreign_group, foreign_array, foreign_folder, broken_metadata])
def test_what_is_no_store_is_neither_opened_nor_deleted(tmp_path: Path, build: Callable[[Path], str]) -> None:
    url = build(tmp_path)
    for action in (FeatureStore.open, WritableStore.delete):
        with pytest.raises(StoreError, match=url):
            action(url)
    assert Path(url).exists()


def tamper(store: FeatureStore, change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(store.url) / "zarr.json"
    content = json.loads(path.read_text())
    change(content["attributes"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda attributes: attributes["specification"].update(token_ratio=0.5), ["fingerprint", "rebuild"]),
        (lambda attributes: attributes.update(fingerprint="0"), ["fingerprint", "rebuild"]),
        (lambda attributes: attributes.pop("fingerprint"), ["fingerprint", "rebuild"]),
        (lambda attributes: attributes["specification"].update(format=99), ["format 99", f"reads {FORMAT}", "rebuild"]),
        (lambda attributes: attributes["specification"].pop("codec"), ["the specification has the fields"]),
        (lambda attributes: attributes["specification"].update(more=1), ["more", "are expected"]),
        (lambda attributes: attributes.pop("specification"), ["is not a feature store", "specification"]),
        (lambda attributes: attributes.update(specification="x"), ["is not a feature store"]),
        (lambda attributes: attributes.pop("ids"), ["fingerprint", "rebuild"]),
        (lambda attributes: attributes["ids"].reverse(), ["fingerprint", "rebuild"]),
    ],
)
def test_a_store_with_other_attributes(
    make: Callable[..., FeatureStore], change: Callable[[dict[str, Any]], Any], words: list[str]
) -> None:
    store = make()
    tamper(store, change)
    with pytest.raises(StoreError) as error:
        FeatureStore.open(store.url)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_a_store_without_one_of_its_arrays(make: Callable[..., FeatureStore]) -> None:
    store = make()
    (Path(store.url) / "indices/zarr.json").unlink()
    with pytest.raises(StoreError, match=r"array indices of the feature store.*damaged or gone"):
        FeatureStore.open(store.url)


def test_delete(make: Callable[..., FeatureStore], tmp_path: Path) -> None:
    url = make().url
    WritableStore.delete(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda attributes: attributes["specification"].update(format=99),
        lambda attributes: attributes["specification"].update(token_ratio=0.5),
    ],
    ids=["format", "fingerprint"],
)
def test_a_store_that_must_be_rebuilt_can_be_deleted(
    make: Callable[..., FeatureStore], change: Callable[[dict[str, Any]], Any]
) -> None:
    """``preload --overwrite true``, which the errors ask for, deletes it first."""
    store = make()
    tamper(store, change)
    WritableStore.delete(store.url)
    assert not Path(store.url).exists()


def test_a_remote_store_is_not_deleted(far: str) -> None:
    with pytest.raises(StoreError, match=f"{far} is remote"):
        WritableStore.delete(far)
    assert FeatureStore.exists(far)


# Far away, with copies near by

SHARD_PATH = "features/c/{}/0/0/0/0/0"


@pytest.fixture
def far(make: Callable[..., FeatureStore]) -> Iterator[str]:
    """URL of a complete store in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    memory.put(make().url, "/far.zarr", recursive=True)
    yield "memory://far.zarr"
    memory.rm("/far.zarr", recursive=True)


def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are copied from now on."""
    paths: list[str] = []
    get_file = MemoryFileSystem.get_file

    def counting(self: MemoryFileSystem, source: str, *rest: Any, **named: Any) -> None:
        paths.append(source)
        get_file(self, source, *rest, **named)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counting)
    return paths


def overwrite_byte(url: str, shard: str) -> None:
    path = f"{url.removeprefix('memory:/')}/{shard}"
    memory = fsspec.filesystem("memory")
    content = bytearray(memory.cat_file(path))
    content[3] ^= 1
    memory.pipe_file(path, bytes(content))


def test_a_remote_store_gives_what_a_local_one_does(far: str) -> None:
    assert_rows(FeatureStore.open(far), range(20))


def test_copies_are_made_once(far: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = fetched(monkeypatch)
    for _ in range(2):  # the second store finds the copies of the first
        assert_rows(FeatureStore.open(far, cache=str(tmp_path / "cache")), range(20))
    assert len(paths) == len(set(paths)) == 2 * len(SAMPLE_ARRAYS)


def test_a_copy_of_a_shard_that_was_written_again_is_replaced(far: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    FeatureStore.open(far, cache=str(cache)).read([0], "features")
    (first,) = cache.rglob("features*")
    WritableStore.open(far).write([0], content([16]), [FileRecord(1, 2, 3)])
    found = FeatureStore.open(far, cache=str(cache)).read([0], "features")
    np.testing.assert_array_equal(found, content([16])["features"])
    (second,) = cache.rglob("features*")
    assert first != second


def test_a_damaged_copy_is_made_again(far: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    FeatureStore.open(far, cache=str(cache)).read([0], "features")
    (copy,) = cache.rglob("features*")
    damaged = bytearray(copy.read_bytes())
    damaged[3] ^= 1
    copy.write_bytes(damaged)
    assert_rows(FeatureStore.open(far, cache=str(cache)), [0])


def test_damage_at_the_source_is_named(far: str, tmp_path: Path) -> None:
    overwrite_byte(far, SHARD_PATH.format(0))
    with pytest.raises(StoreError, match=rf"{far} cannot give the features of a/000.png"):
        FeatureStore.open(far, cache=str(tmp_path / "cache")).read([0], "features")


def test_a_copy_that_was_cut_off_is_none(far: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"

    def half(self: MemoryFileSystem, source: str, target: str, **named: Any) -> None:
        Path(target).write_bytes(self.cat_file(source)[:100])
        raise OSError("No space left on device")

    store = FeatureStore.open(far, cache=str(cache))
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", half)
        with pytest.raises(StoreError, match=r"features/c/0.*cannot be copied to .*\(data.cache\).*No space left"):
            store.read([0], "features")
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert_rows(store, [0])


def test_a_shard_that_vanished_is_named(far: str, tmp_path: Path) -> None:
    store = FeatureStore.open(far, cache=str(tmp_path / "cache"))
    fsspec.filesystem("memory").rm("/far.zarr/pooled/c/1", recursive=True)
    with pytest.raises(StoreError, match=r"pooled/c/1/0 of the feature store memory://far.zarr cannot be copied"):
        store.read([17], "pooled")


def test_copies_cannot_be_kept_in_a_file(far: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StoreError, match=r"copies of memory://far.zarr cannot be kept in .*cache \(data.cache\)"):
        FeatureStore.open(far, cache=str(tmp_path / "cache"))


# Specifications


def test_a_specification_survives_json() -> None:
    again = FeatureSpecification.from_dict(json.loads(json.dumps(SPECIFICATION.to_dict())))
    assert again == SPECIFICATION


def test_every_field_can_differ() -> None:
    assert set(CHANGES) == {field.name for field in fields(FeatureSpecification)}
    changed = {json.dumps(replace(SPECIFICATION, **{name: value}).to_dict()) for name, value in CHANGES.items()}
    assert len(changed | {json.dumps(SPECIFICATION.to_dict())}) == len(CHANGES) + 1


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("statistics", "border", "weights")])
def test_each_difference_is_named_with_both_values(name: str) -> None:
    asked = replace(SPECIFICATION, **{name: CHANGES[name]})
    own = "full" if name == "value_range" else repr(getattr(SPECIFICATION, name))
    line = f"{name}: {own}, asked for {CHANGES[name]!r}"
    assert SPECIFICATION.differences(asked) == [line]
    assert SPECIFICATION.differences(asked, ignore=[name]) == []


def test_how_a_border_is_found_counts_where_it_is_cut_off() -> None:
    assert SPECIFICATION.differences(replace(SPECIFICATION, border=7)) == []
    cut = replace(SPECIFICATION, crop_border=True)
    assert cut.differences(replace(cut, border=7)) == ["border: 2, asked for 7"]


def test_a_specification_of_an_earlier_version_is_read() -> None:
    added = ("border", "window", "value_range", "range_of")
    earlier = {k: v for k, v in SPECIFICATION.to_dict().items() if k not in added}
    assert FeatureSpecification.from_dict(earlier) == replace(SPECIFICATION, border=1)


def test_no_difference() -> None:
    assert SPECIFICATION.differences(replace(SPECIFICATION)) == []


AUTO = "auto over 7 images 0123"


@pytest.mark.parametrize(
    ("stored", "asked", "differing"),
    [
        ("given", "given", ["mean"]),
        (AUTO, "given", ["mean"]),  # numbers count, wherever they came from
        (AUTO, AUTO, []),
        (AUTO, "auto over 8 images 4567", ["statistics"]),
        ("given", AUTO, ["statistics"]),
    ],
)
def test_normalisation_is_compared_by_what_is_asked(stored: str, asked: str, differing: list[str]) -> None:
    made = replace(SPECIFICATION, statistics=stored)
    mean: tuple[float, ...] = () if asked.startswith("auto") else (0.9, 0.9, 0.9)
    found = made.differences(replace(SPECIFICATION, statistics=asked, mean=mean))
    assert [line.split(":")[0] for line in found] == differing
    if asked == "given":
        assert made.differences(replace(SPECIFICATION, statistics="given")) == []


def test_digests_are_compared_where_both_are_known() -> None:
    unknown, other = replace(SPECIFICATION, weights_digest=""), replace(SPECIFICATION, weights_digest="4567")
    assert SPECIFICATION.differences(unknown) == unknown.differences(SPECIFICATION) == []
    assert SPECIFICATION.differences(other) == ["weights_digest: '0123', asked for '4567'"]


def test_weights_are_told_by_their_digest_and_by_their_name_where_one_is_unknown() -> None:
    renamed = replace(SPECIFICATION, weights="sha256:89ab")
    assert SPECIFICATION.differences(renamed) == []
    for unloaded in (replace(renamed, weights_digest=""), renamed):
        stored = replace(SPECIFICATION, weights_digest="" if unloaded is renamed else SPECIFICATION.weights_digest)
        assert stored.differences(unloaded) == ["weights: 'random', asked for 'sha256:89ab'"]


def test_a_stale_store_names_every_field_and_the_rebuild(make: Callable[..., FeatureStore]) -> None:
    store = make()
    names = [name for name in CHANGES if name not in ("statistics", "border", "value_range")]  # by range_of
    with pytest.raises(StaleStoreError) as error:
        store.require(replace(SPECIFICATION, **{name: CHANGES[name] for name in names}), "REBUILD COMMAND")
    message = str(error.value)
    assert store.url in message
    assert "REBUILD COMMAND" in message
    assert "data.store" in message
    for name in names:
        assert f"{name}: {getattr(SPECIFICATION, name)!r}, asked for {CHANGES[name]!r}" in message
    assert "To keep its normalisation" not in message
    store.require(SPECIFICATION, "")


def test_other_training_images_name_the_numbers_that_keep_the_store(make: Callable[..., FeatureStore]) -> None:
    with pytest.raises(StaleStoreError) as error:
        make().require(replace(SPECIFICATION, statistics=AUTO, mean=(), std=()), "R")
    assert "data.mean [0.1, 0.2, 0.3] and data.std [0.4, 0.5, 0.6]" in str(error.value)


# Codecs


def features_of(values: Sequence[float]) -> torch.Tensor:
    """One image a value, which is its last number."""
    features = torch.zeros(len(values), 2, 3, 3, 4, 6)
    features[:, -1, -1, -1, -1, -1] = torch.tensor(values)
    return features


@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_the_error_is_relative_to_the_median_channel_to_the_bit(channels: int) -> None:
    """That of ``nanmedian``, which a GPU refuses where it must be deterministic; degenerate channels included."""
    generator = torch.Generator().manual_seed(channels)
    features = torch.randn(50, 2, 2, 2, 3, channels, generator=generator)
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e-20, 1.0, 1.0])
    features[20:] = odd[torch.randint(7, (30, 2, 2, 2, 1, channels), generator=generator)]
    features[13:20] = odd.view(-1, 1, 1, 1, 1, 1)
    squares = features.square().mean(-2)
    typical = squares.where(squares != 0, torch.nan).nanmedian(-1).values
    error = features.square().mean((-2, -1))
    expected = error.where(error == 0, error / typical).sqrt()
    found = relative_error(features, Features(torch.zeros_like(features)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("codec", "values"), [("fp16", [1.0, -65504.0]), ("fp32", [1e30, 1e-30])], ids=["fp16", "fp32"]
)
def test_values_within_range_are_encoded(codec: str, values: list[float]) -> None:
    encoded = encode(features_of(values), replace(SPECIFICATION, codec=codec), ["1", "2"])
    assert list(encoded) == ["features"]
    features = encoded["features"]
    assert features.dtype == {"fp16": np.float16, "fp32": np.float32}[codec]
    np.testing.assert_array_equal(features, features_of(values).numpy().astype(features.dtype))


@pytest.mark.parametrize(
    ("codec", "value", "words"),
    [
        ("fp16", 70000.0, ["fp16", "70000", "use codec fp32"]),
        ("fp16", -1e6, ["fp16", "1e+06", "use codec fp32"]),
        ("int8", 1e7, ["int8", "1e+07", "use codec fp32."]),
        ("int4", 1e6, ["int4", "1e+06", "use codec fp32 or int8."]),
        ("fp16", float("nan"), ["NaN or Inf"]),
        ("fp32", float("nan"), ["NaN or Inf"]),
        ("fp32", float("inf"), ["NaN or Inf"]),
        ("int8", float("nan"), ["NaN or Inf"]),
        ("int4", float("-inf"), ["NaN or Inf"]),
    ],
)
def test_values_that_do_not_fit_name_the_image(codec: str, value: float, words: list[str]) -> None:
    with pytest.raises(StoreError) as error:
        encode(
            features_of([1.0, value, value]),
            replace(SPECIFICATION, codec=codec),
            ["/x/1.png", "/x/2.png", "/x/3.png"],
        )
    assert "/x/2.png" in str(error.value)
    assert "values of block 5, head 2, of test_vit" in str(error.value)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_outliers_that_break_a_codec_name_the_encoder(part: str) -> None:
    """One channel of one head is far larger than the others, for all tokens: a scale a token has no room for both."""
    features = torch.randn(2, 2, 3, 3, 50, 6, generator=torch.Generator().manual_seed(0))
    specification = replace(SPECIFICATION, codec="int8")
    encode(features, specification, ["1", "2"])
    features[1, ["keys", "values"].index(part), 1, 2, :, 3] += 1000
    with pytest.raises(StoreError, match=rf"2 do not fit int8: {part} of block 4, head 2, of test_vit \(.*use codec"):
        encode(features, specification, ["1", "2"])
    encode(features, replace(specification, codec="fp16"), ["1", "2"])
    if part == "keys":
        encode(features, replace(specification, codec="int4"), ["1", "2"])  # its keys have a scale a channel


def test_an_unknown_codec() -> None:
    with pytest.raises(ConfigurationError, match="codec is 'int2': choose one of fp32, fp16, int8, int4"):
        check_codec("int2")
    with pytest.raises(ConfigurationError, match="a head has 5 channels: use int8"):
        check_codec("int4", head_dim=5)


# The benchmark


def test_the_codec_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small encoders, one of which was fine-tuned and one of which has outliers that 4 bits cannot hold."""
    benchmark = importlib.import_module("store_codecs")
    monkeypatch.setattr("environment.RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "NATIVE", 64)
    monkeypatch.setattr(benchmark, "ENCODERS", {"tiny, fine-tuned": "test_vit", "tiny, outliers put in": "test_vit"})
    write_images(tmp_path / "images", {"a": 12, "b": 12})
    small = ["--resolution", "64", "--epochs", "1", "--tuning-epochs", "1", "--seeds", "2"]
    benchmark.main(["--data", str(tmp_path / "images"), "--out", str(tmp_path / "out"), *small])
    rows = json.loads((tmp_path / "store_codecs.json").read_text())["rows"]
    assert [(row["encoder"], row["codec"]) for row in rows] == [
        (name, codec) for name in benchmark.ENCODERS for codec in CODECS
    ]
    own = {row["codec"]: row for row in rows[:4]}
    assert own["fp32"]["keys"] == own["fp32"]["logits"] == own["fp32"]["changed"] == 0
    for measure in ("keys", "values", "prompts", "logits"):
        assert 0 < own["fp16"][measure] < own["int8"][measure] < own["int4"][measure]
    assert all(len(row["trained_auc"]) == 2 for row in own.values())
    assert "| tiny, fine-tuned | int8 |" in (tmp_path / "store_codecs.md").read_text()
