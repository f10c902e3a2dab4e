"""The metrics against scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor

from fpt_lightning.errors import ConfigurationError
from fpt_lightning.evaluation.metrics import (
    MacroAUROC,
    PerformanceEfficiency,
    classification_metrics,
    performance_efficiency,
)

NAMES = {"auc", "auc_classes", "accuracy", "balanced_accuracy", "f1", "precision", "recall", "kappa"}


def draw(classes: int, count: int = 90, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities that tell the classes apart a little, and labels that are not balanced."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    labels = rng.choice(classes, count, p=share)
    labels[:classes] = range(classes)
    logits = rng.standard_normal((count, classes))
    logits[range(count), labels] += 0.8
    return torch.tensor(logits, dtype=torch.float32).softmax(-1), torch.tensor(labels)


def computed(probabilities: Tensor, labels: Tensor, batch_size: int = 1000) -> dict[str, float]:
    collection = classification_metrics(probabilities.shape[1], "val_")
    for start in range(0, len(labels), batch_size):
        collection.update(probabilities[start : start + batch_size], labels[start : start + batch_size])
    return {name.removeprefix("val_"): float(value) for name, value in collection.compute().items()}


def one_vs_rest(probabilities: Tensor, labels: Tensor) -> list[float]:
    """AUC of every class that has one."""
    found = [(labels == label).numpy() for label in range(probabilities.shape[1])]
    return [
        sk.roc_auc_score(positive, probabilities[:, label].numpy())
        for label, positive in enumerate(found)
        if 0 < positive.sum() < len(labels)
    ]


@pytest.mark.parametrize("batch_size", [1000, 16, 1])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_metrics_equal_scikit_learn(classes: int, batch_size: int) -> None:
    probabilities, labels = draw(classes)
    scores, true, predicted = probabilities.numpy(), labels.numpy(), probabilities.argmax(1).numpy()
    auc = sk.roc_auc_score(true, scores[:, 1] if classes == 2 else scores, multi_class="ovr", average="macro")
    assert computed(probabilities, labels, batch_size) == pytest.approx(
        {
            "auc": auc,
            "auc_classes": classes,
            "accuracy": sk.accuracy_score(true, predicted),
            "balanced_accuracy": sk.balanced_accuracy_score(true, predicted),
            "f1": sk.f1_score(true, predicted, average="macro"),
            "precision": sk.precision_score(true, predicted, average="macro"),
            "recall": sk.recall_score(true, predicted, average="macro"),
            "kappa": sk.cohen_kappa_score(true, predicted),
        },
        abs=1e-6,
    )


def test_kappa_is_weighted_where_classes_are_grades() -> None:
    probabilities, labels = draw(5)
    grades = classification_metrics(5, "", ordered=True)
    found = grades(probabilities, labels)
    weighted = sk.cohen_kappa_score(labels.numpy(), probabilities.argmax(1).numpy(), weights="quadratic")
    assert float(found["quadratic_kappa"]) == pytest.approx(weighted, abs=1e-6)
    assert set(found) == NAMES - {"kappa"} | {"quadratic_kappa"}


def test_ties_count_half() -> None:
    """Probabilities in coarse steps, as half precision gives them."""
    probabilities, labels = draw(3)
    coarse = (probabilities * 4).round() / 4
    assert computed(coarse, labels)["auc"] == pytest.approx(np.mean(one_vs_rest(coarse, labels)), abs=1e-6)


def test_an_absent_class_is_left_out_of_the_auc() -> None:
    probabilities, labels = draw(5)
    probabilities, labels = probabilities[labels != 3], labels[labels != 3]
    scored = one_vs_rest(probabilities, labels)
    assert len(scored) == 4
    result = computed(probabilities, labels, 16)
    assert result["auc"] == pytest.approx(np.mean(scored), abs=1e-6)
    assert result["auc_classes"] == 4


def test_an_absent_class_is_left_out_of_the_balanced_accuracy() -> None:
    probabilities, labels = draw(5)
    probabilities, labels = probabilities[labels != 3], labels[labels != 3]
    predicted = probabilities.argmax(1)
    assert (predicted == 3).any()  # wrongly, and yet the class has no recall
    recalls = [float((predicted[labels == label] == label).float().mean()) for label in (0, 1, 2, 4)]
    assert computed(probabilities, labels)["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-6)


def test_one_class_alone_has_no_auc() -> None:
    probabilities, labels = draw(3)
    only = labels == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = computed(probabilities[only], labels[only])
    assert np.isnan(result["auc"])
    assert result["auc_classes"] == 0
    share = float((probabilities[only].argmax(1) == 2).float().mean())
    assert result["accuracy"] == result["balanced_accuracy"] == pytest.approx(share)


def test_auc_is_not_the_mean_of_batches() -> None:
    probabilities, labels = draw(3)
    batches = [np.mean(one_vs_rest(probabilities[i : i + 16], labels[i : i + 16])) for i in range(0, 90, 16)]
    assert abs(computed(probabilities, labels, 16)["auc"] - np.mean(batches)) > 1e-3


def test_names_carry_the_prefix_and_reset_forgets() -> None:
    collection = classification_metrics(3, "test_")
    collection.update(*draw(3, seed=1))
    collection.reset()
    collection.update(*draw(3))
    values = collection.compute()
    assert set(values) == {f"test_{name}" for name in NAMES}
    assert {k.removeprefix("test_"): float(v) for k, v in values.items()} == pytest.approx(computed(*draw(3)))
    assert all(value.ndim == 0 for value in values.values())


@pytest.mark.parametrize(
    ("auc", "ratio", "expected"),  # table 1: PPE of full fine-tuning, FPT and FPT+; PME of FPT+ and linear probing
    [
        (88.82, 1.0, 65.73),
        (86.40, 0.0181, 85.73),
        (87.12, 0.0103, 86.73),
        (87.12, 736 / 23128, 85.94),
        (83.28, 3416 / 23128, 78.44),
    ],
)
def test_efficiency_is_the_papers(auc: float, ratio: float, expected: float) -> None:
    assert performance_efficiency(auc, ratio) == pytest.approx(expected, abs=0.006)
    metric = PerformanceEfficiency(MacroAUROC(3), ratio)
    probabilities, labels = torch.rand(20, 3).softmax(-1), torch.arange(20) % 3
    score = MacroAUROC(3)
    score.update(probabilities, labels)
    batch = metric(probabilities, labels)
    torch.testing.assert_close(metric.compute(), score.compute() * expected / auc, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch, metric.compute())
    metric.reset()
    metric.update(probabilities[:10], labels[:10])
    metric.update(probabilities[10:], labels[10:])
    torch.testing.assert_close(metric.compute(), batch)


def test_efficiency_of_a_negative_ratio() -> None:
    with pytest.raises(ConfigurationError, match=r"the ratio is -0\.1"):
        performance_efficiency(80.0, -0.1)
