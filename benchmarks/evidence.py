"""What methods are worth with real weights: five patient-wise folds, several seeds, rates searched for each alike.

    python benchmarks/evidence.py --weights FILE.safetensors --fundus DIR --chest DIR --out runs/evidence
    python benchmarks/evidence.py --weights FILE.safetensors --fundus DIR --chest DIR --out runs/evidence --write

``DIR/labels.csv`` has the columns ``image``, ``grade``, ``maculopathy`` and ``patient`` (fundus photographs with grades
of diabetic retinopathy), or ``image``, ``label`` and ``patient_id`` (chest X-rays). Each of five folds tests once and
the next one validates; learning rate and weight decay are chosen for each fold by its validation images with seed 0,
and so is the epoch. The rates go on upwards while the highest is the best, and decays are tried at the best rate; of
methods with the encoder inside, which take long, the first fold chooses the rate for all; studies that are not searched
have each method's own rate. The folds' test predictions are pooled, metrics are averaged over the seeds, and intervals
and differences to FPT+ are of resamples of patients. The rows ``best_of_four`` take for each fold and seed the method
with the best validation.

Every cell is one ``fpt-lightning fit`` (``cells.py``): the same command goes on where it was stopped, and several of
them with other ``--tasks`` or ``--methods`` may run at once. ``{out}/records`` has what the finished cells came to
(``records.py``), from which ``--write`` makes ``results/evidence_{data}_{study}.json`` and ``.md`` of all that is
finished; ``evidence_figures.py`` draws them. The records of the committed tables are in ``results/evidence``: copied to
``{out}/records`` they need not be run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candidates import CANDIDATES, SideFromEncoder
from cells import Cell
from environment import RESULTS, environment, write_result
from fpt_lightning.evaluation.measures import measure
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.resampling import interval, mean_of_known, resampled_weights
from fpt_lightning.files import Row, read_rows, write_rows
from fpt_lightning.methods import METHODS, ClassificationModule, QueryTokensModule
from fpt_lightning.methods.features import FeatureModule
from fpt_lightning.methods.tuning import build_on_meta
from fpt_lightning.progress import significant
from fpt_lightning.store.index import StoreIndex
from records import Record, Records, record

ENCODER, MEAN, STD = "vit_small_patch14_dinov2", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIDE = {"side_resolution": 126}  # a multiple of the patch size
MODULES: dict[str, type[ClassificationModule]] = {**METHODS, **CANDIDATES}


class Entry(NamedTuple):
    """A row of the tables.

    Attributes:
        method: by short name, of the library or of ``candidates.py``.
        label: for people.
        model: options of the method.
        data: options of the data.
        store: what distinguishes its store's name, where it needs one of its own.
        rates: learning rates of its own, between which the first fold chooses for all.
        epochs: of its own, where it needs others.
    """

    method: str
    label: str
    model: Mapping[str, Any] = {}
    data: Mapping[str, Any] = {}
    store: str = ""
    rates: tuple[float, ...] = ()
    epochs: int | None = None

    @property
    def stored(self) -> bool:
        """Whether the method learns from a store."""
        return issubclass(MODULES[self.method], FeatureModule)

    @property
    def own_rate(self) -> float:
        """The method's learning rate by default."""
        return float(MODULES[self.method].defaults()["learning_rate"])


def _part(label: str, model: Mapping[str, Any], store: str = "", **data: Any) -> Entry:
    """Query tokens with one setting changed, at one learning rate."""
    return Entry("query_tokens", label, model, data, store, rates=(1e-3,))


def _side(resolution: int) -> Entry:
    """FPT+ as published, whose side network must learn, with side images of so many pixels, at one learning rate."""
    model = {"side_resolution": resolution, "prompt_head": False}
    return Entry("fpt_plus", f"FPT+, side images of {resolution} pixels", model, rates=(1e-3,))


def _turned(count: int, name: str, entry: Entry, zoom: float = 1.0) -> Entry:
    """With several orientations of every image, in training and in evaluation."""
    label, model = f"{entry.label.removesuffix(', stored')}, {name}", {**entry.model, "test_time_orientations": count}
    data, store = {"orientations": count, **({"zoom": zoom} if zoom < 1 else {})}, f"-{count}-orientations"
    return entry._replace(label=label, model=model, data=data, store=f"{store}-zoomed" if zoom < 1 else store)


