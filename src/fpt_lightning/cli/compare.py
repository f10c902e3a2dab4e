"""The command ``compare``: two predictions files of the same images, without a model."""

from __future__ import annotations

from fpt_lightning.evaluation import comparison
from fpt_lightning.evaluation.predictions import Predictions


def compare(first: str, second: str, resamples: int = 2000, seed: int = 0) -> None:
    """Compare two predictions files of the same images by a paired bootstrap, and print the differences.

    Args:
        first: the CSV file of the reference.
        second: the CSV file that is held against it.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: a file that cannot be used as it is, or files of other images, classes or labels.
    """
    both = Predictions.read(first), Predictions.read(second)
    print(f"first: {first}\nsecond: {second}\n{comparison.compare(*both, resamples=resamples, seed=seed).table()}")
