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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
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
from PIL import Image
from zarr.storage import LocalStore

from commands import few_figures
from fpt_lightning import FPTPlusModule, ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.cli import main, training
from fpt_lightning.cli.run_folder import WholeCheckpoints
from fpt_lightning.cli.store_info import store_info
from fpt_lightning.data import image_files
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.deployment.checkpoints import read_checkpoint
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.errors import ConfigurationError, DataError, FPTError, OutputError, StoreError
from fpt_lightning.files import file_digest, write_rows
from fpt_lightning.store.damage import verify
from fpt_lightning.store.layout import SHARD, fingerprint
from fpt_lightning.store.lock import lock_store
from fpt_lightning.store.preload import FrozenPass
from fpt_lightning.store.store import FeatureStore
from fpt_lightning.store.writing import WritableStore
from small import SPECIFICATION, quiet_trainer, tiny_model, write_images

ENCODER = EncoderConfig("test_vit", pretrained=False)
IDS = [f"{name}/{i:03d}.png" for name in "abc" for i in range(10)]
FUZZ: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}

MakeData = Callable[..., PreloadedFeatureDataModule]


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
FORKS.set_forkserver_preload(["fpt_lightning.cli.training", "albumentations", "omegaconf", "s3fs"])  # what fit imports


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

    checkpoints = training.checkpoint_callbacks
    with pytest.MonkeyPatch.context() as patch, few_figures() if seconds is None else nullcontext():
        if arguments[0] == "preload":
            patch.setattr(FrozenPass, "prepare_data", lambda self: (start(), PREPARE(self)))
        else:
            patch.setattr(training, "checkpoint_callbacks", lambda *given: [Start(), *checkpoints(*given)])
        main(list(arguments))


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


@pytest.mark.slow
def test_a_rank_without_a_share_ends_as_the_others(config: Path, tmp_path: Path) -> None:
    ddp = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    run_doomed(tmp_path, None, "preload", "--config", config)
    whole = files(tmp_path / "store.zarr")
    WritableStore.open(str(tmp_path / "store.zarr")).forget(IDS[SHARD:])
    assert not run_doomed(tmp_path, None, "preload", "--config", config, *ddp)
    assert files(tmp_path / "store.zarr") == whole


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


def interruptible(*arguments: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored
    main(list(arguments))


def test_ctrl_c_in_a_preload_keeps_what_is_complete(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"a": 28, "b": 10, "c": 10}, size=(400, 400))
    preload = ["preload", "--config", str(write_config(tmp_path, images, preload_batch_size=1, resolution=256))]
    process = FORKS.Process(target=interruptible, args=preload)
    process.start()
    done = tmp_path / "store.zarr" / "row_records" / "c" / "0" / "0"
    while not done.exists() and process.is_alive():
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 1
    store = FeatureStore.open(str(tmp_path / "store.zarr"))
    assert 16 <= store.done.sum() < 48
    main(preload)
    assert FeatureStore.open(str(tmp_path / "store.zarr")).done.sum() == 48


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writer = tmp_path / "last.ckpt", WholeCheckpoints()
    writer.save_checkpoint({"epoch": 1}, path)

    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OutputError, match=r"last.ckpt cannot be written: .*No space left on device"):
        writer.save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_of_a_file_is_removed(tiny_data: MakeData) -> None:
    url = tiny_data().preload(ENCODER).url
    partial = Path(url) / "pooled/c/0/0.0123.partial"
    partial.write_bytes(b"half")
    WritableStore.open(url).forget(IDS[:1])
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
    return [store.source(row)[0] for row, *_ in verify(store)] + ([] if store.extended else ["*"])


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
            assert len(found) == 1 or "row_records" in file.parts or not data
    assert found_damage(url) == []


