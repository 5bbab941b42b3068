"""A packed network gives the same bits in every run; for any number of threads too where PyTorch is asked for it."""

from __future__ import annotations

import pytest
import torch
from tiny_cnns import TINY

from fastmkd.nn import cifar, convert_cnn, pack, random_mask

NETWORKS = {
    "cifar_resnet": (lambda: cifar.ResNet(8, num_classes=10), 32, (4, 4)),
    "resnet_bottleneck": (TINY["resnet_bottleneck"], 128, (4, 4)),
    "mobilenetv2": (lambda: cifar.MobileNetV2(0.25, 2, num_classes=10), 64, (4, 4)),
}


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def step(name, training, stats, threads):
    """Pooled features, gradients and running statistics of one forward and backward pass.

    The classifier is left out: it is an ordinary matrix product, which may split its sums by threads.
    """
    make, side, grid = NETWORKS[name]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cnn = convert_cnn(make(), stats=stats).train(training)
    images = torch.randn(16, 3, side, side, requires_grad=True)
    out = cnn.forward_features(pack(images, random_mask(16, grid, 0.5))).mean((2, 3))
    out.square().sum().backward()
    gradients = {f"{key}.grad": p.grad for key, p in cnn.named_parameters() if p.grad is not None}
    assert len(gradients) > 20
    return {"out": out.detach(), "images.grad": images.grad, **gradients, **dict(cnn.named_buffers())}


def differing(first, second):
    return [key for key in first if not torch.equal(first[key], second[key])]


@pytest.mark.parametrize(("training", "stats"), [(True, "visible"), (True, "all"), (False, "visible")])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_number_of_threads(name, training, stats, deterministic):
    one = step(name, training, stats, 1)
    for threads in (2, 3):
        assert differing(one, step(name, training, stats, threads)) == []


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_repeated_runs(name, threads):
    first = step(name, True, "visible", threads)
    assert differing(first, step(name, True, "visible", threads)) == []
