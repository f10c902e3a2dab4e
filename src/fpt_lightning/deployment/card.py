"""The model card: one page of Markdown, with the front matter that Hugging Face reads, on what a model is and is worth.

It names no patient and no image, and no place on the machine that it was made on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm

from fpt_lightning.deployment.checkpoints import as_checkpoint
from fpt_lightning.deployment.hub import README
from fpt_lightning.deployment.predictor import NOTICE
from fpt_lightning.encoder.weight_files import OF_FILES
from fpt_lightning.evaluation.conformal import DEFAULT_COVERAGE, shortage
from fpt_lightning.evaluation.estimates import label, number
from fpt_lightning.evaluation.report import SplitSummary
from fpt_lightning.evaluation.scores import Evaluation
from fpt_lightning.files import write_text
from fpt_lightning.methods import ClassificationModule
from fpt_lightning.methods.ensemble import EnsembleModule
from fpt_lightning.methods.record import tensors_digest
from fpt_lightning.methods.tuning import EncoderModule
from fpt_lightning.store.specification import FeatureSpecification

CARD = "card.md"
_TAGS = ("fpt-lightning", "medical-imaging", "vision-transformer")
_USE = """## Use

```python
from fpt_lightning import Predictor

predictor = Predictor.from_pretrained("organisation/name")  # of the hub, or this folder
predictions = predictor("images/")
```
"""
_KINDS = {
    "multiclass": "one class an image",
    "multilabel": "several labels an image",
    "ordinal": "grades from low to high",
    "coral": "grades from low to high",
    "regression": "a number",
}


@dataclass(frozen=True)
class Outcome:
    """What a test adds to what a model knows of itself.

    Attributes:
        evaluation: of the images.
        data: name of the data set.
        external: whether its images are of elsewhere than those trained on.
        splits: what each holds.
        source: where the splits came from, and what is in several of them.
        cases: evaluation of cases, where there are any.
        epoch: that was tested, from 1; None where unknown.
    """

    evaluation: Evaluation
    data: str
    external: bool = False
    splits: Mapping[str, SplitSummary] = field(default_factory=dict)
    source: str = ""
    cases: Evaluation | None = None
    epoch: int | None = None


def write_card(path: str | Path, module: ClassificationModule, test: Outcome | None = None) -> None:
    """Write the card of a trained model, whole or not at all.

    Args:
        path: of the file.
        module: trained, or loaded from a checkpoint.
        test: of it; None where it was not tested.
    """
    write_text(Path(path), card(module, test))


def card(module: ClassificationModule, test: Outcome | None = None) -> str:
    """The card of a trained model, as text.

    Args:
        module: trained, or loaded from a checkpoint.
        test: of it; None where it was not tested.
    """
    title = f"{module.LABEL} on {test.data}" if test is not None else module.LABEL
    sections = [
        front_matter(module),
        f"# {_plain(title)}",
        f"> {NOTICE}",
        "**Intended use: not stated. Whoever shares this model writes here for whom it is, on which images, for which "
        "decision, and what must not be done with it; and under which licence.**",
        f"## Model\n\n{_table(['', ''], list(_model_rows(module, test)))}",
        *([] if test is None else [_data(test), _results(test)]),
        "## Limits\n\n" + "\n".join(f"- {each}" for each in _limits(module, test)),
    ]
    return "\n\n".join(sections) + "\n"


def card_beside(path: str | Path, module: ClassificationModule) -> str:
    """The card that lies beside a checkpoint, or in a model's folder, if it is of that model; else one without a test.

    Args:
        path: of the checkpoint or folder.
        module: that it holds.
    """
    beside = Path(path) / README if Path(path).is_dir() else Path(path).parent / CARD
    text = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else ""
    return text.split(f"\n\n{_USE}")[0].rstrip() + "\n" if weights_digest(module) in text else card(module)


def shared_card(text: str, module: ClassificationModule, with_encoder: bool) -> str:
    """A card as that of a folder to share, which says how the model is used.

    Args:
        text: of ``card``.
        module: that it is of.
        with_encoder: whether the encoder's weights are in the folder, whose licence then holds for it where the card
            names none.
    """
    if not text.startswith("---\n"):
        text = f"{front_matter(module)}\n\n{text}"
    known = _known_weights(module.specification)
    if with_encoder and known is not None and known.license and "\nlicense:" not in text:
        text = text.replace("\n---\n", f"\nlicense: {json.dumps(known.license)}\n---\n", 1)
    weights = "" if module.specification is None else module.specification.weights
    if with_encoder:
        where = "The encoder's weights are in `encoder.safetensors`, under their own licence."
    elif weights.startswith(OF_FILES):
        where = "The encoder's weights are not here: give their file as `pretrained`."
    else:
        where = "The encoder's weights are not here: timm has them by its name."
    return f"{text.rstrip()}\n\n{_USE}\n{where}\n"


def front_matter(module: ClassificationModule) -> str:
    """The part of a card that Hugging Face reads, as YAML between two lines of dashes."""
    lines = ["library_name: fpt-lightning", "pipeline_tag: image-classification"]
    lines += ["tags:", *(f"- {tag}" for tag in _TAGS)]
    known = _known_weights(module.specification)
    if known is not None and known.hf_hub_id:
        lines.append(f"base_model: {json.dumps(known.hf_hub_id)}")
    return "\n".join(["---", *lines, "---"])


def weights_digest(module: ClassificationModule) -> str:
    """SHA-256 of what a checkpoint of the model holds of its weights."""
    return tensors_digest(as_checkpoint(module)["state_dict"])


def encoder_licence(specification: FeatureSpecification | None) -> str:
    """Of the encoder's weights, as timm names it; a sentence where that is not known."""
    weights = "" if specification is None else specification.weights
    if weights == "random":
        return "none needed: untrained"
    known = _known_weights(specification)
    if known is None or not known.license:
        return "not known here: its owners' page says it"
    return f"{known.license}, as timm {timm.__version__} names it; the owners' page holds"


