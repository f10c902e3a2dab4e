"""The comparison of methods: its cells, search, bootstrap, ablations and table; the sweep."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

import compare_methods
from compare_methods import Comparison, main
from components import MLPTransfer, SideNetworkAlone, values_in_order
from fpt_lightning import ImageDataModule, cli
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.resampling import resampled_auc
from fpt_lightning.methods import ClassificationModule
from small import ROOT, write_images
from variants import Setting, ablation_variants, read_setting


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", {"a": 10, "b": 10, "c": 10})


def write_config(folder: Path, images: Path, **changes: Any) -> Path:
    """A run's YAML; ``changes`` are of its data."""
    data = {
        "root": str(images),
        "store": str(images.parent / "store.zarr"),
        "resolution": 64,
        "mean": [0.4],
        "std": [0.2],
        "image_size": 48,
        "batch_size": 8,
        **changes,
    }
    model = {"num_classes": 3, "encoder": "test_vit", "pretrained": False, "side_resolution": 32, "prompts": 4}
    content = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "logger": False},
        "model": {"class_path": "FPTPlusModule", "init_args": model},
        "data": {"class_path": "PreloadedFeatureDataModule", "init_args": data},
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, images)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, images: Path) -> list[dict[str, Any]]:
    """In place of training, write what a run leaves; the validation AUC is best at a learning rate of 0.003."""
    runs: list[dict[str, Any]] = []

    def run(args: list[str]) -> None:
        if args[0] == "preload":
            return
        config = yaml.safe_load(Path(args[2]).read_text())
        runs.append(config)
        folder, data = Path(config["trainer"]["default_root_dir"]), config["data"]["init_args"]
        rate = config["model"]["init_args"]["learning_rate"]
        score = 0.9 - abs(math.log10(rate / 3e-3)) / 10
        rng = np.random.default_rng(config["seed_everything"])
        module = ImageDataModule(data["root"], manifest=data.get("manifest"))
        lines = ["path,label,prob_a,prob_b,prob_c"]
        for sample in module.read_manifest().split("test"):
            scores = rng.random(3) + np.eye(3)[sample.label] * 2 * ("FPTPlus" in config["model"]["class_path"])
            lines.append(",".join([sample.id, "abc"[sample.label], *map(str, scores / scores.sum())]))
        (folder / "predictions.csv").write_text("\n".join(lines) + "\n")
        (folder / "metrics.csv").write_text(
            f"epoch,val_auc,epoch_seconds,train_peak_live_mib\n0,0.5,,\n0,,1.5,10.0\n1,{score},,\n1,,1.5,12.0\n"
        )
        tested = {which: {"test_auc": score} for which in ("last", "best")}
        (folder / "metrics.json").write_text(json.dumps(tested))

    monkeypatch.setattr(cli, "main", run)
    monkeypatch.setattr("gc.collect", lambda: 0)  # takes longer than all else
    return runs


def arguments(config: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(config), "--out", str(out), "--bootstrap", "200", *more]


def table_rows(out: Path) -> list[list[str]]:
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def refuse(args: Any) -> None:
    raise AssertionError("a finished cell was run again")


# cells


@pytest.mark.usefixtures("few_figures")
def test_methods_train_finished_cells_stay_and_a_lost_one_alone_is_run_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("environment.RESULTS", tmp_path / "results")
    given = arguments(config, out, "--methods", "full", "linear", "fpt_plus", "--seeds", "2", "--name", "tiny")
    main(given)
    rows = table_rows(out)
    assert [row[0] for row in rows] == ["Full fine-tuning", "Linear probing", "FPT+"]
    for row in rows:
        assert len(row) == 9
        numbers = [float(row[i].split(" ± ")[0]) for i in (1, 2, 3, 4, 6, 7, 8)]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
    assert rows[0][1] == "100.00"
    assert rows[2][5] == "reference"
    text = (out / "table.md").read_text(encoding="utf-8")
    assert "untrained: this compares cost" in text
    assert "images: 21 train, 3 val, 6 test" in text
    result = json.loads((out / "result.json").read_text())
    assert result["commit"]
    assert result["variants"]["full"]["pme"] < result["variants"]["full"]["test_auc"]["best"]["mean"] * 100
    assert not list(out.rglob("*.ckpt"))
    assert (tmp_path / "results" / "tiny.md").read_text(encoding="utf-8") == text
    assert json.loads((tmp_path / "results" / "tiny.json").read_text())["variants"] == result["variants"]
    assert text in capsys.readouterr().out

    monkeypatch.setattr(cli, "main", refuse)
    main(given)
    monkeypatch.undo()
    (out / "cells" / "linear" / "lr0.001-wd0.1" / "seed1" / "metrics.json").unlink()
    (out / "table.md").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")}
    main(given[:-2])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(out.rglob("metrics.json"))) == 6
    assert table_rows(out)[1][3] == rows[1][3]  # the same seed, the same run

    changed = yaml.safe_load(config.read_text())
    changed["data"]["init_args"]["batch_size"] = 4
    config.write_text(yaml.safe_dump(changed))
    with pytest.raises(SystemExit, match=r"seed0 holds a run with another(.|\n)*batch_size: 8 there, 4 here"):
        main(given[:-2])


