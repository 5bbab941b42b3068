"""MKD's adaptive decoders and their losses over a feature pyramid: written plainly, and with the library's fused parts.

Five levels of 256 channels at 512 pixels, 16 x 16 cells, as RetinaNet has them. Both ways use the same parameters and
the same transformer blocks; what differs is how a level becomes tokens and how tokens become two losses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastmkd import random_mask
from fastmkd.nn.align import align_tokens, fold_pointwise
from fastmkd.ops import recovered_loss, relation_error

from ..op_entries import compile_variant
from ..registry import Answer, Case, Setting, Variant, benchmark

CHANNELS, WIDTH, GRID, DEPTH, HEADS = 256, 256, 16, 4, 8
SIDES = (64, 32, 16, 8, 4)  # of P3 to P7
LOSS_WEIGHT, RELATION_WEIGHT = 3.0, 3e-6
PARTS = ("alignment", "losses", "decoder and losses")

Terms = tuple[Tensor, Tensor]  # L_feat and L_global, sums over levels


class Context(nn.Module):
    """FGD's GCBlock: what it adds to every position, from the attention-pooled context ``(B, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.Conv2d(CHANNELS, 1, 1)
        hidden = CHANNELS // 2
        self.add = nn.Sequential(
            nn.Linear(CHANNELS, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, CHANNELS)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C, H, W)``, the plain way."""
        weights = self.attend(x).flatten(2).softmax(2)  # (B, 1, HW)
        return x + self.add((x.flatten(2) @ weights.mT)[..., 0])[..., None, None]


class Level(nn.Module):
    """The parameters of one level's decoder, and the plain way through it (MKD, Section 3.1.3).

    Args:
        side: of the level's square map.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.scale = side, max(1, side // GRID)
        self.match = nn.Conv2d(CHANNELS, WIDTH, 1)
        self.align = nn.Conv2d(WIDTH, WIDTH, self.scale, self.scale) if side >= GRID else None
        self.mask_token = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.position = nn.Parameter(0.02 * torch.randn(1, WIDTH, 28, 28))
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, mlp_ratio=8, qkv_bias=True) for _ in range(DEPTH)))
        self.restore = nn.Linear(WIDTH, self.scale**2 * CHANNELS)  # a position's channels side by side
        self.student, self.teacher = Context(), Context()

    def positions(self) -> Tensor:
        """``(N, D)``, interpolated to the grid."""
        resized = F.interpolate(self.position, (GRID, GRID), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).mT

    def tokens(self, x: Tensor, visible: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, N, D)``."""
        x = self.match(x)
        x = F.interpolate(x, (GRID, GRID), mode="nearest") if self.align is None else self.align(x)
        tokens = torch.where(visible.flatten(1)[..., None], x.flatten(2).mT, self.mask_token)
        return tokens + self.positions()

    def rows(self, tokens: Tensor) -> Tensor:
        """``(B, N, D) -> (B, N, p * p * C)``; pooled to the level's size where that is coarser than the grid."""
        rows: Tensor = self.restore(tokens)
        if self.side >= GRID:
            return rows
        return F.adaptive_avg_pool2d(rows.mT.unflatten(2, (GRID, GRID)), self.side).flatten(2).mT

    def losses(self, rows: Tensor, teacher: Tensor) -> Terms:
        """Shuffles, normalises both maps, compares them, and compares what the context blocks make of them."""
        grid = (self.side // self.scale,) * 2
        by_channel = rows.unflatten(2, (self.scale**2, -1)).mT.flatten(2)
        student = F.pixel_shuffle(by_channel.mT.unflatten(2, grid), self.scale)  # (B, C, H, W)
        wide = torch.promote_types(rows.dtype, torch.float32)
        normal = [F.layer_norm(x.to(wide).movedim(1, 3), (CHANNELS,)).movedim(3, 1) for x in (student, teacher)]
        relation = F.mse_loss(self.student(normal[0]), self.teacher(normal[1]), reduction="sum") / len(rows)
        return F.mse_loss(*normal) / 2, relation


class FusedLevel(Level):
    """The same with the library's fused parts."""

    def tokens(self, x: Tensor, visible: Tensor) -> Tensor:
        """Both convolutions in one."""
        weight, bias = fold_pointwise(self.match, self.align)
        return align_tokens(x, visible, weight, bias, self.mask_token, self.positions())

    def rows(self, tokens: Tensor) -> Tensor:
        """Pools tokens rather than rows: the linear layer commutes with it."""
        if self.side < GRID:
            tokens = F.adaptive_avg_pool2d(tokens.mT.unflatten(2, (GRID, GRID)), self.side).flatten(2).mT
        rows: Tensor = self.restore(tokens)
        return rows

    def losses(self, rows: Tensor, teacher: Tensor) -> Terms:
        """One pass over both maps."""
        blocks = self.student, self.teacher
        queries = torch.cat([block.attend.weight.flatten(1) for block in blocks])
        recovered = recovered_loss(rows, teacher, self.scale, queries)
        added = [block.add(context) for block, context in zip(blocks, recovered.contexts, strict=True)]
        return recovered.error, relation_error(recovered, added[0] - added[1], self.side**2)


def _decode(levels: nn.ModuleList, maps: list[Tensor], teacher: list[Tensor], visible: Tensor) -> Terms:
    pairs = []
    for level, x, t in zip(levels, maps, teacher, strict=True):
        pairs.append(level.losses(level.rows(level.blocks(level.tokens(x, visible))), t))
    feat, relation = (torch.stack(terms).sum() for terms in zip(*pairs, strict=True))
    return feat, relation


def _align(levels: nn.ModuleList, maps: list[Tensor], _: list[Tensor], visible: Tensor) -> Terms:
    tokens = torch.stack([level.tokens(x, visible) for level, x in zip(levels, maps, strict=True)])
    return tokens.square().mean(), tokens.mean()


def _compare(levels: nn.ModuleList, rows: list[Tensor], teacher: list[Tensor], _: Tensor) -> Terms:
    pairs = [level.losses(x, t) for level, x, t in zip(levels, rows, teacher, strict=True)]
    feat, relation = (torch.stack(terms).sum() for terms in zip(*pairs, strict=True))
    return feat, relation


def _grid(setting: Setting) -> list[dict[str, Any]]:
    return [{"part": part} for part in (PARTS[1:2] if setting.quick and not setting.on_gpu else PARTS)]


@benchmark(
    "mkd_decoder", summary="MKD's adaptive decoders and losses, five levels of RetinaNet, forward and backward", grid=_grid
)
def mkd_decoder(setting: Setting, part: str) -> Case:
    """Random maps and weights, 10 % hidden; half precisions run under autocast."""
    batch = 16 if setting.on_gpu else 4
    generator = torch.Generator().manual_seed(6)
    torch.manual_seed(0)
    plain = nn.ModuleList(Level(side) for side in SIDES).to(setting.device)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(setting.device)  # noqa: E731
    if part == "losses":
        inputs = [draw(batch, (s // level.scale) ** 2, level.scale**2 * CHANNELS) for s, level in zip(SIDES, plain, strict=True)]
    else:
        inputs = [draw(batch, CHANNELS, side, side) for side in SIDES]
    teacher = [draw(batch, CHANNELS, side, side).to(setting.torch_dtype) for side in SIDES]
    visible = random_mask(batch, (GRID, GRID), 0.1, generator=generator).to(setting.device)
    inputs = [x.to(setting.torch_dtype) for x in inputs]
    function = dict(zip(PARTS, (_align, _compare, _decode), strict=True))[part]

    def step(terms: Callable[..., Terms], levels: nn.ModuleList, maps: list[Tensor], taught: list[Tensor]) -> Any:
        leaves = [x.detach().requires_grad_() for x in maps]
        low = torch.autocast(setting.device.type, setting.torch_dtype, enabled=maps[0].dtype in (torch.bfloat16, torch.float16))
        levels.zero_grad(set_to_none=True)
        with low:
            feat, relation = terms(levels, leaves, taught, visible)
        (LOSS_WEIGHT * feat + RELATION_WEIGHT * relation).backward()
        return feat.detach(), relation.detach(), *(leaf.grad for leaf in leaves)

    def exact() -> Any:
        wide = [[x.double() for x in maps] for maps in (inputs, teacher)]
        return step(function, copy.deepcopy(plain).double(), *wide)

    fused = copy.deepcopy(plain)
    for level in fused:
        level.__class__ = FusedLevel
    answer = Answer(exact)
    variants = [
        Variant("eager", lambda: step(function, plain, inputs, teacher), answer, plain=True),
        Variant("fastmkd", lambda: step(function, fused, inputs, teacher), answer),
    ]
    if not setting.quick:
        compiled = compile_variant(
            "eager, compiled", function, answer, lambda fast: lambda: step(fast, plain, inputs, teacher)
        )
        variants.append(compiled)
    return Case(
        label=part,
        panel=f"five levels at 512 pixels, batch {batch}",
        variants=variants,
        baseline="eager",
        items=batch,
        params={"batch": batch, "levels": list(SIDES), "channels": CHANNELS, "part": part},
    )
