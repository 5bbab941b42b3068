"""Masks and maps that the tests of masked layers draw from."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def draw_mask(kind: str, batch: int, grid: tuple[int, int], seed: int) -> Tensor:
    """``(B, gh, gw)``: "all" visible, "one" cell an image, or "mixed", a different count in each image."""
    if kind == "all":
        return torch.ones(batch, *grid, dtype=torch.bool)
    g = torch.Generator().manual_seed(seed)
    cells = grid[0] * grid[1]
    scores = torch.rand(batch, cells, generator=g)
    keep = torch.ones(batch, 1) if kind == "one" else torch.randint(1, cells + 1, (batch, 1), generator=g)
    return (scores.argsort(1).argsort(1) < keep).view(batch, *grid)


def pixels(visible: Tensor, size: tuple[int, int]) -> Tensor:
    """``(B, 1, H, W)`` float64 mask of a map: each cell repeated."""
    _, gh, gw = visible.shape
    return visible.repeat_interleave(size[0] // gh, 1).repeat_interleave(size[1] // gw, 2)[:, None].double()


masks = st.builds(
    draw_mask,
    kind=st.sampled_from(("all", "one", "mixed", "mixed")),
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 1000),
)
