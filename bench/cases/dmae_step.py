"""A DMAE pre-training step: the public code's way, ours, plain MAE; and the teacher of each alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmkd import DMAE, MaskedViT
from fastmkd.methods.mae_decoder import MAEDecoder

from ..models import images_for, keep_for, vit
from ..op_entries import compile_variant, why_no_compiler
from ..registry import Answer, Case, Setting, Variant, benchmark
from .maskedkd_step import Step, training_step

PATCHES, GRID, PATCH = 196, (14, 14), 16
DECODER = {"width": 512, "depth": 8, "num_heads": 16}
# Losses are means over ten thousands of numbers, so how far rounding takes plain PyTorch's is a matter of luck.
FLOORS = {"fp32": 1e-5, "bf16": 1e-3}

Losses = tuple[Tensor, ...]  # pixels and, with a teacher, alignment: scalars


def whole_block(block: Any, x: Tensor) -> Tensor:
    """A block that forms its attention matrix, as the public code's does."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * attn.scale).softmax(-1)  # (B, H, L, L)
    x = x + attn.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def public_encoder(model: Any, images: Tensor, keep: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Embeds all patches, gathers, runs all blocks: output of a layer, and of the last one through the norm."""
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
    first = model.cls_token + model.pos_embed[:, :1]
    x = torch.cat((first.expand(len(x), -1, -1), x), dim=1)
    for number, block in enumerate(model.blocks, start=1):
        x = whole_block(block, x)
        if number == layer:
            aligned = x
    return aligned, model.norm(x)


def public_decoder(decoder: Any, tokens: Tensor, restore: Tensor) -> Tensor:
    """Decodes every patch: ``(B, N, pixels)``."""
    x = decoder.embed(tokens)
    hidden = decoder.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
    patches = torch.cat((x[:, 1:], hidden), dim=1).gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
    x = torch.cat((x[:, :1], patches), dim=1) + decoder.positions
    for block in decoder.blocks:
        x = whole_block(block, x)
    out: Tensor = decoder.predict(decoder.norm(x))
    return out[:, 1:]


def public_losses(method: DMAE, beside: MAEDecoder, images: Tensor, keep: Tensor, hidden: Tensor) -> Losses:
    """The public code's step on the networks of a method: teacher, its decoder, student, decoder, loss with a mask."""
    restore = torch.cat((keep, hidden), dim=1).argsort(1)
    own, other = method.layers[0]
    with torch.no_grad():
        taught, tokens = public_encoder(method.teacher, images, keep, other)
        public_decoder(beside, tokens, restore)
    aligned, tokens = public_encoder(method.student, images, keep, own)
    prediction = public_decoder(method.heads["decoder"], tokens, restore)
    target = images.unflatten(3, (GRID[1], PATCH)).unflatten(2, (GRID[0], PATCH))
    target = target.permute(0, 2, 4, 3, 5, 1).reshape(prediction.shape)
    mask = torch.ones_like(target[..., 0]).scatter(1, keep, 0.0)
    error = (prediction - target).square().mean(-1)
    project: Any = method.heads["project"]
    return (error * mask).sum() / mask.sum(), F.l1_loss(project[0](aligned), taught)


def our_losses(method: DMAE, images: Tensor) -> Losses:
    """The step through the library; alpha is 1."""
    out = method(images)
    return (out.loss,) if "align" not in out.terms else (out.terms["mae"], out.loss - out.terms["mae"])


def block_macs(width: int, depth: int, tokens: int, rows: int | None = None) -> float:
    """Multiply-adds of plain blocks, of which the last one makes some rows only."""
    each = 12 * tokens * width**2 + 2 * tokens**2 * width
    if rows is None:
        return float(depth * each)
    return float((depth - 1) * each + (2 * tokens + 10 * rows) * width**2 + 2 * rows * tokens * width)


def teacher_flops(model: Any, batch: int, kept: int, layer: int) -> float:
    """Floating-point operations of embedding the kept patches and running the blocks up to a layer."""
    return 2.0 * batch * (kept * 768 * model.embed_dim + block_macs(model.embed_dim, layer, kept + 1))


def student_flops(model: Any, batch: int, kept: int) -> float:
    """Those of forward and backward of encoder and decoder; a backward pass costs two forward passes."""
    width, hidden = DECODER["width"], PATCHES - kept
    macs = kept * 768 * model.embed_dim + block_macs(model.embed_dim, len(model.blocks), kept + 1)
    macs += (kept + 1) * model.embed_dim * width + block_macs(width, DECODER["depth"], PATCHES + 1, hidden)
    return 6.0 * batch * (macs + hidden * width * 768)


def _grid(setting: Setting) -> list[dict[str, Any]]:
    if setting.quick and not setting.on_gpu:
        return [{"student": "ViT-S", "teacher": "ViT-B", "percent": 75, "batch": 4}]
    pair = {"student": "ViT-B", "teacher": "ViT-L"}
    # At 95 % and batch 4 reading the weights and AdamW take as long as the products.
    batches = (256,) if setting.on_gpu else (4, 8)
    return [{**pair, "percent": percent, "batch": batch} for batch in batches for percent in (75, 95)]


@benchmark("dmae_step", summary="DMAE pre-training step: forward, backward, AdamW", grid=_grid)
def dmae_step(setting: Setting, student: str, teacher: str, percent: int, batch: int) -> Case:
    """Random weights. All ways hide the same patches."""
    kept = PATCHES - round(percent / 100 * PATCHES)
    images = images_for(batch, setting)
    keep = keep_for(batch, PATCHES, kept, setting)
    hidden = torch.ones(batch, PATCHES, device=setting.device).scatter(1, keep, 0).nonzero()[:, 1].view(batch, -1)
    own: Any = vit(student, setting).train()
    other: Any = vit(teacher, setting).requires_grad_(False)
    torch.manual_seed(3)
    beside = MAEDecoder(other.embed_dim, 768, 1, GRID, **DECODER).to(setting.device).requires_grad_(False)
    layer = round(0.75 * len(other.blocks))

    def method(with_teacher: bool = True, **options: Any) -> DMAE:
        torch.manual_seed(4)
        made = DMAE(copy.deepcopy(own), other if with_teacher else None, **options).to(setting.device)
        made.__dict__["draw"] = lambda _: (keep, hidden, GRID)
        return made

    def exact() -> Losses:
        wide = copy.deepcopy(method()).double()
        with torch.no_grad():
            return public_losses(wide, copy.deepcopy(beside).double(), images.double(), keep, hidden)

    alone = student_flops(own, batch, kept)
    whole = Answer(exact, alone + teacher_flops(other, batch, kept, layer), floor=FLOORS[setting.dtype])
    mae = Answer(flops=alone)

    def public(function: Callable[..., Losses]) -> Step:
        made = method()
        return training_step(setting, made, function, made, beside, images, keep, hidden)

    def ours(function: Callable[..., Losses] = our_losses, **options: Any) -> Step:
        made = method(**options)
        return training_step(setting, made, function, made, images)

    variants = [
        Variant("public code", public(public_losses), whole, plain=True),
        Variant("fastmkd", ours(), whole),
        Variant("fastmkd, MAE without a teacher", ours(with_teacher=False), mae),
    ]
    if setting.dtype == "fp32":
        variants.append(Variant("fastmkd, teacher in bf16", ours(teacher_dtype=torch.bfloat16), Answer()))
    if setting.on_gpu:
        variants.append(compile_variant("public code, compiled", public_losses, whole, public))
        variants.append(compile_variant("fastmkd, compiled", our_losses, whole, ours))
        compiled = ours(teacher_compile=True)
        variants.append(Variant("fastmkd, compiled teacher", compiled, whole, unavailable=why_no_compiler()))
    return Case(
        label=f"{percent} % hidden",
        panel=f"{student} from {teacher}, batch {batch}",
        variants=variants,
        baseline="public code",
        items=batch,
        params={"batch": batch, "kept": kept},
    )


@benchmark("dmae_teacher", summary="DMAE's teacher on the visible patches", grid=_grid)
def dmae_teacher(setting: Setting, student: str, teacher: str, percent: int, batch: int) -> Case:
    """Up to the aligned layer, against all layers, norm and decoder of the public code. The student has no part."""
    kept = PATCHES - round(percent / 100 * PATCHES)
    images, keep = images_for(batch, setting), keep_for(batch, PATCHES, kept, setting)
    restore = torch.cat((keep, torch.ones(batch, PATCHES, device=setting.device).scatter(1, keep, 0)
                         .nonzero()[:, 1].view(batch, -1)), dim=1).argsort(1)  # fmt: skip
    model: Any = vit(teacher, setting).requires_grad_(False)
    beside = MAEDecoder(model.embed_dim, 768, 1, GRID, **DECODER).to(setting.device).requires_grad_(False)
    masked, layer = MaskedViT(model), round(0.75 * len(model.blocks))

    def public(net: Any, decoder: Any, pixels: Tensor) -> Tensor:
        aligned, tokens = public_encoder(net, pixels, keep, layer)
        public_decoder(decoder, tokens, restore)
        return aligned

    def lowered(dtype: torch.dtype | None, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        lower = setting.torch_dtype if dtype is None else dtype

        def run() -> Any:
            with torch.no_grad(), torch.autocast(setting.device.type, lower, enabled=lower != torch.float32):
                return function(*args)

        return run

    def exact() -> Tensor:
        with torch.no_grad():
            return public(copy.deepcopy(model).double(), copy.deepcopy(beside).double(), images.double())

    def taught(vit: MaskedViT, pixels: Tensor) -> Tensor:
        return vit.forward_intermediates(pixels, [layer - 1], keep)[0]

    answer = Answer(exact, teacher_flops(model, batch, kept, layer))
    theirs = lambda function: lowered(None, function, model, beside, images)  # noqa: E731
    ours = lambda function, dtype=None: lowered(dtype, function, masked, images)  # noqa: E731
    variants = [
        Variant("public code", theirs(public), answer, plain=True),
        Variant("fastmkd", ours(taught), answer),
    ]
    if setting.dtype == "fp32":
        variants.append(Variant("fastmkd in bf16", ours(taught, torch.bfloat16), Answer()))
    if setting.on_gpu:
        variants.append(compile_variant("public code, compiled", public, answer, theirs))
        variants.append(compile_variant("fastmkd, compiled", taught, answer, ours))
    return Case(
        label=f"{percent} % hidden",
        panel=f"{teacher}, layer {layer}, batch {batch}",
        variants=variants,
        baseline="public code",
        items=batch,
        params={"batch": batch, "kept": kept},
    )
