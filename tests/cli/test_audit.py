"""The command ``audit``: what it leaves, what it keeps, and what it refuses."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from commands import fails, run
from fpt_lightning.audit import writer

LEFT = {"audit.html", "duplicates.csv", "images.csv", "labels.csv", "outliers.csv", "shortcuts.csv"}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def stored(config: Path, image_root: Path, tmp_path: Path) -> list[object]:
    """Options of a store of 30 images, of which one is there twice, in two splits."""
    lines = ["image,label,split,site,sex"]
    splits = ("train", "train", "train", "val", "test")
    for i, path in enumerate(sorted(image_root.rglob("*.png"))):
        lines.append(
            f"{path.relative_to(image_root).as_posix()},{path.parent.name},{splits[i % 5]},{i % 2},{'FM'[i % 2]}"
        )
    (image_root / "labels.csv").write_text("\n".join(lines))
    shutil.copy(image_root / "a/000.png", image_root / "a/004.png")
    options: list[object] = ["--config", config, "--data.manifest", "labels.csv", "--data.allow_overlap", "true"]
    run("preload", *options)
    return options


def test_an_audit_leaves_a_page_and_its_tables(
    stored: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run("audit", *stored, "--by", "site", "--by", "sex")
    told = capsys.readouterr().out
    folder = tmp_path / "run" / "audit"
    assert {path.name for path in folder.iterdir()} == LEFT
    assert f"The page is {folder / 'audit.html'}" in told
    (pair,) = rows(folder / "duplicates.csv")
    assert (pair["path_1"], pair["path_2"], pair["crosses"]) == ("a/000.png", "a/004.png", "split")
    assert {row["attribute"] for row in rows(folder / "shortcuts.csv")} >= {"site", "sex"}
    images = rows(folder / "images.csv")
    assert len(images) == 30
    assert all(float(row["x"]) == float(row["x"]) for row in images)

    before = (folder / "audit.html").read_bytes()
    run("audit", *stored)
    assert f"The earlier audit is kept in {folder.with_name('audit-1')}." in capsys.readouterr().out
    assert (folder.with_name("audit-1") / "audit.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == LEFT


def test_an_audit_that_is_stopped_is_none(
    stored: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    options = [*stored, "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_audit_page", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run("audit", *options)
    assert not (tmp_path / "out" / "audit.html").exists()
    run("audit", *options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == LEFT
    assert not (tmp_path / "out-1").exists()


def test_it_needs_a_complete_store(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no feature store" in (said := fails(capsys, "audit", "--config", config))
    assert "fpt-lightning preload" in said


def test_what_cannot_be_audited_is_refused(
    stored: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, "audit", *stored, "--model", "LinearProbingModule")
    assert "LinearProbingModule reads no feature store" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    said = fails(capsys, "audit", *stored, "--out", tmp_path / "mine")
    assert "which holds thesis.txt, no part of an audit" in said
    assert "has no column" in fails(capsys, "audit", *stored, "--by", "ward")
    said = fails(capsys, "audit", *stored, "--data.manifest", "null", "--by", "site")
    assert "there is no data.manifest that could have such columns" in said
    assert "map" in fails(capsys, "audit", *stored, "--map", "tsne")
