"""DINO with a masked teacher on Fashion-MNIST, without labels; nearest neighbours say what its features are worth.

    python examples/dino.py
    python examples/dino.py --data digits --images 1000 --steps 50

Fashion-MNIST comes from Debian's package dataset-fashion-mnist, or from files in the folder data.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmkd.methods import MaskedDINO
from fastmkd.train.data import load_data
from fastmkd.train.schema import DataRecipe


def load(name: str, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns training images (count, 1, 28, 28) and labels, then up to 2000 for testing."""
    data = load_data(DataRecipe(name=name, image_size=28, limit=count))
    parts = []
    for pictures in (data.train, data.test):
        parts += [(pictures.images[:count].float() / 255 - data.mean[0]) / data.std[0], pictures.labels[:count]]
    return parts[0], parts[1], parts[2][:2000], parts[3][:2000]


@torch.no_grad()
def knn_accuracy(model: nn.Module, parts: tuple[Tensor, Tensor, Tensor, Tensor], neighbours: int = 20) -> float:
    """Share of test images whose nearest training images, weighted as in DINO's evaluation, vote for their class."""
    model.eval()
    bank, queries = (
        torch.cat([F.normalize(model(part), dim=1) for part in images.split(250)]) for images in (parts[0], parts[2])
    )
    similarity, index = (queries @ bank.T).topk(neighbours)  # (Q, neighbours)
    votes = F.one_hot(parts[1][index], int(parts[1].max()) + 1) * (similarity / 0.07).exp()[..., None]
    return (votes.sum(1).argmax(1) == parts[3]).float().mean().item()


def main() -> None:
    """Trains, and compares with the untrained network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="or digits")
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--keep-ratio", type=float, default=0.66)
    args = parser.parse_args()
    torch.manual_seed(0)
    parts = load(args.data, args.images)
    kwargs = {"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4, "weight_init": "jax"}
    student = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=0, dynamic_img_size=True, **kwargs)
    print(f"untrained: k-NN accuracy {knn_accuracy(student, parts):.3f}", flush=True)

    head = {"out_features": 256, "hidden": 256, "bottleneck": 64, "teacher_temperature": 0.06}
    # A twentieth of so small a picture, as DINO cuts it, shows nothing.
    crops = {"local_crops": 4, "global_scale": (0.5, 1.0), "local_scale": (0.2, 0.5)}
    method = MaskedDINO(student, args.keep_ratio, **head, **crops, momentum=0.99, total_updates=args.steps)
    optimizer = torch.optim.AdamW(method.parameters(), weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.steps, cycle_momentum=False)
    method.train()
    for step in range(1, args.steps + 1):
        out = method(parts[0][torch.randint(len(parts[0]), (args.batch,))])
        optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(method.parameters(), 3.0)
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step} of {args.steps}: loss {out.loss.item():.3f}", flush=True)
    method.release()
    print(f"trained: k-NN accuracy {knn_accuracy(student, parts):.3f}")


if __name__ == "__main__":
    main()
