"""The model card: what it says, what it leaves to people, and that it names nobody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml

from fpt_lightning.deployment.card import Outcome, card, card_beside, encoder_licence, shared_card, write_card
from fpt_lightning.deployment.checkpoints import load_trained
from fpt_lightning.evaluation.calibration import Calibration
from fpt_lightning.evaluation.conformal import fit_nonconformity, prediction_sets
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.report import SplitSummary
from fpt_lightning.evaluation.scores import evaluate
from fpt_lightning.methods import METHODS, ClassificationModule
from small import ROOT, TINY, save_trained


def trained(folder: Path, method: str = "fpt_plus", **settings: Any) -> tuple[Path, ClassificationModule]:
    own = TINY if method == "fpt_plus" else {"encoder": "test_vit"}
    path = save_trained(METHODS[method], folder / "best.ckpt", (64, 96), **{**own, **settings})
    return path, load_trained(path)[0]


def outcome(**changes: Any) -> Outcome:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    scores = rng.dirichlet([1, 1, 1], 60)
    scores[np.arange(60), labels] += 0.5
    groups = tuple(f"patient{i // 2}" for i in range(60))
    ids = tuple(f"secret/{i}.png" for i in range(60))
    found = Predictions("single-label", ids, labels, scores / scores.sum(1, keepdims=True), ("a", "b", "c"), groups)
    evaluation = evaluate(found, {"a": 0.3}, sets=prediction_sets(found, fit_nonconformity(found), 0.9), resamples=20)
    counts = {"a": 20, "b": 20, "c": 20}
    splits = {"train": SplitSummary(100, counts, 50), "test": SplitSummary(60, counts, 30)}
    return Outcome(evaluation, "clinic", splits=splits, source="The splits were given.", epoch=7, **changes)


def test_a_card_says_what_is_known(tmp_path: Path) -> None:
    path, module = trained(tmp_path)
    write_card(tmp_path / "card.md", module, outcome())
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1]) == {
        "library_name": "fpt-lightning",
        "pipeline_tag": "image-classification",
        "tags": ["fpt-lightning", "medical-imaging", "vision-transformer"],
    }
    for said in (
        "# FPT+ on clinic",
        "not a medical device",
        "**Intended use: not stated. Whoever shares this model writes here",
        "| task | one class an image: a, b, c |",
        "| encoder | test_vit, frozen; weights random, digest ",
        "| licence of the encoder's weights | none needed: untrained |",
        "| images | 64 x 96 pixels, letterbox |",
        "| training | epoch 7; learning rate 0.001 |",
        "| calibration | temperature 1.7, biases +0.4, -0.1, -0.3; fitted to validation |",
        "| patients | 50 | 30 |",
        "| AUC | 0.",
        "| 0.300 |",
        "| most probable |",
        "Prediction sets for a coverage of 90%, from 60 validation images of 30 groups",
        "another hospital was not tried",
        "Subgroups, such as of sex, age or site, were not scored here",
        "No prediction sets for 90%: no validation image has a label.",
    ):
        assert said in text, said
    assert not [said for said in ("secret", "patient1", str(tmp_path)) if said in text]
    assert max(map(len, text.splitlines())) < 400
    assert len(text.splitlines()) < 80
    assert card_beside(path, module) == text
    other, _ = trained(tmp_path / "other")
    content = torch.load(other, weights_only=True)
    content["state_dict"]["fusion.prompts"] += 1
    torch.save(content, path)
    again = load_trained(path)[0]
    assert card_beside(path, again) == card(again)
    assert "Not tested: no figure is known of it here." in card(again)


@pytest.mark.parametrize(("method", "task"), [("lora", "multilabel"), ("stored_linear", "regression")])
def test_cards_of_other_methods_and_tasks(method: str, task: str, tmp_path: Path) -> None:
    path, module = trained(tmp_path, method, task=task)
    assert card(module) == card(load_trained(path)[0])
    module.calibration = Calibration()  # of a training whose validation images have no labels
    text = card(module)
    assert f"{module.learnable_parameters:,} learned parameters" in text
    assert ("of which parts learned" in text) == (method == "lora")
    assert ("Probabilities were not calibrated." in text) == (task == "multilabel")


def test_names_cannot_break_a_card(tmp_path: Path) -> None:
    _, module = trained(tmp_path)
    module.class_names = ("a|b", "<script>", "[x](http://y)")
    text = card(module, replace(outcome(), data="a\n# b"))
    assert "one class an image: a\\|b, &lt;script>, [x]\\(http://y)" in text
    assert "# FPT+ on a # b\n" in text


def test_licences_are_those_of_the_page_and_known_by_name_alone(tmp_path: Path) -> None:
    _, module = trained(tmp_path)
    assert module.specification is not None
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/encoders.md").read_text().splitlines() if "|" in line]
    by_name = {row[0].strip(): row[2].strip(" `") for row in rows if row[-1].strip() == "by name"}
    licences = {row[0].strip(): row[1].strip() for row in rows if len(row) == 4}
    assert len(by_name) == 4
    for weights, name in by_name.items():
        asked = replace(module.specification, weights=f"timm:{name}")
        found = encoder_licence(asked)
        assert found.split(",")[0].replace("-", " ").lower() in licences[weights].replace("-", " ").lower()
        module.specification = asked
        front = yaml.safe_load(shared_card(card(module), module, True).split("---")[1])
        assert front["base_model"] == f"timm/{name}"
        assert front["license"] == timm.get_pretrained_cfg(name).license
        assert "license" not in yaml.safe_load(shared_card(card(module), module, False).split("---")[1])
        own = card(module).replace("tags:", "license: mit\ntags:")
        assert yaml.safe_load(shared_card(own, module, True).split("---")[1])["license"] == "mit"
        assert yaml.safe_load(shared_card("# mine", module, True).split("---")[1]) == front
    for weights in ("sha256:0123", "hf-hub:a/b", "timm:gone"):
        assert "not known here" in encoder_licence(replace(module.specification, weights=weights))
