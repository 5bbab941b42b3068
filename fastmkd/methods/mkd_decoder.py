"""MKD's adaptive decoder: one per level, from the student's masked map to the teacher's map (MKD, Section 3.1.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

__all__ = ["AdaptiveDecoder", "fold_pointwise", "resample", "resample_map"]

Size = tuple[int, int]
POSITIONS = 28  # side of the table of positions


class AdaptiveDecoder(nn.Module):
    r"""Rebuilds one level of the teacher's pyramid from the student's, of which the masked cells are not used.

    .. math:: \hat F = \mathrm{SRM}(\mathrm{blocks}(\mathrm{mask}(\mathrm{SAM}(\phi(F^S))) + \mathrm{positions}))

    A 1 x 1 convolution (phi) brings the map to the decoder's width, the spatial alignment module (SAM) to one token for
    each cell of p x p positions: a convolution of p x p with stride p, nothing for p = 1, nearest up-sampling for a
    level coarser than the tokens. The level's mask token replaces the tokens of masked cells. Positions are a table of
    28 x 28, interpolated bilinearly to the grid of tokens. After pre-norm transformer blocks and a last norm, as MAE's
    decoder has it, the spatial recovery module (SRM) is a linear layer to the p * p * C_T numbers of a token's
    positions; where a token is less than a position, to C_T, and the tokens of a position are averaged.

    The paper is silent on the kernel of SAM's convolution; p x p, the least that sees all positions, is taken. Nothing
    lies between phi and SAM, so they run as one convolution (`fold_pointwise`).

    Args:
        student_channels: C_S.
        teacher_channels: C_T.
        patch: p, positions of the level per token in each direction; 1 also for a level coarser than the tokens.
        masked: whether tokens are replaced; False for levels coarser than the mask, which have no mask token.
        width: of the tokens.
        depth: number of blocks.
        heads: attention heads of a block.
        mlp_ratio: width of a block's MLP, in widths.

    Example:
        >>> decoder = AdaptiveDecoder(16, 24, patch=2, width=32, depth=1, heads=4)
        >>> level, visible = torch.randn(1, 16, 7, 8), torch.rand(1, 4, 4) > 0.1
        >>> rows = decoder(level, visible)
        >>> rows.shape, decoder.to_map(rows, (4, 4), (7, 8)).shape
        (torch.Size([1, 16, 96]), torch.Size([1, 24, 7, 8]))
    """

    mask_token: Tensor | None

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        patch: int,
        masked: bool = True,
        width: int = 256,
        depth: int = 4,
        heads: int = 8,
        mlp_ratio: float = 8.0,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.phi = nn.Conv2d(student_channels, width, 1)
        self.sam = nn.Conv2d(width, width, patch, patch) if patch > 1 else nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(width)) if masked else None
        self.position = nn.Parameter(torch.zeros(POSITIONS, POSITIONS, width))
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.srm = nn.Linear(width, patch * patch * teacher_channels)
        self._initialise()

    def _initialise(self) -> None:
        """As MAE does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in (self.position, self.mask_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, level: Tensor, visible: Tensor) -> Tensor:
        """Returns what SRM's linear layer says of every token.

        Args:
            level: ``(B, C_S, h, w)`` of the student.
            visible: ``(B, gh, gw)`` bool, the grid of tokens; False where masked.

        Returns:
            ``(B, gh * gw, p * p * C_T)``: for each token its positions row by row, for each position its channels.
        """
        rows: Tensor = self.srm(self.norm(self.blocks(self.tokens(level, visible))))
        return rows

    def tokens(self, level: Tensor, visible: Tensor) -> Tensor:
        """Returns the input of the first block, ``(B, gh * gw, width)``.

        Args:
            level: ``(B, C_S, h, w)``.
            visible: ``(B, gh, gw)`` bool.
        """
        grid = (visible.shape[1], visible.shape[2])
        tokens = self._aligned(level, grid).permute(0, 2, 3, 1)  # (B, gh, gw, width)
        if self.mask_token is not None:
            tokens = torch.where(visible[..., None], tokens, self.mask_token.to(tokens.dtype))
        return (tokens + resample(self.position, grid, "linear").to(tokens.dtype)).flatten(1, 2)

    def _aligned(self, level: Tensor, grid: Size) -> Any:
        """SAM of phi of the level, ``(B, width, gh, gw)``."""
        if self.patch == 1:
            aligned = self.phi(level)
            return aligned if aligned.shape[2:] == grid else F.interpolate(aligned, grid, mode="nearest")
        size = (grid[0] * self.patch, grid[1] * self.patch)
        if level.shape[2:] != size or len(level) * grid[0] * grid[1] <= self.phi.out_channels:
            return self.sam(_fill(self.phi(level), size))
        # With fewer tokens than channels the product of the weights costs more than it saves.
        assert isinstance(self.sam, nn.Conv2d)
        weight, bias = fold_pointwise(self.phi, self.sam)
        return F.conv2d(level, weight, bias, self.patch)

    def to_map(self, rows: Tensor, grid: Size, size: Size) -> Tensor:
        """Puts a token's positions where they belong.

        Args:
            rows: ``(B, gh * gw, p * p * C_T)`` from `forward`.
            grid: ``(gh, gw)``.
            size: ``(h, w)`` of the teacher's level.

        Returns:
            ``(B, C_T, h, w)``.
        """
        p = self.patch
        if p == 1 and grid != size:
            return resample_map(rows.unflatten(1, grid).permute(0, 3, 1, 2), size, "average")
        blocks = rows.view(len(rows), *grid, p, p, -1)  # (B, gh, gw, p, p, C_T)
        whole = blocks.permute(0, 5, 1, 3, 2, 4).reshape(len(rows), -1, grid[0] * p, grid[1] * p)
        return whole[:, :, : size[0], : size[1]]

    @torch.no_grad()
    def attention(self, level: Tensor, visible: Tensor) -> Tensor:
        """Returns the last block's attention, the mean over its heads (MKD, Fig. 6).

        Args:
            level: ``(B, C_S, h, w)``.
            visible: ``(B, gh, gw)`` bool.

        Returns:
            ``(B, N, N)``: for each token what it attends to, sums of 1.
        """
        *before, last = self.blocks
        tokens = nn.Sequential(*before)(self.tokens(level, visible))
        attn = last.attn
        qkv = attn.qkv(last.norm1(tokens)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])  # (B, heads, N, width / heads)
        mixed: Tensor = (attn.scale * query @ key.mT).float().softmax(-1).mean(1)
        return mixed

    def extra_repr(self) -> str:
        """Returns what the printed module says of itself."""
        return f"patch={self.patch}, masked={self.mask_token is not None}"


