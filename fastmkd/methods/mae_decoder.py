"""What stands on the encoder in MAE and DMAE: the decoder that predicts pixels."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..nn.attention import run_block_on_rows, runs_on_rows
from ..ops import unshuffle_tokens
from .mae_parts import sincos_positions

__all__ = ["MAEDecoder"]


class MAEDecoder(nn.Module):
    """Predicts the pixels of hidden patches from the encoder's visible tokens (MAE; DMAE, Section 3.1).

    The visible tokens are lifted to the decoder's width and put where they belong, a learned mask token everywhere
    else; fixed sine-cosine positions are added; transformer blocks mix them all. Only hidden patches are read of the
    last block, so its queries, projection and MLP, the norm and the prediction run on those rows alone, which is exact.

    Args:
        embed_dim: width of the encoder's tokens.
        pixels: numbers to predict for a patch, ``ph * pw * C``.
        num_prefix_tokens: P, how many of the encoder's tokens are no patches.
        grid: ``(gh, gw)`` patches; other grids later are fine.
        width: of the blocks.
        depth: number of blocks.
        num_heads: attention heads of a block.

    Example:
        >>> decoder = MAEDecoder(6, 12, num_prefix_tokens=1, grid=(2, 2), width=8, depth=1, num_heads=2)
        >>> keep, hidden = torch.tensor([[1]]), torch.tensor([[0, 2, 3]])
        >>> decoder(torch.randn(1, 2, 6), keep, hidden, (2, 2)).shape
        torch.Size([1, 3, 12])
    """

    positions: Tensor

    def __init__(
        self,
        embed_dim: int,
        pixels: int,
        num_prefix_tokens: int,
        grid: tuple[int, int],
        width: int = 512,
        depth: int = 8,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio=4, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, pixels)
        self.register_buffer("positions", sincos_positions(grid, width, num_prefix_tokens), persistent=False)
        _initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, keep: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Returns the predicted pixels ``(B, m, pixels)`` of the hidden patches.

        Args:
            tokens: ``(B, P + k, embed_dim)`` of the encoder.
            keep: ``(B, k)`` visible patches.
            hidden: ``(B, m)`` hidden patches, all the others.
            grid: ``(gh, gw)`` patches of the images.
        """
        x = unshuffle_tokens(self.embed(tokens), keep, self.mask_token, self._positions(grid))  # (B, P + N, width)
        *body, last = self.blocks
        for block in body:
            x = block(x)
        x = self._hidden_first(x, keep, hidden)
        count = hidden.shape[1]
        x = run_block_on_rows(last, x, count, None)[0] if runs_on_rows(last) else last(x)[:, :count]
        out: Tensor = self.predict(self.norm(x))
        return out

    def _hidden_first(self, x: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """The same tokens with those of the hidden patches in front; blocks do not care about the order."""
        prefix = self.num_prefix_tokens
        own = torch.arange(prefix, device=x.device).expand(len(x), -1)
        order = torch.cat((hidden + prefix, own, keep + prefix), dim=1)  # (B, P + N)
        return x.gather(1, order[:, :, None].expand_as(x))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.positions
        return sincos_positions(grid, self.positions.shape[1], self.num_prefix_tokens).to(self.positions)


def _initialise(module: nn.Module) -> None:
    """Initialises linear layers as MAE does: Xavier uniform, without biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
