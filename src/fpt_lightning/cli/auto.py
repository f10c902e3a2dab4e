"""``fit --model auto``: every method on stored features, at several learning rates; validation says which to use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fpt_lightning.cli.run_folder import logged
from fpt_lightning.cli.series import Configuration, Run, claimed
from fpt_lightning.datamodules.base import is_first_process
from fpt_lightning.errors import ConfigurationError, DataError
from fpt_lightning.evaluation.comparison import Difference, compare
from fpt_lightning.evaluation.estimates import Estimate, label
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.scores import evaluate
from fpt_lightning.files import align, without_nan, write_json, write_text
from fpt_lightning.methods import METHODS
from fpt_lightning.methods.tasks import task_class
from fpt_lightning.progress import significant

CANDIDATES = ("stored_linear", "attentive", "query_tokens", "fpt_plus")
"""Methods that are tried, by name, the cheapest first."""

PREFERRED = "query_tokens"
"""Chosen unless the validation images tell another apart from it: the best value of some hundred images is often that
of a method that is worse (``docs/evidence.md``, Let validation choose)."""

FACTORS = (1 / 3, 1, 3)
"""Of a method's own default learning rate, tried with each: the best of more are among these, or within a point."""


def fit_all(args: Sequence[str]) -> None:
    """Train every candidate, compare the best of each method on the validation images, and say which to use.

    Each is a ``fit`` of the same configuration in a folder of its own below ``trainer.default_root_dir``, which also
    gets ``choice.json`` and ``choice.txt``. The same command goes on where it was stopped.

    Args:
        args: of the command line, ``fit --config X --model auto``, with what else it may have.

    Raises:
        ConfigurationError: the folder holds runs of another configuration, or a run that would leave no checkpoint.
        DataError: the validation images give the metric no value.
    """
    configuration = Configuration(_arguments(args, "fpt_plus"))
    trainer = configuration.settings["trainer"]
    if trainer["fast_dev_run"]:
        raise ConfigurationError("trainer.fast_dev_run leaves no checkpoint: --model auto has nothing to compare.")
    if configuration.settings["ckpt_path"] is not None:
        raise ConfigurationError("--model auto goes on by itself where it was stopped: leave --ckpt_path out.")
    root = Path(trainer["default_root_dir"])
    metric, mode = task_class(configuration.settings["model"]["init_args"]["task"]).MONITOR
    runs = [Candidate(root / name / f"{rate:g}", name, rate) for name in CANDIDATES for rate in learning_rates(name)]
    with claimed(root / "auto.yaml", configuration.text, runs):
        for i, run in enumerate(runs, 1):
            if not run.finished:
                rank_zero_info(f"\n{i} of {len(runs)}: {run.label}, learning rate {run.learning_rate:g}")
                rate = f"{run.learning_rate:g}"
                run.go_on([*_arguments(args, run.method)[1:], "--model.learning_rate", rate])
            run.score(metric, mode)  # refused after the first run, not after all
        best = [
            max((run for run in runs if run.method == name), key=lambda run: run.score(metric, mode))
            for name in CANDIDATES
        ]
        for run in best:
            run.validate()
        if is_first_process():
            choice = choose(best, metric, mode)
            write_json(root / "choice.json", choice.to_dict())
            write_text(root / "choice.txt", choice.table() + "\n")
            print(f"\n{choice.table()}\n\nThis is in {root / 'choice.txt'}, and choice.json beside it.")


def learning_rates(method: str) -> list[float]:
    """Those that are tried with a method, ascending, to one digit."""
    own = METHODS[method].defaults()["learning_rate"]
    return [float(f"{own * factor:.0e}") for factor in FACTORS]


@dataclass(frozen=True)
class Candidate(Run):
    """A method at a learning rate.

    Attributes:
        method: by short name.
        learning_rate: the highest.
    """

    method: str
    learning_rate: float

    @property
    def label(self) -> str:
        return METHODS[self.method].LABEL

    def score(self, metric: str, mode: str) -> float:
        """The best epoch's validation metric, of which more is better.

        Raises:
            DataError: it has no value in any epoch.
        """
        values = [value for value in self.logged(f"val_{metric}") if not math.isnan(value)]
        if not values:
            raise DataError(
                f"val_{metric} has no value in {self.folder / 'metrics.csv'}, as the validation images may be of one "
                "class alone: --model auto cannot choose by it. Give other validation images."
            )
        return max(values) if mode == "max" else -min(values)

    def logged(self, name: str) -> list[float]:
        """A metric of every epoch that has it."""
        return logged(self.folder, name)