@pytest.mark.usefixtures("few_figures")
def test_an_interrupted_cell_goes_on_and_leaves_what_is_finished(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = arguments(config, out, "--methods", "fpt_plus", "stored_linear", "--seeds", "1", "--epochs", "2")
    start = ClassificationModule.on_train_epoch_start

    def interrupt(module: ClassificationModule) -> None:
        if module.current_epoch == 1 and "Linear" in type(module).__name__:
            raise KeyboardInterrupt
        start(module)

    monkeypatch.setattr(ClassificationModule, "on_train_epoch_start", interrupt)
    with pytest.raises(SystemExit):
        main(given)
    assert [row[0] for row in table_rows(out)] == ["FPT+"]
    cell = out / "cells" / "stored_linear" / "lr0.001-wd0.1" / "seed0"
    assert (cell / "last.ckpt").is_file()
    assert not (cell / "metrics.json").exists()

    monkeypatch.undo()
    taken: list[list[str]] = []
    original = cli.main

    def watched(args: list[str]) -> None:
        taken.append(args)
        original(args)

    monkeypatch.setattr(cli, "main", watched)
    main(given)
    assert [args[-2:] for args in taken if args[0] == "fit"] == [["--ckpt_path", str(cell / "last.ckpt")]]
    assert [row[0] for row in table_rows(out)] == ["FPT+", "Linear probing, stored"]
    with (cell / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["val_auc"]] == ["0", "1"]


# search


def test_the_best_validation_auc_chooses(config: Path, tmp_path: Path, pretend: list[dict[str, Any]]) -> None:
    rates = ["--learning-rates", "1e-3", "3e-3", "1e-2", "--weight-decays", "0.01", "0.1"]
    given = arguments(config, tmp_path / "out", "--methods", "lora", "bitfit", "fpt_plus", *rates, "--seeds", "3")
    main([*given, "--rate", "bitfit=5e-3"])
    result = json.loads((tmp_path / "out" / "result.json").read_text())["variants"]
    assert (result["lora"]["learning_rate"], result["lora"]["weight_decay"]) == (3e-3, 0.01)
    assert [len(row["search"]) for row in result.values()] == [0, 6, 6]
    assert max(found["val_auc"] for found in result["lora"]["search"]) == pytest.approx(0.9)
    assert (result["bitfit"]["learning_rate"], result["bitfit"]["weight_decay"]) == (5e-3, 0.1)
    assert len(pretend) == 3 + 2 * (6 + 2)
    assert "(best validation AUC with seed 0 among 6 pairs): BitFit 0.005 and 0.1; LoRA 0.003 and 0.01;" in (
        tmp_path / "out" / "table.md"
    ).read_text(encoding="utf-8")
    assert result["lora"]["memory_mib"] == {"live": 12.0}
    assert result["lora"]["pme"] is None


def test_what_a_run_on_a_gpu_leaves(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"last": {"test_auc": 0.7}, "best": {"test_auc": 0.8}}))
    header = "epoch,val_auc,epoch_seconds,train_peak_allocated_mib,train_peak_reserved_mib"
    lines = [
        header,
        "0,0.6,,,",
        "0,,9.0,100.0,140.0",
        "1,0.5,,,",
        "1,,2.0,110.0,150.0",
        "2,0.55,,,",
        "2,,3.0,105.0,150.0",
    ]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    found = compare_methods.Cell(tmp_path, {"seed_everything": 4}, preloads=False).result()
    memory = {"allocated": 110.0, "reserved": 150.0}
    expected = {"seed": 4, "best": 0.8, "last": 0.7, "val_auc": 0.6, "epoch_seconds": 3.0, "memory_mib": memory}
    assert found == expected


