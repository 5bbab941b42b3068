"""Peak memory of MKD's decoders and losses with SAM at several resolutions and without it (MKD, Table 4b)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastmkd import random_mask
from fastmkd.methods.mkd_decoder import AdaptiveDecoder
from fastmkd.methods.mkd_losses import Relation, recover, relation_loss
from fastmkd.methods.mkd_masking import mask_at

from ..decoder_memory import STRIDES
from ..registry import Answer, Case, Setting, Variant, benchmark
from .mkd_decoder import FLOORS, GLOBAL_WEIGHT, WEIGHT

CELL = 32  # pixels
SAMS = (None, 16, 32, 64)  # pixels of a token


def make_heads(sam: int | None, channels: int, **options: Any) -> nn.ModuleDict:
    """Decoders and context blocks of P3 to P7.

    Args:
        sam: pixels of a token; None makes a token of every position.
        channels: of every level.
        options: of `AdaptiveDecoder`.
    """
    torch.manual_seed(0)
    decoders = [
        AdaptiveDecoder(channels, channels, max(1, (sam or stride) // stride), stride <= CELL, **options)
        for stride in STRIDES
    ]
    return nn.ModuleDict(
        {"decoders": nn.ModuleList(decoders), "relations": nn.ModuleList(Relation(channels) for _ in STRIDES)}
    )


def keep_matrices(heads: nn.ModuleDict) -> nn.ModuleDict:
    """A copy whose attention makes its whole matrix, as it was written when the paper was."""
    heads = copy.deepcopy(heads)
    for module in heads.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return heads


def decode(heads: nn.ModuleDict, maps: list[Tensor], teacher: list[Tensor], visible: Tensor, sam: int | None) -> Tensor:
    """Weighted sum of both losses over all levels.

    Args:
        heads: of `make_heads`.
        maps: the student's levels.
        teacher: the teacher's.
        visible: ``(B, gh, gw)`` bool, cells of `CELL` pixels.
        sam: pixels of a token.
    """
    height, width = (side * CELL for side in visible.shape[1:])
    recovered = []
    decoders: Any = heads["decoders"]
    relations: Any = heads["relations"]
    levels = zip(STRIDES, decoders, relations, maps, teacher, strict=True)
    for stride, decoder, relation, own, taught in levels:
        token = sam or stride
        grid = (height // token, width // token)
        recovered.append(recover(decoder, decoder(own, mask_at(visible, grid)), grid, taught, relation))
    related = relation_loss(relations, recovered, [t.shape[2] * t.shape[3] for t in teacher])
    return WEIGHT * torch.stack([one.error for one in recovered]).sum() + GLOBAL_WEIGHT * related


@benchmark(
    "mkd_memory", summary="MKD's decoders and losses: peak memory with and without SAM", grid=lambda setting: [{}]
)
def mkd_memory(setting: Setting) -> Case:
    """Random maps and weights, 10 % hidden; half precisions run under autocast."""
    side, batch = (512 if setting.on_gpu else 256), 2
    return memory_case(setting, side, batch, 256)


def memory_case(setting: Setting, side: int, batch: int, channels: int, **options: Any) -> Case:
    """The case for images of one size.

    Args:
        setting: device and dtype.
        side: pixels of an image, a multiple of 128.
        batch: images.
        channels: of every level.
        options: of `AdaptiveDecoder`.
    """
    generator = torch.Generator().manual_seed(6)
    draw = lambda n: torch.randn(batch, channels, n, n, generator=generator).to(setting.device)  # noqa: E731
    maps, teacher = ([draw(side // stride).to(setting.torch_dtype) for stride in STRIDES] for _ in range(2))
    visible = random_mask(batch, (side // CELL, side // CELL), 0.1, generator=generator).to(setting.device)

    def variant(name: str, heads: nn.ModuleDict, sam: int | None, answer: Answer, plain: bool) -> Variant:
        leaves = [x.clone().requires_grad_() for x in maps]
        half = setting.dtype != "fp32"

        def run() -> list[Tensor]:
            heads.zero_grad(set_to_none=False)  # so that the memory of gradients does not count as the step's own
            for leaf in leaves:
                leaf.grad = None
            with torch.autocast(setting.device.type, setting.torch_dtype, enabled=half):
                loss = decode(heads, leaves, teacher, visible, sam)
            loss.backward()
            return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

        return Variant(name, run, answer, plain=plain)

    variants = []
    for sam in SAMS:
        heads = make_heads(sam, channels, **options).to(setting.device)

        def exact(sam: int | None = sam, heads: nn.ModuleDict = heads) -> list[Tensor]:
            wide = [x.double().requires_grad_() for x in maps]
            loss = decode(copy.deepcopy(heads).double(), wide, [x.double() for x in teacher], visible, sam)
            return [loss.detach(), *torch.autograd.grad(loss, wide)]

        answer = Answer(exact, floor=FLOORS[setting.dtype])
        name = "without SAM" if sam is None else f"tokens of {sam} pixels"
        variants.append(variant(f"{name}, matrix kept", keep_matrices(heads), sam, answer, plain=True))
        variants.append(variant(name, heads, sam, answer, plain=False))
    return Case(
        label=f"{side} pixels",
        panel=f"five levels, peak memory, batch {batch}",
        variants=variants,
        baseline=variants[0].name,
        quantity="memory",
        params={"batch": batch, "side": side, "channels": channels},
    )
