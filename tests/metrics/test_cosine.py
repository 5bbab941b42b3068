"""Cosines of two networks' maps, a minibatch at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastmkd.metrics import compare_cosine


class Net(nn.Module):
    """A map that the next layer overwrites."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, channels, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)).mean((2, 3))


def nets(*channels: int) -> list[Net]:
    torch.manual_seed(0)
    return [Net(count) for count in channels]


def pictures(*sizes: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 6, 6, generator=g) for size in sizes]


@torch.no_grad()
def test_values_are_those_of_a_plain_loop():
    (a, b), data = nets(5, 5), pictures(4, 3, 1)
    found = compare_cosine(a, b.to(memory_format=torch.channels_last), [(x, None) for x in data], ("conv", "conv"))
    expected = []
    for images in data:
        cosines = []
        for image in images:
            x, y = (net.conv(image[None]).flatten().double() for net in (a, b))
            cosines.append(float(x @ y / (x.norm() * y.norm())))
        expected.append(sum(cosines) / len(cosines))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert min(expected) < 0, "the map was read before the ReLU overwrote it"


def test_itself_and_its_opposite():
    (a,), data = nets(5), pictures(8)
    (opposite,) = nets(5)
    with torch.no_grad():
        for parameter in opposite.parameters():
            parameter.neg_()
    assert float(compare_cosine(a, a, data, ("conv", "conv"))) == pytest.approx(1)
    assert float(compare_cosine(a, opposite, data, ("conv", "conv"))) == pytest.approx(-1)
    assert a.training
    assert not any(module._forward_hooks for module in a.modules())


def test_refuses():
    a, b = nets(5, 7)
    with pytest.raises(ValueError, match=r"'conv' has 80 features an image and 'conv' has 112"):
        compare_cosine(a, b, pictures(4), ("conv", "conv"))
    with pytest.raises(ValueError, match="model_b has no module 'lost'"):
        compare_cosine(a, b, pictures(4), ("conv", "lost"))
    assert compare_cosine(a, a, [], ("conv", "conv")).shape == (0,)