@pytest.mark.parametrize("how", ["open", "read"])
def test_a_flipped_byte_stops_a_fit(sound: Path, how: str) -> None:
    data = PreloadedFeatureDataModule(
        str(sound / "images"), str(sound / "store.zarr"), resolution=64, mean=[0.4], std=[0.2], image_size=48
    )
    name = {"open": "row_records/c/1/0", "read": "features/c/1/0/0/0/0/0"}[how]
    undo = flip(sound / "store.zarr" / name, 5, 1)
    try:
        with pytest.raises(StoreError, match=r"b/006\.png|checksum"):
            quiet_trainer(sound / how).fit(tiny_model(), data)
    finally:
        undo()


def test_verify_lists_and_repair_computes_what_is_damaged(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], said: pytest.LogCaptureFixture
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
    assert "15 samples of" in said.text
    assert "preload: 15 of 30 images" in said.text
    capsys.readouterr()
    main(["store", "verify", str(url)])
    assert "is sound: 30 rows were read" in capsys.readouterr().out
    repaired, whole = (zarr.open_group(str(folder / "store.zarr"), mode="r") for folder in (tmp_path, sound))
    for name in set(whole.array_keys()) - {"row_records"}:  # a batch of other images rounds differently
        np.testing.assert_allclose(repaired[name][:], whole[name][:], rtol=1e-5, atol=1e-6 if name == "pooled" else 1)
    np.testing.assert_array_equal(repaired["row_records"][:, :5], whole["row_records"][:, :5])


def test_repair_of_records_and_of_a_lost_shard(sound: Path, tiny_data: MakeData, tmp_path: Path) -> None:
    shutil.copytree(sound / "store.zarr", tmp_path / "store.zarr")
    url = tmp_path / "store.zarr"
    flip(url / "row_records/c/1/0", 3, 1)
    shutil.rmtree(url / "indices/c/0")
    assert set(found_damage(str(url))) == set(IDS)
    with pytest.raises(StoreError, match=r"records of b/006\.png and of 13 more .*store repair"):
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


# What the disk and other processes do


