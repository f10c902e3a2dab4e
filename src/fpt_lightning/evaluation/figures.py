"""The figures of a report, as SVG that stands within a page: its fonts and colours are the page's."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import Any
from zlib import crc32

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fpt_lightning.evaluation.estimates import Estimate
from fpt_lightning.evaluation.measures import CALIBRATION_BINS, calibration_bin, net_benefit
from fpt_lightning.evaluation.resampling import resampled_counts

POINTS = 200
"""How many points of a curve are drawn at most."""
SCATTERED = 800
"""How many points of a scatter plot are drawn at most."""

MAPPED = 3000
"""How many images of a map are drawn at most."""

_INK, MUTED, LINE, ACCENT, SECOND = "#101112", "#606162", "#d0d1d2", "#0b62a4", "#c05a00"
_VARIABLES = {_INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", SECOND: "second"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 7.5,
    "text.color": _INK,
    "axes.labelcolor": MUTED,
    "text.parse_math": False,  # a class may be called $x_1$
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
_COLOURS = (ACCENT, SECOND, "#2f9e6e", "#b0508f", "#8f7d12", "#7c6bd6", "#c04848", "#3f93a3")
_HALVES = (0, 0.5, 1)
_NAME = 20  # letters of a name in a line
_OTHERS = "others"  # of a map, names without a colour of their own
_GRID = np.linspace(0, 1, 101)
_THRESHOLDS = np.arange(1, 100) / 100

Floats = NDArray[np.float64]


def draw_roc(
    positive: NDArray[np.bool_], scores: Floats, weights: Iterable[Floats], decision: tuple[float, float]
) -> str:
    """ROC curve of one class with a 95% band.

    Args:
        positive: (N,), at least one and not all.
        scores: (N,).
        weights: of resamples, (R, N) each.
        decision: sensitivity and specificity of the decision, which are marked; NaN if there is none.
    """
    false_positives, true_positives = _roc(positive, scores, np.ones((1, len(scores))))
    pairs = ([*zip(*_roc(positive, scores, each), strict=True)] for each in weights)
    band = [np.interp(_GRID, x, y) for x, y in itertools.chain.from_iterable(pairs) if not np.isnan(x[0] + y[0])]
    with matplotlib.rc_context(STYLE):
        figure, axes = _square("1 - specificity", "sensitivity")
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=0.8)
        if band:
            low, high = np.percentile(band, [2.5, 97.5], axis=0)
            axes.fill_between(_GRID, low, high, color=ACCENT, alpha=0.15, linewidth=0)
        kept = _thinned(false_positives.shape[1])
        axes.plot(false_positives[0, kept], true_positives[0, kept], color=ACCENT)
        axes.plot(1 - decision[1], decision[0], "o", color=SECOND, markersize=4)
        return _svg(figure, "ROC curve")


def draw_precision_recall(positive: NDArray[np.bool_], scores: Floats) -> str:
    """Precision-recall curve of one class, and its prevalence; at least one of ``positive`` (N,) is true."""
    true, false = (counts[0, ::-1].cumsum() for counts in resampled_counts(scores, positive, np.ones((1, len(scores)))))
    kept = _thinned(len(true))
    precision = (true / (true + false))[kept]
    with matplotlib.rc_context(STYLE):
        figure, axes = _square("recall (sensitivity)", "precision")
        axes.axhline(positive.mean(), color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.plot(np.r_[0, true[kept] / true[-1]], np.r_[precision[0], precision], color=ACCENT, drawstyle="steps-pre")
        return _svg(figure, "precision-recall curve")


def draw_reliability(scores: Floats, true: NDArray[np.bool_]) -> str:
    """How often what was predicted with a probability (N,) is true (N,), in bins, over how many images each bin has."""
    bins = calibration_bin(scores)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = np.flatnonzero(counts)
    predicted, observed = (np.bincount(bins, values)[filled] / counts[filled] for values in (scores, true))
    with matplotlib.rc_context(STYLE):
        figure, axes = _square("predicted probability", "observed share", bottom=0.38)
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=0.8)
        axes.plot(predicted, observed, color=ACCENT, linewidth=0.9)
        axes.scatter(predicted, observed, 6 + 60 * counts[filled] / counts.sum(), color=ACCENT, linewidth=0)
        axes.set(xlabel="", xticklabels=[])
        below = figure.add_axes((0.22, 0.17, 0.74, 0.15))
        below.bar((np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS, counts, 0.8 / CALIBRATION_BINS, color=MUTED)
        below.set(xlim=(-0.02, 1.02), xticks=_HALVES, xticklabels=_HALVES, xlabel="predicted probability")
        below.set_yticks([counts.max()], [f"{counts.max():,}"])
        return _svg(figure, "reliability diagram")


def draw_decision(positive: NDArray[np.bool_], scores: Floats) -> str:
    """Net benefit of deciding for one class by its scores (N,), for all and for none; any of ``positive`` (N,) is true.

    Nothing is above the share of ``positive``; what is far below 0 is cut off.
    """
    prevalence = positive.mean()
    with matplotlib.rc_context(STYLE):
        figure, axes = _square("threshold probability", "net benefit", left=0.32)
        axes.axhline(0, color=LINE, linewidth=0.8)
        everyone = net_benefit(positive, np.ones(len(scores)), _THRESHOLDS)
        axes.plot(_THRESHOLDS, everyone, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.plot(_THRESHOLDS, net_benefit(positive, scores, _THRESHOLDS), color=ACCENT)
        axes.set_ylim(-0.25 * prevalence, 1.05 * prevalence)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))  # few digits
        axes.yaxis.set_major_formatter("{x:.4g}")
        return _svg(figure, "decision curve")


def draw_forest(estimates: Mapping[str, Estimate], whole: Estimate) -> str:
    """Estimates of subgroups with their intervals, from the first down, over that of all images.

    Args:
        estimates: by subgroup, each with a value.
        whole: a line in a band.
    """
    names = ["\n".join(textwrap.wrap(name, _NAME)) or name for name in estimates]
    heights = [0.09 + 0.13 * (name.count("\n") + 1) for name in names]
    places = np.cumsum(heights) - np.array(heights) / 2
    height = 0.4 + sum(heights)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.7, height))
        axes = figure.add_axes((0.36, 0.28 / height, 0.61, 1 - 0.3 / height))
        axes.axvspan(whole.low, whole.high, color=LINE, alpha=0.5, linewidth=0)
        axes.axvline(whole.value, color=MUTED, linewidth=0.8)
        for row, each in zip(places, estimates.values(), strict=True):
            axes.plot([each.low, each.high], [row, row], color=ACCENT)
            axes.plot(each.value, row, "o", color=ACCENT, markersize=4)
        axes.set(ylim=(sum(heights), 0))
        axes.set_yticks(places, names)
        axes.tick_params(axis="y", length=0)
        return _svg(figure, "subgroups")


def draw_history(
    label: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], marked: float | None = None
) -> str:
    """One or two names with their (epoch, value), and an epoch that is marked."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _wide("epoch", label)
        if marked is not None:
            axes.axvline(marked, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)))
        for (name, points), colour, style in zip(series, (ACCENT, SECOND), ("-", (0, (4, 1.5))), strict=False):
            epochs, values = np.array(points)[_thinned(len(points))].T
            marker = "o" if len(points) == 1 else ""
            axes.plot(epochs, values, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            axes.legend()
        return _svg(figure, f"{label} by epoch")


def draw_scatter(true: Floats, predicted: Floats) -> str:
    """Predicted against true values, (N,) each."""
    kept = _sampled(len(true))
    with matplotlib.rc_context(STYLE):
        figure, axes = _wide("true", "predicted")
        ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
        axes.plot(ends, ends, color=MUTED, linewidth=0.8)
        axes.plot(true[kept], predicted[kept], "o", color=ACCENT, markersize=2.6, alpha=0.45, markeredgewidth=0)
        return _svg(figure, "predicted against true values")


def draw_bland_altman(true: Floats, predicted: Floats) -> str:
    """Differences over means, with their mean and limits of agreement (Bland and Altman, Lancet 1986)."""
    kept = _sampled(len(true))
    mean, (low, high) = float((predicted - true).mean()), limits_of_agreement(true, predicted)
    with matplotlib.rc_context(STYLE):
        figure, axes = _wide("mean of predicted and true", "predicted - true")
        middles, differences = (predicted + true) / 2, predicted - true
        axes.axhline(mean, color=SECOND, linewidth=1)
        for limit in (low, high):
            axes.axhline(limit, color=SECOND, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.plot(middles[kept], differences[kept], "o", color=ACCENT, markersize=2.6, alpha=0.45, markeredgewidth=0)
        return _svg(figure, "Bland-Altman plot")


def draw_map(places: Floats, names: Sequence[str], axes_named: tuple[str, str]) -> str:
    """Images at their places (N, 2), in the colours of their names (N,); the most frequent names have one each."""
    kept = np.sort(np.random.default_rng(0).permutation(len(places))[:MAPPED])
    counts = Counter(names).most_common()
    shown = {name: (colour, count) for (name, count), colour in zip(counts, _COLOURS, strict=False)}
    if others := sum(count for _, count in counts[len(_COLOURS) :]):
        shown[_OTHERS] = MUTED, others
    drawn = np.array([name if name in shown else _OTHERS for name in names])[kept]
    below = 0.1 + 0.17 * -(-len(shown) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.3 + below))
        axes = figure.add_axes((0.05, (0.25 + below) / (3.3 + below), 0.94, 3 / (3.3 + below)))
        axes.set(xlabel=axes_named[0], ylabel=axes_named[1], xticks=[], yticks=[])
        for name, (colour, count) in shown.items():
            style: dict[str, Any] = {"markersize": 2.4, "alpha": 0.7, "markeredgewidth": 0}
            axes.plot(*places[kept[drawn == name]].T, "o", color=colour, label=f"{_short(name)} ({count:,})", **style)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, markerscale=2)
        return _svg(figure, "map of the images")


