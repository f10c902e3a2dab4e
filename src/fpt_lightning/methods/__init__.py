"""The methods: one LightningModule each, over one base."""

from fpt_lightning.methods.base import ClassificationModule
from fpt_lightning.methods.fpt import FPTPlusModule

__all__ = ["ClassificationModule", "FPTPlusModule"]