_HEAD = Entry("fpt_plus", "FPT+ with a prompt head", {**SIDE, "prompt_head": True})
_QUERIES = Entry("query_tokens", "Query tokens, stored")
_LINEAR = Entry("stored_linear", "Linear probing, stored")
_ATTENTIVE = Entry("attentive", "Attentive probing, stored")
ROWS = {
    "stored_linear": _LINEAR,
    "attentive": _ATTENTIVE,
    "query_tokens": _QUERIES,
    "fpt_plus": Entry("fpt_plus", "FPT+", {**SIDE, "prompt_head": False}),
    "fpt_plus_prompt_head": _HEAD,
    "query_tokens_mirrored": _turned(2, "mirror images too", _QUERIES),
    "fpt_plus_mirrored": _turned(2, "mirror images too", _HEAD),
    "stored_linear_mirrored_zoomed": _turned(2, "mirror images too, zoomed", _LINEAR, zoom=0.55),
    "attentive_mirrored_zoomed": _turned(2, "mirror images too, zoomed", _ATTENTIVE, zoom=0.55),
    "query_tokens_mirrored_zoomed": _turned(2, "mirror images too, zoomed", _QUERIES, zoom=0.55),
    "fpt_plus_mirrored_zoomed": _turned(2, "mirror images too, zoomed", _HEAD, zoom=0.55),
    "query_tokens_turned": _turned(8, "all orientations", _QUERIES),
    "fpt_plus_turned": _turned(8, "all orientations", _HEAD),
    "stored_linear_zoomed": _turned(8, "all orientations, zoomed", _LINEAR, zoom=0.55),
    "attentive_zoomed": _turned(8, "all orientations, zoomed", _ATTENTIVE, zoom=0.55),
    "query_tokens_zoomed": _turned(8, "all orientations, zoomed", _QUERIES, zoom=0.55),
    "fpt_plus_zoomed": _turned(8, "all orientations, zoomed", _HEAD, zoom=0.55),
    "fpt": Entry("fpt", "FPT", {"side_resolution": 224}, {}, "-all-layers"),
    "linear": Entry("linear", "Linear probing, augmented", rates=(1e-3, 3e-3, 1e-2)),
    "bitfit": Entry("bitfit", "BitFit", rates=(3e-4, 1e-3, 3e-3)),
    "adapter": Entry("adapter", "Adapter", rates=(3e-4, 1e-3, 3e-3)),
    "lora": Entry("lora", "LoRA", rates=(3e-4, 1e-3, 3e-3)),
    "full": Entry("full", "Full fine-tuning", rates=(3e-6, 1e-5, 3e-5)),
}
"""What is compared, by name."""
PARTS = {
    "default": _part("as by default: token ratio 0.2, `global`, blocks 6 to 11, int8, 16 prompts", {}),
    "ratio_0.05": _part("token ratio 0.05", {"token_ratio": 0.05}, "-ratio-0.05"),
    "ratio_0.1": _part("token ratio 0.1", {"token_ratio": 0.1}, "-ratio-0.1"),
    "ratio_0.5": _part("token ratio 0.5", {"token_ratio": 0.5}, "-ratio-0.5"),
    "ratio_1": _part("all tokens", {"token_ratio": 1.0}, "-ratio-1"),
    "class_token": _part("criterion `class_token`", {"criterion": "class_token"}, "-class-token"),
    "layers_all": _part("all 12 blocks", {"layers": list(range(12))}, "-all-layers"),
    "layers_3": _part("blocks 9 to 11", {"layers": [9, 10, 11]}, "-layers-3"),
    "layers_1": _part("block 11 alone", {"layers": [11]}, "-layers-1"),
    "fp16": _part("codec fp16", {}, "-fp16", codec="fp16"),
    "int4": _part("codec int4", {}, "-int4", codec="int4"),
    "prompts_4": _part("4 prompts", {"prompts": 4}),
    "prompts_64": _part("64 prompts", {"prompts": 64}),
    "decay_0.01": _part("weight decay 0.01", {"weight_decay": 0.01}),
    "decay_0.5": _part("weight decay 0.5", {"weight_decay": 0.5}),
    "side_126": _side(126),
    "side_70": _side(70),
    "side_224": _side(224),
}
"""What the parts of the method bring: query tokens, and FPT+ by its side resolution, with one setting changed."""
TRIED = {
    "dropout_0": _part("no dropout, in place of 0.5", {"dropout": 0.0}),
    "dropout_0.2": _part("dropout 0.2", {"dropout": 0.2}),
    "reduction_2": _part("fused prompts of half the encoder's width, in place of an eighth", {"reduction": 2}),
    "reduction_32": _part("fused prompts of a 32nd of its width", {"reduction": 32}),
    "smoothing": _part("label smoothing 0.1", {"label_smoothing": 0.1}),
    "longer": _part("60 epochs, in place of 20", {})._replace(epochs=60),
    "warmup": _part("warm-up of two epochs", {"warmup_epochs": 2}),
    **{
        name: _part(module.LABEL, {})._replace(method=name)
        for name, module in CANDIDATES.items()
        if issubclass(module, QueryTokensModule)
    },
    "side_126": PARTS["side_126"],
    "side_from_encoder": PARTS["side_126"]._replace(
        method="side_from_encoder", label=f"FPT+ with {SideFromEncoder.LABEL}"
    ),
    "side_from_encoder_prompt_head": _HEAD._replace(
        method="side_from_encoder", label=f"FPT+ with a prompt head and {SideFromEncoder.LABEL}", rates=(1e-3,)
    ),
}
"""What the field does with prompts, small heads and side networks, with one thing changed or added."""
TRIED_ZOOMED = {
    f"{name}_zoomed": _turned(8, "all orientations, zoomed", entry, 0.55)
    for name, entry in {"default": PARTS["default"], "prompts_64": PARTS["prompts_64"], **TRIED}.items()
} | {
    f"{name}_mirrored_zoomed": _turned(2, "mirror images too, zoomed", (PARTS | TRIED)[name], 0.55)
    for name in ("default", "longer")
}
"""The same on zoomed orientations."""
VARIED = PARTS | TRIED | TRIED_ZOOMED
COMPARED = tuple(ROWS)
"""Names of the rows that are methods, and not settings of one."""
ROWS |= VARIED
INSIDE = {"max_epochs": 10, "precision": "bf16-mixed"}
"""Of methods with the encoder inside, which take long: one seed, and this of the trainer."""
FOLDS = 5
REFERENCES = ("fpt_plus", "fpt_plus_prompt_head")
"""To which the others are held: the first that is there, or the first row."""
_METHODS = ("stored_linear", "attentive", "query_tokens", "fpt_plus_prompt_head")
BEST_OF_FOUR = {
    "best_of_four": _METHODS,
    **{
        f"best_of_four_{how}": tuple(f"{method}_{how}" for method in (*_METHODS[:3], "fpt_plus"))
        for how in ("mirrored_zoomed", "zoomed")
    },
}
"""Of which a row takes the one with the best validation, by row."""
DEFAULT, RIVAL = "fpt_plus_prompt_head", "query_tokens"
"""What the library trains by default, and what is nearest to it."""
TOGETHER = (RIVAL, DEFAULT, "query_tokens_turned", "fpt_plus_turned", "query_tokens_zoomed", "fpt_plus_zoomed")
"""Whose seeds' predictions are taken together too."""
PAIRS = {
    "best_of_four": (RIVAL,),
    "best_of_four_mirrored_zoomed": ("query_tokens_mirrored_zoomed",),
    "best_of_four_zoomed": ("query_tokens_zoomed",),
    RIVAL: ("attentive",),
    DEFAULT: (RIVAL,),
    "query_tokens_mirrored": (RIVAL,),
    "query_tokens_turned": (RIVAL,),
    "fpt_plus_mirrored": (DEFAULT, "query_tokens_mirrored"),
    "fpt_plus_turned": (DEFAULT, "query_tokens_turned"),
    "query_tokens_mirrored_zoomed": ("query_tokens_mirrored", RIVAL, "attentive_mirrored_zoomed"),
    "fpt_plus_mirrored_zoomed": ("fpt_plus_mirrored", "query_tokens_mirrored_zoomed"),
    "stored_linear_mirrored_zoomed": ("stored_linear",),
    "attentive_mirrored_zoomed": ("attentive",),
    "stored_linear_zoomed": ("stored_linear",),
    "attentive_zoomed": ("attentive",),
    "query_tokens_zoomed": ("query_tokens_turned", RIVAL, "attentive_zoomed", "bitfit", "adapter", "lora", "full"),
    "fpt_plus_zoomed": ("fpt_plus_turned", "query_tokens_zoomed"),
    "side_from_encoder": ("side_126",),
    "side_70": ("side_126",),
    "side_224": ("side_126",),
}
"""Of which the difference is given too."""
EVERY_RATE = tuple(f"{method}{how}_zoomed" for method in (RIVAL, "fpt_plus") for how in ("", "_mirrored"))
"""Whose test scores are kept of every rate, as ``evidence_side.py`` compares them at each."""
CALIBRATED = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "kappa": "kappa",
    "brier": "Brier score",
    "calibration_error": "calibration error",
}
"""What is said of calibrated predictions, pooled, and how it is called."""
LEARNING_RATES, DECAYS, EPOCHS = (3e-4, 1e-3, 3e-3, 1e-2), (0.1,), 20
"""That are searched, and of each cell."""
HIGHER = (3e-2, 1e-1)
"""Learning rates that are tried one after the other while the highest so far is the best."""


