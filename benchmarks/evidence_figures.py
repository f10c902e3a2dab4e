"""Figures of the result files of ``evidence.py`` and ``evidence_default.py``, and the README's table.

    python benchmarks/evidence_figures.py

Writes AUC against cost and against resolution and the default's lead over every other stored method
(``docs/evidence_cost.png``, ``evidence_resolution.png``, ``evidence_default.png``), and ``benchmarks/results/
evidence.md``. The AUC is the mean of the folds' own, but of the lead that of the pooled predictions, calibrated, all
with 95% intervals.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from environment import DOCS, RESULTS, take_no_arguments
from evidence import COMPARED, FOLDS, ROWS, STUDIES, TASKS
from evidence_default import RATES

COSTS = {"memory_mib": "peak training memory, MiB", "epoch_seconds": "an epoch, seconds"}
DRAWN = ("448", "448_fold1", "224_fold1")
"""Studies of the first figure: the stored methods in all folds, and all methods in one."""


class Point(NamedTuple):
    """What a method came to on a task.

    Attributes:
        task: by name.
        study: the end of the result file's name.
        method: by name.
        row: of the result file.
    """

    task: str
    study: str
    method: str
    row: Mapping[str, Any]

    @property
    def resolution(self) -> int:
        """Of the encoder's images in pixels."""
        return STUDIES[self.study].resolution

    @property
    def all_folds(self) -> bool:
        return len(STUDIES[self.study].folds) == FOLDS


def points(folder: Path) -> Iterator[Point]:
    """Of all result files ``evidence_{data}_{study}.json`` but those of one method's settings."""
    for study in STUDIES:
        for path in sorted(folder.glob(f"evidence_*_{study}.json")):
            for task, rows in json.loads(path.read_text())["tasks"].items():
                yield from (Point(task, study, name, rows[name]) for name in rows if name in COMPARED)


def in_all_folds(found: Iterable[Point]) -> list[Point]:
    """Of each method on a task at a resolution the first, whose rates were searched where any were."""
    first: dict[tuple[str, int, str], Point] = {}
    for point in found:
        if point.all_folds:
            first.setdefault((point.task, point.resolution, point.method), point)
    return list(first.values())