@pytest.mark.parametrize("where", ["write", "create", "extend"])
def test_a_full_disk_is_one_error_and_what_was_complete_is_kept(
    tiny_data: MakeData, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    data, put, written = tiny_data(), LocalStore.set, Counter[str]()
    stop = {"create": ("/pooled/zarr.json", 1), "extend": ("/zarr.json", 2), "write": ("/pooled/c/1/0", 1)}[where]

    async def full(self: LocalStore, key: str, value: Any) -> None:
        name = f"{self.root}/{key}".removeprefix(data.url)
        written[name] += 1
        if (name, written[name]) == stop:
            raise OSError(28, "No space left on device")
        await put(self, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "set", full)
        with pytest.raises(StoreError, match=r"store\.zarr cannot be written: No space left on device.*make room"):
            data.preload(ENCODER)
    assert FeatureStore.exists(data.url) == (where != "create")
    if where == "write":
        assert FeatureStore.open(data.url).missing(IDS) == IDS[SHARD:]
    assert found_damage(tiny_data().preload(ENCODER).url) == []


def test_a_file_size_limit_of_the_system_is_one_error(config: Path, tmp_path: Path) -> None:
    limit = FORKS.Process(target=limited, args=(str(config), str(tmp_path / "said")))
    limit.start()
    limit.join()
    assert limit.exitcode == 2
    said = (tmp_path / "said").read_text()
    assert "StoreError: the feature store" in said.splitlines()[-1]
    assert "cannot be written: File too large" in said.splitlines()[-1]
    assert "Traceback" not in said


def limited(config: str, said: str) -> None:
    sys.stderr = open(said, "w")  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    main(["preload", "--config", config])


@pytest.mark.parametrize("store", ["/proc/store.zarr", "/proc/new/store.zarr"])
def test_a_place_that_cannot_be_written_is_one_error(tiny_data: MakeData, store: str) -> None:
    with pytest.raises(StoreError, match=r"/proc.*store\.zarr cannot be written.*another data\.store"):
        tiny_data(store=store).preload(ENCODER)


def test_two_preloads_at_once_are_refused_and_a_crash_leaves_no_lock(tiny_data: MakeData) -> None:
    url = tiny_data().url
    holder = FORKS.Process(target=hold, args=(url, ready := FORKS.Event()))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(StoreError, match=r"another preload is writing the feature store .*store\.zarr"):
        tiny_data().preload(ENCODER)
    assert not FeatureStore.exists(url)
    holder.kill()
    holder.join()
    store = tiny_data().preload(ENCODER)
    holder = FORKS.Process(target=hold, args=(url, ready := FORKS.Event()))
    holder.start()
    assert ready.wait(60)
    assert tiny_data().preload(ENCODER).ids == store.ids  # a complete store is only read
    holder.kill()
    holder.join()


def hold(url: str, ready: Any) -> None:
    lock = lock_store(url)
    ready.set()
    time.sleep(300)
    assert lock is not None


def test_two_fits_share_a_store(sound: Path, tmp_path: Path) -> None:
    fit = ["fit", "--config", str(sound / "config.yaml"), "--trainer.max_epochs", "2", "--trainer.default_root_dir"]
    fits = [FORKS.Process(target=alone, args=(None, *fit, str(tmp_path / name))) for name in "ab"]
    for process in fits:
        process.start()
    for process in fits:
        process.join()
    assert [process.exitcode for process in fits] == [0, 0]
    assert (tmp_path / "a/metrics.json").read_text() == (tmp_path / "b/metrics.json").read_text()


@pytest.mark.parametrize("gone", ["store.zarr", "store.zarr/features/c/1"])
def test_a_store_that_vanishes_in_an_epoch_is_one_error(
    sound: Path, tiny_data: MakeData, tmp_path: Path, gone: str
) -> None:
    shutil.copytree(sound / "store.zarr", tmp_path / "store.zarr")

    class Vanish(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                shutil.rmtree(tmp_path / gone)

    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[Vanish()], limit_val_batches=0)
    with pytest.raises(StoreError, match=r"cannot give the features of .*No such file"):
        trainer.fit(tiny_model(), tiny_data(root=str(sound / "images")))


def test_a_shard_that_vanishes_from_a_remote_store_is_no_zeros(sound: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(sound / "store.zarr"), "/gone.zarr", recursive=True)
    try:
        store = FeatureStore.open("memory://gone.zarr")
        store.read([20], "features")
        memory.rm("/gone.zarr/features/c/1", recursive=True)
        with pytest.raises(StoreError, match=r"features of c/000\.png.*does not hold it"):
            store.read([20], "features")
    finally:
        memory.rm("/gone.zarr", recursive=True)


def test_an_image_replaced_by_one_of_the_same_size_is_computed_again(
    image_root: Path, tiny_data: MakeData, tmp_path: Path
) -> None:
    for seed, id in enumerate(IDS):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image_root / id, format="bmp")
    data = tiny_data()
    before = data.preload(ENCODER).read([5], "images").copy()
    size = (image_root / IDS[5]).stat().st_size
    Image.fromarray(np.full((40, 40, 3), 9, np.uint8)).save(image_root / IDS[5], format="bmp")
    assert (image_root / IDS[5]).stat().st_size == size
    with pytest.raises(StoreError, match=r"1 images have changed since \(a/005\.png\)"):
        quiet_trainer(tmp_path).fit(tiny_model(), tiny_data())
    assert not np.array_equal(tiny_data().preload(ENCODER).read([5], "images"), before)