# the difference


@pytest.mark.parametrize("ties", [False, True])
def test_resampled_auc_is_that_of_weighted_and_of_repeated_cases(ties: bool) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 40)
    if ties:
        probabilities = probabilities.round(1)
    labels = np.arange(40) % 3
    weights = rng.multinomial(40, [1 / 40] * 40, size=5)
    found = resampled_auc(probabilities, labels, weights)
    for weight, auc in zip(weights, found, strict=True):
        one_vs_rest = [roc_auc_score(labels == c, probabilities[:, c], sample_weight=weight) for c in range(3)]
        assert auc == pytest.approx(np.mean(one_vs_rest), abs=1e-12)
        repeated = np.repeat(np.arange(40), weight)
        again = resampled_auc(probabilities[repeated], labels[repeated], np.ones((1, len(repeated)), int))
        assert auc == pytest.approx(again[0], abs=1e-12)


def test_resampled_auc_leaves_out_classes_that_cannot_be_scored() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.4, 0.5, 0.1]])
    labels = np.array([0, 1, 2])
    found = resampled_auc(probabilities, labels, np.array([[1, 1, 0], [2, 0, 0]]))
    assert found[0] == 1.0
    assert np.isnan(found[1])


def test_groups_are_drawn_whole(images: Path, tmp_path: Path, pretend: list[dict[str, Any]]) -> None:
    lines = ["image,label,split,group"]
    for split, numbers in (("train", range(4)), ("val", range(4, 6)), ("test", range(6, 10))):
        lines += [f"{c}/{n:03d}.png,{c},{split},{split}{n // 2}" for n in numbers for c in "abc"]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    config = write_config(tmp_path, images, manifest=str(tmp_path / "table.csv"))
    comparison = Comparison(read_setting(config), [], tmp_path, 1, [], {}, None, 50)
    assert comparison.weights.shape == (50, 12)
    assert len({tuple(column) for column in comparison.weights.T}) == 2
    main(arguments(config, tmp_path / "out", "--methods", "lora", "linear", "fpt_plus", "--seeds", "2"))
    assert "resamples of the test groups" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    result = json.loads((tmp_path / "out" / "result.json").read_text())["variants"]
    difference = result["lora"]["difference"]
    assert difference["high"] < 0
    assert difference["p"] < 0.05
    linear = json.loads((tmp_path / "out" / "result.json").read_text())["variants"]["linear"]
    assert linear["difference"]["high"] == difference["high"]  # the same predictions


# variants


@pytest.fixture
def setting(config: Path) -> Callable[..., Setting]:
    return lambda **changes: read_setting(config, **changes)


def test_arguments_and_stores_of_the_methods(config: Path) -> None:
    changed = yaml.safe_load(config.read_text())
    changed["model"]["init_args"].update(layers=[1, 4], learning_rate="5e-4", label_smoothing=0.1)
    config.write_text(yaml.safe_dump(changed))
    variants = {v.name: v for v in compare_methods.method_variants(read_setting(config), list(compare_methods.METHODS))}
    assert list(variants) == list(compare_methods.METHODS)
    shared = {"num_classes": 3, "encoder": "test_vit", "pretrained": False, "label_smoothing": 0.1}
    assert variants["lora"].arguments == shared
    assert variants["query_tokens"].arguments == {**shared, "layers": [1, 4]}
    assert variants["fpt"].arguments == shared
    assert variants["fpt_plus"].arguments == {**shared, "layers": [1, 4], "side_resolution": 32, "prompts": 4}
    store = changed["data"]["init_args"]["store"]
    stores = {name: variant.data["init_args"]["store"] for name, variant in variants.items()}
    assert stores.pop("fpt") == store.replace("store.zarr", "store-layers0-5-image224.zarr")
    assert set(stores.values()) == {store}
    assert variants["fpt"].data["init_args"]["image_size"] == 224
    assert not variants["lora"].preloads
    assert variants["fpt"].preloads
    assert read_setting(config).default("learning_rate") == 5e-4
    assert read_setting(config).default("weight_decay") == 0.1


