"""MaskedKD in a bare PyTorch loop, on scikit-learn's handwritten digits.

A small teacher is trained first; then a smaller student learns from the labels and from the teacher, which sees only
the half of the patches that the student's CLS token attends to.

    python examples/bare_loop.py --steps 300
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

import fastmkd


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns training images (1500, 1, 8, 8) and labels, then those for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def make_vit(embed_dim: int, depth: int) -> VisionTransformer:
    """Returns a ViT with a 4 x 4 grid of 2 x 2 patches."""
    picture = {"img_size": 8, "patch_size": 2, "in_chans": 1}
    return VisionTransformer(
        **picture, num_classes=10, embed_dim=embed_dim, depth=depth, num_heads=4, weight_init="jax"
    )


def train(method: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
    """The loop: nothing in it knows about distillation."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3, weight_decay=0.05)
    method.train()
    for step in range(steps):
        batch = torch.randint(len(images), (64,))
        out = method(images[batch], labels[batch])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}", *(f"{name} {value.item():.3f}" for name, value in out.terms.items()))


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that the model gets right."""
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Trains teacher and student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    args = parser.parse_args()
    torch.manual_seed(0)
    train_images, train_labels, test_images, test_labels = digits()

    teacher = make_vit(embed_dim=64, depth=3)
    train(fastmkd.Supervised(teacher), train_images, train_labels, args.steps)
    print(f"teacher accuracy {accuracy(teacher, test_images, test_labels):.3f}")

    student = make_vit(embed_dim=32, depth=2)
    method = fastmkd.MaskedKD(student, teacher, keep_ratio=args.keep_ratio)
    train(method, train_images, train_labels, args.steps)
    method.release()
    print(f"student accuracy {accuracy(student, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()