def test_an_image_replaced_with_its_size_and_time_kept_is_found_by_its_content(
    image_root: Path, tiny_data: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for id in IDS:
        Image.fromarray(np.full((40, 40, 3), 7, np.uint8)).save(image_root / id, format="bmp")
    given = {"allow_overlap": True}
    before = tiny_data(**given).preload(ENCODER).read([5], "images").copy()
    times = (image_root / IDS[5]).stat()
    Image.fromarray(np.full((40, 40, 3), 9, np.uint8)).save(image_root / IDS[5], format="bmp")
    os.utime(image_root / IDS[5], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.array_equal(tiny_data(**given).preload(ENCODER).read([5], "images"), before)  # by size and time
    with pytest.raises(StoreError, match=r"1 images have changed since \(a/005\.png\)"):
        tiny_data(**given, check="digest").setup("fit")
    verify = ["store", "verify", str(tmp_path / "store.zarr"), "--images"]
    with pytest.raises(SystemExit) as stopped:
        main([*verify, str(image_root)])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert f"{IDS[5]}: its image is not the file that was encoded" in said
    assert "1 of 30 images are others by now: encode them again with `fpt-lightning preload --config CONFIG" in said
    data, read = tiny_data(**given, check="digest"), list[Path]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "file_digest", lambda path: (read.append(path), file_digest(path))[1])
        assert not np.array_equal(data.preload(ENCODER).read([5], "images"), before)
        data.setup("fit")
        data.setup("test")
    assert Counter(read) == Counter({image_root / id: 1 + (id == IDS[5]) for id in IDS})  # once more in the pass
    main([*verify, str(image_root)])
    assert "is sound: 30 rows were read" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*verify, str(tmp_path)])
    assert "none of the images of the feature store" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match=r"data\.check is 'md5': choose 'time' or 'digest'"):
        tiny_data(check="md5")


# Broken images


def broken_images(root: Path, ids: Sequence[str]) -> None:
    for length, id in enumerate(ids, 100):
        (root / id).write_bytes((root / id).read_bytes()[:length])


def of_split(data: PreloadedFeatureDataModule, split: str) -> list[str]:
    return [sample.id for sample in data.read_manifest().split(split)]


