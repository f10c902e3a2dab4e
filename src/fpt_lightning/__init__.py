"""Train classifiers on high-resolution medical images with a frozen vision transformer (FPT+)."""

from importlib.metadata import version

from fpt_lightning.datamodules import ImageDataModule, PreloadedFeatureDataModule
from fpt_lightning.methods import FPTPlusModule
from fpt_lightning.predictor import Predictor

__version__ = version("fpt-lightning")
__all__ = ["FPTPlusModule", "ImageDataModule", "Predictor", "PreloadedFeatureDataModule", "__version__"]
