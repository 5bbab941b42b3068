"""MKD's adaptive decoders and their losses over a feature pyramid: written plainly, and as the library runs them.

Five levels of 256 channels at 512 pixels, 16 x 16 tokens, as RetinaNet has them. Both ways use the same parameters and
the same transformer blocks; what differs is how a level becomes tokens and how tokens become two losses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmkd import random_mask
from fastmkd.methods.mkd_decoder import AdaptiveDecoder
from fastmkd.methods.mkd_losses import Relation, recover, relation_loss
from fastmkd.ops.align_cells import align_cells
from fastmkd.ops.cells import cells

from ..op_entries import compile_variant
from ..registry import Answer, Case, Setting, Variant, benchmark

__all__ = ["eager_losses", "eager_tokens", "three_passes"]

CHANNELS, GRID = 256, 16
SIDES = (64, 32, 16, 8, 4)  # of P3 to P7
WEIGHT, GLOBAL_WEIGHT = 3.0, 3e-6
# Means over thousands of numbers, so how far rounding takes plain PyTorch's is a matter of luck.
FLOORS = {"fp32": 1e-5, "bf16": 2e-2}
PARTS = ("tokens", "losses", "decoders and losses")
DIRECTIONS = ("forward", "forward and backward")

Terms = tuple[Tensor, Tensor]  # L_feat and L_global, sums over levels


def eager_tokens(decoder: AdaptiveDecoder, level: Tensor, visible: Tensor) -> Tensor:
    """Input of the first block: two convolutions, mask token, positions.

    Args:
        decoder: whose parameters are used.
        level: ``(B, C, h, w)``.
        visible: ``(B, gh, gw)`` bool.
    """
    grid = (visible.shape[1], visible.shape[2])
    aligned = decoder.sam(decoder.phi(level))
    if aligned.shape[2:] != grid:
        aligned = F.interpolate(aligned, grid, mode="nearest")
    tokens = aligned.flatten(2).mT
    if decoder.mask_token is not None:
        tokens = torch.where(visible.flatten(1)[:, :, None], tokens, decoder.mask_token.to(tokens.dtype))
    positions = F.interpolate(decoder.position.permute(2, 0, 1)[None], grid, mode="bilinear")
    return tokens + positions.flatten(2).mT.to(tokens.dtype)


def eager_losses(decoder: AdaptiveDecoder, rows: Tensor, teacher: Tensor, relation: Relation) -> Terms:
    """The recovered map, both maps normalised, their error, and that of what the context blocks make of them.

    Args:
        decoder: whose rows they are.
        rows: ``(B, gh * gw, p * p * C)``.
        teacher: ``(B, C, h, w)``.
        relation: its context blocks.
    """
    side = int(rows.shape[1] ** 0.5)
    by_channel = rows.unflatten(2, (decoder.patch**2, -1)).mT.flatten(2)  # as a pixel shuffle wants it
    student = F.pixel_shuffle(by_channel.mT.unflatten(2, (side, side)), decoder.patch)  # (B, C, h, w)
    if student.shape != teacher.shape:
        student = F.adaptive_avg_pool2d(student, teacher.shape[2:])
    normal = []
    for x in (student, teacher):
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).permute(0, 2, 3, 1)
        normal.append(F.layer_norm(wide, wide.shape[3:]).permute(0, 3, 1, 2))
    related = F.mse_loss(relation.student(normal[0]), relation.teacher(normal[1]), reduction="sum") / len(rows)
    return F.mse_loss(*normal) / 2, related


def eager_levels(heads: nn.ModuleDict, rows: list[Tensor], teacher: list[Tensor]) -> Terms:
    """Both losses, level by level.

    Args:
        heads: decoders and relations.
        rows: of each level.
        teacher: its levels.
    """
    levels = zip(heads["decoders"], rows, teacher, heads["relations"], strict=True)
    first, second = zip(*(eager_losses(*level) for level in levels), strict=True)
    return torch.stack(first).sum(), torch.stack(second).sum()


def our_levels(heads: nn.ModuleDict, rows: list[Tensor], teacher: list[Tensor]) -> Terms:
    """The library's, likewise."""
    levels = zip(heads["decoders"], rows, teacher, heads["relations"], strict=True)
    recovered = [
        recover(decoder, x, (int(x.shape[1] ** 0.5),) * 2, target, relation) for decoder, x, target, relation in levels
    ]
    feat = torch.stack([one.error for one in recovered]).sum()
    return feat, relation_loss(list(heads["relations"]), recovered, [t.shape[2] * t.shape[3] for t in teacher])


