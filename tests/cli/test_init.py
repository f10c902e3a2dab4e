"""``init`` writes a configuration that ``fit`` runs as it is, whatever form the data have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file

from commands import fails, run
from dicom_files import dataset, write
from fpt_lightning.cli import init as command
from fpt_lightning.files import read_rows
from small import write_images

pytestmark = pytest.mark.usefixtures("few_figures")
Say = Callable[..., str]
TINY = """
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}
model: {init_args: {encoder: test_vit, pretrained: false}}
data: {init_args: {resolution: 64, image_size: 48, batch_size: 8}}
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def settings(name: str = "my.yaml") -> dict[str, dict[str, Any]]:
    """Those of the model and of the data, after each was seen to have a reason."""
    text = Path(name).read_text()
    lines = [line for line in text.splitlines() if line and not line.endswith(":") and line[0] != "#"]
    assert not [line for line in lines if " # " not in line]
    content = yaml.safe_load(text)
    return {section: content[section]["init_args"] for section in ("model", "data")}


def fitted(name: str = "my") -> dict[str, float]:
    """The test metrics of a run of the file, as it is but for the size of everything."""
    run("fit", "--config", f"{name}.yaml", "--config", "tiny.yaml")
    metrics: dict[str, float] = json.loads(Path(f"runs/{name}/metrics.json").read_text())["best"]
    return metrics


def test_a_table_of_graded_photographs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both eyes of a patient, dark around the retina, and few images."""
    rng, rows = np.random.default_rng(0), ["image,grade,maculopathy,patient"]
    (workplace / "eyes/images").mkdir(parents=True)
    for i in range(45):
        pixels = np.zeros((60, 100, 3), np.uint8)
        pixels[5:55, 20:80] = rng.integers(60, 200, (50, 60, 3))
        Image.fromarray(pixels).save(workplace / f"eyes/images/{i:02d}.jpg")
        rows.append(f"images/{i:02d}.jpg,{max(0, i % 5 - 2)},{i % 2},p{i // 2}")
    (workplace / "eyes/labels.csv").write_text("\n".join(rows))
    run("init", "eyes")
    printed = capsys.readouterr().out
    for words in (
        "45 .jpg",
        "60 x 100",
        "fundus photographs",
        "0 (27), 1 (9), 2 (9)",
        "23, column patient",
        "maculopathy",
    ):
        assert words in printed
    assert "fpt-lightning fit --config my.yaml" in printed
    assert "fpt-lightning crossval --config my.yaml" in printed  # as images are few
    found = settings()
    assert found["model"] == {
        "num_classes": 3,
        "task": "ordinal",
        "class_weights": "balanced",
        "encoder": "vit_base_patch14_reg4_dinov2.lvd142m",
        "pretrained": True,
        "learning_rate": 1e-3,
        "test_time_orientations": 8,
    }
    assert found["data"] == {
        "root": "eyes",
        "manifest": "labels.csv",
        "image_column": "image",
        "label_column": "grade",
        "group_column": "patient",
        "classes": ["0", "1", "2"],
        "folds": 5,
        "store": "features/my.zarr",
        "resolution": 224,
        "crop_border": True,
        "fit": "letterbox",
        "orientations": 8,
        "zoom": 0.55,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    text = Path("my.yaml").read_text()
    assert "class_path: QueryTokensModule # FPT+ without its side network" in text
    assert "RETFound (CC BY-NC 4.0" in text
    assert "test_quadratic_kappa" in fitted()
    assert "my.yaml is there already: give another --out" in fails(capsys, "init", "eyes")


def test_folders_and_a_table_of_films(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table, which names patients and splits, goes before the folders."""
    rows = ["image,label,patient_id,split"]
    for split in ("train", "val", "test"):
        root = write_images(workplace / "films" / split, {"normal": 8, "pneumonia": 8}, seed=len(split))
        rows += [f"{p.relative_to(workplace / 'films')},{p.parent.name},{split}{i // 2},{split}"
                 for i, p in enumerate(sorted(root.rglob("*.png")))]  # fmt: skip
    (workplace / "films/labels.csv").write_text("\n".join(rows))
    run("init", "films/labels.csv", "--out", "table.yaml")
    found = settings("table.yaml")
    assert found["data"]["split_column"] == "split"
    assert found["data"]["group_column"] == "patient_id"
    assert found["model"]["encoder"] == "vit_base_patch14_dinov2.lvd142m"  # as RAD-DINO is
    assert "class_weights" not in found["model"]
    assert (
        found["model"]["test_time_orientations"] == found["data"]["orientations"] == 2
    )  # films have a side that is up
    assert found["data"]["zoom"] == 0.55
    assert "given: train 16, val 16, test 16" in capsys.readouterr().out
    assert "test_auc" in fitted("table")