@dataclass(frozen=True)
class Task:
    """A question put to a data set.

    Attributes:
        data: ``fundus`` or ``chest``.
        title: for people.
        short: of the title.
        label: of a row of ``labels.csv``; None leaves its image out.
        classes: in their order.
        kind: ``model.task``.
        group: column of the patients.
    """

    data: str
    title: str
    short: str
    label: Callable[[Row], str | None]
    classes: tuple[str, ...]
    kind: str = "multiclass"
    group: str = "patient"

    @property
    def monitor(self) -> str:
        return "quadratic_kappa" if self.kind == "ordinal" else "auc"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("auc", "fold_auc", "quadratic_kappa") if self.kind == "ordinal" else ("auc", "fold_auc")


TASKS = {
    "fundus_referable": Task(
        "fundus",
        "referable retinopathy (grade 2 or more)",
        "referable retinopathy",
        lambda row: "yes" if int(row["grade"]) >= 2 else "no",
        ("no", "yes"),
    ),
    "fundus_maculopathy": Task("fundus", "maculopathy", "maculopathy", lambda row: row["maculopathy"], ("0", "1")),
    "fundus_grade": Task(
        "fundus", "grade of retinopathy, 0 to 4", "grade", lambda row: row["grade"], tuple("01234"), "ordinal"
    ),
    "chest_pneumonia": Task(
        "chest",
        "pneumonia against no finding",
        "pneumonia",
        lambda row: None if row["label"] == "covid19" else row["label"],
        ("no_finding", "pneumonia"),
        group="patient_id",
    ),
    "chest_all": Task(
        "chest",
        "three classes",
        "three classes",
        lambda row: row["label"],
        ("covid19", "no_finding", "pneumonia"),
        group="patient_id",
    ),
}


