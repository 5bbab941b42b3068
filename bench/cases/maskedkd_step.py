"""A MaskedKD training step: the student alone, full distillation, masked the public way, ours, and its bound."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmkd import MaskedKD, MaskedViT
from fastmkd.reference import masked_vit_forward

from ..models import images_for, keep_for, vit, vit_flops
from ..op_entries import compile_variant, why_no_compiler
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


def apart_losses(student: nn.Module, ask: Callable[..., Any], images: Tensor, keep: Tensor, targets: Tensor) -> Losses:
    """What a step cannot do without: the student's own, and the teacher on some patches, neither knowing the other."""
    with torch.no_grad():
        target = ask(images, keep)
    return F.cross_entropy(student(images), targets), target.sum() * 0


def our_losses(method: MaskedKD, images: Tensor, targets: Tensor) -> Losses:
    """MaskedKD through the library; its loss is the sum of both, with all weights one."""
    out = method(images, targets)
    return out.terms["ce"], out.loss - out.terms["ce"]


def training_step(setting: Setting, module: nn.Module, function: Callable[..., Any], *args: Any) -> Step:
    """A step with AdamW: forward, backward, update; returns the parts of the loss.

    Args:
        setting: device and precision.
        module: what is trained.
        function: returns the parts of the loss, scalars that are added.
        args: its arguments.
    """
    # A learning rate of zero does all the work of a step and leaves the weights, so that every step can be compared.
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)

    def run() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(setting.device.type, setting.torch_dtype, enabled=setting.dtype != "fp32"):
            parts = function(*args)
        torch.stack(parts).sum().backward()
        optimizer.step()
        return tuple(part.detach() for part in parts)

    return run


def _mode(setting: Setting) -> str:
    """What ``teacher_compile=True`` takes."""
    return "reduce-overhead" if setting.on_gpu else "default"


def _grid(setting: Setting) -> list[dict[str, Any]]:
    pairs = [("DeiT-Ti", "DeiT-S"), ("DeiT-S", "DeiT-B")]
    if setting.quick:
        pairs = pairs[1:] if setting.on_gpu else pairs[:1]
    return [{"student": student, "teacher": teacher, "percent": 50} for student, teacher in pairs]


@benchmark("maskedkd_step", summary="training step, DeiT at 50 %: forward, backward, AdamW", grid=_grid)
def maskedkd_step(setting: Setting, student: str, teacher: str, percent: int) -> Case:
    """Random weights; the student's last queries and keys are scaled up, so that scores differ as trained ones do.

    The two variants "apart" run the student's step and the masked teacher's forward one after the other with nothing in
    between: the bound of a step whose parts take what they take.
    """
    kept = percent * PATCHES // 100
    panel = f"{student} from {teacher}"
    batch = 256 if setting.on_gpu else 8
    images, targets = images_for(batch, setting), torch.randint(CLASSES, (batch,), device=setting.device)
    own, other = vit(student, setting).train(), vit(teacher, setting).requires_grad_(False)
    with torch.no_grad():
        own.blocks[-1].attn.qkv.weight[: 2 * own.embed_dim] *= 8
    some = keep_for(batch, PATCHES, kept, setting)

    def exact() -> Losses:
        wide = [copy.deepcopy(model).double() for model in (own, other)]
        with torch.no_grad():
            return public_losses(*wide, images.double(), targets)

    alone = 3 * vit_flops(own, batch, PATCHES)  # a backward pass costs two forward passes
    whole = Answer(flops=alone + vit_flops(other, batch, PATCHES))
    least = alone + vit_flops(other, batch, kept)
    masked = Answer(exact, least, floor=FLOORS[setting.dtype])

    # Each way has its own student, so that neither hooks nor gradients are shared.
    def plain(function: Callable[..., Any]) -> Step:
        net = copy.deepcopy(own)
        return training_step(setting, net, function, net, other, images, targets)

    def apart(compiled: bool) -> Step:
        net, ask = copy.deepcopy(own), MaskedViT(copy.deepcopy(other))
        run = torch.compile(ask, dynamic=False, mode=_mode(setting)) if compiled else ask
        return training_step(setting, net, apart_losses, net, run, images, some, targets)

    def ours(function: Callable[..., Any], **options: Any) -> Step:
        method = MaskedKD(copy.deepcopy(own), copy.deepcopy(other), keep_ratio=percent / 100, **options)
        return training_step(setting, method, function, method, images, targets)

    variants = [
        Variant("full distillation", plain(full_losses), whole),
        Variant("student alone", plain(student_loss), Answer(flops=alone)),
        Variant("public code", plain(public_losses), masked, plain=True),
        Variant("fastmkd", ours(our_losses), masked),
        Variant("apart", apart(compiled=False), Answer(flops=least)),
    ]
    if setting.dtype == "fp32":
        variants.append(Variant("fastmkd, teacher in bf16", ours(our_losses, teacher_dtype=torch.bfloat16), Answer()))
    if setting.on_gpu or not setting.quick:
        lacks = why_no_compiler()
        step = ours(our_losses, teacher_compile=True)
        variants.append(Variant("fastmkd, compiled teacher", step, masked, unavailable=lacks))
        variants.append(
            Variant("apart, compiled teacher", apart(compiled=True), Answer(flops=least), unavailable=lacks)
        )
    if not setting.quick:
        variants.append(compile_variant("public code, compiled", public_losses, masked, plain))
        variants.append(compile_variant("fastmkd, compiled", our_losses, masked, ours))
    return Case(
        label=f"{percent} % kept",
        panel=f"{panel}, batch {batch}",
        variants=variants,
        baseline="full distillation",
        items=batch,
        params={"batch": batch, "kept": kept},
    )