def three_passes(
    level: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, mask_token: Tensor, patch: int, visible: Tensor
) -> Tensor:
    """What `fastmkd.ops.align_cells` does, written plainly: a product of all cells, a choice, an addition.

    Args:
        level: ``(B, C, h, w)``.
        weight: ``(D, p * p * C)``.
        bias: ``(D,)``.
        positions: ``(gh * gw, D)``.
        mask_token: ``(D,)``.
        patch: p.
        visible: ``(B, gh * gw)`` bool.
    """
    tokens = F.linear(cells(level, patch), weight, bias)
    return torch.where(visible[..., None], tokens, mask_token) + positions


class Way:
    """One way through all levels: how tokens are made and how rows are compared.

    Args:
        tokens: as `eager_tokens`.
        losses: as `eager_levels`.
    """

    def __init__(self, tokens: Callable[..., Tensor], losses: Callable[..., Terms]) -> None:
        self.tokens, self.losses = tokens, losses

    def __call__(
        self, part: str, heads: nn.ModuleDict, maps: list[Tensor], teacher: list[Tensor], visible: Tensor
    ) -> Terms:
        """Returns two scalars that depend on everything that the part computes.

        Args:
            part: one of `PARTS`.
            heads: decoders and relations.
            maps: the student's levels; for "losses" the rows of each level.
            teacher: the teacher's levels.
            visible: ``(B, gh, gw)`` bool.
        """
        rows = maps
        if part != "losses":
            decoders = cast(nn.ModuleList, heads["decoders"])
            rows = [self.tokens(decoder, x, visible) for decoder, x in zip(decoders, maps, strict=True)]
            if part == "tokens":
                ends = [(x.float().square().mean(), x.float().mean()) for x in rows]
                return torch.stack([a for a, _ in ends]).sum(), torch.stack([b for _, b in ends]).sum()
            rows = [decoder.srm(decoder.norm(decoder.blocks(x))) for decoder, x in zip(decoders, rows, strict=True)]
        return self.losses(heads, rows, teacher)


EAGER, OURS = Way(eager_tokens, eager_levels), Way(AdaptiveDecoder.tokens, our_levels)


