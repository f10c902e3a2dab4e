"""One run, one folder: no command replaces what another run or an earlier command left there."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from commands import change, fails, run
from fpt_lightning.cli.run_folder import claim
from fpt_lightning.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("few_figures")
FORKS = multiprocessing.get_context("fork")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """While another process holds a run's folder."""

    def hold() -> None:
        lock = claim(folder, None)
        ready.set()
        time.sleep(200)
        lock.close()

    ready = FORKS.Event()
    holder = FORKS.Process(target=hold)
    holder.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        holder.kill()
        holder.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_fits_at_once_are_refused_and_a_crash_leaves_no_lock(tmp_path: Path) -> None:
    """Both would write their configuration and their checkpoints."""
    with held(tmp_path / "run"), pytest.raises(ConfigurationError, match=r"another fit is running in .*run: wait"):
        claim(tmp_path / "run", None)
    claim(tmp_path / "run", None).close()


def test_a_fit_holds_its_folder(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path / "run"):
        message = fails(capsys, "fit", "--config", config)
    assert f"another fit is running in {tmp_path / 'run'}" in message
    assert set(contents(tmp_path / "run")) == {".lock"}


def test_a_run_and_what_else_would_write_to_its_folder(
    trained: Path,
    image_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    said: pytest.LogCaptureFixture,
) -> None:
    root, other, config = tmp_path / "run", tmp_path / "other", trained
    change(config, "data", root=str(image_root))  # the same images, whose folder is renamed
    before = contents(root)

    # another run, from its own start or from its checkpoint
    shutil.copytree(root, other)
    assert f"{root} already holds a run" in fails(capsys, "fit", "--config", config)
    for name in ("last", "best"):
        message = fails(capsys, "fit", "--config", config, "--ckpt_path", other / f"{name}.ckpt")
        assert f"{root} already holds a run" in message
    assert "best.ckpt holds weights alone" in fails(capsys, "fit", "--config", config, "--ckpt_path", "best")
    message = fails(capsys, "fit", "--config", config, "--ckpt_path", "last", "--seed_everything", 1)
    assert "seed_everything is 1, but the checkpoint's run was seeded with 0" in message
    run("fit", "--config", config, "--trainer.fast_dev_run", "true")  # refuses nothing, writes nothing
    assert contents(root) == before

    # several tests are kept side by side
    run("test", "--config", config, "--ckpt_path", "best")
    run("test", "--config", config, "--ckpt_path", "last")
    run("test", "--config", config, "--ckpt_path", root / "best.ckpt", "--data.batch_size", "5")
    assert sorted(path.name for path in (root / "test").iterdir()) == ["best", "best-1", "last"]
    assert set(json.loads((root / "test" / "last" / "metrics.json").read_text())) == {"last"}
    elsewhere = image_root.rename(tmp_path / "elsewhere")
    computed = torch.load(root / "best.ckpt", weights_only=True)["fpt_lightning"]["specification"]
    outside = ["--data.external", "true"]
    outside += [part for name in ("mean", "std") for part in (f"--data.{name}", str(list(computed[name])))]
    run("test", "--config", config, "--ckpt_path", "best", "--data.root", elsewhere, *outside)
    assert (root / "test" / "best-elsewhere" / "metrics.json").is_file()
    elsewhere.rename(image_root)

    # it goes on: what ran is what config.yaml says, and the schedule says where it stands
    run("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", 3)
    assert "now ends after 9 steps: at step 6 the learning rate is 0.00075, where it was 0" in said.text
    assert f"the run goes on with other settings: those until now are in {root / 'config-1.yaml'}" in said.text
    now, earlier = (yaml.safe_load((root / name).read_text()) for name in ("config.yaml", "config-1.yaml"))
    assert (now["trainer"]["max_epochs"], earlier["trainer"]["max_epochs"]) == (3, 2)
    assert now.get("ckpt_path") is None
    run("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", 3)
    assert not (root / "config-2.yaml").exists()


def test_a_start_that_failed_does_not_stop_the_next(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.yaml").write_text("trainer: {max_epochs: 7}\n")  # what is there before the first checkpoint
    (root / "metrics.csv").write_text("epoch,step\n0,1\n")
    run("fit", "--config", config, "--trainer.max_epochs", 1)
    assert yaml.safe_load((root / "config.yaml").read_text())["trainer"]["max_epochs"] == 1
    assert not (root / "config-1.yaml").exists()


def test_without_validation_the_last_epoch_is_tested(config: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no epoch was validated, so that there is no .*best\.ckpt to test"):
        run("fit", "--config", config, "--trainer.max_epochs", 1, "--trainer.limit_val_batches", 0)
    assert set(json.loads((tmp_path / "run" / "metrics.json").read_text())) == {"last"}
    none = ["--trainer.max_epochs", 0, "--trainer.default_root_dir", tmp_path / "none"]
    with pytest.warns(UserWarning, match=r"no epoch was finished, so that there is no .*last\.ckpt to test"):
        run("fit", "--config", config, *none)
