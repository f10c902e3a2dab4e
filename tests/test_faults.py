"""Faults survived: kills, damage, full disks, two writers, broken images, and input that nobody should trust."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import lightning as L
import numpy as np
import pytest
import torch
import yaml
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import quiet_trainer, tiny_model, write_images
from fpt_lightning import FPTPlusModule, PreloadedFeatureDataModule, cli
from fpt_lightning.cli import WholeCheckpoints, main
from fpt_lightning.encoder import EncoderConfig
from fpt_lightning.errors import CheckpointError, DataError, FPTError, StoreError
from fpt_lightning.manifest import read_manifest
from fpt_lightning.preload import FrozenPass
from fpt_lightning.store import SHARD, FeatureStore, lock_store

ENCODER = EncoderConfig("test_vit", pretrained=False)
IDS = [f"{name}/{i:03d}.png" for name in "abc" for i in range(10)]
REAL_TIME = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}

MakeData = Callable[..., PreloadedFeatureDataModule]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fpt_lightning", *map(str, arguments)]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, **options)


def write_config(folder: Path, images: Path, **data: Any) -> Path:
    """Two epochs on small images."""
    content = {
        "trainer": {"accelerator": "cpu", "max_epochs": 3, "enable_progress_bar": False},
        "model": {
            "class_path": "FPTPlusModule",
            "init_args": {"num_classes": 3, "encoder": "test_vit", "pretrained": False, "side_resolution": 32},
        },
        "data": {
            "class_path": "PreloadedFeatureDataModule",
            "init_args": {
                "root": str(images),
                "store": str(folder / "store.zarr"),
                "resolution": 64,
                "image_size": 48,
                "batch_size": 8,
                "mean": [0.4],
                "std": [0.2],
                **data,
            },
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def config(tmp_path: Path, image_root: Path) -> Path:
    return write_config(tmp_path, image_root)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Kills

FORKS = multiprocessing.get_context("forkserver")  # which imports once, and forks for each run
FORKS.set_forkserver_preload(["fpt_lightning.cli"])


def doomed(seconds: float | None, *arguments: str) -> None:
    """Run a command, whose processes are killed some time after its frozen pass or its training has started."""

    def kill() -> None:
        time.sleep(seconds or 0)
        os.killpg(0, signal.SIGKILL)

    def start(*_: Any) -> float:
        if seconds is not None:
            threading.Thread(target=kill, daemon=True).start()
        return 1.0

    class Start(L.Callback):
        on_train_start = staticmethod(start)

    checkpoints = cli._checkpoints
    with pytest.MonkeyPatch.context() as patch:
        if arguments[0] == "preload":
            patch.setattr(FrozenPass, "prepare_data", lambda self: (start(), PREPARE(self)))
        else:
            patch.setattr(cli, "_checkpoints", lambda *given: [Start(), *checkpoints(*given)])
        cli.main(list(arguments))


PREPARE = FrozenPass.prepare_data


def alone(*arguments: Any) -> None:
    os.setsid()
    doomed(*arguments)


def run_doomed(folder: Path, seconds: float | None, *given: object) -> bool:
    """Whether the command was killed."""
    arguments = [str(argument) for argument in given]
    if "ddp" in arguments:  # whose launcher starts the script again for each process
        script = folder / "doomed.py"
        script.write_text(f"import sys, test_faults\ntest_faults.doomed({seconds}, *sys.argv[1:])")
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        code = subprocess.run(
            [sys.executable, str(script), *arguments], start_new_session=True, env={**os.environ, "PYTHONPATH": paths}
        ).returncode
    else:
        process = FORKS.Process(target=alone, args=(seconds, *arguments))
        process.start()
        process.join()
        code = process.exitcode
    assert code == 0 or (code == -signal.SIGKILL and seconds is not None)
    return code != 0


@pytest.mark.parametrize(
    ("kills", "ranks"),
    [
        (3, 1),
        pytest.param(20, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
        pytest.param(20, 2, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_a_preload_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    tmp_path: Path, kills: int, ranks: int
) -> None:
    images = write_images(tmp_path / "images", {"a": 40 * kills, "b": 40, "c": 40})
    config = write_config(tmp_path, images)
    devices = ["--trainer.devices", ranks, *(["--trainer.strategy", "ddp"] if ranks > 1 else [])]
    preload = ["preload", "--config", config, *devices]
    run_doomed(tmp_path, None, *preload, "--data.store", tmp_path / "whole.zarr")
    rng, store, stopped = random.Random(kills + ranks), tmp_path / "store.zarr", 0
    for _ in range(kills):
        stopped += run_doomed(tmp_path, rng.uniform(0, 0.8), *preload)
        if FeatureStore.exists(str(store)):
            FeatureStore.open(str(store)).done.sum()
    run_doomed(tmp_path, None, *preload)
    assert stopped, "no kill came before the end"
    assert files(store) == files(tmp_path / "whole.zarr")


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_a_fit_that_is_killed_and_resumed_ends_as_an_undisturbed_one(config: Path, tmp_path: Path, kills: int) -> None:
    fit = ["fit", "--config", config, "--trainer.max_epochs", 2 + 2 * kills, "--trainer.default_root_dir"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    run_doomed(tmp_path, None, *fit, whole)
    rng, stopped = random.Random(kills), 0

    def resume() -> list[object]:
        """Nothing where the first epoch had no end."""
        if (part / "last.ckpt").exists():
            torch.load(part / "last.ckpt", weights_only=True)
            return ["--ckpt_path", part / "last.ckpt"]
        shutil.rmtree(part, ignore_errors=True)
        return []

    for _ in range(kills):
        stopped += run_doomed(tmp_path, rng.uniform(0.1, 0.6), *fit, part, *resume())
    run_doomed(tmp_path, None, *fit, part, *resume())
    assert stopped, "no kill came before the end"
    assert (part / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    for name in ("last", "best"):
        one, two = (torch.load(run / f"{name}.ckpt", weights_only=True)["state_dict"] for run in (whole, part))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writer = tmp_path / "last.ckpt", WholeCheckpoints()
    writer.save_checkpoint({"epoch": 1}, path)

    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match=r"last.ckpt cannot be written: .*No space left on device"):
        writer.save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_of_a_file_is_removed(tiny_data: MakeData) -> None:
    url = tiny_data().preload(ENCODER).url
    partial = Path(url) / "pooled/c/0/0.0123.partial"
    partial.write_bytes(b"half")
    FeatureStore.open(url, writable=True).forget(IDS[:1])
    tiny_data().preload(ENCODER)
    assert not partial.exists()


# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images, the configuration and the complete store of two shards."""
    folder = tmp_path_factory.mktemp("sound")
    images = write_images(folder / "images", {"a": 10, "b": 10, "c": 10})
    write_config(folder, images)
    PreloadedFeatureDataModule(
        str(images), str(folder / "store.zarr"), resolution=64, mean=[0.4], std=[0.2], image_size=48
    ).preload(ENCODER)
    return folder


