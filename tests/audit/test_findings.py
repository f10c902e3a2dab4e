"""What an audit finds: statistics against scikit-learn or by hand, and faults that were put into data on purpose."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from dicom_files import dataset, write
from fpt_lightning.audit import neighbours, shortcuts
from fpt_lightning.audit.duplicates import near_duplicates
from fpt_lightning.audit.findings import Audit, find
from fpt_lightning.audit.labels import Doubt, doubtful_labels
from fpt_lightning.audit.neighbours import directions, nearest
from fpt_lightning.audit.page import write_audit_page
from fpt_lightning.audit.probe import PENALTY, out_of_fold, out_of_fold_numbers
from fpt_lightning.audit.shortcuts import OTHERS, Told, find_shortcuts, questions
from fpt_lightning.data.filed import filed
from fpt_lightning.data.image_files import ImageFiles
from fpt_lightning.data.manifest import Kind, Manifest, Sample
from fpt_lightning.errors import ConfigurationError

COUNT, WIDTH = 120, 16
LABELS = np.arange(COUNT) % 3
FOLDS = np.arange(COUNT) // 3 % 5
ALONE = np.arange(COUNT)  # each image is a group


def separable(labels: NDArray[Any], distance: float = 4.0, seed: int = 0) -> NDArray[np.float32]:
    """Features of which the first tell the label."""
    features = np.random.default_rng(seed).normal(size=(len(labels), WIDTH))
    features[np.arange(len(labels)), labels] += distance
    return features.astype(np.float32)


def samples(labels: Sequence[int], **changes: Any) -> tuple[Sample, ...]:
    return tuple(Sample(f"{i:03d}.png", int(label), split="train", **changes) for i, label in enumerate(labels))


def textures(count: int, size: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures (count, size, size, 3) that are unlike each other."""
    noise = np.random.default_rng(seed).normal(size=(count, size, size))
    smooth = gaussian_filter(noise, (0, 1.5, 1.5))
    grey = (128 + 40 * smooth / smooth.std((1, 2), keepdims=True)).clip(0, 255)
    return np.repeat(grey[..., None], 3, axis=3).astype(np.uint8)


# -------------------------------------------------------------------------------------------------- nearest and probes


def test_nearest_images_are_of_other_groups_and_those_that_all_cosines_give(monkeypatch: pytest.MonkeyPatch) -> None:
    features = directions(separable(LABELS))
    groups = np.arange(COUNT) // 2
    cosines = features @ features.T
    cosines[groups[:, None] == groups] = -np.inf
    monkeypatch.setattr(neighbours, "_BLOCK", 7 * COUNT)  # 17 blocks of 7 rows, and one of one
    found = nearest(features, 4, groups)
    np.testing.assert_array_equal(found.rows, np.argsort(-cosines, 1, kind="stable")[:, :4])
    np.testing.assert_allclose(found.cosines, np.sort(cosines, 1)[:, :-5:-1], rtol=1e-5)


def test_where_there_are_too_few_others_rows_are_missing() -> None:
    found = nearest(directions(separable(LABELS[:3])), 4, np.array([0, 0, 1]))
    assert found.rows.tolist() == [[2, -1, -1, -1], [2, -1, -1, -1], found.rows[2].tolist()]
    assert {*found.rows[2].tolist()} == {0, 1, -1}
    assert np.isneginf(found.cosines[0, 1:]).all()


def test_probes_give_what_scikit_learn_gives() -> None:
    features = separable(LABELS, distance=1.0)
    found, numbers = out_of_fold(features, LABELS, 3, FOLDS), out_of_fold_numbers(features, LABELS * 10.0, FOLDS)
    for fold in range(5):
        held = fold == FOLDS
        fit = ~held
        scaler = StandardScaler().fit(features[fit])
        known, unknown = scaler.transform(features[fit]), scaler.transform(features[held])
        logistic = LogisticRegression(C=1 / (PENALTY * fit.sum()), tol=1e-6).fit(known, LABELS[fit])
        np.testing.assert_allclose(found[held], logistic.predict_proba(unknown), atol=0.005)
        ridge = Ridge(alpha=PENALTY * fit.sum()).fit(known, LABELS[fit] * 10.0)
        np.testing.assert_allclose(numbers[held], ridge.predict(unknown), atol=0.002)