def limits_of_agreement(true: Floats, predicted: Floats) -> tuple[float, float]:
    """Mean difference minus and plus 1.96 standard deviations; NaN of fewer than two values."""
    differences = predicted - true
    if len(differences) < 2:
        return math.nan, math.nan
    mean, spread = float(differences.mean()), 1.96 * float(differences.std(ddof=1))
    return mean - spread, mean + spread


def _roc(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """False and true positives, (R, D + 1) shares from (0, 0) to (1, 1); NaN for want of positives or negatives."""
    shares = []
    for counts in reversed(resampled_counts(scores, positive, weights)):
        total = counts.sum(1, keepdims=True)
        share = counts[:, ::-1].cumsum(1) / np.where(total > 0, total, np.nan)
        shares.append(np.concatenate([share[:, :1] * 0, share], 1))
    return shares[0], shares[1]


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[:_NAME]}..."


def _thinned(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(np.int64))


def _sampled(count: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(0).permutation(count)[:SCATTERED])


def _square(x: str, y: str, bottom: float = 0.2, left: float = 0.22) -> tuple[Figure, Axes]:
    """A panel of two shares from 0 to 1."""
    figure = Figure(figsize=(2.1, 2.1 * (0.95 if bottom < 0.3 else 1.1)))
    axes = figure.add_axes((left, bottom, 0.96 - left, 0.98 - bottom))
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=_HALVES, yticks=_HALVES, xlabel=x, ylabel=y)
    axes.set(xticklabels=_HALVES, yticklabels=_HALVES)
    return figure, axes