def _known_weights(specification: FeatureSpecification | None) -> Any:
    """timm's configuration of weights that it has by name; None of files, repositories and untrained encoders."""
    kind, _, name = ("" if specification is None else specification.weights).partition(":")
    return timm.get_pretrained_cfg(name) if kind == "timm" and timm.is_model(name.partition(".")[0]) else None


# Sections


def _model_rows(module: ClassificationModule, test: Outcome | None) -> Iterator[list[str]]:
    asked, arguments = module.specification, module.hparams
    outputs = "" if module.task.KIND == "regression" else f": {', '.join(module.output_names)}"
    yield ["task", f"{_KINDS[arguments['task']]}{outputs}"]
    share = f"{100 * module.learnable_ratio:.2f}% of all with the encoder"
    yield ["method", f"{module.LABEL}; {module.learnable_parameters:,} learned parameters, {share}"]
    if asked is not None:
        does = "of which parts learned" if isinstance(module, EncoderModule) else "frozen"
        yield ["encoder", f"{asked.encoder}, {does}; weights {asked.weights}, digest {asked.weights_digest[:16]}"]
        yield ["licence of the encoder's weights", encoder_licence(asked)]
        cropped = ", dark border cropped" if asked.crop_border else ""
        yield ["images", f"{asked.resolution[0]} x {asked.resolution[1]} pixels, {asked.fit}{cropped}"]
    tested = "" if test is None or test.epoch is None else f"epoch {test.epoch}; "
    seed = "" if module._seed is None else f"; seed {module._seed}"
    yield ["training", f"{tested}learning rate {arguments['learning_rate']:g}{seed}"]
    if module.is_calibrated:
        found = str(module.calibration) if len(module.calibrations) == 1 else "of each member"
        yield ["calibration", f"{found}; fitted to validation"]
    names = ("fpt-lightning", "torch", "timm")
    yield ["versions", ", ".join(f"{name} {version(name)}" for name in names) + f"; {date.today().isoformat()}"]
    yield ["learned weights", f"SHA-256 {weights_digest(module)}"]


def _data(test: Outcome) -> str:
    rows, splits = [["images", *(f"{split.images:,}" for split in test.splits.values())]], test.splits.values()
    if any(split.groups is not None for split in splits):
        rows.append(["patients", *("-" if split.groups is None else f"{split.groups:,}" for split in splits)])
    for name in dict.fromkeys(name for split in splits for name in split.classes):
        rows.append([name, *(f"{split.classes.get(name, 0):,}" for split in splits)])
    parts = ["## Data", *([_table(["", *test.splits], rows)] if test.splits else []), test.source]
    return "\n\n".join(part for part in parts if part)


def _results(test: Outcome) -> str:
    parts = ["## Results", *_scores(test.evaluation)]
    if test.cases is not None:
        parts += ["### Cases", *_scores(test.cases)]
    return "\n\n".join(parts)


def _scores(evaluation: Evaluation) -> Iterator[str]:
    yield _plain(evaluation.basis())
    yield _table(["metric", "value [95% interval]"], evaluation.overall_rows())
    if evaluation.per_class:
        metrics = ["auc", "sensitivity", "specificity"]
        heads = ["class", f"{evaluation.unit}s", *(label(metric, 0) for metric in metrics), "threshold"]
        rows = []
        for name, values in evaluation.per_class.items():
            threshold = number(evaluation.thresholds[name]) if name in evaluation.thresholds else "most probable"
            found = (str(values[metric]) for metric in metrics)
            rows.append([name, f"{evaluation.positives[name]:,}", *found, threshold])
        yield _table(heads, rows)
    if evaluation.coverage is not None:
        yield _plain(str(evaluation.coverage))
    if evaluation.notes:
        yield "\n".join(f"- {_plain(note)}" for note in evaluation.notes)


def _limits(module: ClassificationModule, test: Outcome | None) -> Iterator[str]:
    if test is None:
        yield "Not tested: no figure is known of it here."
    else:
        if test.external:
            yield "The test images are of elsewhere than those trained on, and of that place alone."
        else:
            yield "The test images are of the same data set as those trained on: another hospital was not tried."
        yield "Subgroups, such as of sex, age or site, were not scored here: `fpt-lightning evaluate --by` does."
        if test.evaluation.groups is None:
            yield "No patients are known: images of one may be in training and test, and intervals take them as many."
    if module.task.KIND != "regression" and not module.is_calibrated:
        yield "Probabilities were not calibrated."
    if why := shortage(module.nonconformity, DEFAULT_COVERAGE):
        yield f"No prediction sets for {DEFAULT_COVERAGE:.0%}: {why}."
    if isinstance(module, EnsembleModule):
        yield "An ensemble of the models of a cross-validation: each figure is of the models of one fold, not of all."
    yield "What the model looks at was not examined here: `fpt-lightning explain` does."


# Pieces


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_plain, row)) + " |" for row in lines)


def _plain(text: str) -> str:
    """Text on one line of Markdown that is no link, no HTML and no border of a table."""
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("<", "&lt;").replace("![", "!\\[").replace("](", "]\\(")
