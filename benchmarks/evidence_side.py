"""What the side network adds at each learning rate: FPT+ with a prompt head minus query tokens, on the same images.

    python benchmarks/evidence_side.py --weights FILE --fundus DIR --chest DIR --out runs/evidence

A hundred or two validation images tell the rates of one method apart by chance more than by worth, so that two methods
at the rates that each was best with are compared by that chance too. Here both have the same rate: each that
``evidence.py`` searched, and the mean of these differences. Images are those of what ``init`` writes; predictions are
calibrated, differences paired, and intervals of 2,000 resamples of patients. Reads the cells or records of what
``evidence.py`` ran, trains nothing, and writes ``results/evidence_side.json`` and ``.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from environment import RESULTS, write_result
from evidence import (
    DECAYS,
    EPOCHS,
    FOLDS,
    LEARNING_RATES,
    TASKS,
    Pooled,
    Protocol,
    keep_records,
    paired,
    parser_of_places,
    places,
    pooled,
    resampled_values,
    shown,
)
from evidence_default import DEFAULTS, METRICS, RESOLUTION
from fpt_lightning.evaluation.resampling import resampled_weights


def at_rates(protocol: Protocol, task: str, method: str) -> dict[float, Pooled]:
    """The test predictions of seed 0 by learning rate, of those with which all folds are finished, and calibrated."""
    found = {}
    for rate in protocol.rates:
        pair = (rate, protocol.decays[0])
        folds = [protocol.record(task, method, fold, pair, 0, run=False, scores=True) for fold in protocol.folds]
        finished = [each for each in folds if each is not None and each.calibration is not None]
        if len(finished) == len(folds):
            [found[rate]] = pooled(task, protocol.labelled(task), [finished])
    return found


def added(protocol: Protocol, task: str, plain: str, resamples: int = 2000) -> dict[str, Any]:
    """Of each rate at which both are finished, and of the mean over the rates; empty where there is none.

    Args:
        protocol: whose rates are compared.
        task: by name.
        plain: the row of query tokens, beside which there is one of FPT+.
    """
    found = {method: at_rates(protocol, task, method) for method in (plain, with_side(plain))}
    finished = [rate for rate in protocol.rates if all(rate in own for own in found.values())]
    if not finished:
        return {}
    drawn = list(resampled_weights(found[plain][finished[0]].predictions, resamples, 0))

    def mean_of(rates: Sequence[float]) -> dict[str, Any]:
        value, spread = {}, {}
        for method, own in found.items():
            value[method], spread[method] = resampled_values([own[rate] for rate in rates], drawn)
        return {metric: paired(value, spread, with_side(plain), metric, plain) for metric in METRICS}

    return {"rates": {f"{rate:g}": mean_of([rate]) for rate in finished}, "mean": mean_of(finished)}


def with_side(plain: str) -> str:
    """The row of FPT+ with a prompt head on the same images as one of query tokens."""
    return plain.replace("query_tokens", "fpt_plus")


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a row a task."""
    rates = [f"{rate:g}" for rate in LEARNING_RATES]
    heads = ["task", *(f"{rate} [95%]" for rate in rates), "mean [95%]", "of the folds' AUC, mean [95%]"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for task, row in found.items():
        cells = [shown(row["rates"][rate]["auc"], "+") if rate in row["rates"] else "" for rate in rates]
        cells += [shown(row["mean"][metric], "+") for metric in METRICS]
        lines.append(f"| {TASKS[task].short} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    args = parser_of_places(__doc__).parse_args(arguments)
    folds = tuple(range(1, FOLDS + 1))
    protocol = Protocol(*places(args), RESOLUTION, folds, 1, EPOCHS, LEARNING_RATES, DECAYS)
    found = {}
    for task, of in TASKS.items():
        plain = DEFAULTS[of.data]
        if row := added(protocol, task, plain):
            found[task] = row
            keep_records(protocol, task, (plain, with_side(plain)))
    path = write_result("evidence_side", {"resolution": RESOLUTION, "tasks": found})
    (RESULTS / "evidence_side.md").write_text(table(found))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
