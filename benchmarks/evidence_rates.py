"""Which learning rate is a good one of each method: validation by rate, of the cells of ``evidence.py``.

    python benchmarks/evidence_rates.py

Reads the records in ``results/evidence`` and writes ``results/evidence_rates.json`` and ``.md``. Only rates count that
all folds of a row were trained with (the first one of methods with the encoder inside), with seed 0 and the weight
decay 0.1.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from environment import RESULTS, take_no_arguments, write_result
from evidence import COMPARED, FOLDS, ROWS, TASKS, named

DECAY = 0.1
"""Of the search of rates."""


def validation(records: Mapping[str, Any], folds: Sequence[int]) -> dict[float, float]:
    """The mean over the folds of the best epoch's validation, by learning rate that all of them were trained with."""
    found: dict[float, list[float]] = defaultdict(list)
    wanted = tuple(f"fold{fold}/" for fold in folds)
    for key, each in records.items():
        if key.startswith(wanted) and key.endswith("/seed0") and each["weight_decay"] == DECAY:
            found[each["learning_rate"]].append(each["validation"])
    return {rate: mean(values) for rate, values in sorted(found.items()) if len(values) == len(folds)}


def rows() -> list[dict[str, Any]]:
    """Of each method and task whose rates were searched."""
    found = []
    for method in COMPARED:
        for path in sorted((RESULTS / "evidence").glob(f"*/{method}.json")):
            task, _, resolution = path.parent.name.rpartition("-")
            folds = range(1, 2 if ROWS[method].rates else FOLDS + 1)
            values = validation(json.loads(path.read_text()), folds)
            if len(values) > 1:
                described = {"method": method, "label": ROWS[method].label, "task": task, "resolution": int(resolution)}
                described |= {"metric": TASKS[task].monitor, "default": ROWS[method].own_rate}
                found.append({**described, "validation": values})
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; the best of a row in bold type."""
    rates = sorted({rate for row in found for rate in row["validation"]})
    heads = ["method", "default", "task", "pixels", "metric", *(f"{rate:g}" for rate in rates)]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---|---:|---|" + "---:|" * len(rates)]
    for row in found:
        values = row["validation"]
        told = {rate: f"{100 * value:.1f}" for rate, value in values.items()}
        best = max(values, key=lambda rate: values[rate])
        told[best] = f"**{told[best]}**"
        cells = [row["label"], f"{row['default']:g}", TASKS[row["task"]].short, str(row["resolution"])]
        lines.append(f"| {' | '.join([*cells, named(row['metric']), *(told.get(rate, '') for rate in rates)])} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    take_no_arguments(__doc__, arguments)
    found = rows()
    path = write_result("evidence_rates", {"rows": found})
    (RESULTS / "evidence_rates.md").write_text(table(found))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
