"""MaskedKD inside a LightningModule (package pytorch-lightning), on scikit-learn's handwritten digits.

The teacher is not part of the method's parameters or state dict, so checkpoints hold the student alone. An untrained
teacher stands in for your own here.

    python examples/lightning.py --steps 200
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

import fastmkd


def make_vit(embed_dim: int, depth: int) -> VisionTransformer:
    """Returns a ViT with a 4 x 4 grid of 2 x 2 patches."""
    picture = {"img_size": 8, "patch_size": 2, "in_chans": 1}
    return VisionTransformer(
        **picture, num_classes=10, embed_dim=embed_dim, depth=depth, num_heads=4, weight_init="jax"
    )


class Distillation(pl.LightningModule):
    """Trains whatever the method trains, and logs its terms."""

    def __init__(self, method: torch.nn.Module) -> None:
        super().__init__()
        self.method = method

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """One step: the method returns the loss."""
        images, labels = batch
        out = self.method(images, labels)
        accuracy = (out.student_output.argmax(1) == labels).float().mean()
        self.log_dict({**out.terms, "accuracy": accuracy}, prog_bar=True)
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The student's parameters are all there is to optimise."""
        return torch.optim.AdamW(self.method.parameters(), lr=1e-3, weight_decay=0.05)


def main() -> None:
    """Trains the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    pl.seed_everything(0)

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    loader = DataLoader(TensorDataset(images, torch.tensor(data.target)), batch_size=128, shuffle=True)

    student = make_vit(embed_dim=32, depth=2)
    module = Distillation(fastmkd.MaskedKD(student, teacher=make_vit(embed_dim=64, depth=3), keep_ratio=0.5))
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader)
    print(" ".join(f"{name} {value.item():.3f}" for name, value in sorted(trainer.callback_metrics.items())))


if __name__ == "__main__":
    main()
