"""``crossval``: every fold of a data set, with one or several seeds, from one store; one report and one ensemble."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import fpt_lightning
from fpt_lightning.cli.callbacks import error_pictures
from fpt_lightning.cli.methods_paragraph import folds_paragraph
from fpt_lightning.cli.series import Configuration, Run, claimed
from fpt_lightning.cli.trainer import Trainer
from fpt_lightning.datamodules.base import is_first_process
from fpt_lightning.deployment.card import CARD, Outcome, write_card
from fpt_lightning.deployment.checkpoints import load_trained, read_checkpoint
from fpt_lightning.deployment.ensemble import write_ensemble
from fpt_lightning.errors import ConfigurationError, DataError, check_at_least
from fpt_lightning.evaluation.cases import Rule
from fpt_lightning.evaluation.estimates import Estimate, label
from fpt_lightning.evaluation.folds import CrossValidation, are_held_out, averaged, cross_validated, pooled
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.report import SplitSummary, write_report
from fpt_lightning.files import read_rows, write_json
from fpt_lightning.methods import METHODS
from fpt_lightning.methods.ensemble import feature_method
from fpt_lightning.methods.record import TrainingRecord


def cross_validate(args: Sequence[str]) -> None:
    """Train and test every fold with every seed, and report all of them as one.

    Each is a ``fit`` in ``seed{s}/fold{k}`` below ``trainer.default_root_dir``, which also gets the predictions, the
    report, the spread and the ensemble of all. The same command goes on where it was stopped.

    Args:
        args: of the command line, ``crossval --config X``, with ``--seeds`` and what else ``fit`` takes.

    Raises:
        ConfigurationError: the folder holds runs of another configuration, or settings that leave nothing to report.
        DataError: the data set changed between two runs, or a fold tests no image with a label.
    """
    plan = _Plan(args)
    runs = [Fold(plan.root / f"seed{seed}" / f"fold{k}", k, seed) for seed in plan.seeds for k in plan.folds]
    path = plan.root / "crossval.yaml"
    with claimed(path, plan.text, runs):
        done = sum(run.finished for run in runs)
        rank_zero_info(
            f"cross-validation in {plan.root}: {len(plan.folds)} folds, with each seed of {_listed(plan.seeds)}"
            + (f"; {done} of {len(runs)} runs are finished" if done else "")
        )
        for i, run in enumerate(runs, 1):
            if not run.finished:
                rank_zero_info(f"\n{i} of {len(runs)}: seed {run.seed}, fold {run.fold}")
                run.go_on(["--config", str(path), "--seed_everything", str(run.seed), "--data.fold", str(run.fold)])
            if not run.finished:
                raise ConfigurationError(
                    f"{run.folder} has no best epoch that was tested: let trainer.max_epochs, limit_val_batches and "
                    "limit_test_batches leave one."
                )
            if run.images() != runs[0].images():
                raise DataError(
                    f"{run.folder} is of other images or labels than {runs[0].folder}, as the data set changed: its "
                    "folds are others now. Give another --trainer.default_root_dir."
                )
            rank_zero_info(run.told())
        tests = {(run.fold, run.seed): run.test for run in runs}
        held_out = are_held_out([tests[fold, plan.seeds[0]] for fold in plan.folds])
        for run in () if held_out else runs:
            run.validate()
        if is_first_process():
            validation = None if held_out else _validated(runs)
            epochs, rules = list[int](), list[Rule]()
            for run in runs:
                checkpoint = read_checkpoint(run.checkpoint)
                epochs.append(checkpoint["epoch"])
                if tests[run.fold, run.seed].cases and (rule := TrainingRecord.of(checkpoint).case_rule):
                    rules.append(rule)
            _conclude(plan, runs, cross_validated(tests, validation, case_rules=rules), epochs)


@dataclass(frozen=True)
class Fold(Run):
    """A fold with a seed.

    Attributes:
        fold: from 1.
        seed: of the run.
    """

    fold: int
    seed: int

    @property
    def test(self) -> Predictions:
        """The best epoch's predictions for the test images."""
        return Predictions.read(self.folder / "predictions.csv")

    def images(self) -> list[dict[str, str]]:
        """Of the data set that it split, with their labels and groups."""
        rows = read_rows(self.folder / "split.csv", "split")
        return [{name: value for name, value in row.items() if name != "split"} for row in rows]

    def told(self) -> str:
        """What its best epoch came to, in a line.

        Raises:
            DataError: none of its test images has a label.
        """
        path = self.folder / "evaluation.json"
        if not path.is_file():
            raise DataError(f"{self.folder} has no test image with a label: give fewer data.folds, or more labels.")
        found = json.loads(path.read_text(encoding="utf-8"))["best"]
        metric, estimate = next(iter(found["overall"].items()))
        bounds = Estimate(**{name: math.nan if value is None else value for name, value in estimate.items()})
        return f"seed {self.seed}, fold {self.fold}: test {label(metric, found['specificity'])} {bounds}"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


class _FoldsTrainer(Trainer):
    crossval = L.Trainer.fit  # whose options it takes


