"""MaskedKD with Hugging Face's Trainer, on scikit-learn's handwritten digits.

The Trainer wants a model that takes a batch's columns by name and returns a dict with the loss. The teacher moves to
the Trainer's device with the method. An untrained teacher stands in for your own here.

    python examples/hf_trainer.py --steps 200
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import fastmkd


def make_vit(embed_dim: int, depth: int) -> VisionTransformer:
    """Returns a ViT with a 4 x 4 grid of 2 x 2 patches."""
    picture = {"img_size": 8, "patch_size": 2, "in_chans": 1}
    return VisionTransformer(
        **picture, num_classes=10, embed_dim=embed_dim, depth=depth, num_heads=4, weight_init="jax"
    )


class Digits(Dataset):
    """Handwritten digits as the columns `pixel_values` and `labels`."""

    def __init__(self) -> None:
        data = load_digits()
        self.images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        self.labels = torch.tensor(data.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Distillation(torch.nn.Module):
    """A method under the names that the Trainer uses."""

    def __init__(self, method: torch.nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the loss first, as the Trainer expects."""
        out = self.method(pixel_values, labels)
        return {"loss": out.loss, "logits": out.student_output}


def main() -> None:
    """Trains the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    method = fastmkd.MaskedKD(make_vit(embed_dim=32, depth=2), make_vit(embed_dim=64, depth=3), keep_ratio=0.5)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=128, learning_rate=1e-3, save_strategy="no",
            report_to="none", logging_steps=50,
        )  # fmt: skip
        result = Trainer(Distillation(method), arguments, train_dataset=Digits()).train()
    print(f"training loss {result.training_loss:.3f}")


if __name__ == "__main__":
    main()