class Study(NamedTuple):
    """Tasks and methods that stand in one table.

    Attributes:
        tasks: by name.
        methods: names of ``ROWS``.
        resolution: of the encoder's images in pixels.
        folds: that are run, of 1 to ``FOLDS``.
        seeds: of each fold, counted from 0; methods with the encoder inside have one.
        searched: whether rates and decays are; else each method has its own.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    resolution: int = 448
    folds: tuple[int, ...] = tuple(range(1, FOLDS + 1))
    seeds: int = 3
    searched: bool = True


_REFERABLE = ("fundus_referable",)
_FUNDUS = ("fundus_referable", "fundus_maculopathy", "fundus_grade")
_ZOOMED = BEST_OF_FOUR["best_of_four_zoomed"]
_TURNED = (
    *(f"{method}_{how}" for how in ("mirrored", "turned") for method in ("query_tokens", "fpt_plus")),
    *BEST_OF_FOUR["best_of_four_mirrored_zoomed"],
    *_ZOOMED,
)
_INSIDE = ("linear", "bitfit", "adapter", "lora", "full")
STUDIES = {
    "448": Study(tuple(TASKS), ("fpt_plus", *_METHODS, *_TURNED)),
    "224": Study(tuple(TASKS), ("fpt_plus", *_METHODS, *_TURNED, *_INSIDE), 224),
    "896": Study(_REFERABLE, ("fpt_plus", *_METHODS), 896, seeds=1),
    "448_fold1": Study(
        _REFERABLE, ("fpt_plus", *_METHODS, *_ZOOMED, "fpt", *_INSIDE), 448, (1,), seeds=1, searched=False
    ),
    "224_fold1": Study(_REFERABLE, ("fpt_plus", *_METHODS, *_TURNED, "fpt", *_INSIDE), 224, (1,), 1),
    "448_zoomed": Study(_FUNDUS, ("query_tokens", *_ZOOMED), searched=False),
    "448_parts": Study(_REFERABLE, tuple(PARTS)),
    "224_parts": Study(_REFERABLE, tuple(PARTS), 224),
    "224_tried": Study(("fundus_referable", "chest_pneumonia"), ("default", *TRIED), 224),
    "224_tried_zoomed": Study((*_FUNDUS, "chest_pneumonia"), tuple(TRIED_ZOOMED), 224),
}
"""By the end of its files' names."""


