"""MKD's adaptive decoder: one per level, from the student's masked map to the teacher's map (MKD, Section 3.1.3)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..ops.align_cells import align_cells

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
    lies between phi and SAM, so they run as one (`fold_pointwise`), a matrix product of cells.

    Args:
        student_channels: C_S.
        teacher_channels: C_T.
        patch: p, positions of the level per token in each direction; 1 also for a level coarser than the tokens.
        masked: whether tokens are replaced; False for levels behind the masked part, which have no mask token.
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
    phi: Any
    sam: Any
    blocks: Any

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
        grid, p = (visible.shape[1], visible.shape[2]), self.patch
        whole = (grid[0] * p, grid[1] * p)
        position = resample(self.position, grid, "linear").flatten(0, 1)  # (gh * gw, width)
        if p == 1 and level.shape[2:] != whole:  # coarser than the tokens
            tokens = F.interpolate(self.phi(level), grid, mode="nearest").flatten(2).mT
            if self.mask_token is not None:
                tokens = torch.where(visible.flatten(1)[:, :, None], tokens, self.mask_token.to(tokens.dtype))
            return tokens + position.to(tokens.dtype)
        if level.shape[2:] == whole:
            weight, bias = fold_pointwise(self.phi, self.sam)
        else:  # phi makes no zeros of what is filled in, so it comes before
            level = _fill(self.phi(level), whole)
            weight, bias = self.sam.weight.movedim(1, 3), self.sam.bias
        hidden = () if self.mask_token is None else (visible, self.mask_token)
        return align_cells(level, weight.flatten(1), bias, position, p, *hidden)

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


def fold_pointwise(pointwise: nn.Conv2d, align: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of the one linear layer of cells that does what two convolutions do; differentiable.

    It costs a product of weights in each step, and saves a product and a map of the level's size: less work from two
    images on.

    Args:
        pointwise: 1 x 1, the first, with a bias.
        align: the second, p x p with stride p, a bias and no padding; the identity where p is 1.

    Returns:
        ``(D, p, p, C)``, whose last three match a row of `fastmkd.ops.cells.cells`, and ``(D,)``.

    Example:
        >>> from fastmkd.ops.cells import cells
        >>> first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 2, stride=2)
        >>> x, (weight, bias) = torch.randn(1, 3, 4, 4), fold_pointwise(first, second)
        >>> tokens = F.linear(cells(x, 2), weight.flatten(1), bias)
        >>> torch.allclose(tokens, second(first(x)).flatten(2).mT, atol=1e-5)
        True
    """
    assert pointwise.bias is not None
    if not isinstance(align, nn.Conv2d):
        return pointwise.weight.movedim(1, 3), pointwise.bias
    assert align.bias is not None
    weight = align.weight.movedim(1, 3) @ pointwise.weight.flatten(1)  # (D, p, p, W) @ (W, C)
    return weight, align.bias + align.weight.sum((2, 3)) @ pointwise.bias


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
    return torch.einsum("ah,hwd,bw->abd", down, table, across)  # from left to right: never (a, h, b, w)


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
    """``(target, source)``, what each new place takes of the old ones; made once for each size, dtype and device."""
    # A fake tensor or a trace wants a matrix of its own kind, and what a CUDA graph makes is the graph's alone.
    traced = torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter)
    if traced or (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _make_matrix(source, target, how, like.dtype, like.device)
    return _kept_matrix(source, target, how, like.dtype, like.device)


@functools.lru_cache(maxsize=1024)  # images of many sizes have some forty sides in tokens, five levels each
def _kept_matrix(source: int, target: int, how: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    # An inference tensor could not be saved for a backward pass. The copy to the device is waited for, so that a stream
    # other than this one may use it.
    with torch.inference_mode(False), torch.no_grad():
        return _make_matrix(source, target, how, dtype, torch.device("cpu")).to(device)


def _make_matrix(source: int, target: int, how: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    unit = torch.eye(source, device=device, dtype=wide)[None]  # (1, source, source)
    if how == "average":
        resized = F.adaptive_avg_pool1d(unit, target)
    else:
        resized = F.interpolate(unit, target, mode="linear", align_corners=False)
    return resized[0].mT.to(dtype)


def _fill(x: Tensor, size: Size) -> Tensor:
    """Adds zeros below and to the right."""
    h, w = x.shape[2:]
    return x if (h, w) == size else F.pad(x, (0, size[1] - w, 0, size[0] - h))
