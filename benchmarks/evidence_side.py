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

import numpy as np
from numpy.typing import NDArray

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
    parser_of_places,
    places,
    pooled,
    resampled_values,
    shown,
)
from evidence_default import DEFAULTS, METRICS, RESOLUTION
from fpt_lightning.evaluation.resampling import interval, resampled_weights


def at_rate(protocol: Protocol, task: str, method: str, rate: float) -> list[Pooled] | None:
    """The test predictions of seed 0, of all folds; None where one is not finished, or not calibrated."""
    pair = (rate, protocol.decays[0])
    found = [protocol.record(task, method, fold, pair, 0, run=False, scores=True) for fold in protocol.folds]
    finished = [each for each in found if each is not None and each.calibration is not None]
    return pooled(task, protocol.labelled(task), [finished]) if len(finished) == len(found) else None


def added(protocol: Protocol, task: str, plain: str, resamples: int = 2000) -> dict[str, Any]:
    """Of each rate at which both are finished, and of the mean over the rates; empty where there is none.

    Args:
        protocol: whose rates are compared.
        task: by name.
        plain: the row of query tokens, beside which there is one of FPT+.
    """
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    spreads: dict[str, list[NDArray[np.float64]]] = {metric: [] for metric in METRICS}
    rates = []
    for rate in protocol.rates:
        seeds, plain_seeds = (at_rate(protocol, task, method, rate) for method in (with_side(plain), plain))
        if seeds is None or plain_seeds is None:
            continue
        rates.append(rate)
        drawn = list(resampled_weights(seeds[0].predictions, resamples, 0))
        (side, of_side), (without, of_without) = (resampled_values(each, drawn) for each in (seeds, plain_seeds))
        for metric in METRICS:
            values[metric].append(float(side[metric][0] - without[metric][0]))
            spreads[metric].append(of_side[metric] - of_without[metric])
    if not rates:
        return {}

    def estimate(of: slice) -> dict[str, Any]:
        return {
            metric: {"value": float(np.mean(values[metric][of])), **interval(np.mean(spreads[metric][of], 0))}
            for metric in METRICS
        }

    return {
        "rates": {f"{rate:g}": estimate(slice(place, place + 1)) for place, rate in enumerate(rates)},
        "mean": estimate(slice(None)),
    }


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
