r"""Token selection: the k most salient patches, on the teacher's grid (MaskedKD, Section 3.1; Appendix B for grids).

``(B, N) -> (B, k)``: indices of the k largest values of each row in ascending order, ties to the lower index. When
student and teacher cut the image into different grids, the saliency map is first resized bilinearly.

Every backend must pick the same tokens, so the resize is defined to the last bit: float32, each operation rounded on
its own, in the order written in `resize`. A neighbour that would lie outside the map has no weight, so a value repeated
at the border stays a tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .registry import Backend, BadInput, Cost, Sample, declare

__all__ = ["resize", "select_tokens"]

SCHEMA = "select_tokens(Tensor saliency, int k, int grid_h, int grid_w, int target_h, int target_w) -> Tensor"
FLOAT32 = (torch.float32,)
MOST_CELLS = 1 << 30  # positions are 32-bit inside the kernels


def select_tokens(
    saliency: Tensor,
    k: int,
    grid: tuple[int, int] | None = None,
    target_grid: tuple[int, int] | None = None,
) -> Tensor:
    """Returns the indices of the k most salient patches of each image, ascending (MaskedKD, Section 3.1).

    Args:
        saliency: ``(B, N)`` finite scores of any floating-point dtype, row-major over `grid`.
        k: how many patches to keep, 1 to N (of the target grid).
        grid: ``(gh, gw)`` of the scores; needed only with `target_grid`.
        target_grid: grid in which to select; the map is resized bilinearly (align_corners=False, no antialias).

    Returns:
        ``(B, k)`` int64 indices into the target grid, ascending; ties go to the lower index.

    Raises:
        ValueError: `k` out of range, grids that do not fit, or scores that are not finite (on a GPU an asynchronous
            assert, so that the step does not wait).
        TypeError: scores that are not floating point, or a `k` or a grid that is not made of ints.

    Example:
        >>> select_tokens(torch.tensor([[0.1, 0.4, 0.4, 0.3]]), 2)
        tensor([[1, 2]])
        >>> select_tokens(torch.tensor([[1.0, 0.0]]), 1, grid=(1, 2), target_grid=(1, 4))
        tensor([[0]])
    """
    if not isinstance(saliency, Tensor):
        raise TypeError(f"saliency is a {type(saliency).__name__}; expected a (B, N) tensor.")
    if saliency.dim() != 2:
        raise ValueError(f"saliency has shape {tuple(saliency.shape)}; expected (B, N), a score per patch.")
    if not saliency.is_floating_point():
        raise TypeError(f"saliency has dtype {saliency.dtype}; expected a floating-point dtype.")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is {k!r}; expected an int, the number of patches to keep.")
    if target_grid is not None and grid is None:
        raise ValueError("target_grid was given without grid; pass the (gh, gw) of the saliency map too.")
    for name, size in (("grid", grid), ("target_grid", target_grid)):
        if size is not None and not _is_size(size):
            raise TypeError(f"{name} is {size!r}; expected (gh, gw), two ints.")
    gh, gw = (1, saliency.shape[1]) if grid is None else grid
    th, tw = (gh, gw) if target_grid is None else target_grid
    return _entry(saliency.detach().float().contiguous(), k, gh, gw, th, tw)


def _is_size(size: object) -> bool:
    whole = (int, torch.SymInt)  # the latter while torch.export traces
    return isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, whole) for side in size)


def reference(saliency: Tensor, k: int, grid_h: int, grid_w: int, target_h: int, target_w: int) -> Tensor:
    if (target_h, target_w) != (grid_h, grid_w):
        saliency = resize(saliency.view(-1, grid_h, grid_w), (target_h, target_w)).flatten(1)
    # A stable sort keeps equal scores in index order, so ties go to the lower index.
    order = saliency.sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes ``(B, h, w)`` float32 maps to ``(B, th, tw)`` bilinearly, as every backend of `select_tokens` does.

    Args:
        maps: ``(B, h, w)`` float32.
        size: ``(th, tw)``.

    Returns:
        ``(B, th, tw)`` float32.

    Example:
        >>> resize(torch.tensor([[[0.0, 1.0]]]), (1, 4))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    y0, y1, h0, h1 = _axis(maps.shape[1], size[0], maps.device)
    x0, x1, w0, w1 = _axis(maps.shape[2], size[1], maps.device)
    # One tensor operation per rounding; a fused multiply-add would change ties.
    upper = w0 * maps[:, y0][:, :, x0] + w1 * maps[:, y0][:, :, x1]
    lower = w0 * maps[:, y1][:, :, x0] + w1 * maps[:, y1][:, :, x1]
    return h0[:, None] * upper + h1[:, None] * lower


def _axis(size_in: int, size_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per output cell of one axis: index of both neighbours (int64) and their weights (float32)."""
    ratio = size_in / size_out  # rounded to float32 when it meets the float32 tensor
    source = ((torch.arange(size_out, dtype=torch.float32, device=device) + 0.5) * ratio - 0.5).clamp_min(0)
    low = source.long().clamp_max(size_in - 1)
    high = (low + 1).clamp_max(size_in - 1)
    weight = torch.where(low == high, torch.zeros_like(source), source - low)
    return low, high, 1 - weight, weight


