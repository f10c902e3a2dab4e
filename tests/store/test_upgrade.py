"""A store of format 4 becomes one of format 5 in its place, whatever stops that."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from zarr.storage import LocalStore

from fpt_lightning.cli import main
from fpt_lightning.errors import StoreError
from fpt_lightning.store.damage import verify
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.layout import (
    EARLIER_RECORDS,
    OWNER,
    RECORDS,
    SHARD,
    array_documents,
    create_array,
    fingerprint,
)
from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.upgrade import upgrade
from fpt_lightning.store.writing import WritableStore
from stores import IDS, SAMPLE_ARRAYS, assert_rows, shard_file, write


class KilledError(Exception):
    """In place of the end of the process."""


def files(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def as_format_4(url: str) -> None:
    """The layout of format 4, with the same data."""
    group = zarr.open_group(url)
    records = group[RECORDS][:]
    row = (OWNER,), records.dtype
    create_array(f"{url}/{EARLIER_RECORDS}", EARLIER_RECORDS, len(records), *row)
    group[EARLIER_RECORDS][:] = records[:, :OWNER]
    attributes: dict[str, Any] = group.attrs.asdict()
    attributes["specification"]["format"] = 4
    attributes["arrays"] = array_documents(url, [*SAMPLE_ARRAYS, EARLIER_RECORDS])
    group.attrs.put({**attributes, "fingerprint": fingerprint(attributes)})
    shutil.rmtree(f"{url}/{RECORDS}")


@pytest.fixture
def made(make: Callable[..., FeatureStore]) -> tuple[str, dict[str, bytes]]:
    """A store of format 4 with complete rows, one that was left out and one that is absent; its files in format 5."""
    store = make(rows=[*range(10), *range(12, 20)])
    store.leave_out([11], [FileRecord(5, 6, 7)])
    before = files(store.url)
    as_format_4(store.url)
    return store.url, before


def test_it_is_what_would_have_been_made(
    made: tuple[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, before = made
    with pytest.raises(StoreError, match=rf"the format 4, .* reads 5: .*fpt-lightning store upgrade {url}"):
        FeatureStore.open(url)
    main(["store", "upgrade", url])
    assert capsys.readouterr().out == f"the feature store {url} has the format 5.\n"
    assert files(url) == before
    store = FeatureStore.open(url)
    assert_rows(store, [0, 9, 12, 19])
    assert (store.missing(IDS), store.left_out(IDS)) == ([IDS[10]], [IDS[11]])
    assert verify(store) == []
    main(["store", "upgrade", url])
    assert files(url) == before


def test_whatever_stops_it_another_call_goes_on(
    made: tuple[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, before = made
    earlier, put, left, stop = tmp_path / "earlier", LocalStore.set, 0, 0
    shutil.copytree(url, earlier)

    async def killed(self: LocalStore, key: str, value: Any) -> None:
        nonlocal left
        if left == 0:
            raise KilledError
        left -= 1
        await put(self, key, value)

    while True:
        shutil.rmtree(url)
        shutil.copytree(earlier, url)
        left = stop
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "set", killed)
            try:
                upgrade(url)
                break
            except KilledError:
                pass
        assert json.loads((Path(url) / "zarr.json").read_text())["attributes"]["specification"]["format"] == 4
        kept = files(str(earlier))
        assert {name: content for name, content in files(url).items() if name in kept} == kept
        assert upgrade(url) == []
        assert files(url) == before
        stop += 1
    assert stop == 4  # the array, its two chunks, the attributes


def test_what_was_read_is_not_read_again(made: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, before = made
    read, rows = FeatureStore.read, list[int]()

    def stopping(self: FeatureStore, given: list[int], name: str) -> Any:
        if given[0] >= SHARD and not rows:
            raise KilledError
        rows.extend(given if stopped else [])
        return read(self, given, name)

    monkeypatch.setattr(FeatureStore, "read", stopping)
    stopped = False
    with pytest.raises(KilledError):
        upgrade(url)
    stopped, rows = True, [-1]
    upgrade(url)
    assert set(rows) == {-1, *range(SHARD, 20)}
    assert files(url) == before


def test_earlier_records_are_removed_where_that_was_stopped(made: tuple[str, dict[str, bytes]]) -> None:
    url, before = made
    shutil.copytree(f"{url}/{EARLIER_RECORDS}", f"{url}/kept")
    upgrade(url)
    (Path(url) / "kept").rename(Path(url) / EARLIER_RECORDS)
    FeatureStore.open(url)
    upgrade(url)
    assert files(url) == before


def test_damage_is_named_and_counts_as_absent(
    made: tuple[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = made
    file = shard_file(url, "pooled", 0)
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    (Path(url) / EARLIER_RECORDS / "c/1/0").write_bytes(b"")
    main(["store", "upgrade", url])
    said = capsys.readouterr().out
    assert f"cannot give the pooled of {IDS[0]}: ValueError: its checksum is wrong" in said
    assert f"the record of {IDS[19]} is damaged" in said
    assert "5 rows are damaged and count as absent: compute them again with `fpt-lightning preload`" in said
    store = WritableStore.open(url)
    assert store.missing(IDS) == [IDS[0], IDS[10], *IDS[16:]]
    write(store, [0, 10, *range(16, 20)])
    assert_rows(FeatureStore.open(url), [0, 1, 10, 19])


def test_one_process_upgrades_a_store(made: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    def held(*_: Any) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", held)
    with pytest.raises(StoreError, match="another preload is writing"):
        upgrade(made[0])


@pytest.mark.parametrize("change", [{"format": 3}, {"format": None}, {"token_ratio": 0.5}])
def test_what_cannot_be_upgraded_stays(made: tuple[str, dict[str, bytes]], change: dict[str, Any]) -> None:
    url, _ = made
    path = Path(url) / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["specification"].update(change)
    path.write_text(json.dumps(document))
    before = files(url)
    with pytest.raises(StoreError, match="rebuild it"):
        upgrade(url)
    assert files(url) == before