def flip(file: Path, position: int, mask: int) -> Callable[[], None]:
    """Change a byte; what is returned changes it back."""
    content = file.read_bytes()
    changed = bytearray(content)
    changed[position] ^= mask
    file.write_bytes(changed)
    return lambda: file.write_bytes(content) and None


def found_damage(url: str) -> list[str]:
    """Samples that ``verify`` names; ``*`` if the store cannot be opened."""
    try:
        store = FeatureStore.open(url, tolerant=True)
    except StoreError:
        return ["*"]
    return [store.source(row)[0] for row, *_ in store.verify()] + ([] if store.extended else ["*"])


def test_every_flipped_byte_is_found_and_named(sound: Path) -> None:
    url, rng = str(sound / "store.zarr"), random.Random(0)
    assert found_damage(url) == []
    everything = sorted(path for path in Path(url).rglob("*") if path.is_file())
    places = [(file, i) for file in everything if file.name == "zarr.json" for i in range(file.stat().st_size)]
    chosen = rng.sample(places, 60)
    chunks = [file for file in everything if file.name != "zarr.json"]
    chosen += [(file := rng.choice(chunks), rng.randrange(file.stat().st_size)) for _ in range(140)]
    for file, position in chosen:
        undo = flip(file, position, 1 << rng.randrange(8))
        found = found_damage(url)
        undo()
        assert found, f"{file} at {position}"
        if file.name == "zarr.json":
            assert found == ["*"]
        else:
            shard = int(file.relative_to(url).parts[2])
            assert set(found) <= set(IDS[shard * SHARD : (shard + 1) * SHARD])
            data = 0 < position < file.stat().st_size - 16 * SHARD - 4
            assert len(found) == 1 or "records" in file.parts or not data
    assert found_damage(url) == []


