"""Use the parts of fpt-lightning inside a LightningModule that knows nothing of its command line or its methods.

    python examples/embed_in_your_project.py

draws 60 fundus-like images, stores the selected tokens of a small untrained encoder, trains a module of its own on them
and classifies an image that is in no store. Less than a minute on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fpt_lightning import PreloadedFeatureDataModule
from fpt_lightning.data.images import read_image
from fpt_lightning.data.transforms import normalise, unit_pixels
from fpt_lightning.datamodules.synthetic import CLASSES, write_fundus_images
from fpt_lightning.encoder.config import EncoderConfig
from fpt_lightning.encoder.frozen import FrozenEncoder
from fpt_lightning.evaluation.metrics import classification_metrics
from fpt_lightning.methods.fusion import FineGrainedFusion
from fpt_lightning.methods.side import SideViT
from fpt_lightning.store.codecs import Features, as_features

ENCODER = EncoderConfig("test_vit", pretrained=False, layers=(0, 1, 2, 3))  # a timm name, and True for its weights
RESOLUTION, SIDE = (320, 320), 128
MEAN, STD = [0.582, 0.289, 0.150], [0.094, 0.076, 0.048]


class YourModule(L.LightningModule):
    """Your own loss, optimiser and head; from here come fusion, side network and metrics."""

    INPUTS = frozenset({"side_images", "features"})  # what the data module puts into a batch
    side_resolution = SIDE
    encoder_config = ENCODER  # which store it asks for

    def __init__(self, classes: int) -> None:
        super().__init__()
        shape, depth, width = ENCODER.shape, len(ENCODER.tapped_layers), 16
        self.fusion = FineGrainedFusion(depth, shape.heads, shape.width, width, prompts=8, dropout=0.1)
        self.side = SideViT(width, shape.heads, depth, shape.patch_size, (SIDE, SIDE), outputs=32)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(32, classes))
        self.metrics = classification_metrics(classes, prefix="val_")

    def forward(self, side_images: Tensor, features: Features) -> Tensor:
        """Logits (B, classes) of low-resolution images (B, 3, side, side) and keys and values in any codec."""
        logits: Tensor = self.head(self.side(side_images, self.fusion(features)))
        return logits

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["side_images"], as_features(batch)), batch["labels"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        scores = self(batch["side_images"], as_features(batch)).softmax(-1)
        self.metrics.update(scores, batch["labels"])
        self.log_dict(self.metrics, on_epoch=True, batch_size=len(scores))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def classify(model: YourModule, path: Path) -> Tensor:
    """Probabilities (classes,) of an image that no store holds, by the encoder itself."""
    image = read_image(path)
    encoder = FrozenEncoder(ENCODER, RESOLUTION)
    features = Features(encoder(normalise(unit_pixels(image, RESOLUTION), MEAN, STD)[None]).features)
    side_image = normalise(unit_pixels(image, (SIDE, SIDE)), MEAN, STD)[None]
    with torch.no_grad():
        probabilities: Tensor = model.eval()(side_image, features).softmax(-1)[0]
    return probabilities


def main() -> None:
    """Draw, store, train and classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/embedded"), help="of the images and the store")
    parser.add_argument("--count", type=int, default=60, help="of images")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    L.seed_everything(0)

    write_fundus_images(arguments.folder / "images", arguments.count, 0, RESOLUTION[0])
    data = PreloadedFeatureDataModule(
        str(arguments.folder / "images"),
        str(arguments.folder / "features.zarr"),
        resolution=RESOLUTION,
        mean=MEAN,
        std=STD,
    )
    data.preload(ENCODER)
    model = YourModule(len(CLASSES))
    trainer = L.Trainer(max_epochs=arguments.epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    print(f"validation AUC: {float(trainer.callback_metrics['val_auc']):.3f}")

    sample = data.labelled.split("test")[0]
    print(sample.id, classify(model, data.labelled.path(sample)).tolist())


if __name__ == "__main__":
    main()
