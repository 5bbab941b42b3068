"""What DPK puts between the feature maps and the loss (DPK, Table 8): encoders and decoders over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..nn.attention import run_block_on_rows, runs_on_rows

__all__ = ["TRANSFORMS", "Blocks", "Transform"]

Grid = tuple[int, int]


class Transform(NamedTuple):
    """A row of Table 8.

    Attributes:
        encoder: ``(width, depth)`` -> module ``(tokens (B, N, d), grid) -> (B, N, d)``.
        decoder: likewise.
        positions: whether tokens need a position embedding; convolutions know where they are.
    """

    encoder: Callable[[int, int], nn.Module]
    decoder: Callable[[int, int], nn.Module]
    positions: bool = True


class Blocks(nn.Module):
    """Pre-norm transformer blocks with MLP ratio 4 and heads of 64 channels, and a norm after the last.

    Args:
        width: d.
        depth: number of blocks; 0 leaves the norm alone.

    Example:
        >>> import torch
        >>> Blocks(64, 1)(torch.zeros(2, 4, 64), (2, 2)).shape
        torch.Size([2, 4, 64])
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        heads = max(1, width // 64)
        if width % heads:
            raise ValueError(f"width is {width}; expected less than 128 or a multiple of its {heads} attention heads.")
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio=4, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Returns ``(B, N, d)``.

        Args:
            tokens: ``(B, N, d)``.
            grid: not needed.
        """
        out: Tensor = self.norm(self.blocks(tokens))
        return out

    def first_rows(self, tokens: Tensor, rows: int) -> Tensor:
        """Returns the first `rows` tokens of what `forward` returns; the last block does not run for the others.

        Args:
            tokens: ``(B, N, d)``.
            rows: from 0 to N.

        Example:
            >>> import torch
            >>> blocks, tokens = Blocks(64, 2), torch.randn(2, 5, 64)
            >>> torch.allclose(blocks.first_rows(tokens, 3), blocks(tokens, (1, 5))[:, :3], atol=1e-5)
            True
        """
        blocks = list(self.blocks)
        for block in blocks[:-1]:
            tokens = block(tokens)
        for last in blocks[-1:]:
            # One row at least: attention is not asked for nothing.
            tokens = run_block_on_rows(last, tokens, max(rows, 1), None)[0] if runs_on_rows(last) else last(tokens)
        out: Tensor = self.norm(tokens[:, :rows])
        return out


class Decoder(nn.Module):
    """A linear layer, then `Blocks`.

    The parameter counts of Table 17 leave room for one layer of d x d beside lifts, blocks and output; it is put where
    MAE has it, in front of the decoder.

    Args:
        width: d.
        depth: number of blocks.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = Blocks(width, depth)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Returns ``(B, N, d)``.

        Args:
            tokens: ``(B, N, d)``.
            grid: not needed.
        """
        out: Tensor = self.blocks(self.embed(tokens), grid)
        return out


class TokenMlp(nn.Module):
    """One MLP of d, 2 d and d channels on each token alone (Table 8, "MLP-Decoder": no encoder).

    Args:
        width: d.
        depth: not needed.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.mlp = Mlp(width, 2 * width)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Returns ``(B, N, d)``.

        Args:
            tokens: ``(B, N, d)``.
            grid: not needed.
        """
        out: Tensor = self.mlp(tokens)
        return out


class Convolutions(nn.Module):
    """3 x 3 convolutions over the grid of tokens, each with batch norm and ReLU (Table 8, "Conv").

    Args:
        width: d.
        depth: number of convolutions.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(depth):
            self.layers.extend((nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()))

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Returns ``(B, N, d)``.

        Args:
            tokens: ``(B, N, d)``.
            grid: ``(gh, gw)`` with N cells.
        """
        out: Tensor = self.layers(tokens.mT.unflatten(2, grid)).flatten(2).mT
        return out


class Nothing(nn.Module):
    """Leaves tokens as they are: with lift and output around it, a 1 x 1 convolution each (Table 17).

    Args:
        width: not needed.
        depth: not needed.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Returns `tokens`.

        Args:
            tokens: ``(B, N, d)``.
            grid: not needed.
        """
        return tokens


# By the name that DPK(transform=...) and a recipe use.
TRANSFORMS: dict[str, Transform] = {
    "encoder-decoder": Transform(Blocks, Decoder),
    "mlp-decoder": Transform(TokenMlp, Decoder),
    "conv": Transform(Convolutions, Convolutions, positions=False),
    "1x1": Transform(Nothing, Nothing, positions=False),
}