def _wide(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.7, 2.3))
    axes = figure.add_axes((0.15, 0.17, 0.82, 0.79))
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=LINE, linewidth=0.4)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an element of a page, its ids its own."""
    for patch in [figure.patch, *(axes.patch for axes in figure.axes)]:
        patch.set_visible(False)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for dropped in ("<metadata>.*?</metadata>", "<style.*?</style>", "<!--.*?-->"):
        svg = re.sub(dropped, "", svg, flags=re.DOTALL)
    view = re.search('viewBox="[^"]*"', svg)
    assert view is not None
    svg = re.sub("<svg[^>]*>", f'<svg role="img" aria-label="{label}" {view[0]}>', svg, count=1)
    referred, own = set(re.findall(r"#([A-Za-z_][\w-]*)", svg)), f"{crc32(svg.encode()):08x}"
    svg = re.sub(' id="([^"]*)"', lambda found: f' id="f{own}-{found[1]}"' if found[1] in referred else "", svg)
    svg = re.sub(r'(url\(|xlink:href=")#', rf"\1#f{own}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"(font-family|font-weight|stroke-linejoin): [^;\"]*(; )?", "", svg)
    svg = re.sub(r" transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub("<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)  # of places, not of labels
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r">\s+<", "><", svg).strip()