def test_one_group_alone_teaches_nothing() -> None:
    """All its images are in one fold."""
    features, one = separable(LABELS), np.zeros(COUNT, np.int64)
    np.testing.assert_array_equal(out_of_fold(features, LABELS, 3, one), np.full((COUNT, 3), 1 / 3))
    np.testing.assert_array_equal(out_of_fold_numbers(features, LABELS * 1.0, one), np.ones(COUNT))
    of_one = tuple(replace(sample, group="p") for sample in samples(LABELS))
    found = find(Manifest(Path("root"), of_one, ("a", "b", "c")), features, lambda rows: textures(len(rows)), {})
    assert not found.doubts
    assert not found.outliers


# ----------------------------------------------------------------------------------------------------- near-duplicates


def test_copies_of_a_picture_are_found_and_pictures_that_features_take_for_one_are_not() -> None:
    copies = textures(40)
    copies[31] = (255 * (copies[1] / 255) ** 0.7).astype(np.uint8)  # brighter
    copies[32] = np.roll(copies[2], (2, 3), (0, 1))
    copies[33] = copies[3][:, ::-1]
    copies[34] = np.asarray(Image.fromarray(copies[4]).resize((48, 48)).resize((64, 64)))
    features = separable(LABELS[:40], distance=0.0)
    features[31:36] = features[1:6] + 0.05  # 35 and 5 differ
    found = near_duplicates(directions(features), lambda rows: copies[list(rows)])
    assert {(pair.first, pair.second) for pair in found} == {(1, 31), (2, 32), (3, 33), (4, 34)}
    assert [pair.first for pair in found if pair.mirrored] == [3]
    assert [pair.match for pair in found] == sorted((pair.match for pair in found), reverse=True)


def alike(count: int, own: float) -> NDArray[np.uint8]:
    """Pictures of which most is the same, such as the rim of fundus photographs, and a share is each one's own."""
    return (own * textures(count, seed=1) + (1 - own) * textures(1)).astype(np.uint8)


def test_what_all_images_share_makes_no_duplicates() -> None:
    copies = alike(30, 0.15)
    pointing = np.full((30, WIDTH), WIDTH**-0.5, np.float32)  # all alike
    assert not near_duplicates(pointing, lambda rows: copies[list(rows)])


def test_a_mirror_image_is_found_beside_what_all_images_share() -> None:
    copies = alike(30, 0.5)
    copies[7] = copies[3][:, ::-1]
    pointing = np.full((30, WIDTH), WIDTH**-0.5, np.float32)
    pointing[[3, 7]] *= -1
    (pair,) = near_duplicates(pointing, lambda rows: copies[list(rows)])
    assert (pair.first, pair.second, pair.mirrored) == (3, 7, True)


# -------------------------------------------------------------------------------------------------------------- labels


def doubts(
    kind: Kind, of: Sequence[Sample], classes: Sequence[str], features: NDArray[np.float32], ordered: bool = False
) -> list[Doubt]:
    rows = nearest(directions(features), 10, np.arange(len(of))).rows
    return doubtful_labels(of, kind, classes, ordered, features, rows, FOLDS[: len(of)])


def test_labels_that_were_exchanged_come_first() -> None:
    features, given = separable(LABELS, 6.0), LABELS.copy()
    wrong = [4, 17, 50, 81, 99, 110]
    given[wrong] = (given[wrong] + 1) % 3
    found = doubts("single-label", samples(given), ["a", "b", "c"], features)
    assert {doubt.row for doubt in found[: len(wrong)]} == {*wrong}
    first = found[0]
    assert (first.given, first.suggested) == ("abc"[given[first.row]], "abc"[LABELS[first.row]])
    assert first.probe[1] > 0.8 > 0.2 > first.probe[0]
    assert first.nearest[1] > 0.8 > 0.2 > first.nearest[0]


def test_a_rare_class_is_not_doubted_for_its_rarity() -> None:
    labels = np.where(np.arange(COUNT) % 20 == 0, 1, 0)  # 6 of 120
    assert not [d for d in doubts("single-label", samples(labels), ["a", "b"], separable(labels)) if labels[d.row]]


def test_grades_are_doubted_from_two_apart_on() -> None:
    features, given = separable(LABELS), LABELS.copy()
    near, far = int(np.flatnonzero(LABELS == 0)[5]), int(np.flatnonzero(LABELS == 0)[9])
    given[near], given[far] = 1, 2
    found = doubts("single-label", samples(given), ["0", "1", "2"], features, ordered=True)
    assert [doubt.row for doubt in found] == [far]


