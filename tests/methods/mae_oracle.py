"""MAE and DMAE the long way: embed all patches and gather, run every block, decode every patch, weigh by the mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmkd
from fastmkd.reference import masked_vit_intermediates


def patchify(images: Tensor, p: tuple[int, int]) -> Tensor:
    """``(B, C, H, W) -> (B, N, ph * pw * C)``, patch by patch."""
    rows = [
        images[:, :, y : y + p[0], x : x + p[1]].permute(0, 2, 3, 1).flatten(1)
        for y in range(0, images.shape[2], p[0])
        for x in range(0, images.shape[3], p[1])
    ]
    return torch.stack(rows, dim=1)


def visible_patches(seed: int, batch: int, grid: tuple[int, int], ratio: float) -> Tensor:
    """What the method draws after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    visible = fastmkd.random_mask(batch, grid, ratio).flatten(1)
    return visible.nonzero()[:, 1].view(batch, -1)


def losses(method: Any, images: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """The terms of a method by name, and ``loss``."""
    student, decoder, p = method.student, method.heads["decoder"], method.patch_size
    B, k = keep.shape
    outputs = masked_vit_intermediates(student, images, keep)
    own_norm = isinstance(student.norm, torch.nn.Identity)
    tokens = decoder.embed((method.heads["norm"] if own_norm else student.norm)(outputs[-1]))
    prefix = tokens.shape[1] - k
    target = patchify(images, p)
    N = target.shape[1]
    whole = decoder.mask_token.repeat(B, N, 1)
    mask = torch.ones(B, N, dtype=images.dtype)  # 1 is hidden
    for b in range(B):
        for j in range(k):
            whole[b, keep[b, j]] = tokens[b, prefix + j]
            mask[b, keep[b, j]] = 0
    x = torch.cat((tokens[:, :prefix], whole), dim=1) + decoder.positions
    for block in decoder.blocks:
        x = block(x)
    prediction = decoder.predict(decoder.norm(x))[:, prefix:]
    if method.normalize_target:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((prediction - target) ** 2).mean(-1)
    found = {"mae": (error * mask).sum() / mask.sum()}
    found["loss"] = found["mae"]
    if method.layers:
        with torch.no_grad():
            taught = masked_vit_intermediates(method.teacher, images, keep)
        found["align"] = torch.zeros(())
        for (own, other), project in zip(method.layers, method.heads["project"], strict=True):
            z, t = outputs[own - 1], taught[other - 1]
            common = method_common(method, z.shape[1] - k, t.shape[1] - k)
            z = project(torch.cat((z[:, :common], z[:, -k:]), dim=1))
            t = torch.cat((t[:, :common], t[:, -k:]), dim=1)
            if method.normalize:
                z, t = z / z.norm(dim=-1, keepdim=True), t / t.norm(dim=-1, keepdim=True)
            one = (F.l1_loss if method.loss == "l1" else F.mse_loss)(z, t)
            several = sum(layer == own for layer, _ in method.layers) > 1
            found[f"align.{own}-{other}" if several else f"align.{own}"] = one
            found["align"] = found["align"] + one
        found["loss"] = found["mae"] + method.alpha * found["align"]
    return found


def method_common(method: Any, own: int, other: int) -> int:
    """The tests that use the oracle have a class token first or none, and then only equal kinds."""
    return min(own, other) if not hasattr(method, "common_in_test") else method.common_in_test
