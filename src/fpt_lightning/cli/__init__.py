"""The command line over everything else, imported by none of it; it hands on ``main``, the console script."""

from fpt_lightning.cli.entry import main

__all__ = ["main"]