def test_several_labels_and_numbers_are_doubted_too() -> None:
    features = separable(LABELS)
    targets = np.eye(3)[LABELS]
    targets[7, LABELS[7]], targets[8, 0] = 0, np.nan
    several = tuple(replace(s, targets=tuple(t)) for s, t in zip(samples([-1] * COUNT), targets, strict=True))
    (doubt,) = doubts("multi-label", several, ["x", "y", "z"], features)
    assert (doubt.row, doubt.name, doubt.given, doubt.suggested) == (7, "xyz"[LABELS[7]], "0", "1")
    numbers = LABELS * 10 + np.random.default_rng(0).normal(size=COUNT)
    numbers[33] += 25
    ages = tuple(replace(s, targets=(float(n),)) for s, n in zip(samples([-1] * COUNT), numbers, strict=True))
    assert doubts("regression", ages, ["age"], features)[0].row == 33


def test_unknown_labels_are_not_doubted() -> None:
    given = LABELS.copy()
    given[::10] = -1
    assert not {doubt.row for doubt in doubts("single-label", samples(given), list("abc"), separable(LABELS))} & {
        *range(0, COUNT, 10)
    }


# ----------------------------------------------------------------------------------------------------------- shortcuts


def told(
    attributes: dict[str, Sequence[str]], features: NDArray[np.float32], labels: NDArray[np.int64] = LABELS
) -> dict[tuple[bool, str], Told]:
    names = list("abc")[: int(labels.max()) + 1]
    asked = questions(samples(labels), "single-label", names)
    found = find_shortcuts(attributes, asked, features, np.arange(len(labels)), np.arange(len(labels)) // 3 % 5)
    return {(each.from_features, each.told): each for each in found}


def test_the_auc_is_of_pairs_within_strata() -> None:
    rng = np.random.default_rng(0)
    scores, positive, strata = rng.random(COUNT), rng.random(COUNT) < 0.4, np.arange(COUNT) % 4
    scores += 10 * strata  # which would rule an AUC of all
    found = shortcuts._auc(scores, positive, np.ones(COUNT, bool), strata, ALONE)
    aucs = [roc_auc_score(positive[strata == i], scores[strata == i]) for i in range(4)]
    pairs = [positive[strata == i].sum() * (~positive[strata == i]).sum() for i in range(4)]
    assert found.value == pytest.approx(np.average(aucs, weights=pairs))
    assert 0 <= found.low < found.value < found.high <= 1


def test_an_attribute_that_goes_with_a_class_rings_and_others_do_not() -> None:
    rng = np.random.default_rng(0)
    sizes = ["512 x 512" if label else f"{400 + i} x {400 + i}" for i, label in enumerate(LABELS)]  # all of a differ
    found = told({"image size": sizes}, separable(LABELS))
    assert found[False, "a"].rings
    assert found[False, "a"].auc.low > 0.99
    assert found[False, "a"].sentence().startswith("Image size alone tells a from the rest with an AUC of 1.000")
    assert not found[False, "b"].rings
    others = told({"site": list(rng.choice(["x", "y"], COUNT)), "split": list(rng.choice(["train", "test"], COUNT))},
                  separable(LABELS))  # fmt: skip
    assert len(others) > 4
    assert not any(each.rings for each in others.values())


def test_features_that_tell_the_split_ring() -> None:
    split = np.arange(COUNT) // 7 % 2
    features = separable(LABELS)
    features[:, 9] += 4 * split
    found = told({"split": ["train" if own else "test" for own in split]}, features)
    (each,) = (each for (from_features, _), each in found.items() if from_features)
    assert each.rings
    assert each.sentence().startswith("The features tell split")


def test_features_that_know_the_label_alone_do_not_tell_what_goes_with_it() -> None:
    """Within a class nothing is left to tell."""
    labels = np.arange(300) % 2
    site = np.where(np.random.default_rng(1).random(300) < 0.8, labels, 1 - labels)
    found = told({"site": ["xy"[own] for own in site]}, separable(labels, 6.0), labels)
    assert found[False, "b"].auc.value == pytest.approx(0.8, abs=0.06)
    (each,) = (each for (from_features, _), each in found.items() if from_features)
    assert each.auc.low < 0.5 < each.auc.high


def test_rare_values_are_together_and_too_few_have_no_auc() -> None:
    assert not told({"file type": [".png"] * COUNT}, separable(LABELS))  # one value
    assert not told({"file type": [".jpg"] * 9 + [".png"] * (COUNT - 9)}, separable(LABELS))[False, "a"].rings
    found = told({"file type": [".jpg"] * 9 + [".png"] * (COUNT - 9)}, separable(LABELS))
    assert (True, OTHERS) not in found  # nine images
    few = np.where(np.arange(COUNT) < 9, 1, 0)
    assert not told({"site": list("xy" * (COUNT // 2))}, separable(few), few).keys() & {(False, "b")}


# ------------------------------------------------------------------------------------------------- how images are filed


def test_headers_say_how_images_are_filed(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "a.JPG", "JPEG")
    Image.fromarray(np.zeros((20, 10), np.uint16)).save(tmp_path / "b.png")
    write(tmp_path / "c.dcm", dataset(np.zeros((8, 6), np.uint16), Modality="DX", Manufacturer="Maker"))
    pages = [Image.new("RGB", (6, 4)), Image.new("RGB", (4, 4))]
    pages[0].save(tmp_path / "d.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "e.png").write_bytes(b"no picture")
    ids = ["a.JPG", "b.png", "c.dcm", "d.tif#2", "e.png"]
    found = filed(ImageFiles.look(tmp_path, ids), ids)
    assert found["file type"] == [".jpg", ".png", ".dcm", ".tif", ".png"]
    assert found["image size"] == ["20 x 30", "20 x 10", "8 x 6", "4 x 4", ""]
    assert found["pixels"] == ["600", "200", "48", "16", ""]
    assert found["aspect ratio"] == ["1.5", "0.5", "0.75", "1", ""]
    assert found["colour mode"] == ["L", "I;16", "MONOCHROME2, 16 bits", "RGB", ""]
    assert found["modality"] == ["", "", "DX", "", ""]
    assert found["manufacturer"][2] == "Maker"
    assert found["file size (bytes)"][4] == "10"


# ------------------------------------------------------------------------------------------------------- all, and shown


def audited(features: NDArray[np.float32], names: Sequence[str] = ("a", "b", "c"), **changes: Any) -> Audit:
    splits = np.array(["train", "val", "test"])[ALONE % 5 // 2]
    own = tuple(replace(s, split=str(split)) for s, split in zip(samples(LABELS), splits, strict=True))
    pictures = textures(COUNT)
    pictures[4] = pictures[3]
    return find(Manifest(Path("root"), own, tuple(names)), features, lambda rows: pictures[list(rows)], {}, **changes)


def test_an_audit_sums_up_what_it_found() -> None:
    features = separable(LABELS)
    features[4] = features[3]  # one picture with two labels, in two splits
    features[60] = -20 * features[:3].mean(0)
    found = audited(features)
    assert [(pair.first, pair.second) for pair in found.pairs] == [(3, 4)]
    assert found.leaks == 1
    assert found.outliers[0] == 60
    assert found.basis() == "120 images; no groups, such as patients, are known."
    lines = found.table(80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["near-duplicates", "1", "pair", "1", "across", "splits", "or", "groups"]
    assert lines[-2].startswith("No attribute alone tells a label")


def test_the_map_is_of_principal_components() -> None:
    features = separable(LABELS)
    centred = features - features.mean(0)
    _, values, vectors = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    found = audited(features)
    np.testing.assert_allclose(np.abs(found.places), np.abs(centred @ vectors[:2].T), atol=1e-3)
    assert found.axes[0] == f"component 1, {values[0] ** 2 / (values**2).sum():.0%} of the variance"


def test_umap_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpt_lightning.audit.findings.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="needs umap-learn: pip install umap-learn"):
        audited(separable(LABELS), map="umap")
    monkeypatch.setattr("fpt_lightning.audit.findings.find_spec", lambda name: object())
    made = SimpleNamespace(fit_transform=lambda features: features[:, :2])
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=lambda **settings: made))  # type: ignore[arg-type]
    found = audited(separable(LABELS), map="umap")
    np.testing.assert_allclose(found.places, directions(separable(LABELS))[:, :2], rtol=1e-6)


def test_the_page_shows_names_as_text_and_needs_nothing_else(tmp_path: Path) -> None:
    features = separable(LABELS)
    features[4] = features[3]
    found = audited(features, ("<i>a</i>", "b & c", "c"))
    pictures = textures(COUNT)
    write_audit_page(tmp_path / "audit.html", found, lambda rows: pictures[list(rows)], "<Title>", {"encoder": "<e>"})
    page = (tmp_path / "audit.html").read_text()
    assert "<i>a</i>" not in page
    for shown in (
        "&lt;Title&gt;",
        "&lt;e&gt;",
        "two splits",
        "label &lt;i&gt;a&lt;/i&gt; and b &amp; c",
        "img-src data:",
    ):
        assert shown in page
    assert page.count('src="data:image/jpeg;base64,') >= 2
    assert "<script" not in page
    assert "<p>No attribute alone tells a label" in page  # an alarm would be in a box
    assert "http" not in page.replace("http-equiv", "")
