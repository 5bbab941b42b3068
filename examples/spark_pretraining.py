"""Masked pre-training of a CNN in the manner of SparK (Tian et al. 2023); the encoder pays only for what it sees.

A CIFAR ResNet learns from images alone: it sees some cells of a 4 x 4 grid, and a light decoder paints the hidden ones.
Then it is fine-tuned on a few labels, beside the same network from scratch.

    python examples/spark_pretraining.py
    python examples/spark_pretraining.py --data fashion-mnist --side 32 --epochs 3 --labels 500
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmkd
from fastmkd.nn import cifar
from fastmkd.train.data import load_data
from fastmkd.train.schema import DataRecipe

GRID = (4, 4)
MASKS = {"random": fastmkd.random_mask, "block": fastmkd.block_mask, "grid": fastmkd.grid_mask}


def load(name: str, side: int) -> list[Tensor]:
    """Returns training images (N, 3, side, side) and labels, then those for testing."""
    data = load_data(DataRecipe(name=name, image_size=side))
    parts = []
    for pictures in (data.train, data.test):
        images = (pictures.images.float() / 255 - data.mean[0]) / data.std[0]
        parts += [images.expand(-1, 3, -1, -1), pictures.labels]  # grey, but the network takes three channels
    return parts


def to_cells(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, gh, gw, C, H / gh, W / gw)."""
    return images.unflatten(3, (GRID[1], -1)).unflatten(2, (GRID[0], -1)).permute(0, 2, 4, 1, 3, 5)


def to_images(cells: Tensor) -> Tensor:
    """The way back from `to_cells`."""
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class SparK(nn.Module):
    """A CNN that is computed at visible cells only, and a decoder that paints the whole image."""

    def __init__(self, encoder: cifar.ResNet, width: int = 32) -> None:
        super().__init__()
        self.encoder = fastmkd.convert_cnn(encoder)
        self.mask_token = nn.Parameter(torch.zeros(encoder.num_features))

        def twice_as_large(channels: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            return [nn.Upsample(scale_factor=2, mode="bilinear"), conv, nn.BatchNorm2d(width), nn.ReLU()]

        upsampling = (*twice_as_large(encoder.num_features), *twice_as_large(width))
        self.decoder = nn.Sequential(*upsampling, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, images: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss, and the images with their hidden cells painted."""
        features = self.encoder.forward_features(fastmkd.pack(images, visible))  # packed (B, 64, H / 4, W / 4)
        painted = to_cells(self.decoder(features.to_dense(fill=self.mask_token)))
        target = to_cells(images)
        var, mean = torch.var_mean(target, dim=(3, 4, 5), keepdim=True)
        std = (var + 1e-3).sqrt()
        error = (painted - (target - mean) / std).square().mean((3, 4, 5))  # (B, gh, gw), each cell normalised
        # For the picture, hidden cells are given back their own mean and deviation, which the decoder does not predict.
        filled = torch.where(visible[..., None, None, None], target, painted * std + mean)
        return error[~visible].mean(), to_images(filled)


def train(
    name: str, model: nn.Module, loss_of: Callable[[Tensor], Tensor], count: int, epochs: int, batch: int
) -> None:
    """AdamW with one cycle of the learning rate; `loss_of` gives the loss of a batch of indices."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * -(-count // batch))
    model.train()
    for epoch in range(1, epochs + 1):
        losses = []
        for index in torch.randperm(count).split(batch):
            loss = loss_of(index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())  # read once an epoch: a GPU need not wait for each step
        if epoch == 1 or epoch % max(1, epochs // 5) == 0:
            print(f"{name}, epoch {epoch} of {epochs}: loss {torch.stack(losses).mean():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that the model gets right."""
    model.eval()
    return (torch.cat([model(part).argmax(1) for part in images.split(500)]) == labels).float().mean().item()


@torch.no_grad()
def draw(model: SparK, images: Tensor, visible: Tensor, path: str) -> None:
    """Draws the images, what the encoder sees of them, and what the decoder makes of it."""
    masked = fastmkd.pack(images, visible).to_dense(fill=0.5)
    rows = {"input": images, "masked": masked, "painted": model.eval()(images, visible)[1]}
    figure, axes = plt.subplots(3, len(images), figsize=(len(images), 3.6), squeeze=False)
    for axis_row, (title, pictures) in zip(axes, rows.items(), strict=True):
        axis_row[0].set_title(title, fontsize=9, loc="left")
        for axis, picture in zip(axis_row, pictures, strict=True):
            axis.imshow(picture[0], cmap="gray", vmin=float(images.min()), vmax=float(images.max()))
            axis.axis("off")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    """Pre-trains, draws, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--side", type=int, default=16, help="of the images in pixels, a multiple of 16")
    parser.add_argument("--mask", choices=MASKS, default="random")
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--labels", type=int, default=100, help="labelled images to fine-tune on")
    parser.add_argument("--tune-epochs", type=int, default=10)
    parser.add_argument("--out", default="spark.png")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load(args.data, args.side)

    def mask(batch: int) -> Tensor:
        return MASKS[args.mask](batch, GRID, args.mask_ratio)

    spark = SparK(cifar.resnet20(num_classes=10))
    train("pre-training", spark, lambda i: spark(images[i], mask(len(i)))[0], len(images), args.epochs, 64)
    draw(spark, test_images[:8], mask(8), args.out)

    fastmkd.revert_cnn(spark.encoder)  # an ordinary network again
    for name, net in (("pre-trained", spark.encoder), ("from scratch", cifar.resnet20(num_classes=10))):
        loss_of = lambda i, net=net: F.cross_entropy(net(images[i]), labels[i])  # noqa: E731
        train(name, net, loss_of, args.labels, args.tune_epochs, 16)
        print(f"{name}: accuracy {accuracy(net, test_images, test_labels):.3f} with {args.labels} labels")


if __name__ == "__main__":
    main()