@pytest.mark.parametrize("mean", ["auto", [0.4]])
@pytest.mark.parametrize("orientations", [1, 2])
def test_skipped_images_are_in_no_stage_and_listed(
    image_root: Path, tiny_data: MakeData, tmp_path: Path, mean: Any, orientations: int
) -> None:
    given = {"on_error": "skip", "mean": mean, "std": mean if mean == "auto" else [0.2], "orientations": orientations}
    data = tiny_data(**given)
    broken = [of_split(data, split)[0] for split in ("train", "val", "test")]
    broken_images(image_root, broken)
    with pytest.warns(UserWarning, match=r"3 images cannot be read and are left out: .*store\.zarr\.left_out\.csv"):
        store = data.preload(ENCODER)
    assert sorted(store.left_out(IDS)) == sorted(broken)
    assert not store.missing(IDS)
    listed = (tmp_path / "store.zarr.left_out.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in listed] == ["image", *sorted(broken)]
    trainer = quiet_trainer(tmp_path, limit_train_batches=2)
    with pytest.warns(UserWarning, match="left out 3 of 30 samples"):
        trainer.fit(tiny_model(), tiny_data(**given))
    seen: list[str] = []
    for loader in (trainer.datamodule.train_dataloader, trainer.datamodule.val_dataloader):
        seen += [id for batch in loader() for id in batch["ids"]]
    assert set(IDS) - set(seen) == {*of_split(data, "test"), *broken}
    assert len(trainer.datamodule.training_labels) == len(of_split(data, "train")) - 1
    with pytest.raises(StoreError, match=r"left out 3 of 30 samples.*data\.on_error skip"):
        quiet_trainer(tmp_path).fit(tiny_model(), tiny_data(**{**given, "on_error": "stop"}))


def test_skipped_images_are_tried_again_when_they_change(image_root: Path, tiny_data: MakeData) -> None:
    content = (image_root / IDS[4]).read_bytes()
    broken_images(image_root, [IDS[4]])
    with pytest.warns(UserWarning, match="left out"):
        tiny_data(on_error="skip").preload(ENCODER)
    (image_root / IDS[4]).write_bytes(content)
    store = tiny_data(on_error="skip").preload(ENCODER)
    assert store.done.all()
    assert not Path(f"{store.url}.left_out.csv").exists()


def test_predict_and_live_training_skip_broken_images(image_root: Path, tiny_data: MakeData, tmp_path: Path) -> None:
    data = tiny_data(on_error="skip")
    broken = [of_split(data, split)[0] for split in ("train", "test")]
    broken_images(image_root, broken)
    module = tiny_model()
    trainer = quiet_trainer(tmp_path)
    live = ImageDataModule(str(image_root), resolution=64, mean=[0.4], std=[0.2], image_size=48, on_error="skip")
    with pytest.warns(UserWarning, match=r"2 images cannot be read and are left out: .*left_out\.csv"):
        trainer.fit(module, live)
    with pytest.warns(UserWarning, match="2 images cannot be read"):
        predicted = trainer.predict(module, live)
    assert predicted is not None
    assert sorted(id for batch in predicted for id in batch["ids"]) == sorted(set(IDS) - set(broken))
    listed = (tmp_path / "left_out.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in listed] == ["image", *sorted(broken)]


def test_a_split_of_which_no_image_can_be_read(image_root: Path, tiny_data: MakeData, tmp_path: Path) -> None:
    data = tiny_data(on_error="skip")
    broken_images(image_root, of_split(data, "val"))
    with pytest.warns(UserWarning, match="left out"):
        data.preload(ENCODER)
    with pytest.raises(DataError, match=r"no image of the split val of .* can be read"):
        quiet_trainer(tmp_path).fit(tiny_model(), tiny_data(on_error="skip"))


# Input that nobody should trust


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["torch", "pickle", "in a state dict"])
def test_a_checkpoint_runs_no_code(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "best.ckpt"
    content: Any = Payload(mark)
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save({"state_dict": {"a": content}} if how == "in a state dict" else content, path)
    for stage in ("test", "predict", "fit"):
        with pytest.raises(SystemExit) as stopped:
            main([stage, "--config", str(config), "--ckpt_path", str(path)])
        assert stopped.value.code == 2
        assert "CheckpointError: the checkpoint" in capsys.readouterr().err
    with pytest.raises(pickle.UnpicklingError):
        FPTPlusModule.load_from_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.safetensors"])
def test_encoder_weights_run_no_code(tiny_data: MakeData, tmp_path: Path, name: str) -> None:
    torch.save({"model": {"cls_token": Payload(tmp_path / "mark")}}, tmp_path / name)
    with pytest.raises(FPTError, match=name):
        tiny_data().preload(EncoderConfig("test_vit", pretrained=str(tmp_path / name)))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [{mark}]", "!!python/name:os.mkdir"])
def test_a_configuration_makes_no_python_objects(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tag: str
) -> None:
    config.write_text(config.read_text() + f"seed_everything: {tag.format(mark=tmp_path / 'mark')}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["preload", "--config", str(config)])
    assert stopped.value.code == 2
    assert "could not determine a constructor" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"data_type": "numpy.object"},
        {"codecs": [{"name": "bytes"}, {"name": "numcodecs.pickle"}]},
        {"codecs": [{"name": "vlen-bytes"}]},
        {"fill_value": 1},
        {"storage_transformers": [{"name": "anything"}]},
    ],
)
def test_a_store_names_no_codecs_of_its_own(sound: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Even one whose fingerprint is right."""
    url = tmp_path / "store.zarr"
    shutil.copytree(sound / "store.zarr", url)
    for file, key in ((url / "pooled/zarr.json", None), (url / "zarr.json", "attributes")):
        content = json.loads(file.read_text())
        if key is None:
            content.update(change)
        else:
            content[key]["arrays"]["pooled"].update(change)
            content[key]["fingerprint"] = fingerprint(content[key])
        file.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="pooled"):
        FeatureStore.open(str(url))


@pytest.mark.parametrize("image", ["../secret.png", "/etc/passwd", "a/../../secret.png", "..\\secret.png", "."])
def test_a_manifest_names_nothing_above_its_root(image_root: Path, image: str) -> None:
    (image_root.parent / "secret.png").write_bytes(b"")
    (image_root / "labels.csv").write_text(f"image,label\n{image},a\na/000.png,b\n")
    with pytest.raises(DataError, match=r"is not a path below the data root|do not exist"):
        read_manifest(image_root, "labels.csv")


# Fuzzing: only errors made for people come out


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=60, **FUZZ)
def test_any_manifest(image_root: Path, content: bytes) -> None:
    (image_root / "labels.csv").write_bytes(b"image,label\n" + content if len(content) % 2 else content)
    raises_only_ours(read_manifest, image_root, "labels.csv")


@given(
    cells=st.lists(st.tuples(st.sampled_from([*IDS, "x", ""]), st.text(max_size=4), st.text(max_size=6)), max_size=8)
)
@settings(max_examples=60, **FUZZ)
def test_any_table(image_root: Path, cells: list[tuple[str, str, str]]) -> None:
    write_rows(image_root / "labels.csv", [["image", "label", "split"], *cells])
    for kind in ("single-label", "multi-label", "regression"):
        raises_only_ours(read_manifest, image_root, "labels.csv", kind=kind)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@given(data=st.data(), value=JSON, name=st.sampled_from([".", "features", "row_records"]), signed=st.booleans())
@settings(max_examples=120, **FUZZ)
def test_any_metadata_of_a_store(sound: Path, data: st.DataObject, value: Any, name: str, signed: bool) -> None:
    """Also where the fingerprint was made to fit."""
    file = sound / "store.zarr" / name / "zarr.json"
    content = file.read_text()
    document = json.loads(content)
    *path, key = data.draw(st.sampled_from(list(places(document))))
    inner = document
    for step in path:
        inner = inner[step]
    inner[key] = value
    if signed and name == "." and isinstance(document.get("attributes"), dict):
        document["attributes"]["fingerprint"] = fingerprint(document["attributes"])
    try:
        file.write_text(json.dumps(document))
        raises_only_ours(FeatureStore.open, str(sound / "store.zarr"))
        raises_only_ours(store_info, str(sound / "store.zarr"))
    finally:
        file.write_text(content)


@given(data=st.data(), value=JSON)
@settings(max_examples=60, **FUZZ)
def test_any_checkpoint(checkpoint: dict[str, Any], data: st.DataObject, value: Any) -> None:
    """What ``on_load_checkpoint`` is given by a file that torch reads."""
    content = json.loads(json.dumps(checkpoint))
    *path, key = data.draw(st.sampled_from(list(places(content))))
    inner = content
    for step in path:
        inner = inner[step]
    inner[key] = value
    raises_only_ours(tiny_model().on_load_checkpoint, content)


@given(content=st.binary(max_size=300), cut=st.integers(0, 2000), whole=st.booleans())
@settings(max_examples=40, **FUZZ)
def test_any_checkpoint_file(tmp_path: Path, content: bytes, cut: int, whole: bool) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}, "epoch": 3}, path)
    if not whole:
        saved = path.read_bytes()
        path.write_bytes(saved[:cut] + content)
    raises_only_ours(read_checkpoint, str(path))


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    """What a model saves besides tensors."""
    module = tiny_model()
    content: dict[str, Any] = {"hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(content)
    content["fpt_lightning"]["specification"] = SPECIFICATION.to_dict()
    return content


def raises_only_ours(call: Callable[..., Any], *given: Any, **named: Any) -> None:
    with warnings.catch_warnings(), suppress(FPTError):
        warnings.simplefilter("ignore")
        call(*given, **named)
