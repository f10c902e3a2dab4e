"""The evidence benchmark on small images: every image is tested once, rates are chosen for each fold, runs go on."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

import evidence
import evidence_default
import evidence_figures
import evidence_rates
import evidence_side
import selected_tokens
import side_network
from fpt_lightning.cli import init
from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.calibration import Calibration, calibrated, fit_calibration
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.store.index import FileRecord
from fpt_lightning.store.specification import FeatureShape
from fpt_lightning.store.writing import WritableStore
from records import Record
from small import ROOT, SPECIFICATION, write_images

Main = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """``main`` on 40 images of 20 patients, three folds, one seed, one epoch; what it wrote."""
    root = write_images(tmp_path / "fundus", {"images": 40})
    listed = [[f"images/{i:03d}.png", i // 2 % 5, i // 2 % 2, f"p{i // 2}"] for i in range(40)]
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "grade", "maculopathy", "patient"], *listed])
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    rows = {
        "stored_linear": evidence.Entry("stored_linear", "linear, stored", rates=(1e-2,)),
        "fpt_plus": evidence.Entry("fpt_plus", "FPT+", {"side_resolution": 32}),
    }
    small = {
        "BEST_OF_FOUR": {"best_of_four": tuple(rows)},
        "HIGHER": (3e-2,),
        "STUDIES": {"64": evidence.Study(("fundus_grade",), tuple(rows), 64, (1, 2, 3), 1)},
        "ENCODER": "test_vit",
        "ROWS": rows,
        "FOLDS": 3,
        "RESULTS": tmp_path,
        "results": partial(evidence.results, resamples=200),
    }
    for name, value in small.items():
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr("environment.RESULTS", tmp_path)

    def call(*more: str) -> dict[str, Any]:
        out, weights = tmp_path / "out", tmp_path / "weights.safetensors"
        folders = ["--weights", weights, "--fundus", root, "--chest", root]
        size = ["--epochs", "1", "--learning-rates", "1e-3", "1e-2"]
        evidence.main([*map(str, folders), "--out", str(out), *size, *more])
        if "--write" not in more:
            return {}
        found: dict[str, Any] = json.loads((tmp_path / "evidence_fundus_64.json").read_text())["tasks"]["fundus_grade"]
        return found

    return call


@pytest.mark.usefixtures("few_figures")
def test_tables_of_pooled_folds(run: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--methods", "stored_linear", "fpt_plus")
    found = run("--methods", "stored_linear", "fpt_plus", "--write")
    assert list(found) == ["stored_linear", "fpt_plus", "best_of_four"]
    assert found["best_of_four"]["label"] == "The best of four by validation, stored"
    chosen = [pair["learning_rate"] for pair in found["fpt_plus"]["chosen"]]
    assert len(chosen) == 3
    for fold, rate in enumerate(chosen, 1):
        tried = {path.name for path in (tmp_path / f"out/fundus_grade-64/fpt_plus/fold{fold}").iterdir()}
        assert tried - {"lr0.03-wd0.1"} == {"lr0.001-wd0.1", "lr0.01-wd0.1"}
        assert f"lr{rate:g}-wd0.1" in tried
    for metric in ("auc", "fold_auc", "quadratic_kappa"):
        difference = found["stored_linear"][metric]["difference"]
        values = {name: row[metric]["value"] for name, row in found.items()}
        assert difference["value"] == pytest.approx(values["stored_linear"] - values["fpt_plus"])
        assert difference["low"] <= difference["value"] <= difference["high"]
    folds = sorted((tmp_path / "out/fundus_grade-64/fpt_plus").glob("fold*/lr0.001-*/seed0/predictions.csv"))
    tested = [row["path"] for path in folds for row in csv.DictReader(path.open(newline=""))]
    assert sorted(tested) == [f"images/{i:03d}.png" for i in range(40)]  # once each
    own = sorted((tmp_path / "out/fundus_grade-64/stored_linear").glob("fold*/*/seed0/predictions.csv"))
    given = [row for path in own for row in csv.DictReader(path.open(newline=""))]
    right = np.mean([row["grade"] == row["most_probable"] for row in given])
    assert found["stored_linear"]["calibrated"]["accuracy"]["value"] == pytest.approx(right)

    table = (tmp_path / "evidence_fundus_64.md").read_text()
    assert "40 images of 20 patients" in table
    assert table.count("\n| FPT+ |") == 2  # as trained, and calibrated
    assert "| calibrated | AUC x 100 | accuracy x 100 |" in table

    # Tasks that were run elsewhere stay
    path = tmp_path / "evidence_fundus_64.json"
    content = json.loads(path.read_text())
    content["tasks"]["fundus_referable"] = content["tasks"]["fundus_grade"]
    path.write_text(json.dumps(content))
    run("--methods", "stored_linear", "fpt_plus", "--write")
    assert list(json.loads(path.read_text())["tasks"]) == ["fundus_grade", "fundus_referable"]
    assert "### Referable" in path.with_suffix(".md").read_text()

    # Records are enough to go on elsewhere; neither images nor patients are in them
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(tmp_path / "evidence", tmp_path / "out/records")
    text = next((tmp_path / "evidence").rglob("*.json")).read_text()
    assert "images" not in text
    assert '"p' not in text
    capsys.readouterr()
    run("--methods", "stored_linear", "fpt_plus")
    assert "running" not in capsys.readouterr().out
    assert run("--methods", "stored_linear", "fpt_plus", "--write") == found
    # A cell whose scores were dropped, and are needed now
    records = next((tmp_path / "out/records").rglob("stored_linear.json"))
    kept = json.loads(records.read_text())
    kept["fold1/lr0.01-wd0.1/seed0"]["test"] = {}
    records.write_text(json.dumps(kept))
    run("--methods", "stored_linear")
    assert "running" in capsys.readouterr().out
    assert len(json.loads(records.read_text())["fold1/lr0.01-wd0.1/seed0"]["test"]) > 10
    with pytest.raises(ConfigurationError, match=r"stored_linear.json has a record of fold1/.* with other settings"):
        run("--methods", "stored_linear", "--epochs", "2")


RIGHT, BY_CHANCE = [np.arange(40) % 2 * 0.5 + 0.2] * 2, np.random.default_rng(0).random((2, 40))
"""Scores of 40 images by seed, every second of which is of the class."""


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives methods these test scores, by seed, in one fold."""
    ids = [f"{i:02d}.png" for i in range(40)]
    rows = {id: {"image": id, "label": ("no", "yes")[i % 2], "patient": f"p{i}"} for i, id in enumerate(ids)}

    def give(scores: dict[str, Any], uncalibrated: tuple[str, ...] = ()) -> None:
        def records(self: evidence.Protocol, name: str, method: str, run: bool = False) -> list[list[Record]] | None:
            tests = [{str(i): [1 - p, p] for i, p in enumerate(each)} for each in scores.get(method, ())]
            given = None if method in uncalibrated else asdict(Calibration())
            return [[replace(of_validation(0.5), test=test, calibration=given)] for test in tests] or None

        monkeypatch.setattr(evidence.Protocol, "cells", records)
        monkeypatch.setattr(evidence.Protocol, "labelled", lambda self, name: rows)
        monkeypatch.setattr(evidence, "_cost", lambda protocol, name, method, seeds: {"label": method})

    return give