def summary(found: Sequence[Point]) -> str:
    """Markdown, a row a method, a column a task at a resolution; empty where nothing was measured.

    Other views are those that ``init`` writes, of photographs or of X-rays; without zoom they have no row.
    """
    columns = [(task, size) for task in TASKS for size in sorted({p.resolution for p in found if p.task == task})]
    heads = [f"{TASKS[task].short}, {size}" for task, size in columns]
    lines = [f"| method | learnable, % | {' | '.join(heads)} |", "|---|" + "---:|" * (1 + len(columns))]
    shown: dict[str, dict[tuple[str, int], Mapping[str, Any]]] = {_called(method): {} for method in COMPARED}
    for point in found:
        shown[_called(point.method)][point.task, point.resolution] = point.row
    for label, own in shown.items():
        if label and own:
            ratio = next(iter(own.values()))["learnable_ratio"]
            cells = [_with_half_width(own[column]["fold_auc"]) if column in own else "" for column in columns]
            lines.append(f"| {label} | {100 * ratio:.2g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _called(method: str) -> str:
    """In the summary; empty where it has no row there."""
    label, data = ROWS[method].label, ROWS[method].data
    if "zoom" in data:
        return f"{label.split(', ')[0]}, other views"
    return "" if "orientations" in data else label


def _with_half_width(estimate: Mapping[str, float]) -> str:
    return f"{100 * estimate['value']:.1f} ± {50 * (estimate['high'] - estimate['low']):.1f}"


def draw_cost(found: list[Point], path: Path) -> None:
    """A row a task of a study: AUC against memory and against time, a point a method."""
    rows = [
        (study, name) for study in DRAWN for name in TASKS if any((p.study, p.task) == (study, name) for p in found)
    ]
    figure = Figure(figsize=(11, 3.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(COSTS), squeeze=False, sharey="row", sharex="col")
    for (study, name), row in zip(rows, panels, strict=True):
        own = [point for point in found if (point.study, point.task) == (study, name)]
        for axes, (cost, label) in zip(row, COSTS.items(), strict=True):
            for point in own:
                _error_bar(axes, point.row[cost], point)
            axes.set(xscale="log", xlabel=label)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.grid(alpha=0.3)
        row[0].set_ylabel("AUC x 100")
        of = f"{own[0].resolution} pixels" + ("" if own[0].all_folds else ", one fold")
        row[0].set_title(f"{TASKS[name].title}, {of}", loc="left", fontsize=10)
    figure.legend(*_unique(panels.ravel()), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Date": None})


def draw_resolution(found: list[Point], path: Path) -> None:
    """A panel a task that was run at several resolutions: AUC against resolution, a line a method."""
    sizes = {name: sorted({p.resolution for p in found if p.task == name}) for name in TASKS}
    tasks = [name for name in TASKS if len(sizes[name]) > 1]
    figure = Figure(figsize=(2.5 + 3.6 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for name, axes in zip(tasks, panels, strict=True):
        of_methods = [[p for p in found if (p.task, p.method) == (name, method)] for method in COMPARED]
        lines = [sorted(own, key=lambda p: p.resolution) for own in of_methods if len(own) > 1]
        for rank, own in enumerate(lines):
            shift = 1 + 0.015 * (rank - len(lines) // 2)  # so that intervals do not hide each other
            places = [p.resolution * shift for p in own]
            axes.plot(places, [100 * p.row["fold_auc"]["value"] for p in own], color=_color(own[0].method))
            for place, point in zip(places, own, strict=True):
                _error_bar(axes, place, point)
        axes.set(xscale="log", xlabel="resolution of the encoder's images, pixels")
        axes.set_xticks(sizes[name], [str(size) for size in sizes[name]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(TASKS[name].title, fontsize=10)
    panels[0].set_ylabel("AUC x 100")
    figure.legend(*_unique(panels), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Date": None})


def draw_leads(found: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """A panel a task: by how much what ``init`` writes is above each other stored method, by learning rates."""
    tasks = [task for task in TASKS if any(found[rates].get(task) for rates in RATES)]
    leads = {
        (rates, task, method): row["lead"]["auc"]
        for rates, task in product(RATES, tasks)
        for method, row in found[rates].get(task, {}).items()
        if row["lead"]
    }
    methods = [method for method in reversed(COMPARED) if any(method == other for *_, other in leads)]
    figure = Figure(figsize=(3.5 + 2.2 * len(tasks), 1.6 + 0.33 * len(methods)), layout="constrained")
    panels = dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], strict=True))
    for (rates, task, method), lead in leads.items():
        value, low, high = (100 * lead[key] for key in ("value", "low", "high"))
        own = rates == next(iter(RATES))
        panels[task].errorbar(
            [value],
            [methods.index(method) + (0.14 if own else -0.14)],
            xerr=[[value - low], [high - value]],
            marker="o" if own else "s",
            markersize=5,
            markerfacecolor=None if own else "white",
            color=_color(method),
        )
    for task, axes in panels.items():
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3, axis="x")
        axes.set_title(TASKS[task].short, fontsize=10)
    panels[tasks[0]].set_yticks(range(len(methods)), [ROWS[method].label for method in methods])
    figure.supxlabel(
        "lead of what init writes, points of AUC (filled: own learning rates; hollow: searched ones)", fontsize=10
    )
    figure.savefig(path, dpi=130, metadata={"Date": None})


def _error_bar(axes: Axes, x: float, point: Point) -> None:
    estimate = point.row["fold_auc"]
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    axes.errorbar(
        [x],
        [value],
        [[value - low], [high - value]],
        marker="o" if ROWS[point.method].stored else "s",
        color=_color(point.method),
        elinewidth=0.8,
        label=point.row["label"],
    )


def _color(method: str) -> Any:
    colors = [*colormaps["tab20"].colors, *colormaps["tab20b"].colors]  # type: ignore[attr-defined]
    return colors[COMPARED.index(method)]


def _unique(panels: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of all panels, each label once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return list(handles.values()), list(handles)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    take_no_arguments(__doc__, arguments)
    found = list(points(RESULTS))
    draw_cost(found, DOCS / "evidence_cost.png")
    complete = in_all_folds(found)
    (RESULTS / "evidence.md").write_text(summary(complete))
    if len({point.resolution for point in complete}) > 1:
        draw_resolution(complete, DOCS / "evidence_resolution.png")
    leads = RESULTS / "evidence_default.json"
    if leads.is_file():
        draw_leads(json.loads(leads.read_text()), DOCS / "evidence_default.png")


if __name__ == "__main__":
    main()