@dataclass(frozen=True)
class Judged:
    """A method at its best learning rate, and how it stands to the chosen one.

    Attributes:
        label: the method's name.
        learning_rate: with the best validation.
        checkpoint: of its best epoch.
        validation: its metric on the validation images.
        difference: its minus the chosen one's, paired; None for the chosen one.
        epoch_seconds: median.
        memory_mib: peak of training: live tensors on a CPU, reserved on CUDA.
    """

    label: str
    learning_rate: float
    checkpoint: str
    validation: Estimate
    difference: Difference | None
    epoch_seconds: float
    memory_mib: float


@dataclass(frozen=True)
class Choice:
    """What the validation images say.

    Attributes:
        metric: that was compared.
        basis: images, groups and resamples, in a sentence.
        chosen: ``PREFERRED``, or the method with the best value where that is told apart from it.
        best: the method with the best value.
        methods: all of them, in the order of ``CANDIDATES``.
    """

    metric: str
    basis: str
    chosen: Judged
    best: Judged
    methods: tuple[Judged, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain: dict[str, Any] = without_nan(asdict(self))
        return plain

    def table(self) -> str:
        """For people: a row a method, and what to use."""
        heads = ["method", "learning rate", f"validation {self.metric}", "minus the chosen", "s/epoch", "MiB"]
        rows = [heads]
        for each in self.methods:
            d = each.difference
            apart = "chosen" if d is None else str(d)
            cost = [significant(each.epoch_seconds, 3), f"{each.memory_mib:.1f}"]
            rows.append([each.label, f"{each.learning_rate:g}", str(each.validation), apart, *cost])
        return f"Validation: {self.basis}\n\n{align(rows)}\n\n{self.advice()}"

    def advice(self) -> str:
        """Which to use, why, and the command that does."""
        chosen, metric = self.chosen, self.metric
        equal = [each for each in self.methods if each.difference is not None and not each.difference.told_apart]
        if chosen is self.best:
            why = f"the best validation {metric}, {chosen.validation}"
        else:
            why = (
                "no method was better on real images so far, nor is one here by more than chance; "
                f"the best validation {metric} is that of {self.best.label}, {self.best.validation}"
            )
        lines = [f"Use {chosen.label}: {why}."]
        if equal:
            times = [
                f"{each.label} ({significant(each.epoch_seconds / chosen.epoch_seconds, 2)} x its time)"
                for each in equal
            ]
            lines.append(f"These images do not tell it apart from {', '.join(times)}.")
        else:
            lines.append("It is told apart from all others.")
        lines.append(
            "Epoch, learning rate and method were chosen by these very images, so the values are optimistic; the test "
            f"of the chosen one is in {Path(chosen.checkpoint).parent / 'report.html'}."
        )
        config = Path(chosen.checkpoint).with_name("config.yaml")
        lines.append(
            f"  fpt-lightning predict --config {config} --ckpt_path {chosen.checkpoint} --data.root new_images/"
        )
        return "\n".join(lines)


def choose(runs: Sequence[Candidate], metric: str, mode: str) -> Choice:
    """Compare runs by their predictions for the same validation images.

    Args:
        runs: one a method, ``PREFERRED`` among them; of equal ones the first is the best.
        metric: of ``fpt_lightning.evaluation``, such as ``auc``.
        mode: ``max`` where more is better, or ``min``.
    """
    predictions = [Predictions.read(run.validation) for run in runs]
    evaluations = [evaluate(each) for each in predictions]
    values = [evaluation.overall[metric].value for evaluation in evaluations]
    best = values.index(max(values) if mode == "max" else min(values))

    def differences(reference: int) -> list[Difference | None]:
        first = predictions[reference]
        return [None if each is first else compare(first, each).differences[metric] for each in predictions]

    chosen = [run.method for run in runs].index(PREFERRED)
    apart = differences(chosen)
    lead = apart[best]
    if lead is not None and lead.told_apart:
        chosen, apart = best, differences(best)
    judged = [
        Judged(
            run.label,
            run.learning_rate,
            str(run.checkpoint),
            evaluations[i].overall[metric],
            apart[i],
            median(run.logged("epoch_seconds")),
            max([*run.logged("train_peak_live_mib"), *run.logged("train_peak_reserved_mib")]),
        )
        for i, run in enumerate(runs)
    ]
    name = label(metric, evaluations[chosen].specificity)
    return Choice(name, evaluations[chosen].basis(), judged[chosen], judged[best], tuple(judged))


def _arguments(args: Sequence[str], method: str) -> list[str]:
    """Those of ``fit --model auto`` for one method.

    FPT+ stands in the place of ``auto``, so that arguments of its own may follow; another method at the end takes over
    those that it has too.
    """
    fpt, own = METHODS["fpt_plus"].__name__, METHODS[method].__name__
    joined = [f"--model={fpt}" if arg == "--model=auto" else arg for arg in args]
    named = [fpt if pair == ("--model", "auto") else pair[1] for pair in zip(["", *joined], joined, strict=False)]
    return [*named, "--model", own]