def test_what_init_writes_is_held_to_every_method_with_calibrated_predictions(scored: Callable[..., None]) -> None:
    methods = ("query_tokens", "query_tokens_turned", "attentive", "linear")
    scored({"query_tokens_zoomed": RIGHT, "query_tokens": BY_CHANCE, "query_tokens_turned": RIGHT}, methods[1:2])
    found = evidence_default.held(PROTOCOL, "fundus_referable", "query_tokens_zoomed", methods, resamples=50)
    assert list(found) == ["query_tokens_zoomed", "query_tokens"]
    assert found["query_tokens_zoomed"]["auc"]["value"] == 1
    assert found["query_tokens_zoomed"]["lead"] == {}
    chance = np.mean([roc_auc_score(np.arange(40) % 2, each) for each in BY_CHANCE])
    lead = found["query_tokens"]["lead"]["auc"]
    assert lead["value"] == pytest.approx(1 - chance)
    assert 0 < lead["low"] < lead["value"] < lead["high"]
    lines = evidence_default.table({"own_rate": {"fundus_referable": found}, "searched": {}}).splitlines()
    assert lines[2].startswith("| referable retinopathy | **Query tokens, all orientations, zoomed** | 100.0 ")
    assert f"| +{100 * lead['value']:.1f} [" in lines[3]
    assert lines[3].endswith("| 2 |  |  |  | 1.0 |")  # seeds; nothing of searched rates; MiB
    assert evidence_default.held(PROTOCOL, "chest_all", "query_tokens_mirrored_zoomed", methods, resamples=50) == {}


