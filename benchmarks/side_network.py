"""What the side network adds to the prompts with real weights: FPT+ with a prompt head, tested without either part.

    python benchmarks/side_network.py --weights FILE.safetensors --fundus DIR --chest DIR --out runs/evidence

Cells of ``evidence.py`` (five folds, seed 0, learning rate 1e-3), which share its stores. Each trained model is tested
as it is, without the logits of its side network, and without those of its prompt head. Goes on where it was stopped;
writes ``results/side_network.json`` and ``.md``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cells import Cell
from environment import RESULTS, write_result
from evidence import (
    EPOCHS,
    FOLDS,
    ROWS,
    TASKS,
    Pooled,
    Protocol,
    estimated,
    parser_of_places,
    places,
    pool,
    resampled_values,
    shown,
)
from fpt_lightning import cli
from fpt_lightning.evaluation.predictions import Predictions
from fpt_lightning.evaluation.resampling import resampled_weights

RESOLUTION, PAIR, SEED = 224, (1e-3, 0.1), 0
TRAINED = (
    ("fundus_referable", "fpt_plus_prompt_head"),
    ("fundus_referable", "fpt_plus_zoomed"),
    ("chest_pneumonia", "fpt_plus_prompt_head"),
    ("chest_pneumonia", "fpt_plus_mirrored_zoomed"),
)
"""Tasks and rows of ``evidence.py``."""
WITHOUT = {"whole": None, "without the side network": "side.head", "without the prompt head": "prompt_head"}
"""What each model is tested as, and the head whose logits are left out."""


def tested(cell: Cell, head: str | None) -> Predictions:
    """Test predictions of a trained cell, without the logits of one of its heads."""
    if head is None:
        return Predictions.read(cell.folder / "predictions.csv")
    folder = cell.folder / f"without_{head}"
    found = folder / "test" / "best" / "predictions.csv"
    if not found.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        checkpoint = torch.load(cell.folder / "best.ckpt", map_location="cpu", weights_only=True)
        for kind in ("weight", "bias"):
            checkpoint["state_dict"][f"{head}.{kind}"].zero_()
        torch.save(checkpoint, folder / "best.ckpt")
        arguments = ["--config", str(cell.folder / "cell.yaml"), "--ckpt_path", str(folder / "best.ckpt")]
        cli.main(["test", *arguments, "--trainer.default_root_dir", str(folder)])
    return Predictions.read(found)


def measured(protocol: Protocol, task: str, method: str) -> dict[str, Any]:
    """The mean of the folds' AUC of each part, with intervals, and the norms of the heads' weights."""
    folds: dict[str, list[Predictions]] = {part: [] for part in WITHOUT}
    norms: dict[str, list[float]] = {head: [] for head in WITHOUT.values() if head is not None}
    for fold in protocol.folds:
        folder = protocol.out / "side_network" / f"{task}-{method}" / f"fold{fold}"
        cell = protocol.cell(task, method, fold, PAIR, SEED).at(folder)
        cell.check()
        cell.run(keep_checkpoints=True)
        for part, head in WITHOUT.items():
            folds[part].append(tested(cell, head))
        weights = torch.load(cell.folder / "best.ckpt", map_location="cpu", weights_only=True)["state_dict"]
        for head, found in norms.items():
            found.append(float(weights[f"{head}.weight"].norm()))
    pooled = {part: pool(found) for part, found in folds.items()}
    return {"label": ROWS[method].label, "auc": _aucs(pooled), "norms": norms}


def _aucs(pooled: Mapping[str, Pooled]) -> dict[str, Any]:
    drawn = list(resampled_weights(pooled["whole"].predictions, 2000, 0))
    value, spread = {}, {}
    for part, own in pooled.items():
        value[part], spread[part] = resampled_values([own], drawn)
    return {part: estimated(value, spread, part, "fold_auc", "whole") for part in pooled}


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown, a row a task and a method."""
    heads = ["task", "method", "AUC x 100 [95%]", *(f"{part} [95%], minus whole [95%]" for part in list(WITHOUT)[1:])]
    heads += ["side network's head, norm", "prompt head, norm"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for task, rows in found.items():
        for row in rows.values():
            whole, *others = row["auc"].values()
            cells = [TASKS[task].title, row["label"], shown(whole)]
            cells += [f"{shown(each)}, {shown(each['difference'], '+', 2)}" for each in others]
            cells += [f"{min(norms):.2g} to {max(norms):.2g}" for norms in row["norms"].values()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    args = parser_of_places(__doc__).parse_args(arguments)
    folds = tuple(range(1, FOLDS + 1))
    protocol = Protocol(*places(args), RESOLUTION, folds, 1, EPOCHS, PAIR[:1], PAIR[1:])
    found: dict[str, dict[str, Any]] = {}
    for task, method in TRAINED:
        found.setdefault(task, {})[method] = measured(protocol, task, method)
    path = write_result("side_network", {"resolution": RESOLUTION, "learning_rate": PAIR[0], "tasks": found})
    (RESULTS / "side_network.md").write_text(table(found))
    print(f"results are in {path}, and .md beside it")


if __name__ == "__main__":
    main()