@pytest.mark.parametrize(("method", "rate"), [("StoredLinearProbingModule", 1e-2), ("OfAnotherPackage", 1e-3)])
def test_a_rate_that_is_not_given_is_the_methods_own(method: str, rate: float, config: Path) -> None:
    setting = dataclasses.replace(read_setting(config), method=method, arguments={})
    assert setting.default("learning_rate") == rate


@pytest.mark.parametrize(("encoder", "layers"), [("test_vit", range(1, 7)), ("vit_tiny_patch16_224", range(2, 13, 2))])
def test_ablations(
    setting: Callable[..., Setting], encoder: str, layers: range, capsys: pytest.CaptureFixture[str]
) -> None:
    made = setting(encoder=encoder)
    labels = {
        name: [variant.label for variant in ablation_variants(made, name)]
        for name in ("prompts", "side_resolution", "token_ratio", "layers")
    }
    assert labels == {
        "prompts": ["4", "8", "16", "32", "64", "128"],
        "side_resolution": ["64", "128", "256", "512"],
        "token_ratio": ["0.1", "0.2", "0.3", "0.5", "0.7", "0.9"],
        "layers": [str(count) for count in layers],
    }
    variants = {v.name: v for name in compare_methods.ABLATIONS for v in ablation_variants(made, name)}
    store = made.data["init_args"]["store"].removesuffix(".zarr")
    assert store.endswith("store" if encoder == "test_vit" else f"store-{encoder}")
    depth = max(layers)
    assert variants[f"layers-{layers[0]}"].arguments["layers"] == list(range(depth - layers[0], depth))
    assert variants[f"layers-{depth // 2}"].data["init_args"]["store"] == f"{store}.zarr"
    assert variants[f"layers-{depth}"].data["init_args"]["store"] == f"{store}-layers0-{depth - 1}.zarr"
    assert variants["prompts-64"].data["init_args"]["store"] == f"{store}.zarr"
    assert variants["token_ratio-0.5"].data["init_args"]["store"] == f"{store}-tokens0.5.zarr"
    assert variants["side_resolution-256"].data["init_args"]["store"] == f"{store}-image256.zarr"
    assert variants["side_resolution-256"].data["init_args"]["image_size"] == 256
    assert compare_methods.published(made, "layers") == f"layers-{depth // 2}"
    assert compare_methods.published(made, "prompts") == "prompts-4"
    components = [variants[name] for name in variants if name.startswith("components")]
    assert [v.module.side_resolution for v in components] == [64, 64, 64, 32, 32, 32]
    assert [v.module.encoder_config.token_ratio for v in components] == [0.2, 1.0, 1.0, 1.0, 0.2, 0.2]
    assert [v.preloads for v in components] == [False] * 5 + [True]
    assert isinstance(components[0].module, SideNetworkAlone)
    assert components[0].module.learnable_ratio == 1.0
    assert isinstance(components[1].module, MLPTransfer)
    assert not capsys.readouterr().out


def test_what_cannot_work_is_left_out_and_said(images: Path, tmp_path: Path, capsys: Any) -> None:
    path = write_config(tmp_path, images, resolution=[64, 96])
    content = yaml.safe_load(path.read_text())
    content["data"]["class_path"] = "ImageDataModule"
    del content["data"]["init_args"]["store"]
    path.write_text(yaml.safe_dump(content))
    names = [variant.name for variant in ablation_variants(read_setting(path), "components")]
    assert names == ["components-asymmetric", "components-selection"]
    said = capsys.readouterr().out
    assert "side network alone is left out: the encoder's images are not square" in said
    assert "+ preloading is left out: data has no store" in said
    patch_14 = read_setting(write_config(tmp_path, images, resolution=70))
    patch_14.arguments.update(encoder="vit_small_patch14_dinov2")
    patch_14.arguments["side_resolution"] = 70
    with pytest.raises(ConfigurationError, match="no value of side_resolution works"):
        ablation_variants(patch_14, "side_resolution")
    assert "side_resolution 64 is left out: side_resolution 64 x 64 is not a multiple" in capsys.readouterr().out


