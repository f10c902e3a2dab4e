"""Recipes for the paper's eight data sets: a new one is a file beside them and a line here."""

from fpt_lightning.datasets import chncxr, cmmd, covid, ddr, ddsm, isic2016, isic2018, messidor2
from fpt_lightning.datasets.pieces import Pieces, Wanted
from fpt_lightning.datasets.recipe import Found, Layout, Recipe

DATASETS: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE for module in (ddr, messidor2, isic2018, isic2016, ddsm, cmmd, covid, chncxr)
}
"""By name, in the paper's order."""

__all__ = ["DATASETS", "Found", "Layout", "Pieces", "Recipe", "Wanted"]
