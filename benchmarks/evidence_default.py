"""What ``init`` writes, held to every other method on stored features, on the same folds.

    python benchmarks/evidence_default.py --weights FILE --fundus DIR --chest DIR --out runs/evidence
    python benchmarks/evidence_default.py --weights FILE --fundus DIR --chest DIR --out runs/evidence --write

Twice: with each method's own learning rate by default, as ``init`` writes it and as a user has it who searches nothing,
and with the rates that ``evidence.py`` chose for each fold. The first command runs what is missing of the former, as
cells of ``evidence.py`` (of which ``--tasks`` and ``--methods`` take a part). Predictions are calibrated, as by
default, which gives the folds a common scale before they are pooled; differences are paired, and intervals of 2,000
resamples of patients. ``--write`` writes ``results/evidence_default.json`` and ``.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from environment import RESULTS, write_result
from evidence import (
    COMPARED,
    DECAYS,
    EPOCHS,
    FOLDS,
    LEARNING_RATES,
    ROWS,
    TASKS,
    Protocol,
    estimated,
    keep_records,
    paired,
    parser_of_cells,
    places,
    pooled,
    resampled_values,
    run,
    shown,
)
from fpt_lightning.evaluation.resampling import resampled_weights

RESOLUTION, SEEDS = 224, 3
DEFAULTS = {"fundus": "query_tokens_zoomed", "chest": "query_tokens_mirrored_zoomed"}
"""What ``init`` writes for a folder of few such images, by data set."""
METRICS = ("auc", "fold_auc")
RATES = {"own_rate": "own rates", "searched": "searched rates"}
"""With which learning rates, and how that is called."""


def held(protocol: Protocol, task: str, default: str, methods: Sequence[str], resamples: int = 2000) -> dict[str, Any]:
    """Each finished method with calibrated predictions, the default first, and the default's lead over it."""
    rows, cells = protocol.labelled(task), {}
    for method in (default, *(method for method in methods if method != default)):
        finished = protocol.cells(task, method)
        if finished is not None and all(each.calibration is not None for folds in finished for each in folds):
            cells[method] = finished
    if default not in cells:
        return {}
    seeds = {method: pooled(task, rows, found) for method, found in cells.items()}
    drawn = list(resampled_weights(seeds[default][0].predictions, resamples, 0))
    value, spread = {}, {}
    for method, each in seeds.items():
        value[method], spread[method] = resampled_values(each, drawn)

    def row(method: str) -> dict[str, Any]:
        estimates = {metric: estimated(value, spread, method, metric, method) for metric in METRICS}
        apart = METRICS if method != default else ()
        lead = {metric: paired(value, spread, default, metric, method) for metric in apart}
        memory = max(each.memory_mib for folds in cells[method] for each in folds)
        described = {"label": ROWS[method].label, "seeds": len(seeds[method]), "memory_mib": memory}
        return {**described, **estimates, "lead": lead}

    others = sorted(cells.keys() - {default}, key=lambda method: -value[method]["auc"][0])
    return {method: row(method) for method in (default, *others)}


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown, a row a method of a task; the default of each task in bold type, its lead beside the others.

    Args:
        found: of each of ``RATES`` the rows of each task.
    """
    heads = ["task", "method"]
    for called in RATES.values():
        heads += [f"AUC x 100, {called} [95%]", "the default's lead [95%]", "seeds"]
    heads.append("MiB")
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for task in TASKS:
        of_rates = [found[rates].get(task, {}) for rates in RATES]
        methods = list(dict.fromkeys(method for rows in of_rates for method in rows))
        for place, method in enumerate(methods):
            own = [rows.get(method) for rows in of_rates]
            row = next(each for each in own if each is not None)
            label = row["label"] if place else f"**{row['label']}**"
            cells = ["" if place else TASKS[task].short, label]
            for each in own:
                cells += ["", "", ""] if each is None else _cells(each)
            cells.append(f"{row['memory_mib']:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [shown(row["auc"]), shown(row["lead"]["auc"], "+") if row["lead"] else "", str(row["seeds"])]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    args = parser_of_cells(__doc__).parse_args(arguments)
    folds = tuple(range(1, FOLDS + 1))
    searched = Protocol(*places(args), RESOLUTION, folds, SEEDS, EPOCHS, LEARNING_RATES, DECAYS)
    own_rate = replace(searched, searched=False)
    methods = [method for method in COMPARED if ROWS[method].stored]
    if not args.write:
        run(own_rate, args.tasks, [method for method in methods if method in args.methods])
        return
    found: dict[str, dict[str, Any]] = {rates: {} for rates in RATES}
    for task, of in TASKS.items():
        for rates, protocol in zip(RATES, (own_rate, searched), strict=True):
            if rows := held(protocol, task, DEFAULTS[of.data], methods):
                found[rates][task] = rows
        keep_records(searched, task, methods)
    path = write_result("evidence_default", {"resolution": RESOLUTION, **found})
    (RESULTS / "evidence_default.md").write_text(table(found))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