@pytest.mark.parametrize("how", ["open", "read"])
def test_a_flipped_byte_stops_a_fit(sound: Path, how: str) -> None:
    data = PreloadedFeatureDataModule(
        str(sound / "images"), str(sound / "store.zarr"), resolution=64, mean=[0.4], std=[0.2], image_size=48
    )
    name = {"open": "records/c/1/0", "read": "features/c/1/0/0/0/0/0"}[how]
    undo = flip(sound / "store.zarr" / name, 5, 1)
    try:
        with pytest.raises(StoreError, match=r"b/006\.png|checksum"):
            quiet_trainer(sound / how).fit(tiny_model(), data)
    finally:
        undo()


def test_verify_lists_and_repair_computes_what_is_damaged(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(sound / "store.zarr", tmp_path / "store.zarr")
    config = write_config(tmp_path, sound / "images")
    url = tmp_path / "store.zarr"
    flip(url / "pooled/c/0/0", 260 * 3 + 30, 1)
    flip(url / "images/c/1/0/0/0", url.joinpath("images/c/1/0/0/0").stat().st_size - 10, 1)  # of the index
    with pytest.raises(SystemExit) as stopped:
        main(["store", "verify", str(url)])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a/003.png: pooled: its checksum is wrong"
    assert [line.split(":")[:2] for line in lines[1:-1]] == [[id, " images"] for id in IDS[SHARD:]]
    assert "15 of 30 samples" in lines[-1]
    assert "fpt-lightning store repair --config CONFIG" in lines[-1]
    main(["store", "repair", "--config", str(config)])
    assert "15 samples of" in caplog.text
    assert "preload: 15 of 30 images" in caplog.text
    capsys.readouterr()
    main(["store", "verify", str(url)])
    assert "is sound: 30 rows were read" in capsys.readouterr().out
    repaired, whole = (zarr.open_group(str(folder / "store.zarr"), mode="r") for folder in (tmp_path, sound))
    for name in whole.array_keys():  # a batch of other images rounds differently
        np.testing.assert_allclose(repaired[name][:], whole[name][:], rtol=1e-5, atol=1e-6 if name == "pooled" else 1)
    np.testing.assert_array_equal(repaired["records"][:], whole["records"][:])


def test_repair_of_records_and_of_a_lost_shard(sound: Path, tiny_data: MakeData, tmp_path: Path) -> None:
    shutil.copytree(sound / "store.zarr", tmp_path / "store.zarr")
    url = tmp_path / "store.zarr"
    flip(url / "records/c/1/0", 3, 1)
    shutil.rmtree(url / "indices/c/0")
    assert set(found_damage(str(url))) == set(IDS)
    with pytest.raises(StoreError, match=r"records of b/006\.png to c/009\.png .*store repair"):
        FeatureStore.open(str(url))
    store = tiny_data(root=str(sound / "images")).preload(ENCODER, repair=True)
    assert found_damage(store.url) == []
    assert files(url) == files(sound / "store.zarr")


def test_info(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["store", "info", str(sound / "store.zarr")])
    said = capsys.readouterr().out
    for words in ("test_vit", "int8", "30, of which 30 are complete", "made with torch", "(64, 64)", "array features"):
        assert words.replace("(64, 64)", "[64, 64]") in said
    with pytest.raises(SystemExit) as stopped:
        main(["store", "info", str(sound / "none.zarr")])
    assert stopped.value.code == 2
    assert "there is no feature store at" in capsys.readouterr().err