def test_folders_of_splits_by_other_names(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, split in enumerate(("Training", "Testing")):
        write_images(workplace / "mri" / split, {"a": 8, "b": 8, "c": 8}, size=(80, 80), seed=seed)
    (workplace / "mri/Testing/a/! odd.png").write_bytes(b"no image")
    run("init", "mri")
    printed = capsys.readouterr().out
    assert "given: train 21, val 3, test 25" in printed
    assert "there are no validation images" in printed
    assert "! odd.png cannot be read" in printed
    found = settings()
    assert found["data"]["on_error"] == "skip"
    assert not {"fit", "crop_border", "manifest"} & set(found["data"])
    assert "test_auc" in fitted()


def test_dicom_whose_headers_alone_know_the_patients(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = workplace / "breast" / ("benign", "malignant")[i // 20]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 4096, (64, 40)).astype(np.uint16)
        write(folder / f"{i:02d}", dataset(pixels, bits=12, Modality="MG", PatientID=f"p{i // 2}"))
    run("init", "breast")
    printed = capsys.readouterr().out
    for words in ("40 without suffix", "MG (40)", "mammograms", "grey, 16 bits", "20, PatientID of the headers"):
        assert words in printed
    found = settings()
    assert found["data"]["manifest"] == str(workplace / "my.csv")
    assert found["data"]["group_column"] == "patient"
    assert "test_auc" in fitted()
    rows = [row.split(",") for row in Path("runs/my/split.csv").read_text().splitlines()[1:]]
    assert len({(group, split) for _, _, split, group in rows}) == 20  # each in one split


def test_several_labels(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_images(workplace / "chest", {"all": 40})
    rows = [f"all/{i:03d}.png,{int(i % 2 > 0)},{('1', '0', '', '-1')[i // 2 % 4]}" for i in range(40)]
    (root / "labels.csv").write_text("\n".join(["image,edema,effusion", *rows]))
    run("init", "chest")
    assert "labels are -1 (uncertain)" in capsys.readouterr().out
    found = settings()
    assert (found["model"]["task"], found["data"]["label_column"]) == ("multilabel", ["edema", "effusion"])
    assert "test_auc" in fitted()


def test_copies_in_two_splits_are_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file runs, as fit says it again at each start."""
    for seed, split in enumerate(("Training", "Testing")):
        write_images(workplace / "mri" / split, {"a": 16, "b": 16}, size=(8, 8), seed=seed)
    shutil.copy(workplace / "mri/Training/a/000.png", workplace / "mri/Testing/a/copy.png")
    run("init", "mri")
    assert "1 images are also in another split, to the byte: T" in capsys.readouterr().out
    assert settings()["data"]["allow_overlap"] is True


def test_patients_of_headers_keep_the_splits_that_are_given(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for i in range(48):
        folder = workplace / "breast" / ("train", "test")[i // 24] / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 9)).astype(np.uint8)
        write(folder / f"{i:02d}.dcm", dataset(pixels, PatientID=f"p{i // 2}"))
    run("init", "breast")
    rows = read_rows(Path("my.csv"), "table")
    assert {(row["image"].split("/")[0], row["split"]) for row in rows} == {("train", "train"), ("test", "test")}
    Path("my.yaml").unlink()
    assert "my.csv is there already" in fails(capsys, "init", "breast")


@pytest.mark.parametrize(
    ("names", "words"),
    [([], "there is no image below data"), (["alone"], "the data set has one class only, 'alone'")],
)
def test_what_cannot_be_used(names: list[str], words: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "data").mkdir()
    write_images(workplace / "data", dict.fromkeys(names, 12), size=(8, 8))
    assert words in fails(capsys, "init", "data")
    assert not Path("my.yaml").exists()


def test_what_fit_would_refuse_writes_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpt_lightning.encoder.weights.ENCODERS", ("vit_tiny_patch16_224", "test_vit2"))
    write_images(workplace / "data", {"a": 9, "b": 9}, size=(8, 8))
    message = fails(capsys, "init", "data", "--weights", "none.safetensors")
    assert "the weights file 'none.safetensors' (pretrained) does not exist" in message
    save_file(timm.create_model("test_vit").state_dict(), "odd.safetensors")
    message = fails(capsys, "init", "data", "--weights", "odd.safetensors")
    assert "fits none of the encoders that are tried (vit_tiny_patch16_224, " in message
    assert not Path("my.yaml").exists()


def test_weights_on_disk(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpt_lightning.encoder.weights.ENCODERS", ("vit_tiny_patch16_224", "test_vit2", "test_vit"))
    save_file(timm.create_model("test_vit").state_dict(), "odd.safetensors")
    write_images(workplace / "data", {"a": 12, "b": 12})
    run("init", "data", "--weights", "odd.safetensors")
    found = settings()
    assert (found["model"]["encoder"], found["model"]["pretrained"]) == ("test_vit", "odd.safetensors")
    assert found["data"]["mean"] == "auto"  # what these were trained with is not known
    small = {"trainer.max_epochs": 1, "trainer.accelerator": "cpu", "data.resolution": 64, "data.batch_size": 8}
    run("fit", "--config", "my.yaml", *(f"--{name}={value}" for name, value in small.items()))


@pytest.mark.parametrize(
    ("memory", "resolution", "at_once"),
    [("64GiB", 1022, 4), ("2GiB", 1022, 1), ("1.2GiB", 518, 1), ("1GiB", None, 1), (None, 518, 4)],
)
def test_a_resolution_for_a_memory(
    memory: str | None,
    resolution: int | None,
    at_once: int,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def peak(setting: Any) -> int:
        return int(400 * setting.resolution[0] ** 2 * setting.preload_batch_size)

    monkeypatch.setattr(command, "STAGES", {"fit": peak})
    for i in range(20):
        (workplace / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1100, 1100), (i, 9, 9)).save(workplace / "data" / "ab"[i % 2] / f"{i}.png")
    asked = ["init", "data", *([] if memory is None else ["--gpu-memory", memory])]
    if resolution is None:
        assert "not even 224 pixels fit" in fails(capsys, *asked)
        return
    run(*asked)
    data = settings()["data"]
    assert (data["resolution"], data.get("preload_batch_size", 4)) == (resolution, at_once)


def test_no_memory(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "gpu_memory is 'much'" in fails(capsys, "init", "data", "--gpu-memory", "much")


@pytest.mark.parametrize(
    "value", ["no", "1e3", "a b", "x: y", "#c", "0", ".5", "data/mine", "~/x", "é'\"", "", "null", "-"]
)
def test_values_are_read_back(value: str) -> None:
    assert yaml.safe_load(f"a: {command._value(value)} # why") == {"a": value}
    assert yaml.safe_load(f"a: {command._value([value, 1, 0.5, 5e-4])} # why") == {"a": [value, 1, 0.5, 5e-4]}
