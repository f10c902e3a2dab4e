"""What FPT+ looks at with real weights, as published and with a prompt head: ``explain`` of one fold's test images.

    python benchmarks/explained.py --weights FILE.safetensors --fundus DIR --chest DIR --out runs/evidence

Two cells of ``evidence.py`` (referable retinopathy, 448 pixels, fold 1, seed 0, learning rate 1e-3), which share its
store, each followed by ``fpt-lightning explain``. Writes ``results/explained.json`` and ``.md``; the pictures stay in
``{out}/explained/{method}/pictures``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from environment import RESULTS, write_result
from evidence import ROWS, Protocol, parser_of_places, places
from fpt_lightning import cli

TASK, FOLD, PAIR, SEED = "fundus_referable", 1, (1e-3, 0.1), 0
METHODS = ("fpt_plus", "fpt_plus_prompt_head")


def explained(protocol: Protocol, method: str, images: int) -> dict[str, Any]:
    """Fit one cell, explain its test images, and what both came to."""
    folder = protocol.out / "explained" / method
    cell = protocol.cell(TASK, method, FOLD, PAIR, SEED).at(folder)
    cell.check()
    cell.run(keep_checkpoints=True)
    pictures = folder / "pictures"
    options = {
        "config": folder / "cell.yaml",
        "ckpt_path": folder / "best.ckpt",
        "split": "test",
        "images": images,
        "deletion": "true",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    cli.main(["explain", *arguments, "--out", str(pictures)])
    return {
        "label": ROWS[method].label,
        "auc": json.loads((folder / "metrics.json").read_text())["best"]["test_auc"],
        **json.loads((pictures / "explanation.json").read_text()),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a method."""
    blocks = list(found[0]["side_attention"]["by_block"])
    heads = ["", "test AUC x 100", "random - most attended [95%]", "least - most attended [95%]"]
    heads += [f"block {block}, %" for block in blocks]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for each in found:
        areas = [each["deletion"]["areas"][f"{name} - most attended"] for name in ("random", "least")]
        cells = [each["label"], f"{100 * each['auc']:.1f}"]
        cells += [f"{area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]" for area in areas]
        cells += [f"{100 * each['side_attention']['by_block'][block]['value']:.1f}" for block in blocks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = parser_of_places(__doc__)
    parser.add_argument("--images", type=int, default=8, help="how many are drawn")
    args = parser.parse_args(arguments)
    protocol = Protocol(*places(args), 448, (FOLD,), 1, 20, PAIR[:1], PAIR[1:])
    found = [explained(protocol, method, args.images) for method in METHODS]
    path = write_result("explained", {"resolution": 448, "fold": FOLD, "learning_rate": PAIR[0], "methods": found})
    (RESULTS / "explained.md").write_text(table(found))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
