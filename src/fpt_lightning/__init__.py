"""Train classifiers on high-resolution medical images with a frozen vision transformer (FPT+)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpt_lightning.datamodules.images import ImageDataModule
    from fpt_lightning.datamodules.preloaded import PreloadedFeatureDataModule
    from fpt_lightning.deployment.predictor import Predictor
    from fpt_lightning.methods import FPTPlusModule

__version__ = version("fpt-lightning")
__all__ = ["FPTPlusModule", "ImageDataModule", "Predictor", "PreloadedFeatureDataModule", "__version__"]

_ROOMS = {
    "FPTPlusModule": "methods",
    "ImageDataModule": "datamodules.images",
    "Predictor": "deployment.predictor",
    "PreloadedFeatureDataModule": "datamodules.preloaded",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that the command line, and rooms without PyTorch, start without it."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name not in __all__)]