def check(saliency: Tensor, k: int, grid_h: int, grid_w: int, target_h: int, target_w: int) -> None:
    if saliency.dim() != 2:
        raise ValueError(f"saliency has shape {tuple(saliency.shape)}; expected (B, N), a score per patch.")
    if saliency.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"saliency has dtype {saliency.dtype}; expected float32.")
    if not saliency.is_contiguous():
        raise ValueError(f"saliency has strides {saliency.stride()}; expected a contiguous tensor, call .contiguous().")
    for name, grid in (("grid", (grid_h, grid_w)), ("target_grid", (target_h, target_w))):
        if min(grid) < 1 or grid[0] * grid[1] > MOST_CELLS:
            raise ValueError(f"{name} is {grid}; expected two positive numbers, {MOST_CELLS} cells at most.")
    if grid_h * grid_w != saliency.shape[1]:
        raise ValueError(
            f"grid ({grid_h}, {grid_w}) has {grid_h * grid_w} cells but saliency has {saliency.shape[1]} scores a row."
        )
    if not 1 <= k <= target_h * target_w:
        raise ValueError(f"k is {k}; expected 1 to {target_h * target_w}, the number of patches.")


def check_values(saliency: Tensor, *_: int) -> Iterator[tuple[Tensor, str]]:
    yield saliency.isfinite().all(), "saliency holds NaN or infinity; every score must be finite."


def fake(saliency: Tensor, k: int, grid_h: int, grid_w: int, target_h: int, target_w: int) -> Tensor:
    return saliency.new_empty((saliency.shape[0], k), dtype=torch.int64)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return (None,) * 6  # indices carry no gradient


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(batch: int, k: int, grid: tuple[int, int], target: tuple[int, int] | None = None, levels: int = 0) -> Any:
        g = torch.Generator().manual_seed(batch * 31 + grid[0] * grid[1])
        n = grid[0] * grid[1]
        if levels:  # few distinct values: many ties
            scores = torch.randint(-levels, levels, (batch, n), generator=g).to(torch.float32)
        else:
            scores = torch.rand(batch, n, generator=g)
        return (scores.to(device=device, dtype=dtype), k, *grid, *(target or grid))

    def zeros() -> tuple[Any, ...]:
        scores = torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0], [-0.0, 0.0, -1.0, 0.0, 0.0]])
        return scores.to(device=device, dtype=dtype), 2, 1, 5, 1, 5

    def huge() -> tuple[Any, ...]:
        scores = torch.empty(1 << 17, 128 * 128, device=device, dtype=dtype)  # 2^31 scores: offsets need 64 bits
        return scores.random_(-1000, 1000), 64, 128, 128, 128, 128

    return [
        Sample("half_of_deit", lambda: make(8, 98, (14, 14))),
        Sample("keep_one", lambda: make(3, 1, (7, 7))),
        Sample("keep_all", lambda: make(2, 49, (7, 7))),
        Sample("one_patch", lambda: make(2, 1, (1, 1))),
        Sample("ties", lambda: make(4, 20, (8, 8), levels=2)),
        Sample("two_values", lambda: make(2, 5, (3, 5), levels=1)),
        Sample("signed_zeros", zeros),
        Sample("finer_grid", lambda: make(4, 128, (14, 14), (16, 16))),
        Sample("finer_grid_ties", lambda: make(4, 100, (6, 6), (15, 13), levels=3)),
        Sample("coarser_grid", lambda: make(4, 30, (14, 14), (9, 11))),
        Sample("one_row_grid", lambda: make(2, 7, (1, 12), (5, 12))),
        Sample("high_resolution", lambda: make(2, 288, (14, 14), (24, 24))),
        Sample("large", lambda: make(2, 2000, (64, 64))),
        Sample("huge", huge, huge=True),
    ]


def bad_inputs() -> list[BadInput]:
    s = torch.rand(2, 12)
    nan = s.clone()
    nan[1, 3] = float("nan")
    return [
        BadInput("k_zero", (s, 0, 3, 4, 3, 4), ValueError, "k is 0"),
        BadInput("k_above_n", (s, 13, 3, 4, 3, 4), ValueError, "k is 13"),
        BadInput("wrong_grid", (s, 2, 3, 5, 3, 5), ValueError, "grid \\(3, 5\\)"),
        BadInput("empty_target", (s, 2, 3, 4, 0, 4), ValueError, "target_grid"),
        BadInput("three_dims", (s[None], 2, 3, 4, 3, 4), ValueError, "saliency has shape"),
        BadInput("integers", (s.long(), 2, 3, 4, 3, 4), TypeError, "saliency has dtype"),
        BadInput("strided", (torch.rand(12, 2).T, 2, 3, 4, 3, 4), ValueError, "contiguous"),
        BadInput("nan", (nan, 2, 3, 4, 3, 4), ValueError, "NaN"),
        BadInput("infinity", (nan.nan_to_num(float("inf")), 2, 3, 4, 3, 4), ValueError, "infinity"),
    ]


def cost(saliency: Tensor, k: int, grid_h: int, grid_w: int, target_h: int, target_w: int) -> Cost:
    return Cost(flops=0.0, bytes=float(saliency.numel() * 4 + saliency.shape[0] * k * 8))


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    check_values=check_values,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    bad_inputs=bad_inputs,
    cost=cost,
    dtypes=FLOAT32,
    backends=[
        Backend("cpp", native.entry("select_tokens"), "cpu", FLOAT32, native.missing_cpu),
        Backend("triton", triton.launcher("select_tokens"), "cuda", FLOAT32, triton.missing),
        # Built and tested; stays out of `auto` until a GPU shows it faster than Triton.
        Backend("cuda", native.entry("select_tokens"), "cuda", FLOAT32, native.missing_cuda, default=False),
    ],
)
