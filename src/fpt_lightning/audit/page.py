"""An audit as one HTML file that stands alone, with thumbnails of what was found."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fpt_lightning.audit.duplicates import NEAR, SAME, Copies
from fpt_lightning.audit.findings import FOLDS, LONELY, NEIGHBOURS, Audit, crossed, label_of
from fpt_lightning.audit.labels import Doubt
from fpt_lightning.audit.shortcuts import RINGS, SPLIT, Told
from fpt_lightning.evaluation.estimates import number
from fpt_lightning.evaluation.figures import MAPPED, draw_map
from fpt_lightning.evaluation.page import capital, note_box, panel, section, table, write_page

SHOWN = 24
"""Findings of a kind that have thumbnails; the CSV files have all."""
_SIDE, _QUALITY = 160, 80  # of thumbnails: pixels, and JPEG's


def write_audit_page(path: Path, audit: Audit, copies: Copies, title: str, about: Mapping[str, str]) -> None:
    """Write the page of an audit, whole or not at all.

    Args:
        path: of the HTML file.
        audit: what was found.
        copies: gives the images' low-resolution copies by their rows.
        title: of the page.
        about: what identifies data, store and software, by name.
    """
    pairs, doubts, lonely = audit.pairs[:SHOWN], audit.doubts[:SHOWN], audit.outliers[:SHOWN]
    rows = sorted({*(row for pair in pairs for row in pair[:2]), *(doubt.row for doubt in doubts), *lonely})
    pictures = dict(zip(rows, map(_thumbnail, copies(rows)), strict=True)) if rows else {}
    sections = [
        _headline(audit),
        _map(audit),
        _shortcuts(audit.told),
        _found(
            "Near-duplicates",
            len(audit.pairs),
            f"Pairs whose features have a cosine of at least {NEAR}, and whose copies have the same detail (a "
            f"correlation of at least {SAME}, moved a little or mirrored). Those in two splits, or of two groups such "
            "as patients, leak from training into test.",
            "duplicates.csv",
            [_pair(audit, index, pictures) for index in range(len(pairs))],
            "wide pairs",
        ),
        _found(
            "Likely wrong labels",
            len(audit.doubts),
            f"A linear probe that saw no image of the group ({FOLDS} folds), and the {NEIGHBOURS} nearest images of "
            "other groups, both speak for another label. A list to look through, not a verdict.",
            "labels.csv",
            [_doubt(audit, doubt, pictures[doubt.row]) for doubt in doubts],
        ),
        _found(
            "Outliers",
            len(audit.outliers),
            f"Images that are far from their {NEIGHBOURS} nearest of other groups: by more than {LONELY} robust "
            "deviations of what is usual.",
            "outliers.csv",
            [
                _card(
                    audit,
                    row,
                    pictures[row],
                    [f"label {label_of(audit.manifest, audit.samples[row])}", f"deviation {audit.loneliness[row]:.1f}"],
                )
                for row in lonely
            ],
        ),
        section("About", table([], [[escape(name), escape(value)] for name, value in about.items()], "narrow text")),
    ]
    said = "Pictures are the low-resolution copies of the feature store, as the encoder's frame has them."
    write_page(path, title, f"{audit.basis()} {said}", sections, _STYLE)


def _headline(audit: Audit) -> str:
    tiles = {
        "Images": (f"{len(audit.samples):,}", ""),
        "Near-duplicates": (f"{len(audit.pairs):,}", f"{audit.leaks:,} across splits or groups"),
        "Likely wrong labels": (f"{len(audit.doubts):,}", ""),
        "Outliers": (f"{len(audit.outliers):,}", ""),
        "Shortcuts that ring": (f"{len({each.attribute for each in audit.ringing}):,}", ""),
    }
    cells = [
        f"<div><dt>{name}</dt><dd><b>{value}</b><small>{small}</small></dd></div>"
        for name, (value, small) in tiles.items()
    ]
    listed = f'<dl class="tiles" style="--columns:{len(cells)}">{"".join(cells)}</dl>'
    said = note_box(audit.verdict()) if audit.ringing else f"<p>{escape(audit.verdict()[0])}</p>"
    return section("Found", listed + said)


def _map(audit: Audit) -> str:
    names = [label_of(audit.manifest, sample) or "none" for sample in audit.samples]
    if audit.manifest.kind == "multi-label":
        names = [name.split(", ")[0] for name in names]
    elif audit.manifest.kind == "regression":
        names = _thirds([sample.targets[0] for sample in audit.samples])
    explained = "Each point is an image at its pooled features: what is near is alike. Places are in images.csv."
    if audit.manifest.kind == "multi-label":
        explained += " Of several labels the first has its colour."
    if len(names) > MAPPED:
        explained += f" {MAPPED:,} of {len(names):,} images are drawn, chosen at random."
    return section(
        "Map", f'<div class="panels map">{panel("", "", draw_map(audit.places, names, audit.axes))}</div>', explained
    )


def _thirds(numbers: Sequence[float]) -> list[str]:
    low, high = np.nanquantile(numbers, (1 / 3, 2 / 3))
    return [
        "none"
        if value != value
        else f"up to {low:g}"
        if value <= low
        else f"up to {high:g}"
        if value <= high
        else f"above {high:g}"
        for value in numbers
    ]


def _shortcuts(told: Sequence[Told]) -> str:
    heads = ["Attribute", "Tells the label by itself: best", "Told from the features: best"]
    rows = [
        [
            escape(capital(name)),
            *(
                _best([each for each in told if each.attribute == name and each.from_features == way])
                for way in (False, True)
            ),
        ]
        for name in dict.fromkeys(each.attribute for each in told)
    ]
    explanation = (
        "AUC and 95% interval by group. Left: how well the attribute alone, without any picture, tells a label; where "
        "it does, a model may learn where an image is from in place of what it shows. Right: how well the features "
        "tell the attribute among images of the same label, which does harm where the label goes with it. An AUC whose "
        f"whole interval is above {RINGS} rings: on the left, and of the {SPLIT} on the right. File sizes also follow "
        "what a picture shows. A dash: fewer than ten groups to compare on one side. All are in shortcuts.csv."
    )
    return section("Shortcuts", table(heads, rows, "shortcuts"), explanation)


def _best(told: Sequence[Told]) -> str:
    if not told:
        return "-"
    best = max(told, key=lambda each: each.auc.value)
    bounds = f"{number(best.auc.low)} to {number(best.auc.high)}"
    value = f'<b class="rings">{number(best.auc.value)} rings</b>' if best.rings else number(best.auc.value)
    return f"{value}<small>{bounds}</small><small>{escape(best.told)} from {escape(best.rest)}</small>"


def _found(title: str, count: int, explanation: str, file: str, cards: Sequence[str], kind: str = "") -> str:
    if not cards:
        return section(title, "<p>None.</p>", explanation)
    more = f" The first {len(cards)} of {count:,} are shown; all are in {file}." if count > len(cards) else ""
    return section(title, f'<div class="panels {kind}">{"".join(cards)}</div>', explanation + more)


def _pair(audit: Audit, index: int, pictures: Mapping[int, str]) -> str:
    pair = audit.pairs[index]
    both = [audit.samples[row] for row in pair[:2]]
    leaks, labels = crossed(audit.samples, pair), [label_of(audit.manifest, sample) for sample in both]
    unlike = labels[0] != labels[1]
    lines = [
        _alarm(
            f"two {' and two '.join(f'{name}s' for name in leaks)}" if leaks else "one group, one split", bool(leaks)
        ),
        _alarm(f"label {labels[0]}{f' and {labels[1]}' * unlike}", unlike),
        f"<span>cosine {pair.cosine:.3f}, detail {pair.match:.2f}{', mirrored' * pair.mirrored}</span>",
        *(f"<span>{escape(f'{sample.split}: {sample.id}')}</span>" for sample in both),
    ]
    images = "".join(pictures[row] for row in pair[:2])
    return f'<figure><div class="pair">{images}</div><figcaption>{"".join(lines)}</figcaption></figure>'


def _alarm(text: str, rings: bool) -> str:
    return f'<b class="rings">{escape(text)}</b>' if rings else f"<span>{escape(text)}</span>"


def _doubt(audit: Audit, doubt: Doubt, picture: str) -> str:
    of = f"{doubt.name}: " if doubt.name else ""
    lines = [f"{of}label {doubt.given}, likelier {doubt.suggested}"]
    if audit.manifest.kind == "regression":
        lines.append(f"probe {doubt.probe[1]:.4g}, nearest {doubt.nearest[1]:.4g}")
    else:
        lines += [
            f"probe {doubt.probe[0]:.2f} against {doubt.probe[1]:.2f}",
            f"nearest {doubt.nearest[0]:.0%} against {doubt.nearest[1]:.0%}",
        ]
    return _card(audit, doubt.row, picture, lines)


def _card(audit: Audit, row: int, picture: str, lines: Iterable[str]) -> str:
    first, *rest = lines
    said = "".join(f"<span>{escape(line)}</span>" for line in (*rest, audit.samples[row].id))
    return f"<figure>{picture}<figcaption><b>{escape(first)}</b>{said}</figcaption></figure>"


def _thumbnail(copy: NDArray[np.uint8]) -> str:
    image = Image.fromarray(copy)
    image.thumbnail((_SIDE, _SIDE))
    content = BytesIO()
    image.save(content, "JPEG", quality=_QUALITY)
    coded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{coded}">'


_STYLE = """
img{display:block;width:100%;height:auto;border-radius:4px;background:#000}
.panels figure:has(img){flex-basis:184px}
.panels.pairs figure{flex-basis:304px}
.panels.map figure{flex:0 1 620px}
figure img+figcaption,.pair+figcaption{margin-top:5px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:4px}
b.rings{color:var(--second)}
.shortcuts td{white-space:normal}.shortcuts td small{white-space:normal;overflow-wrap:anywhere}
section>p{margin:10px 0 0}
@media (max-width:640px){.panels figure:has(img){flex-basis:calc(50% - 7px)}.panels.pairs figure{flex-basis:100%}
.shortcuts tbody th{min-width:6.5em}}
@media print{.panels figure:has(img){flex-basis:110px}.panels.pairs figure{flex-basis:224px}}
"""