@pytest.mark.usefixtures("few_figures")
def test_the_components_train(config: Path, tmp_path: Path) -> None:
    main(arguments(config, tmp_path / "out", "--ablation", "components", "--seeds", "1"))
    rows = table_rows(tmp_path / "out")
    assert [row[0] for row in rows] == [
        "side network alone",
        "+ encoder through an MLP",
        "MLP → fusion modules",
        "+ asymmetric input",
        "+ important tokens selection",
        "+ preloading",
    ]
    assert rows[-1][5] == "reference"
    assert (tmp_path / "out" / "components.png").stat().st_size > 10_000
    runs = json.loads((tmp_path / "out" / "result.json").read_text())["variants"]
    live, stored = (runs[f"components-{name}"]["runs"][0] for name in ("selection", "preloading"))
    assert live["best"] == pytest.approx(stored["best"], abs=0.02)  # the same tokens, in fp16 and in fp32


def test_the_mlp_gets_the_tokens_in_their_own_order() -> None:
    encoder = FrozenEncoder(EncoderConfig("test_vit", pretrained=False, layers=(1, 4), token_ratio=1.0), (64, 64))
    projected: list[torch.Tensor] = []
    for layer in (1, 4):
        projection = encoder.model.blocks[layer].attn.qkv  # type: ignore[union-attr, index]
        projection.register_forward_hook(lambda module, inputs, output: projected.append(output[..., 128:]))
    encoded = encoder(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(values_in_order(encoded), torch.stack(projected, 1))

    module = MLPTransfer(3, encoder="test_vit", pretrained=False, side_resolution=64, token_ratio=1.0)
    shape = module.encoder_shape
    values = torch.arange(shape.tokens((64, 64))).float().view(1, 1, -1, 1).expand(1, 3, -1, shape.width)
    aligned = module._aligned(values)
    assert aligned.shape[2] == module.side.positions.shape[1]
    patches = list(range(shape.prefix_tokens, shape.tokens((64, 64))))
    assert aligned[0, 0, :, 0].tolist() == [0, *patches]


# people


def test_errors_for_people(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, known in ((("--methods", "lorra"), "adalora"), (("--ablation", "prompt"), "token_ratio")):
        with pytest.raises(SystemExit):
            main(arguments(config, tmp_path / "out", *option))
        assert known in capsys.readouterr().err
    for option in (("--rate", "lorra=1e-3"), ("--reference", "lorra")):
        with pytest.raises(SystemExit, match="'lorra' is not compared here: choose of full, linear"):
            main(arguments(config, tmp_path / "out", *option))
    config.write_text("trainer: {max_epochs: 1}\nmodel: FPTPlusModule\n")
    with pytest.raises(SystemExit, match="has no section model and no section data with a class_path"):
        main(arguments(config, tmp_path / "out"))


# the sweep


def test_a_trial_of_the_sweep_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = yaml.safe_load((ROOT / "examples" / "sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "val_auc", "goal": "maximize"}
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    chosen = {name: values["values"][-1] for name, values in sweep["parameters"].items()}
    macros = {"${program}": [str(program)], "${args}": [f"--{name}={value}" for name, value in chosen.items()]}
    command = [word for chunk in sweep["command"] for word in macros.get(chunk, [chunk])]  # as wandb's agent does
    environment = {"PATH": "/usr/bin:/bin", "WANDB_RUN_ID": "abc123"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*done.stdout.splitlines(), "--print_config"])
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["default_root_dir"] == "runs/sweep/abc123"
    assert config["trainer"]["logger"]["init_args"]["offline"] is False
    assert config["model"]["init_args"]["learning_rate"] == chosen["model.learning_rate"]
    assert config["model"]["init_args"]["weight_decay"] == chosen["model.weight_decay"]


def test_a_live_encoder_keeps_what_the_yaml_says_of_labels_and_groups(images: Path, tmp_path: Path) -> None:
    """All but what is of a store: ``ImageDataModule`` takes it, itself or by its base."""
    path = write_config(tmp_path, images, allow_overlap=True, folds=7, augmentation="none", codec="fp16")
    variants = {variant.name: variant for variant in ablation_variants(read_setting(path), "components")}
    live = variants["components-selection"].data["init_args"]
    assert live.items() >= {"allow_overlap": True, "folds": 7, "augmentation": "none"}.items()
    assert not {"store", "codec"} & set(live)