class _Plan(Configuration):
    """What is asked for.

    Attributes:
        root: the folder of all runs.
        folds: from 1.
        seeds: counted from ``seed_everything``.
        method: name of the model's class.
        text: the configuration that all runs share, in which ``data.fold`` is 1, so that ``preload`` and ``test`` by it
            take the store of the folds.
    """

    TRAINER = _FoldsTrainer

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {"crossval": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.description = (
            "Train and test every fold of data.folds from one store, with --seeds seeds each: one report of all "
            "predictions, their spread, and one ensemble. The same command goes on where it was stopped."
        )
        parser.add_argument("--seeds", type=int, default=1, help="how many, counted from seed_everything")

    def _set_seed(self) -> None:
        first = self._get(self.config, "seed_everything")
        if type(first) is not int:  # true would become another number each time
            raise ConfigurationError(f"seed_everything is {first}: crossval counts its seeds from a number.")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        trainer, data, first = (self.settings[name] for name in ("trainer", "data", "seed_everything"))
        if trainer["fast_dev_run"]:
            raise ConfigurationError("trainer.fast_dev_run leaves nothing to report: leave it out of crossval.")
        if self.settings["ckpt_path"] is not None:
            raise ConfigurationError("crossval goes on by itself where it was stopped: leave --ckpt_path out.")
        check_at_least("seeds", self.settings["seeds"], 1)
        given = data.get("init_args", {})
        if "fold" not in given:
            raise ConfigurationError(f"data is {data['class_path']}, which has no folds: give a data module that has.")
        if given["fold"] not in (None, 1):
            raise ConfigurationError(f"data.fold is {given['fold']}, but crossval runs every fold: leave it out.")
        self.root = Path(trainer["default_root_dir"])
        self.folds = range(1, given["folds"] + 1)
        self.seeds = range(first, first + self.settings["seeds"])
        self.method = str(self.settings["model"]["class_path"]).rpartition(".")[2]
        shared: dict[str, Any] = yaml.safe_load(self.text)
        del shared["seeds"]  # more of them may be added later
        shared["data"]["init_args"]["fold"] = 1
        self.text = yaml.safe_dump(shared, sort_keys=False)


def _conclude(plan: _Plan, runs: Sequence[Fold], found: CrossValidation, epochs: Sequence[int]) -> None:
    """Write what all runs came to, and print it."""
    found.predictions.write(plan.root / "predictions.csv")
    for seed, predictions in found.by_seed.items() if len(found.by_seed) > 1 else ():
        predictions.write(plan.root / f"seed{seed}" / "predictions.csv")
    content, cases = found.evaluation.to_dict(), found.cases
    if cases is not None:
        cases.predictions.write(plan.root / "predictions_cases.csv")
        content["cases"] = cases.evaluation.to_dict()
    write_json(plan.root / "evaluation.json", content)
    write_json(plan.root / "crossval.json", found.to_dict())
    name = {method.__name__: method.LABEL for method in METHODS.values()}.get(plan.method, plan.method)
    module, specification = load_trained(runs[0].checkpoint)
    data = plan.settings["data"]["init_args"]
    root, reader = Path(data["root"]).expanduser(), replace(specification.reader, max_pixels=data.get("max_pixels"))
    write_report(
        plan.root / "report.html",
        found.predictions,
        found.evaluation,
        methods=folds_paragraph(module, plan.settings, found, epochs),
        folds=(found.caption(), found.rows()),
        cases=None if cases is None else (cases.predictions, cases.evaluation),
        pictures=error_pictures(found.predictions, plan.settings["report_pictures"], root, reader),
        title=f"{name} on {root.name}, {len(plan.folds)} folds",
        configuration=plan.text,
        about={
            "folds": str(len(plan.folds)),
            "seeds": _listed(plan.seeds),
            "fpt-lightning": fpt_lightning.__version__,
            "Python": platform.python_version(),
        },
    )
    tables = [found.evaluation.table(), found.table(), *([cases.evaluation.table()] if cases else [])]
    print("\n" + "\n\n".join([*tables, f"Predictions and report are in {plan.root}."]))
    if feature_method(plan.method) is None:
        print(f"There is no ensemble, which is for methods on a frozen encoder's features: {name} trains the encoder.")
        return
    ensemble = plan.root / "ensemble.ckpt"
    of_cases = (cases.rule, cases.evaluation.thresholds) if cases else (None, {})
    write_ensemble(
        [run.checkpoint for run in runs], ensemble, found.evaluation.thresholds, found.nonconformity, *of_cases
    )
    summary = SplitSummary(found.evaluation.images, found.evaluation.positives, found.evaluation.groups)
    source = f"{len(plan.folds)} folds, with each seed of {_listed(plan.seeds)}."
    outcome = Outcome(
        found.evaluation,
        root.name,
        splits={"tested": summary},
        source=source,
        cases=None if cases is None else cases.evaluation,
    )
    write_card(plan.root / CARD, load_trained(ensemble)[0], outcome)
    print(
        f"The ensemble of all {len(runs)} models predicts by\n"
        f"  fpt-lightning predict --config {plan.root / 'crossval.yaml'} --ckpt_path ensemble --data.root new_images/"
    )


def _validated(runs: Sequence[Fold]) -> Predictions:
    """Out-of-fold predictions of the validation images, of which each fold has its own: the mean of the seeds."""
    seeds = dict.fromkeys(run.seed for run in runs)
    read = [[Predictions.read(run.validation) for run in runs if run.seed == seed] for seed in seeds]
    return averaged([pooled(parts) for parts in read])