def test_what_the_side_network_adds_is_of_equal_rates_and_their_mean(
    scored: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first rate the side network makes a ranking by chance right, at the second a right one by chance."""
    scored({})
    ranks = {("fpt_plus_zoomed", 1e-3): RIGHT[0], ("query_tokens_zoomed", 1e-3): BY_CHANCE[0]}
    ranks |= {("fpt_plus_zoomed", 1e-2): BY_CHANCE[1], ("query_tokens_zoomed", 1e-2): RIGHT[1]}

    def found(self: object, name: str, method: str, fold: int, pair: Any, *_: Any, **__: Any) -> Record | None:
        if (method, pair[0]) not in ranks:
            return None
        test = {str(i): [1 - p, p] for i, p in enumerate(ranks[method, pair[0]])}
        return replace(of_validation(0.5), test=test, calibration=asdict(Calibration()))

    monkeypatch.setattr(evidence.Protocol, "record", found)
    protocol = replace(PROTOCOL, rates=(1e-3, 3e-3, 1e-2))
    row = evidence_side.added(protocol, "fundus_referable", "query_tokens_zoomed", resamples=50)
    first, second = (1 - roc_auc_score(np.arange(40) % 2, each) for each in BY_CHANCE)
    assert list(row["rates"]) == ["0.001", "0.01"]  # both are finished
    assert row["rates"]["0.001"]["auc"]["value"] == pytest.approx(first)
    assert row["rates"]["0.01"]["auc"]["value"] == pytest.approx(-second)
    assert row["mean"]["auc"]["value"] == pytest.approx((first - second) / 2)
    assert row["rates"]["0.001"]["auc"]["low"] > 0 > row["rates"]["0.01"]["auc"]["high"]
    cells = evidence_side.table({"fundus_referable": row}).splitlines()[2].split(" | ")
    assert cells[2].startswith(f"+{100 * first:.1f} [")
    assert (cells[1], cells[3]) == ("", "")  # 3e-4 and 3e-3
    del ranks["fpt_plus_zoomed", 1e-3], ranks["query_tokens_zoomed", 1e-2]
    assert evidence_side.added(protocol, "fundus_referable", "query_tokens_zoomed", resamples=50) == {}


@pytest.mark.parametrize(("data", "topic"), [("fundus", "fundus photographs"), ("chest", "chest X-rays")])
def test_what_is_called_the_default_is_what_init_writes(data: str, topic: str) -> None:
    entry = evidence.ROWS[evidence_default.DEFAULTS[data]]
    assert entry.data == {"orientations": init._ORIENTATIONS[topic], "zoom": 0.55}
    assert entry.model == {"test_time_orientations": init._ORIENTATIONS[topic]}
    assert topic in init._ZOOMED
    assert evidence_side.with_side(evidence_default.DEFAULTS[data]) in evidence.EVERY_RATE


def test_the_default_is_held_to_its_rival_and_seeds_are_taken_together(scored: Callable[..., None]) -> None:
    """The scores of the default rank all images right, those of its rival by chance."""
    scored({"fpt_plus_prompt_head": RIGHT, "query_tokens": BY_CHANCE})
    found = evidence.results(replace(PROTOCOL, seeds=2), "fundus_referable", list(evidence.ROWS), resamples=50)
    values = {method: row["auc"]["value"] for method, row in found.items()}
    assert values["fpt_plus_prompt_head"] == values["fpt_plus_prompt_head_together"] == 1
    assert values["query_tokens_together"] == pytest.approx(roc_auc_score(np.arange(40) % 2, BY_CHANCE.mean(0)))
    assert found["query_tokens_together"]["label"] == "Query tokens, stored, 2 seeds together"
    minus = found["fpt_plus_prompt_head"]["minus"]["query_tokens"]["auc"]
    assert minus["value"] == pytest.approx(1 - values["query_tokens"])
    assert minus["low"] <= minus["value"] <= minus["high"]
    assert f"fpt_plus_prompt_head minus Query tokens, stored: {100 * minus['value']:+.1f} [" in evidence.table(
        "fundus_referable", found
    )


def test_tables_are_of_scores_as_trained_and_say_what_calibration_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that ranks rightly, and finds most images to be of the first class."""
    ids = [f"{i:02d}.png" for i in range(40)]
    rows = {id: {"image": id, "label": ("no", "yes")[i // 20], "patient": f"p{i}"} for i, id in enumerate(ids)}
    raw = np.stack([1 - np.linspace(0.01, 0.6, 40), np.linspace(0.01, 0.6, 40)], 1)
    ids, labels = tuple(ids), np.arange(40) // 20
    calibration = fit_calibration(Predictions("single-label", ids, labels, raw, ("no", "yes")))
    scores = calibrated(Predictions("single-label", ids, labels, raw, ("no", "yes")), calibration).scores
    cell = replace(
        of_validation(0.5),
        test={str(i): each for i, each in enumerate(scores.tolist())},
        calibration=asdict(calibration),
    )
    np.testing.assert_allclose([*cell.uncalibrated().test.values()], raw, rtol=1e-6)
    monkeypatch.setattr(evidence.Protocol, "cells", lambda self, name, method: [[cell]] * (method == "query_tokens"))
    monkeypatch.setattr(evidence.Protocol, "labelled", lambda self, name: rows)
    monkeypatch.setattr(evidence, "_cost", lambda protocol, name, method, seeds: {"label": method})
    found = evidence.results(PROTOCOL, "fundus_referable", ["query_tokens"], resamples=50)["query_tokens"]["calibrated"]
    assert found["auc"]["before"] == found["auc"]["value"] == 1
    assert found["accuracy"]["before"] == pytest.approx((raw.argmax(1) == labels).mean())
    assert found["accuracy"]["value"] == pytest.approx((scores.argmax(1) == labels).mean())
    assert found["accuracy"]["difference"]["value"] > 0.1
    assert found["brier"]["value"] < found["brier"]["before"]


@pytest.mark.parametrize(("seconds", "shown"), [(302.4, "300"), (98.2, "98"), (0.0921, "0.092")])
def test_seconds_have_two_digits_and_no_exponent(seconds: float, shown: str) -> None:
    estimate = {"value": 0.8, "low": 0.7, "high": 0.9}
    row = {"label": "a", "auc": estimate, "fold_auc": estimate, "auc_of_seeds": [0.8]}
    row |= {"memory_mib": 1.0, "epoch_seconds": seconds, "stored_bytes": 0}
    assert evidence.table("fundus_referable", {"lora": row}).endswith(f"| 1.0 | {shown} | 0.00 |")


def of_validation(value: float) -> Record:
    return Record("", 1e-3, 0.1, value, 1.0, 1.0, 0, {})


PROTOCOL = evidence.Protocol(Path("w"), {}, Path("o"), 448, (1,), 1, 1, (1e-3, 1e-2), (0.1, 1.0))


@pytest.mark.parametrize(
    ("values", "chosen"),
    [
        ({(1e-3, 0.1): 0.8, (1e-2, 0.1): 0.7, (1e-3, 1.0): 0.6}, (1e-3, 0.1)),
        ({(1e-3, 0.1): 0.8, (1e-2, 0.1): 0.7, (1e-3, 1.0): 0.9}, (1e-3, 1.0)),  # the other decay
        ({(1e-3, 0.1): 0.6, (1e-2, 0.1): 0.7, (3e-2, 0.1): 0.65, (1e-2, 1.0): 0.1}, (1e-2, 0.1)),  # one more is worse
        ({(1e-3, 0.1): 0.6, (1e-2, 0.1): 0.7, (3e-2, 0.1): 0.8, (1e-1, 0.1): 0.9, (1e-1, 1.0): 0.1}, (1e-1, 0.1)),
        ({(1e-3, 0.1): 0.7, (1e-2, 0.1): 0.7, (1e-3, 1.0): 0.7}, (1e-3, 0.1)),  # of equal ones the first
    ],
)
def test_the_search_goes_on_upwards_while_the_highest_rate_is_the_best(
    values: dict[tuple[float, float], float], chosen: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        evidence.Protocol, "record", lambda self, name, method, fold, pair, *_: of_validation(values[pair])
    )
    assert PROTOCOL.chosen("fundus_referable", "fpt_plus", 1, run=False) == chosen  # nothing else is asked for


def test_without_a_search_each_method_has_its_own_rate_whose_scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(evidence.Protocol, "record", lambda *_, **__: of_validation(0.5))
    monkeypatch.setattr(
        evidence.Protocol, "records", lambda *_: SimpleNamespace(forget_tests=lambda *of: kept.append(of))
    )
    protocol = replace(PROTOCOL, searched=False)
    assert protocol.chosen("fundus_referable", "stored_linear", 1, run=False) == (1e-2, 0.1)
    assert protocol.chosen("fundus_referable", "query_tokens", 1, run=False) == (1e-3, 0.1)
    assert protocol.cells("fundus_referable", "stored_linear") is not None
    assert kept == []  # of the search it is not known what it needs
    PROTOCOL.cells("fundus_referable", "stored_linear")
    [(_, but)] = kept
    assert {*but} == {"fold1/lr0.001-wd0.1/", "fold1/lr0.01-wd0.1/"}  # the chosen rate, and the method's own


def test_a_rate_whose_cell_is_run_again_may_lose_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    values, asked = {1e-3: 0.8, 1e-2: 0.79, 3e-2: 0.1}, []

    def again(self: object, name: str, method: str, fold: int, pair: Any, *_: Any, scores: bool = False) -> Record:
        if scores:
            asked.append(pair[0])
            values[1e-3] = 0.7  # as another machine has it
        return of_validation(values[pair[0]])

    monkeypatch.setattr(evidence.Protocol, "record", again)
    protocol = replace(PROTOCOL, decays=(0.1,))
    assert protocol._settled("fundus_referable", "fpt_plus", 1, run=True) == (1e-2, 0.1)
    assert asked == [1e-3, 1e-2]


def test_cells_of_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = evidence.Protocol(
        Path("weights"), {"fundus": ROOT, "chest": ROOT}, Path("out"), 224, (1,), 1, 20, (1e-3,), (0.1,)
    )

    def cell(method: str) -> dict[str, Any]:
        return protocol.cell("fundus_referable", method, 1, (1e-3, 0.1), 0).config

    monkeypatch.setattr(evidence.Protocol, "manifest", lambda self, name: ROOT)
    assert cell("mixup")["model"]["class_path"] == "candidates.MixedPrompts"
    assert cell("query_tokens")["model"]["class_path"] == "fpt_lightning.methods.QueryTokensModule"
    assert [cell(name)["trainer"]["max_epochs"] for name in ("smoothing", "longer", "lora")] == [20, 60, 10]
    side = cell("side_from_encoder")["model"]
    assert side["class_path"] == "candidates.SideFromEncoder"
    assert side["init_args"]["prompt_head"] is False  # or the side network stays silent, wherever it starts
    zoomed = cell("longer_zoomed")
    data = zoomed["data"]["init_args"]
    assert (zoomed["trainer"]["max_epochs"], data["orientations"], data["zoom"]) == (60, 8, 0.55)
    assert data["store"].endswith("fundus224-8-orientations-zoomed.zarr")
    assert cell("longer_mirrored_zoomed")["data"]["init_args"]["orientations"] == 2


def test_of_each_fold_the_method_with_the_best_validation_is_taken() -> None:
    one, other = ([of_validation(value) for value in values] for values in ((0.7, 0.8), (0.9, 0.8)))
    assert evidence.by_validation([[one], [other]]) == [[other[0], one[1]]]
    assert evidence.by_validation([[one, other], [other]]) == [[other[0], one[1]]]  # of the seeds that all have


def test_the_first_fold_chooses_rates_of_a_methods_own_and_a_table_has_the_finished_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a method with the encoder inside one seed is asked for, of others all, as far as every fold is finished."""
    asked = []

    def of(
        self: object,
        name: str,
        method: str,
        fold: int,
        pair: tuple[float, float],
        seed: int,
        run: bool,
        scores: bool = False,
    ) -> Any:
        asked.append((fold, pair[0], seed))
        unfinished = method == "default" and (fold, seed) == (2, 1)
        return None if unfinished else of_validation(pair[0] if fold == 1 else -pair[0])

    monkeypatch.setattr(evidence.Protocol, "record", of)
    monkeypatch.setattr(evidence.Protocol, "records", lambda *_: SimpleNamespace(forget_tests=lambda *_: None))
    protocol = replace(PROTOCOL, folds=(1, 2), seeds=3)
    found = protocol.cells("fundus_referable", "full")
    assert found is not None
    assert len(found) == 1
    assert {(fold, rate) for fold, rate, _ in asked if fold == 2} == {(2, max(evidence.ROWS["full"].rates))}
    assert len(protocol.cells("fundus_referable", "default") or []) == 2
    monkeypatch.setattr(evidence.Protocol, "manifest", lambda *_: "m.csv")
    cell = replace(protocol, roots={"fundus": Path("r")}).cell("fundus_referable", "full", 1, (1e-5, 0.1), 0)
    trainer = cell.config["trainer"]
    assert evidence.INSIDE.items() <= trainer.items()


@pytest.mark.usefixtures("few_figures", "run")
def test_models_are_tested_without_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = ("fundus_referable", "with_head")
    entry = evidence.Entry("fpt_plus", "FPT+", {"side_resolution": 32, "prompt_head": True})
    for module in (evidence, side_network):
        monkeypatch.setitem(module.ROWS, "with_head", entry)
    for name, value in {"RESOLUTION": 64, "FOLDS": 3, "TRAINED": (trained,), "RESULTS": tmp_path, "EPOCHS": 1}.items():
        monkeypatch.setattr(side_network, name, value)
    places = {"weights": "weights.safetensors", "fundus": "fundus", "chest": "fundus", "out": "out"}
    arguments = [part for name, place in places.items() for part in (f"--{name}", str(tmp_path / place))]
    side_network.main(arguments)
    found = json.loads((tmp_path / "side_network.json").read_text())["tasks"]["fundus_referable"]["with_head"]
    folder = tmp_path / "out/side_network/fundus_referable-with_head"
    whole, alone, side = (
        np.concatenate(
            [Predictions.read(folder / f"fold{fold}" / place / "predictions.csv").scores for fold in (1, 2, 3)]
        )
        for place in ("", "without_side.head/test/best", "without_prompt_head/test/best")
    )
    assert np.abs(whole - side).max() > np.abs(whole - alone).max() > 0  # as the side network's head starts from zero
    assert max(found["norms"]["side.head"]) < min(found["norms"]["prompt_head"])
    values = found["auc"]["whole"]["value"], found["auc"]["without the prompt head"]["value"]
    assert found["auc"]["without the prompt head"]["difference"]["value"] == pytest.approx(values[1] - values[0])
    before = (tmp_path / "side_network.md").read_text()
    assert before.count("\n") == 3
    side_network.main(arguments)  # from what is there
    assert (tmp_path / "side_network.md").read_text() == before


def test_figures_of_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auc = {"value": 0.8, "low": 0.7, "high": 0.94}
    row = {"label": "a", "learnable_ratio": 0.0123, "memory_mib": 3.0, "epoch_seconds": 2.0, "fold_auc": auc}
    again = {**row, "fold_auc": {**auc, "value": 0.1}}  # at its own rate, beside the searched one

    def write(data: str, study: str, methods: dict[str, Any]) -> None:
        content = {"tasks": {{"fundus": "fundus_grade", "chest": "chest_all"}[data]: {**methods, "best_of_four": {}}}}
        (tmp_path / f"evidence_{data}_{study}.json").write_text(json.dumps(content))

    write("fundus", "224", {"fpt_plus": row, "query_tokens_turned": row})
    write("fundus", "448", {"fpt_plus": row})
    write("fundus", "448_fold1", {"lora": row})
    write("fundus", "448_zoomed", {"fpt_plus": again, "query_tokens_zoomed": row})
    write("chest", "224", {"query_tokens_mirrored_zoomed": row})
    lead = {"auc": {"value": 0.01, "low": -0.02, "high": 0.03}}
    leads = {"fundus_grade": {"query_tokens_zoomed": {"lead": {}}, "fpt_plus": {"lead": lead}}}
    (tmp_path / "evidence_default.json").write_text(json.dumps({"own_rate": leads, "searched": {}}))
    found = list(evidence_figures.points(tmp_path))
    assert {(point.task, point.study, point.method) for point in found} >= {
        ("fundus_grade", "448_fold1", "lora"),
        ("fundus_grade", "448_zoomed", "query_tokens_zoomed"),
        ("chest_all", "224", "query_tokens_mirrored_zoomed"),
    }
    assert len(found) == 7  # none of which is the best of four
    monkeypatch.setattr(evidence_figures, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence_figures, "DOCS", tmp_path)
    evidence_figures.main([])
    for name in ("cost", "resolution", "default"):
        assert Image.open(tmp_path / f"evidence_{name}.png").size[0] > 500
    assert (tmp_path / "evidence.md").read_text().splitlines() == [
        "| method | learnable, % | grade, 224 | grade, 448 | three classes, 224 |",
        "|---|---:|---:|---:|---:|",
        "| FPT+ | 1.2 | 80.0 ± 12.0 | 80.0 ± 12.0 |  |",
        "| Query tokens, other views | 1.2 |  | 80.0 ± 12.0 | 80.0 ± 12.0 |",
    ]  # without what one fold alone came to, and orientations that are not zoomed


def test_the_table_of_the_readme_is_that_of_the_result_files() -> None:
    assert (ROOT / "benchmarks/results/evidence.md").read_text() in (ROOT / "README.md").read_text()


def predictions(scores: list[float], ids: str = "abcd") -> Predictions:
    """Of two negatives and two positives."""
    table = np.column_stack([1 - np.array(scores), scores])
    return Predictions("single-label", tuple(ids), np.array([0, 0, 1, 1]), table, ("no", "yes"))


def test_a_methods_own_learning_rate_is_the_best_that_was_tried_or_near_it() -> None:
    """It loses at most a point of validation AUC in the mean over tasks."""
    found: dict[tuple[type, float], list[dict[str, float]]] = {}
    for row in json.loads((ROOT / "benchmarks" / "results" / "evidence_rates.json").read_text())["rows"]:
        method = evidence.MODULES[evidence.ROWS[row["method"]].method]
        if row["metric"] != "auc":
            continue
        own = method.defaults()["learning_rate"]
        found.setdefault((method, own), []).append(row["validation"])
        assert row["default"] == own
    assert len(found) > 5
    for (method, default), rows in found.items():
        lost = [max(row.values()) - row[str(default)] for row in rows]
        assert sum(lost) / len(lost) < 0.01, (method, lost)


def test_the_rates_of_all_folds_count() -> None:
    def cell(rate: float, value: float, decay: float = 0.1) -> dict[str, float]:
        return {"learning_rate": rate, "weight_decay": decay, "validation": value}

    records = {
        "fold1/a/seed0": cell(1e-3, 0.6),
        "fold2/a/seed0": cell(1e-3, 0.8),
        "fold1/b/seed0": cell(1e-2, 0.9),
        "fold1/a/seed1": cell(1e-3, 0.1),
        "fold1/c/seed0": cell(1e-3, 0.2, decay=0.5),
    }
    assert evidence_rates.validation(records, (1, 2)) == {1e-3: pytest.approx(0.7)}
    assert evidence_rates.validation(records, (1,)) == {1e-3: 0.6, 1e-2: 0.9}
    assert evidence_rates.validation(records, (1, 2, 3)) == {}  # one is not finished


def test_a_metric_is_the_mean_over_the_seeds() -> None:
    seeds = [evidence.pool([predictions(scores)]) for scores in ([0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1])]
    assert evidence.resampled(seeds, np.ones((1, 4)))["auc"] == pytest.approx(0.5)


def test_folds_of_other_scales_lower_the_pooled_auc_alone() -> None:
    pooled = evidence.pool([predictions([0.1, 0.2, 0.3, 0.4], "fbcd"), predictions([0.6, 0.7, 0.8, 0.9], "aegh")])
    assert "".join(pooled.predictions.ids) == "abcdefgh"
    assert pooled.folds.tolist() == [1, 0, 0, 0, 1, 0, 1, 1]
    found = evidence.resampled([pooled], np.ones((1, 8)))
    assert found["fold_auc"] == pytest.approx(1)
    assert found["auc"] == pytest.approx(0.75)


def test_where_selected_tokens_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store of one image, black in its left half, with 4 x 6 patches."""
    specification = replace(SPECIFICATION, encoder="test_vit", resolution=(64, 96), image_size=24)
    store = WritableStore.create(str(tmp_path / "s.zarr"), specification, FeatureShape(1, 1, 4, 6), {}).extend(["a"])
    content = {name: np.zeros((1, *size), dtype) for name, (size, dtype) in store.sample_arrays.items()}
    content["indices"][0, 0, 0] = [0, 1, 6, 9]  # the class token; patches (0, 0) and (0, 5), at the border; (1, 2)
    content["images"][0, :, 12:] = 200
    store.write([0], content, [FileRecord(1, 2, 3)])
    monkeypatch.setattr("environment.RESULTS", tmp_path)
    monkeypatch.setattr(selected_tokens, "RING", 1)
    selected_tokens.main([store.url, "--name", "small"])
    found = json.loads((tmp_path / "selected_tokens_small.json").read_text())
    assert found["background_of_area"] == 0.5
    assert found["background_of_selected"] == pytest.approx([2 / 3])
    assert found["border_of_area"] == pytest.approx(16 / 24)
    assert found["border_of_selected"] == pytest.approx([2 / 3])
    assert found["heads_with_class_token"] == 1
