"""A training step, DeiT-Ti student and DeiT-S teacher: alone, full distillation, masked the public way, and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmkd import MaskedKD
from fastmkd.reference import masked_vit_forward

from ..models import images_for, vit, vit_flops
from ..op_entries import compile_variant
from ..registry import Answer, Case, Setting, Variant, benchmark

PATCHES, KEPT, CLASSES = 196, 98, 1000
# Tokens near the cut may swap when the scores round differently, which moves the loss by this much.
FLOORS = {"fp32": 1e-3, "bf16": 5e-2}

Losses = tuple[Tensor, Tensor]  # cross-entropy and distillation, both scalars
Step = Callable[[], tuple[Tensor, ...]]


def logits_and_saliency(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """A ViT whose last block forms the whole attention matrix, as the public code does; its CLS row is Eq. 2."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    *body, last = model.blocks
    for block in body:
        x = block(x)
    B, L, D = x.shape
    attn, prefix = last.attn, model.num_prefix_tokens
    qkv = attn.qkv(last.norm1(x)).view(B, L, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
    weights = (q * attn.scale @ k.mT).softmax(-1)  # (B, H, L, L)
    x = x + attn.proj((weights.to(v.dtype) @ v).transpose(1, 2).reshape(B, L, D))
    x = x + last.mlp(last.norm2(x))
    row = weights[:, :, 0, prefix:].detach()
    return model.forward_head(model.norm(x)), (row / row.sum(-1, keepdim=True)).sum(1)


def public_losses(student: nn.Module, teacher: nn.Module, images: Tensor, targets: Tensor) -> Losses:
    """MaskedKD as the public code runs it: saliency from the matrix, teacher embeds all patches and gathers."""
    logits, saliency = logits_and_saliency(student, images)
    keep = saliency.topk(KEPT, dim=1).indices.sort(dim=1).values
    with torch.no_grad():
        target = masked_vit_forward(teacher, images, keep)
    return _losses(logits, target, targets)


def full_losses(student: nn.Module, teacher: nn.Module, images: Tensor, targets: Tensor) -> Losses:
    """Ordinary logit distillation: the teacher sees every patch."""
    with torch.no_grad():
        target = teacher(images)
    return _losses(student(images), target, targets)


def _losses(logits: Tensor, target: Tensor, targets: Tensor) -> Losses:
    wide = torch.promote_types(logits.dtype, torch.float32)
    own, other = logits.to(wide).log_softmax(-1), target.to(wide).log_softmax(-1)
    return F.nll_loss(own, targets), F.kl_div(own, other, reduction="batchmean", log_target=True)


def student_loss(student: nn.Module, teacher: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor]:
    """Training without a teacher."""
    return (F.cross_entropy(student(images), targets),)


def our_losses(method: MaskedKD, images: Tensor, targets: Tensor) -> Losses:
    """MaskedKD through the library; its loss is the sum of both, with all weights one."""
    out = method(images, targets)
    return out.terms["ce"], out.loss - out.terms["ce"]


def _step(setting: Setting, module: nn.Module, function: Callable[..., Any], *args: Any) -> Step:
    fused = {"fused": True} if setting.on_gpu else {}
    # A learning rate of zero does all the work of a step and leaves the weights, so that every step can be compared.
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, **fused)

    def run() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(setting.device.type, setting.torch_dtype, enabled=setting.dtype != "fp32"):
            parts = function(*args)
        torch.stack(parts).sum().backward()
        optimizer.step()
        return tuple(part.detach() for part in parts)

    return run


def _grid(setting: Setting) -> list[dict[str, Any]]:
    return [{"percent": 50}]


@benchmark("maskedkd_step", summary="training step, DeiT-Ti from DeiT-S at 50 %: forward, backward, AdamW", grid=_grid)
def maskedkd_step(setting: Setting, percent: int) -> Case:
    """Random weights; the student's last queries and keys are scaled up, so that scores differ as trained ones do."""
    batch = 256 if setting.on_gpu else 8
    images, targets = images_for(batch, setting), torch.randint(CLASSES, (batch,), device=setting.device)
    student, teacher = vit("DeiT-Ti", setting).train(), vit("DeiT-S", setting).requires_grad_(False)
    with torch.no_grad():
        student.blocks[-1].attn.qkv.weight[: 2 * student.embed_dim] *= 8

    def exact() -> Losses:
        wide = [copy.deepcopy(model).double() for model in (student, teacher)]
        with torch.no_grad():
            return public_losses(*wide, images.double(), targets)

    kept = percent * PATCHES // 100
    alone = 3 * vit_flops(student, batch, PATCHES)  # a backward pass costs two forward passes
    whole = Answer(flops=alone + vit_flops(teacher, batch, PATCHES))
    masked = Answer(exact, alone + vit_flops(teacher, batch, kept), floor=FLOORS[setting.dtype])

    # Each way has its own student, so that neither hooks nor gradients are shared.
    def plain(function: Callable[..., Any]) -> Step:
        own = copy.deepcopy(student)
        return _step(setting, own, function, own, teacher, images, targets)

    def ours(function: Callable[..., Any]) -> Step:
        method = MaskedKD(copy.deepcopy(student), copy.deepcopy(teacher), keep_ratio=percent / 100)
        return _step(setting, method, function, method, images, targets)

    variants = [
        Variant("full distillation", plain(full_losses), whole),
        Variant("student alone", plain(student_loss), Answer(flops=alone)),
        Variant("public code", plain(public_losses), masked, plain=True),
        Variant("fastmkd", ours(our_losses), masked),
    ]
    if not setting.quick:
        variants.append(compile_variant("public code, compiled", public_losses, masked, plain))
        variants.append(compile_variant("fastmkd, compiled", our_losses, masked, ours))
    return Case(
        label=f"{percent} % kept",
        panel=f"DeiT-Ti from DeiT-S, batch {batch}",
        variants=variants,
        baseline="full distillation",
        items=batch,
        params={"batch": batch, "kept": kept},
    )
