"""The headlines that `fastmkd.bench.gate` holds, at sizes that take a tenth of a second or so.

The plain way of each is PyTorch's, timm's or published code's: a baseline of fastmkd's own kernels could become slower
and raise the ratio. Small sizes have small ratios, for a step's fixed costs weigh more in them; they are there to be
compared with themselves. ``docs/benchmarks.md`` has the real sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F

import fastmkd
from fastmkd.methods.mae_decoder import MAEDecoder
from fastmkd.nn.cifar import ResNet

from .cases import dmae_step, dpk_step, maskedkd_step, mkd_step
from .cases.cka import pairwise
from .crossings import Shape, ways
from .registry import Case, Setting

__all__ = ["HEADLINES", "Headline", "Ways"]

Ways = dict[str, Callable[[], Any]]

_HERE = Setting(torch.device("cpu"), quick=True)


@dataclass(frozen=True)
class Headline:
    """Two ways to do one thing.

    Args:
        name: what it stands for.
        build: makes both, ``{"plain": ..., "fastmkd": ...}``.
        training: whether they want gradients.
    """

    name: str
    build: Callable[[], Ways]
    training: bool = False


def _teacher() -> Ways:
    """A frozen ViT on half of its patches, against timm's on all."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", depth=6).eval()
    masked, images = fastmkd.MaskedViT(model), torch.randn(4, 3, 224, 224)
    keep = torch.rand(4, 196).argsort(1)[:, :98].sort(1).values
    return {"plain": lambda: model(images), "fastmkd": lambda: masked(images, keep=keep)}


def _maskedkd() -> Ways:
    """Forward and backward with the teacher on half of the patches, against plain distillation from timm's on all."""
    torch.manual_seed(0)
    images, targets = torch.randn(2, 3, 112, 112), torch.tensor([1, 2])
    student, teacher = (
        timm.create_model(f"deit_{size}_patch16_224", depth=2, img_size=112, num_classes=10)
        for size in ("small", "base")
    )
    method = fastmkd.MaskedKD(copy.deepcopy(student), copy.deepcopy(teacher), keep_ratio=0.5)
    teacher.eval().requires_grad_(False)
    return {
        "plain": lambda: _backward(maskedkd_step.full_losses(student, teacher, images, targets)),
        "fastmkd": lambda: method(images, targets).loss.backward(),
    }


def _dmae() -> Ways:
    """Forward and backward of a pre-training step, against the public code's way on the same networks."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 224, 224)
    pair: list[Any] = [timm.create_model(f"vit_{size}_patch16_224", depth=4) for size in ("tiny", "small")]
    student, teacher = pair
    width, depth = 128, 2  # of the decoder
    keep, hidden = dmae_step._hide(75, len(images), _HERE)

    def method() -> fastmkd.DMAE:
        made = fastmkd.DMAE(copy.deepcopy(student), copy.deepcopy(teacher), decoder_width=width, decoder_depth=depth)
        made.__dict__["draw"] = lambda _: (keep, hidden, dmae_step.GRID)
        return made

    theirs, ours = method(), method()
    beside = MAEDecoder(teacher.embed_dim, 768, 1, dmae_step.GRID, width, depth).requires_grad_(False)
    return {
        "plain": lambda: _backward(dmae_step.public_losses(theirs, beside, images, keep, hidden)),
        "fastmkd": lambda: ours(images).loss.backward(),
    }


def _mkd() -> Ways:
    """A whole step of a small detector, against the map times the mask before each layer."""
    side = 128
    student, teacher = mkd_step.networks(_HERE, ("resnet50", "resnet18"), out_channels=32, image_size=(side, side))
    decoder: dict[str, Any] = {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 4}
    scenes = mkd_step.scenes(1, side, _HERE)
    return _of(mkd_step.step_case(_HERE, student, teacher, mkd_step.KINDS[1], 30, *scenes, **decoder))


def _convolution() -> Ways:
    """One of ResNet-50's 3x3 layers, forward and backward, three quarters hidden, against PyTorch's on whole maps."""
    torch.manual_seed(0)
    shape = Shape(128, 128, 3, 1, 1, 28, 4)
    size = (shape.batch, shape.cin, shape.size, shape.size)
    x, grad = (torch.randn(size).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.randn(shape.cout, shape.cin, 3, 3).contiguous(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    return {
        "plain": lambda: torch.autograd.grad(F.conv2d(x, weight, padding=1), leaves, grad),
        "fastmkd": ways(shape, 0.75, torch.device("cpu"), torch.float32, training=True)["packed"],
    }


def _network() -> Ways:
    """A whole CNN, forward and backward, three quarters hidden, against the unmasked one."""
    torch.manual_seed(0)
    plain, packed = (ResNet(20, num_classes=10).train() for _ in range(2))
    fastmkd.convert_cnn(packed)
    images = torch.randn(8, 3, 56, 56)
    visible = fastmkd.random_mask(8, (7, 7), 0.75)
    return {
        "plain": lambda: plain(images).sum().backward(),
        "fastmkd": lambda: packed(fastmkd.pack(images, visible)).sum().backward(),
    }


def _cka() -> Ways:
    """All pairs of six and six layers, against Eq. 6 of DPK pair by pair."""
    torch.manual_seed(0)
    xs, ys = ([torch.randn(32, 64, 14, 14) for _ in range(6)] for _ in range(2))
    return {"plain": lambda: pairwise(xs, ys), "fastmkd": lambda: fastmkd.cka_matrix(xs, ys)}


def _backward(losses: tuple[torch.Tensor, ...]) -> None:
    torch.stack(losses).sum().backward()


def _of(case: Case) -> Ways:
    """The baseline of a benchmark's case, and fastmkd."""
    runs = {variant.name: variant.run for variant in case.variants}
    return {"plain": runs[case.baseline], "fastmkd": runs["fastmkd"]}


HEADLINES = (
    Headline("masked teacher, half of the patches", _teacher),
    Headline("MaskedKD step, half of the patches", _maskedkd, training=True),
    Headline("DMAE step, three quarters hidden", _dmae, training=True),
    Headline("DPK step, 64 pixels", lambda: _of(dpk_step.step_case(_HERE, side=64, batch=4)), training=True),
    Headline("MKD step, 30 % hidden", _mkd, training=True),
    Headline("3x3 convolution, three quarters hidden", _convolution, training=True),
    Headline("ResNet step, three quarters hidden", _network, training=True),
    Headline("CKA of 6 x 6 layers", _cka),
)