def fold_pointwise(pointwise: nn.Conv2d, align: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of the one convolution that does what two do one after the other; differentiable.

    That costs a product of weights in each step, and saves a product and a map of the level's size: less work from two
    images on.

    Args:
        pointwise: 1 x 1, the first, with a bias.
        align: the second, with a bias and without padding, at whose border the first one's bias would be missed.

    Example:
        >>> first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 2, stride=2)
        >>> x, (weight, bias) = torch.randn(1, 3, 4, 4), fold_pointwise(first, second)
        >>> torch.allclose(F.conv2d(x, weight, bias, stride=2), second(first(x)), atol=1e-5)
        True
    """
    assert pointwise.bias is not None
    assert align.bias is not None
    weight = align.weight.movedim(1, 3) @ pointwise.weight.flatten(1)  # (D, p, p, W) @ (W, C)
    return weight.movedim(3, 1), align.bias + align.weight.sum((2, 3)) @ pointwise.bias


def resample(table: Tensor, size: Size, how: str) -> Tensor:
    """Resizes ``(h, w, D)`` to ``(h', w', D)`` by one small matrix for each direction.

    PyTorch's own resizing adds gradients up in any order on a GPU; matrix products are repeatable to the bit.

    Args:
        table: the values.
        size: ``(h', w')``.
        how: "linear", as bilinear interpolation without aligned corners, or "average", as adaptive average pooling.

    Example:
        >>> resample(torch.tensor([[[0.0], [1.0]]]), (1, 4), "linear").flatten()
        tensor([0.0000, 0.2500, 0.7500, 1.0000])
    """
    if (table.shape[0], table.shape[1]) == size:
        return table
    down, across = (_matrix(n, m, how, table) for n, m in zip(table.shape[:2], size, strict=True))
    return torch.einsum("ah,bw,hwd->abd", down, across, table)


def resample_map(x: Tensor, size: Size, how: str) -> Tensor:
    """`resample` of a map ``(B, C, h, w)``.

    Args:
        x: the map.
        size: ``(h', w')``.
        how: see `resample`.
    """
    down, across = (_matrix(n, m, how, x) for n, m in zip(x.shape[2:], size, strict=True))
    return down @ x @ across.mT


def _matrix(source: int, target: int, how: str, like: Tensor) -> Tensor:
    """``(target, source)``, what each new place takes of the old ones."""
    wide = torch.promote_types(like.dtype, torch.float32)
    unit = torch.eye(source, device=like.device, dtype=wide)[None]  # (1, source, source)
    if how == "average":
        resized = F.adaptive_avg_pool1d(unit, target)
    else:
        resized = F.interpolate(unit, target, mode="linear", align_corners=False)
    return resized[0].mT.to(like.dtype)


def _fill(x: Tensor, size: Size) -> Tensor:
    """Adds zeros below and to the right."""
    h, w = x.shape[2:]
    return x if (h, w) == size else F.pad(x, (0, size[1] - w, 0, size[0] - h))
