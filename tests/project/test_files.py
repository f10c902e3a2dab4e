"""Tables that spreadsheets open: names that they would run as formulas, and names of any characters."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpt_lightning.cli.callbacks import write_confusion
from fpt_lightning.data.manifest import Manifest, Sample
from fpt_lightning.data.sources import read_manifest
from fpt_lightning.errors import OutputError
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.report import write_report
from fpt_lightning.evaluation.scores import evaluate
from fpt_lightning.files import keep_beside, read_rows, whole_file, write_rows

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''+x"]
PLAIN = ["-1", "+2.5", "-1e-3", "a=b", "", "'quoted'", "-inf", "x", "'"]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_written_as_text_and_read_as_they_were(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_rows(path, [["image", text], [text, 3]])
    with path.open(newline="") as file:
        header, row = csv.reader(file)
    assert header[1] == row[0] == f"'{text}"
    (found,) = read_rows(path, "manifest")
    assert dict(found) == {"image": text, text: "3"}


@pytest.mark.parametrize("text", PLAIN)
def test_what_no_spreadsheet_runs_stays_as_it_is(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_rows(path, [["a", "b"], [text, text]])
    assert list(csv.reader(path.open(newline="")))[1] == [text, text]
    assert dict(read_rows(path, "manifest")[0]) == {"a": text, "b": text}


def test_a_file_appears_whole_in_a_new_folder_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "table.csv"
    write_rows(path, [["a"], ["1"]])

    def stop() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert path.read_text() == "a\n1\n"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OutputError, match=r"the folder .*below cannot be made: .*Give another place"):
        write_rows(path / "below" / "other.csv", [["a"]])
    with pytest.raises(OutputError, match=r"deep cannot be written: Is a directory"):
        write_rows(path.parent, [["a"]])


def test_what_would_be_replaced_is_kept_beside(tmp_path: Path) -> None:
    assert keep_beside(tmp_path / "best") is None
    for number in (1, 2):
        (tmp_path / "best").mkdir()
        assert keep_beside(tmp_path / "best") == tmp_path / f"best-{number}"
    (tmp_path / "config.yaml").write_text("a: 1")
    assert keep_beside(tmp_path / "config.yaml") == tmp_path / "config-1.yaml"


NAMES = ("$x_1$ $", '<b>bold</b> & "q"', "two\nlines", "=1+1")


def test_classes_of_any_name(tmp_path: Path) -> None:
    """From predictions to files, pictures and the report, and back."""
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(4), 60)
    ids = tuple(f"-{i:02d}.png" for i in range(60))
    predictions = Predictions("single-label", ids, rng.integers(0, 4, 60), scores, NAMES)
    predictions.write(tmp_path / "predictions.csv")
    again = Predictions.read(tmp_path / "predictions.csv")
    assert (again.classes, again.ids) == (NAMES, ids)
    np.testing.assert_array_equal(again.labels, predictions.labels)
    write_confusion(tmp_path, predictions)
    assert Image.open(tmp_path / "confusion_matrix.png").size[0] > 100
    evaluation = evaluate(predictions)
    write_report(tmp_path / "report.html", predictions, evaluation, title="a <b> & c")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; " in page
    assert "<b>bold" not in page
    assert "$x_1$ $" in page


def test_a_manifest_of_such_names_is_read_as_it_was_written(tmp_path: Path) -> None:
    ids, splits = [f"{start}{i}.png" for i, start in enumerate("=+-@a")], ("train", "train", "val", "test", "test")
    samples = [Sample(id, i % 2, split=splits[i], group=f"={i}") for i, id in enumerate(ids)]
    for id in ids:
        (tmp_path / id).write_bytes(id.encode())
    manifest = Manifest(tmp_path, tuple(sorted(samples, key=lambda sample: sample.id)), ("+a", "=b"))
    manifest.write(tmp_path / "split.csv")
    assert read_manifest(tmp_path, "split.csv") == manifest
