"""Small CNNs, pictures for them, and a DPK between two of them, in float64."""

from __future__ import annotations

import torch
from torch import nn

import fastmkd

TARGETS = torch.tensor([0, 4, 2, 1])
SMALL = {"encoder_depth": 1, "decoder_depth": 1, "width": 16, "image_size": 24}


class Cnn(nn.Module):
    """Two stages, 12 x 12 and 6 x 6 for 24 x 24 images."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, 2, 1), nn.Tanh())
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.stem(x)).mean((2, 3)))


def cnn(seed: int, channels: int = 4, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return Cnn(channels, classes).double()


def pictures(size: int = 24, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def make(layers=None, student=None, teacher=None, **options) -> fastmkd.DPK:
    student, teacher = student or cnn(0), teacher or cnn(1, channels=6)
    torch.manual_seed(2)
    method = fastmkd.DPK(student, teacher, layers or {"last": "last"}, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in method.heads.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return method.double()