@dataclass(frozen=True)
class Protocol:
    """All cells of a comparison.

    Attributes:
        weights: of the encoder.
        roots: folders of the data sets, by name.
        out: folder of cells, stores and manifests.
        resolution: of the encoder's images in pixels.
        folds: that are run, of 1 to ``FOLDS``.
        seeds: of each fold, counted from 0.
        epochs: of each cell.
        rates: learning rates, ascending.
        decays: weight decays; the others are tried at the rate that is best with the first.
        searched: whether rates and decays are; else each method has its own rate by default, and the first decay.
    """

    weights: Path
    roots: Mapping[str, Path]
    out: Path
    resolution: int
    folds: tuple[int, ...]
    seeds: int
    epochs: int
    rates: tuple[float, ...]
    decays: tuple[float, ...]
    searched: bool = True

    def cell(self, name: str, method: str, fold: int, pair: tuple[float, float], seed: int) -> Cell:
        task, entry = TASKS[name], ROWS[method]
        folder = self.out / f"{name}-{self.resolution}" / method / f"fold{fold}" / f"lr{pair[0]:g}-wd{pair[1]:g}"
        model = {
            "num_classes": len(task.classes),
            "task": task.kind,
            "encoder": ENCODER,
            "pretrained": str(self.weights),
            "learning_rate": pair[0],
            "weight_decay": pair[1],
            **entry.model,
        }
        data: dict[str, Any] = {
            "root": str(self.roots[task.data]),
            "manifest": str(self.manifest(name)),
            "group_column": "patient",
            "classes": list(task.classes),
            "fold": fold,
            "folds": FOLDS,
            "resolution": self.resolution,
            "mean": MEAN,
            "std": STD,
        }
        if entry.stored:
            data |= {"store": str(self.store(task, method)), "in_memory": True}
        data |= entry.data
        trainer = {"accelerator": "auto", "devices": 1, "max_epochs": self.epochs, "enable_progress_bar": False}
        trainer |= {} if entry.stored else INSIDE
        trainer |= {} if entry.epochs is None else {"max_epochs": entry.epochs}
        module = "PreloadedFeatureDataModule" if entry.stored else "ImageDataModule"
        place = "candidates" if entry.method in CANDIDATES else "fpt_lightning.methods"
        config = {
            "seed_everything": seed,
            "trainer": {**trainer, "default_root_dir": str(folder / f"seed{seed}")},
            "model": {"class_path": f"{place}.{MODULES[entry.method].__name__}", "init_args": model},
            "data": {"class_path": module, "init_args": data},
        }
        return Cell(folder / f"seed{seed}", config, preloads=entry.stored)

    def store(self, task: Task, method: str) -> Path:
        """One for all tasks of a data set."""
        return self.out / "stores" / f"{task.data}{self.resolution}{ROWS[method].store}.zarr"

    def manifest(self, name: str) -> Path:
        """The task's own, written where it is missing."""
        task, path = TASKS[name], self.out / "manifests" / f"{name}.csv"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = read_rows(self.roots[task.data] / "labels.csv", "manifest")
            labelled = [(row["image"], task.label(row), row[task.group]) for row in rows]
            write_rows(path, [("image", "label", "patient"), *(row for row in labelled if row[1] is not None)])
        return path

    def record(
        self, name: str, method: str, fold: int, pair: tuple[float, float], seed: int, run: bool, scores: bool = False
    ) -> Record | None:
        """What a cell came to, with its test scores where they are needed; None where it is not finished."""
        cell, key = self.cell(name, method, fold, pair, seed), f"fold{fold}/lr{pair[0]:g}-wd{pair[1]:g}/seed{seed}"
        found = self.records(name, method).get(key, cell)
        if found is not None and (found.test or not scores):
            return found
        if run and not cell.finished:
            print(f"running {cell.folder}", flush=True)
            cell.check()
            cell.run()
        if not cell.finished:
            return None
        rows = {id: row for row, id in enumerate(self.labelled(name))}
        new = record(cell, TASKS[name].monitor, rows, self._stored_bytes(name, method))
        return self.records(name, method).add(key, new)  # to what others have added meanwhile

    def records(self, name: str, method: str) -> Records:
        return Records(self.out / "records" / f"{name}-{self.resolution}" / f"{method}.json")

    def labelled(self, name: str) -> dict[str, Row]:
        """Rows of the manifest by image, in ascending order of images."""
        rows = read_rows(self.manifest(name), "manifest")
        return {row["image"]: row for row in sorted(rows, key=lambda row: row["image"])}

    def _stored_bytes(self, name: str, method: str) -> int:
        """Of an image, all orientations that are stored; 0 of methods without a store."""
        if not ROWS[method].stored:
            return 0
        index = StoreIndex.open(str(self.store(TASKS[name], method)))
        return index.bytes_per_row * index.orientations

    def chosen(self, name: str, method: str, fold: int, run: bool) -> tuple[float, float] | None:
        """The pair of the best validation with seed 0, of equal ones the first; None where one is not finished.

        Where the method has rates of its own, of the first fold.
        """
        if not self.searched:
            return ROWS[method].own_rate, self.decays[0]
        fold = self.folds[0] if ROWS[method].rates else fold
        found: dict[tuple[float, float], float] = {}

        def best(pairs: Iterable[tuple[float, float]]) -> tuple[float, float] | None:
            for pair in pairs:
                each = self.record(name, method, fold, pair, 0, run)
                if each is None:
                    return None
                found[pair] = each.validation
            return max(found, key=lambda pair: found[pair])

        rates = ROWS[method].rates
        if rates:
            return best((rate, self.decays[0]) for rate in rates)
        chosen = best((rate, self.decays[0]) for rate in self.rates)
        for higher in HIGHER:
            if chosen is not None and chosen[0] == max(rate for rate, _ in found) < higher:
                chosen = best([(higher, self.decays[0])])
        return None if chosen is None else best((chosen[0], decay) for decay in self.decays[1:])

    def _settled(self, name: str, method: str, fold: int, run: bool) -> tuple[float, float] | None:
        """The chosen pair, which may be another once a cell was run again for its scores, on another machine."""
        pair = self.chosen(name, method, fold, run)
        while pair is not None and run:
            self.record(name, method, fold, pair, 0, run, scores=True)
            if (again := self.chosen(name, method, fold, run)) == pair:
                break
            pair = again
        return pair

    def cells(self, name: str, method: str, run: bool = False) -> list[list[Record]] | None:
        """Of each seed that is finished the records of all folds, with the chosen pairs; None where none is."""
        seeds: list[list[Record | None]] = [[] for _ in range(self.seeds if ROWS[method].stored else 1)]
        for fold in self.folds:
            pair = self._settled(name, method, fold, run)
            if pair is None:
                return None
            for seed, found in enumerate(seeds):
                found.append(self.record(name, method, fold, pair, seed, run, scores=True))
            if self.searched and method not in EVERY_RATE:
                needed = {pair, (ROWS[method].own_rate, self.decays[0])}
                kept = tuple(f"fold{fold}/lr{rate:g}-wd{decay:g}/" for rate, decay in needed)
                self.records(name, method).forget_tests(f"fold{fold}/", kept)
        finished = [[each for each in found if each is not None] for found in seeds]
        return [found for found in finished if len(found) == len(self.folds)] or None


# Results


class Pooled(NamedTuple):
    """The test predictions of all folds, every image once, in ascending order of ids.

    Attributes:
        predictions: N.
        folds: (N,), which fold tested each image.
    """

    predictions: Predictions
    folds: NDArray[np.int64]


def tested(name: str, rows: Mapping[str, Row], found: Record) -> Predictions:
    """The test predictions of a cell, with what is true."""
    task, images = TASKS[name], list(rows)
    ids = tuple(images[int(row)] for row in found.test)
    return Predictions(
        "single-label",
        ids,
        np.array([task.classes.index(rows[id]["label"]) for id in ids]),
        np.array(list(found.test.values())),
        task.classes,
        tuple(rows[id]["patient"] for id in ids),
        ordered=task.kind == "ordinal",
    )


