"""A disk that takes nothing more: every command ends in one error that names the file, and leaves nothing partial."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

from commands import few_figures, run, write_config
from fpt_lightning.cli import main
from small import write_images

FORKS = multiprocessing.get_context("fork")
ROOM = 64  # bytes that a file may have


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a configuration, a store and a run."""
    folder = tmp_path_factory.mktemp("trained")
    images = write_images(folder / "images", {"a": 10, "b": 10, "c": 10})
    with few_figures():
        run("fit", "--config", write_config(images, folder), "--trainer.max_epochs", 1)
    return folder


def attempt(arguments: list[str], sender: int) -> None:
    sys.stdout = sys.stderr = os.fdopen(sender, "w", buffering=1)  # a pipe, whatever pytest writes to
    logging.raiseExceptions = False  # of handlers that write to pytest's own files
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    main(arguments)


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("fit --config {0}/config.yaml --trainer.default_root_dir {0}/new", "split.csv"),
        ("fit --config {0}/config.yaml --trainer.default_root_dir {0}/auto --model auto", "auto.yaml"),
        ("preload --config {0}/config.yaml --data.store {0}/new.zarr", "new.zarr"),
        ("test --config {0}/config.yaml --ckpt_path {0}/run/best.ckpt", "metrics.json"),
        ("predict --config {0}/config.yaml --ckpt_path {0}/run/best.ckpt", "predictions.csv"),
        ("validate --config {0}/config.yaml --ckpt_path {0}/run/best.ckpt", "predictions.csv"),
        ("explain --config {0}/config.yaml --ckpt_path {0}/run/best.ckpt --out {0}/pictures --images 1", ".png"),
        ("evaluate {0}/run/predictions.csv --out {0}/evaluation --resamples 9", "evaluation.json"),
        ("export --ckpt_path {0}/run/best.ckpt --out {0}/model.pt2 --format torch", "model.pt2"),
        ("export --ckpt_path {0}/run/best.ckpt --out {0}/shared --format hub", "shared"),
        pytest.param("export --ckpt_path {0}/run/best.ckpt --out {0}/model.onnx", "model.onnx", marks=pytest.mark.slow),
    ],
    ids=lambda value: value.split()[0],
)
def test_a_full_disk(command: str, file: str, trained: Path) -> None:
    if command.startswith("export"):
        pytest.importorskip("onnx", reason="comes with a torch that exports")
    before = set(trained.rglob("*"))
    receiver, sender = os.pipe()
    child = FORKS.Process(target=attempt, args=(command.format(trained).split(), sender))
    child.start()
    os.close(sender)
    with open(receiver) as stream:
        said = stream.read()
    child.join()
    assert child.exitcode == 2, said
    message = said.splitlines()[-1]
    assert "Traceback" not in said
    assert message.startswith(("fpt-lightning: OutputError: ", "fpt-lightning: StoreError: "))
    assert file in message
    assert "File too large" in message
    left = set(trained.rglob("*")) - before
    assert [path for path in left if path.name.endswith(".partial")] == []
    for path in sorted(left, reverse=True):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
