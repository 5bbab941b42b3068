"""Counts what each method does for an image: operations of its networks, bytes of its gradients and of its teacher."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

import fastmkd
from fastmkd.train.cost import vit_macs
from fastmkd.train.dmae_cost import dmae_macs

from .counted import operations
from .registry import Setting
from .scaling import Work

__all__ = ["count"]


def count() -> list[Work]:
    """One entry a method; CNNs are run once on this CPU, some seconds in all."""
    torch.manual_seed(0)
    supervised, masked, whole = _vits()
    dpk = _dpk()
    sums = Work(**{**vars(dpk), "name": f'{dpk.name}, CkaGap("sums")', "gathered": 0.0, "summed": 1})
    dmae = _dmae()
    split = Work(**{**vars(dmae), "name": f"{dmae.name}, teacher split", "blocks": 24})
    return [supervised, whole, masked, dmae, split, dpk, sums, _mkd(), _detector()]


def _weights(network: nn.Module, trained: bool = False) -> float:
    """Bytes in float32."""
    return 4.0 * sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)


def _vits() -> tuple[Work, Work, Work]:
    with torch.device("meta"):
        student, teacher = (timm.create_model(f"deit_{size}_patch16_224") for size in ("small", "base"))
    own, gradients, weights = 2.0 * vit_macs(student).total, _weights(student), _weights(teacher)
    full, half = (2.0 * vit_macs(teacher, keep).total for keep in (None, 98))
    return (
        Work("Supervised, DeiT-S", 128, own, 0.0, gradients),
        Work("MaskedKD, DeiT-S from DeiT-B, half kept", 128, own, half, gradients, weights),
        Work("KD, DeiT-S from DeiT-B, all kept", 128, own, full, gradients, weights),
    )


def _dmae() -> Work:
    with torch.device("meta"):
        nets = [timm.create_model(f"vit_{size}_patch16_224", num_classes=0) for size in ("base", "large")]
        method = fastmkd.DMAE(*nets)
    macs = dmae_macs(method)
    own = 2.0 * (macs.student + macs.decoder + macs.projection)
    gradients = _weights(method, trained=True)
    return Work("DMAE, ViT-B from ViT-L, 75 % hidden", 64, own, 2.0 * macs.teacher, gradients, _weights(nets[1]))


def _run(method: Any, teacher: nn.Module, batch: int) -> tuple[float, float]:
    """Operations an image of the student's side and of the teacher, forward."""
    images, targets = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.int64)
    asked = operations(lambda: teacher(images)) / batch
    return operations(lambda: method(images, targets)) / batch - asked, asked


def _dpk() -> Work:
    nets = [timm.create_model(name) for name in ("resnet18", "resnet34")]
    method = fastmkd.DPK(*nets)
    own, asked = _run(method.train(), nets[1], 4)
    maps = 2 * 512 * 7 * 7.0  # the student's and the teacher's last map
    return Work(
        "DPK, ResNet-18 from ResNet-34",
        32,
        own,
        asked,
        _weights(method, trained=True),
        _weights(nets[1]),
        gathered=maps,
    )


def _mkd() -> Work:
    student, teacher = (timm.create_model(name) for name in ("resnet18", "resnet34"))
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in student.modules())
    method = fastmkd.MKD(student, teacher, image_size=224)
    own, asked = _run(method.train(), teacher, 2)
    name = "MKD, ResNet-18 from ResNet-34, SyncBatchNorm"
    return Work(name, 32, own, asked, _weights(method, trained=True), _weights(teacher), norms=norms)


def _detector() -> Work:
    from .cases.mkd_step import SIDE, networks, scenes  # torchvision, which nothing else on the page needs

    batch, setting = 2, Setting(torch.device("cpu"))
    student, teacher = networks(setting)
    method = fastmkd.MKD(student, teacher, image_size=(SIDE, SIDE)).train()
    images, targets = scenes(batch, SIDE, setting)
    asked = operations(lambda: teacher.get_submodule("backbone")(torch.stack(images))) / batch  # no head
    own = operations(lambda: method(images, targets)) / batch - asked
    return Work("MKD, RetinaNet R50 from R101 at 512", 4, own, asked, _weights(method, trained=True), _weights(teacher))