def pool(parts: Sequence[Predictions]) -> Pooled:
    """The folds' predictions as one."""
    joined = replace(
        parts[0],
        ids=tuple(id for part in parts for id in part.ids),
        labels=np.concatenate([part.labels for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        groups=tuple(group for part in parts for group in part.groups),
    )
    order = np.argsort(joined.ids)
    folds = np.repeat(np.arange(len(parts)), [len(part.ids) for part in parts])
    return Pooled(joined.take(order), folds[order])


def pooled(name: str, rows: Mapping[str, Row], cells: Sequence[Sequence[Record]]) -> list[Pooled]:
    """The test predictions of each seed."""
    return [pool([tested(name, rows, each) for each in folds]) for folds in cells]


def resampled(seeds: Sequence[Pooled], weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Each overall metric (R,) of resamples (R, N), mean over the seeds.

    Beside the pooled metrics ``fold_auc``, the mean of the folds' own: each fold has a model of its own, and the pooled
    AUC is lower where their scales differ.
    """
    found = []
    for predictions, folds in seeds:
        values = {metric: v for (_, metric), v in measure(predictions, {}, 0.9, weights, per_class=False).items()}
        own = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
        with np.errstate(invalid="ignore"):  # a resample may have nothing of a small fold
            of_folds = [measure(predictions.take(rows), {}, 0.9, weights[:, rows], per_class=False) for rows in own]
        found.append({**values, "fold_auc": mean_of_known([each["", "auc"] for each in of_folds])})
    return {metric: np.mean([values[metric] for values in found], 0) for metric in found[0]}


def results(protocol: Protocol, name: str, methods: Sequence[str], resamples: int = 2000) -> dict[str, Any]:
    """What the finished methods of a task come to, by method."""
    tried = {method: cells for method in methods if (cells := protocol.cells(name, method)) is not None}
    finished = {method: [[each.uncalibrated() for each in folds] for folds in cells] for method, cells in tried.items()}
    for row, among in BEST_OF_FOUR.items():
        if set(among) <= set(tried):
            finished[row] = by_validation([finished[method] for method in among])
    rows = protocol.labelled(name)
    seeds = {method: pooled(name, rows, cells) for method, cells in finished.items()}
    if not seeds:
        return {}
    for method in TOGETHER:
        if len(seeds.get(method, ())) > 1:
            seeds[f"{method}_together"] = [together(seeds[method])]
    first = next(iter(seeds.values()))[0].predictions
    drawn = list(resampled_weights(first, resamples, 0))
    value, spread = {}, {}
    for method, each in seeds.items():
        value[method], spread[method] = resampled_values(each, drawn)
    reference = next((method for method in REFERENCES if method in seeds), next(iter(seeds)))
    found = {
        method: {
            **_described(protocol, name, method, finished),
            **{metric: estimated(value, spread, method, metric, reference) for metric in TASKS[name].metrics},
            "auc_of_seeds": [float(_values([each])["auc"][0]) for each in seeds[method]],
        }
        for method in seeds
    }
    told: dict[str, Any] = {}  # calibrated, as ``value`` and ``spread`` are not
    spreads: dict[str, Any] = {}
    for method, cells in tried.items():
        if all(each.calibration is not None for folds in cells for each in folds):
            told[method], spreads[method] = resampled_values(pooled(name, rows, cells), drawn)
            found[method]["calibrated"] = _changes(
                name, (value[method], spread[method]), (told[method], spreads[method])
            )
    for method in found.keys() & PAIRS.keys():
        found[method]["minus"] = {
            other: {metric: paired(value, spread, method, metric, other) for metric in TASKS[name].metrics}
            | ({"calibrated": paired(told, spreads, method, "auc", other)} if {method, other} <= set(told) else {})
            for other in PAIRS[method]
            if other in found
        }
    return found


def resampled_values(
    seeds: Sequence[Pooled], drawn: Sequence[NDArray[np.float64]]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Each metric of all images (1,), and of resamples (R,)."""
    parts = [resampled(seeds, weights) for weights in drawn]
    spread = {metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]}
    return _values(seeds), spread


def _values(seeds: Sequence[Pooled]) -> dict[str, NDArray[np.float64]]:
    return resampled(seeds, np.ones((1, len(seeds[0].folds))))


def _changes(name: str, before: tuple[Any, Any], after: tuple[Any, Any]) -> dict[str, Any]:
    """Metrics of calibrated predictions, beside what they were before, and the difference."""
    found = {}
    for metric in CALIBRATED:
        metric = TASKS[name].monitor if metric == "kappa" and TASKS[name].kind == "ordinal" else metric
        old, new = float(before[0][metric][0]), float(after[0][metric][0])
        difference = {"value": new - old, **interval(after[1][metric] - before[1][metric])}
        found[metric] = {"before": old, "value": new, "difference": difference}
    return found


def together(seeds: Sequence[Pooled]) -> Pooled:
    """The mean of several seeds' probabilities."""
    scores = np.mean([each.predictions.scores for each in seeds], 0)
    return seeds[0]._replace(predictions=replace(seeds[0].predictions, scores=scores))


def by_validation(methods: Sequence[Sequence[Sequence[Record]]]) -> list[list[Record]]:
    """Of each seed and fold the record of the method with the best validation, of equal ones the first.

    Args:
        methods: each one's records by seed and fold.
    """
    seeds = zip(*methods, strict=False)  # as many as all of them have
    return [[max(each, key=lambda one: one.validation) for each in zip(*folds, strict=True)] for folds in seeds]


def estimated(
    value: Mapping[str, Any], spread: Mapping[str, Any], method: str, metric: str, reference: str
) -> dict[str, Any]:
    """The metric with its interval, and its difference to the reference, paired."""
    bounds = interval(spread[method][metric])
    found = {"value": float(value[method][metric][0]), "low": bounds["low"], "high": bounds["high"]}
    if method == reference:
        return found
    return {**found, "difference": paired(value, spread, method, metric, reference)}


def paired(value: Mapping[str, Any], spread: Mapping[str, Any], method: str, metric: str, other: str) -> dict[str, Any]:
    """A method's metric minus another's, with its interval."""
    difference = float(value[method][metric][0] - value[other][metric][0])
    return {"value": difference, **interval(spread[method][metric] - spread[other][metric])}


def _described(
    protocol: Protocol, name: str, method: str, finished: Mapping[str, Sequence[Sequence[Record]]]
) -> dict[str, Any]:
    """Label, and of what was trained cost and the chosen rates."""
    if method not in finished:
        trained = method.removesuffix("_together")
        return {"label": f"{ROWS[trained].label}, {len(finished[trained])} seeds together"}
    seeds = finished[method]
    rates = [{"learning_rate": each.learning_rate, "weight_decay": each.weight_decay} for each in seeds[0]]
    if method in BEST_OF_FOUR:
        images = ROWS[BEST_OF_FOUR[method][0]].label.split(", ", 1)[1]
        return {"label": f"The best of four by validation, {images}", "chosen": rates}
    return {**_cost(protocol, name, method, seeds), "chosen": rates}


def _cost(protocol: Protocol, name: str, method: str, seeds: Sequence[Sequence[Record]]) -> dict[str, Any]:
    found = [each for folds in seeds for each in folds]
    config = protocol.cell(name, method, 1, (found[0].learning_rate, found[0].weight_decay), 0).config
    model = {**config["model"]["init_args"], "pretrained": False}
    module = build_on_meta(lambda: MODULES[ROWS[method].method](**model), (protocol.resolution, protocol.resolution))
    return {
        "label": ROWS[method].label,
        "learnable_parameters": module.learnable_parameters,
        "learnable_ratio": module.learnable_ratio,
        "memory_mib": max(each.memory_mib for each in found),
        "epoch_seconds": median(each.epoch_seconds for each in found),
        "epochs": config["trainer"]["max_epochs"],
        "stored_bytes": max(each.stored_bytes for each in found),
    }


def table(name: str, found: Mapping[str, Any]) -> str:
    """Markdown, a row a method."""
    task = TASKS[name]
    metrics = task.metrics
    called = {"auc": "AUC x 100", "fold_auc": "mean of the folds' AUC", "quadratic_kappa": "quadratic kappa x 100"}
    called["calibrated"] = "AUC x 100, calibrated"
    other = next((ROWS[name].label for name in REFERENCES if name in found and name in ROWS), "the first row")
    heads = ["method", "learnable, %", *(f"{called[m]} [95%] | minus {other} [95%]" for m in metrics)]
    heads += ["AUC of each seed", "MiB", "s/epoch", "MB stored an image"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1 + len(metrics))]
    for row in found.values():
        cells = [row["label"], f"{100 * row['learnable_ratio']:.3g}" if "learnable_ratio" in row else ""]
        for metric in metrics:
            estimate = row[metric]
            cells += [shown(estimate), shown(estimate["difference"], "+") if "difference" in estimate else ""]
        cells.append(", ".join(f"{100 * value:.1f}" for value in row["auc_of_seeds"]))
        if "memory_mib" in row:
            seconds = significant(row["epoch_seconds"], 2)
            cells += [f"{row['memory_mib']:.1f}", seconds, f"{row['stored_bytes'] / 1e6:.2f}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    if any("calibrated" in row for row in found.values()):
        lines += ["", *_calibrations(found)]
    for row in found.values():
        for other, differences in row.get("minus", {}).items():
            told = ", ".join(
                f"{shown(differences[metric], '+')} ({called[metric]})"
                for metric in (*metrics, "calibrated")
                if metric in differences
            )
            lines += ["", f"{row['label']} minus {ROWS[other].label}: {told}."]
    return "\n".join([f"### {task.title[0].upper()}{task.title[1:]}", "", *lines])


def _calibrations(found: Mapping[str, Any]) -> Iterator[str]:
    """What calibration changes, a row a method."""
    rows = {row["label"]: row["calibrated"] for row in found.values() if "calibrated" in row}
    metrics = list(next(iter(rows.values())))
    heads = [f"{named(metric)} x 100" for metric in metrics]
    yield f"| calibrated | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * len(metrics)
    for label, row in rows.items():
        cells = []
        for metric in metrics:
            before, after, difference = row[metric]["before"], row[metric]["value"], row[metric]["difference"]
            bounds = "" if metric == "calibration_error" else f" ({shown(difference, '+')})"
            cells.append(f"{100 * before:.1f} to {100 * after:.1f}{bounds}")
        yield f"| {label} | {' | '.join(cells)} |"


def named(metric: str) -> str:
    """A metric, for people."""
    return CALIBRATED.get(metric, metric.replace("_", " "))


def shown(estimate: Mapping[str, float], sign: str = "", digits: int = 1) -> str:
    """A value with its interval, x 100."""
    value, low, high = (f"{100 * estimate[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def report(protocol: Protocol, found: Mapping[str, Mapping[str, Any]], data: str) -> str:
    """All tables of a data set."""
    machine = environment()["machine"]
    place = f"{machine['gpu'] or machine['processor']}, {machine['threads']} thread"
    seeds = "1 seed" if protocol.seeds == 1 else f"up to {protocol.seeds} seeds"
    only = "" if len(protocol.folds) == FOLDS else f" (here alone: {_listed(protocol.folds)})"
    rows = read_rows(protocol.manifest(next(name for name in found)), "manifest")
    methods = {method for rows in found.values() for method in rows if method in ROWS}
    text = (
        f"DINOv2 ViT-S/14 at {protocol.resolution} pixels; {len(rows):,} images of "
        f"{len({row['patient'] for row in rows}):,} patients in the first table; {FOLDS} patient-wise folds, of which "
        f"each tests once and the next validates{only}; {seeds}; {protocol.epochs} epochs, of which "
        f"the best by validation counts; {'; '.join(_settings(protocol, methods))}. AUC and kappa are of the pooled "
        "predictions, which have models of several scales, and beside them the mean of the folds' own AUC; all are "
        "means over the seeds, with intervals of 2,000 resamples of patients, paired for differences. The scores are "
        "those of the models as trained; below a table is what calibration changes, which is fitted to each fold's "
        "validation images, and is the default (`model.calibrate`). MiB of live tensors in training. "
        f"{place}; other work ran beside it, so seconds are upper bounds."
    )
    tables = [table(name, rows) for name, rows in found.items() if rows and TASKS[name].data == data]
    return "\n\n".join([text, *tables]) + "\n"


def _settings(protocol: Protocol, methods: set[str]) -> Iterator[str]:
    """Of the methods: learning rates and what chose between them, weight decay, and what those with an encoder have."""
    yield from _searches(protocol, methods) if protocol.searched else ["each method's own learning rate by default"]
    inside = [ROWS[method].label for method in ROWS if method in methods and not ROWS[method].stored]
    if inside:
        yield f"{INSIDE['max_epochs']} epochs, 1 seed and precision {INSIDE['precision']} of {', '.join(inside)}"
    yield f"weight decay {_listed(protocol.decays)}"


def _searches(protocol: Protocol, methods: set[str]) -> Iterator[str]:
    rates, higher = _listed(protocol.rates), _listed(HIGHER)
    if any(not ROWS[method].rates for method in methods):
        chosen = f"for each fold the learning rate with the best validation of {rates}"
        yield f"{chosen}, and of {higher} while the highest is the best"
    own = {ROWS[method].label: ROWS[method].rates for method in ROWS if method in methods and ROWS[method].rates}
    if methods <= set(VARIED):
        own = {"all": next(iter(own.values()))}
    for label, few in own.items():
        yield f"learning rate {_listed(few)} of {label}" + (", chosen by the first fold" if len(few) > 1 else "")


def run(protocol: Protocol, tasks: Iterable[str], methods: Iterable[str]) -> None:
    """Every cell that is not finished, the first seed of all before the second of any."""
    for seeds in range(1, protocol.seeds + 1):
        for task, method in product(tasks, methods):
            replace(protocol, seeds=seeds).cells(task, method, run=True)


def parser_of_places(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark with cells of this one, which needs what ``places`` takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help=f"of {ENCODER}, as a file")
    parser.add_argument("--fundus", type=Path, required=True, help="folder of the fundus photographs")
    parser.add_argument("--chest", type=Path, required=True, help="folder of the chest X-rays")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is run")
    return parser


def places(args: argparse.Namespace) -> tuple[Path, dict[str, Path], Path]:
    """Weights, roots and out of a ``Protocol``."""
    roots = {"fundus": args.fundus.absolute(), "chest": args.chest.absolute()}
    return args.weights.absolute(), roots, args.out.absolute()


def parser_of_cells(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark that runs cells, or a part of them, and writes tables of those that are finished."""
    parser = parser_of_places(description)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="only these")
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=list(ROWS), help="only these")
    parser.add_argument("--write", action="store_true", help="write the result files, and run nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = parser_of_cells(__doc__)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--weight-decays", type=float, nargs="+", default=list(DECAYS))
    args = parser.parse_args(arguments)
    for name in args.studies:
        study = STUDIES[name]
        protocol = Protocol(
            *places(args),
            study.resolution,
            study.folds,
            study.seeds,
            args.epochs,
            tuple(args.learning_rates),
            tuple(args.weight_decays),
            study.searched,
        )
        tasks = [task for task in study.tasks if task in args.tasks]
        methods = [method for method in study.methods if method in args.methods]
        if args.write:
            write(protocol, name, {task: results(protocol, task, methods) for task in tasks})
        else:
            run(protocol, tasks, methods)


def write(protocol: Protocol, study: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """The result files of a study, one a data set."""
    for data in ("fundus", "chest"):
        own = {name: rows for name, rows in found.items() if rows and TASKS[name].data == data}
        if own:
            name = f"evidence_{data}_{study}"
            before = RESULTS / f"{name}.json"
            if before.is_file():  # tasks that were run elsewhere stay
                own = {**json.loads(before.read_text())["tasks"], **own}
            path = write_result(name, {"resolution": protocol.resolution, "tasks": own})
            (RESULTS / f"{name}.md").write_text(report(protocol, own, data))
            print(f"results are in {path}, and .md beside it")
    for task, rows in found.items():
        keep_records(protocol, task, rows)


def keep_records(protocol: Protocol, task: str, methods: Iterable[str]) -> None:
    """Copy those that there are to the results."""
    for method in methods:
        records = protocol.records(task, method).path
        if records.is_file():
            kept = RESULTS / "evidence" / records.parent.name / records.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(records, kept)


if __name__ == "__main__":
    main()