def make_heads(sides: tuple[int, ...], channels: int, **options: Any) -> nn.ModuleDict:
    """Decoders and context blocks of a pyramid; the blocks' last convolutions do not start at zero here.

    Args:
        sides: of the levels.
        channels: of every level.
        options: of `AdaptiveDecoder`.
    """
    torch.manual_seed(0)
    decoders = [AdaptiveDecoder(channels, channels, max(1, side // GRID), side >= GRID, **options) for side in sides]
    relations = [Relation(channels) for _ in sides]
    for relation in relations:
        for block in (relation.student, relation.teacher):
            nn.init.normal_(block.transform[-1].weight, std=channels**-0.5)
    return nn.ModuleDict({"decoders": nn.ModuleList(decoders), "relations": nn.ModuleList(relations)})


def _grid(setting: Setting) -> list[dict[str, Any]]:
    return [{"part": part} for part in (PARTS[1:2] if setting.quick and not setting.on_gpu else PARTS)]


@benchmark(
    "mkd_decoder", summary="MKD's decoders and losses, five levels of RetinaNet: forward and backward", grid=_grid
)
def mkd_decoder(setting: Setting, part: str) -> Case:
    """Random maps and weights, 10 % hidden; half precisions run under autocast."""
    batch, generator = 16 if setting.on_gpu else 4, torch.Generator().manual_seed(6)
    heads = make_heads(SIDES, CHANNELS).to(setting.device)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(setting.device, setting.torch_dtype)  # noqa: E731
    maps = [draw(batch, CHANNELS, side, side) for side in SIDES]
    teacher = [draw(batch, CHANNELS, side, side) for side in SIDES]
    if part == "losses":
        maps = [draw(batch, GRID**2, decoder.patch**2 * CHANNELS) for decoder in heads["decoders"]]
    visible = random_mask(batch, (GRID, GRID), 0.1, generator=generator).to(setting.device)

    def step(way: Callable[..., Terms], own: nn.ModuleDict, inputs: list[Tensor], targets: list[Tensor]) -> Any:
        leaves = [x.detach().requires_grad_() for x in inputs]
        own.zero_grad(set_to_none=True)
        half = inputs[0].dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(setting.device.type, setting.torch_dtype, enabled=half):
            feat, relation = way(part, own, leaves, targets, visible)
        (WEIGHT * feat + GLOBAL_WEIGHT * relation).backward()
        return feat.detach(), relation.detach(), *(leaf.grad for leaf in leaves)

    def exact() -> Any:
        return step(EAGER, copy.deepcopy(heads).double(), [x.double() for x in maps], [x.double() for x in teacher])

    answer = Answer(exact, floor=FLOORS[setting.dtype])
    variants = [
        Variant("eager", lambda: step(EAGER, heads, maps, teacher), answer, plain=True),
        Variant("fastmkd", lambda: step(OURS, heads, maps, teacher), answer),
    ]
    if not setting.quick:
        bind = lambda fast: lambda: step(fast, heads, maps, teacher)  # noqa: E731
        variants.append(compile_variant("eager, compiled", EAGER, answer, bind))
    return Case(
        label=part,
        panel=f"five levels at 512 pixels, batch {batch}",
        variants=variants,
        baseline="eager",
        items=batch,
        min_rounds=5,
        params={"batch": batch, "levels": list(SIDES), "channels": CHANNELS, "part": part},
    )


def _alignments(setting: Setting) -> list[dict[str, Any]]:
    sides, hidden = (SIDES[:1], (10,)) if setting.quick else (SIDES[:3], (10, 50))
    return [{"side": s, "hidden": h, "direction": d} for s in sides for h in hidden for d in DIRECTIONS]


@benchmark(
    "align_cells",
    summary="one level's cells as tokens with mask token and positions, against three passes",
    grid=_alignments,
)
def align_cells_alone(setting: Setting, side: int, hidden: int, direction: str) -> Case:
    """A level of 256 channels, 16 x 16 tokens of width 256, everything in the setting's dtype."""
    batch, patch, backward = 16 if setting.on_gpu else 4, side // GRID, direction != "forward"
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(setting.device, setting.torch_dtype)  # noqa: E731
    depth = patch**2 * CHANNELS
    leaves = [
        draw(batch, CHANNELS, side, side), draw(CHANNELS, depth) * depth**-0.5, draw(CHANNELS),
        draw(GRID**2, CHANNELS), draw(CHANNELS),
    ]  # fmt: skip
    visible = random_mask(batch, (GRID, GRID), hidden / 100, generator=generator).to(setting.device).flatten(1)

    def ours(level: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, mask_token: Tensor) -> Tensor:
        return align_cells(level, weight, bias, positions, patch, visible, mask_token)

    def plain(*tensors: Tensor) -> Tensor:
        return three_passes(*tensors, patch, visible)

    def bind(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], Any]:
        own = [x.detach().requires_grad_(backward) for x in tensors]

        def run() -> Any:
            out = function(*own)
            return (out, *torch.autograd.grad(out, own, out.detach())) if backward else out

        return run

    seen = int(visible.sum())  # cells
    answer = Answer(
        bind(plain, [x.double() for x in leaves]),
        flops=(6.0 if backward else 2.0) * seen * leaves[1].numel(),
        floor=FLOORS[setting.dtype],
    )
    variants = [Variant("eager", bind(plain, leaves), answer, plain=True)]
    if not setting.quick:
        variants.append(compile_variant("eager, compiled", plain, answer, lambda fast: bind(fast, leaves)))
    variants.append(Variant("fastmkd", bind(ours, leaves), answer))
    return Case(
        label=f"{side} x {side}, {hidden} % hidden",
        panel=f"{direction}, batch {batch}",
        variants=variants,
        baseline="eager",
        items=batch,
        device_time=not backward,
        params={"batch": batch, "side": side, "patch": patch, "hidden": hidden, "direction": direction},
    )
