"""What ``init`` writes, held to every other method on stored features: the same images, folds and search.

    python benchmarks/evidence_default.py --weights FILE.safetensors --fundus DIR --chest DIR --out runs/evidence

Reads the records of what ``evidence.py`` ran and trains nothing. Predictions are calibrated, as by default, which gives
the folds a common scale before they are pooled; differences are paired and intervals of 2,000 resamples of patients.
Writes ``results/evidence_default.json`` and ``.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    parser_of_places,
    places,
    pooled,
    resampled_values,
    shown,
)
from fpt_lightning.evaluation.resampling import resampled_weights

RESOLUTION, SEEDS = 224, 3
DEFAULTS = {"fundus": "query_tokens_zoomed", "chest": "query_tokens_mirrored_zoomed"}
"""What ``init`` writes for a folder of few such images, by data set."""
METRICS = ("auc", "fold_auc")


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
        lead = {metric: estimated(value, spread, default, metric, method)["difference"] for metric in apart}
        memory = max(each.memory_mib for folds in cells[method] for each in folds)
        described = {"label": ROWS[method].label, "seeds": len(seeds[method]), "memory_mib": memory}
        return {**described, **estimates, "lead": lead}

    others = sorted(cells.keys() - {default}, key=lambda method: -value[method]["auc"][0])
    return {method: row(method) for method in (default, *others)}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown; the default of each task in bold type, its lead beside the others."""
    heads = ["task", "method", "seeds", "AUC x 100, pooled [95%]", "the default's lead [95%]"]
    heads += ["mean of the folds' AUC [95%]", "the default's lead [95%]", "MiB"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for task, rows in found.items():
        for place, row in enumerate(rows.values()):
            label = row["label"] if place else f"**{row['label']}**"
            cells = ["" if place else TASKS[task].short, label, str(row["seeds"])]
            for metric in METRICS:
                cells += [shown(row[metric]), shown(row["lead"][metric], "+") if metric in row["lead"] else ""]
            cells.append(f"{row['memory_mib']:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    args = parser_of_places(__doc__).parse_args(arguments)
    folds = tuple(range(1, FOLDS + 1))
    protocol = Protocol(*places(args), RESOLUTION, folds, SEEDS, EPOCHS, LEARNING_RATES, DECAYS)
    stored = [method for method in COMPARED if ROWS[method].stored]
    rows = {name: held(protocol, name, DEFAULTS[task.data], stored) for name, task in TASKS.items()}
    found = {name: each for name, each in rows.items() if each}
    path = write_result("evidence_default", {"resolution": RESOLUTION, "tasks": found})
    (RESULTS / "evidence_default.md").write_text(table(found))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
