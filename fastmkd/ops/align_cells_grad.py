r"""Gradient of the aligned cells in the level and in the weight; only visible cells take part.

With the names of `fastmkd.ops.align_cells` and the gradient g of its result

.. math::
    \partial x_{bn} = g_{bn} W \text{ where visible, else } 0, \qquad
    \partial W = \sum_{bn \text{ visible}} g_{bn} x_{bn}^\top

The rows of cells are made again from the level rather than kept: the level stays alive in its network anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .cells import CellInputs, cells, check_cells, check_like, level_of, level_samples, tile_level
from .registry import Backend, BadInput, Cost, Sample, declare

__all__ = ["align_cells_grad"]

SCHEMA = "align_cells_grad(Tensor level, Tensor weight, Tensor? visible, Tensor grad, int patch) -> (Tensor, Tensor)"
LOW = (torch.float32, torch.bfloat16, torch.float16)


def align_cells_grad(
    level: Tensor, weight: Tensor, visible: Tensor | None, grad: Tensor, patch: int
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `fastmkd.ops.align_cells` in its level and its weight.

    Args:
        level: ``(B, C, gh * p, gw * p)``, contiguous or channels-last.
        weight: ``(D, p * p * C)``.
        visible: ``(B, gh * gw)`` bool, or None where no cell is hidden.
        grad: ``(B, gh * gw, D)``, of the result.
        patch: p.

    Returns:
        Like `level`, zeros in hidden cells, and like `weight`.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not fit.

    Example:
        >>> level, visible = torch.arange(4.0).view(1, 1, 1, 4), torch.tensor([[True, False, True, True]])
        >>> align_cells_grad(level, torch.tensor([[2.0]]), visible, torch.ones(1, 4, 1), 1)
        (tensor([[[[2., 0., 2., 2.]]]]), tensor([[5.]]))
    """
    d_level, d_weight = _entry(level, weight, visible, grad, patch)
    return d_level, d_weight


def reference(level: Tensor, weight: Tensor, visible: Tensor | None, grad: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    rows, pulled = cells(level, patch), grad @ weight  # (B, gh * gw, p * p * C)
    if visible is not None:  # 0 times infinity is no zero
        grad, rows, pulled = (torch.where(visible[..., None], x, 0) for x in (grad, rows, pulled))
    d_weight = grad.flatten(0, 1).mT @ rows.flatten(0, 1)  # (D, B * gh * gw) @ (B * gh * gw, p * p * C)
    return level_of(pulled, level, patch), d_weight


def check(level: Tensor, weight: Tensor, visible: Tensor | None, grad: Tensor, patch: int) -> None:
    check_cells(level, weight, visible, patch)
    count = level.shape[2] * level.shape[3] // patch**2
    check_like("grad", grad, level, (level.shape[0], count, weight.shape[0]))


def fake(level: Tensor, weight: Tensor, visible: Tensor | None, grad: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(level), torch.empty_like(weight)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    level, weight, visible, grad, ctx.patch = inputs
    ctx.save_for_backward(level, weight, visible, grad)


def backward(ctx: Any, g_level: Tensor, g_weight: Tensor) -> tuple[Tensor | None, ...]:
    """Of a gradient, in plain PyTorch: both results are products of what is given."""
    level, weight, visible, grad = ctx.saved_tensors
    above, rows = cells(g_level, ctx.patch), cells(level, ctx.patch)  # (B, gh * gw, p * p * C)
    pull = grad
    if visible is not None:
        above, rows, pull = (torch.where(visible[..., None], x, 0) for x in (above, rows, grad))
    d_level = level_of(pull @ g_weight, level, ctx.patch)
    d_weight = pull.flatten(0, 1).mT @ above.flatten(0, 1)
    d_grad = above @ weight.mT + rows @ g_weight.mT
    return d_level, d_weight, None, d_grad, None


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    return [
        Sample(name, partial(_build, make, patch), grad=(0, 1, 3) if small else (), huge=name == "huge")
        for name, make, patch, small in level_samples(device, dtype)
    ]


def tile_sample(device: str, dtype: torch.dtype) -> Sample:
    return Sample("tiles", partial(_build, *tile_level(device, dtype)))


def _build(make: CellInputs, patch: int) -> tuple[Any, ...]:
    level, weight, visible = make()
    count = level.shape[2] * level.shape[3] // patch**2
    g = torch.Generator().manual_seed(8)
    grad = torch.randn(level.shape[0], count, weight.shape[0], generator=g).to(level)
    return level, weight, visible, grad, patch


def bad_inputs() -> list[BadInput]:
    x, w, g = torch.zeros(2, 3, 4, 6), torch.zeros(5, 12), torch.zeros(2, 6, 5)
    seen = torch.ones(2, 6, dtype=torch.bool)
    return [
        BadInput("three_dims", (x[0], w, seen, g, 2), ValueError, "level has shape"),
        BadInput("patch_does_not_divide", (x, w, seen, g, 4), ValueError, "patch is 4"),
        BadInput("weight_values", (x, w[:, 1:].contiguous(), seen, g, 2), ValueError, "weight has shape"),
        BadInput("few_cells", (x, w, seen[:, :5].contiguous(), g, 2), ValueError, "visible has shape"),
        BadInput("grad_width", (x, w, seen, g[..., :4].contiguous(), 2), ValueError, "grad has shape"),
        BadInput("half_grad", (x, w, seen, g.half(), 2), TypeError, "grad has dtype"),
        BadInput("strided_grad", (x, w, seen, torch.zeros(2, 5, 6).mT, 2), ValueError, "grad has strides"),
    ]


def cost(level: Tensor, weight: Tensor, visible: Tensor | None, grad: Tensor, patch: int) -> Cost:
    share = 1.0 if visible is None else visible.float().mean().item()
    moved = (1 + share) * level.numel() + 2 * weight.numel() + share * grad.numel()
    return Cost(flops=4.0 * share * grad.numel() * weight.shape[1], bytes=moved * level.element_size())


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    tile_sample=tile_sample,
    bad_inputs=bad_inputs,
    cost=cost,
    backends=[
        Backend("cpp", native.entry("align_cells_grad"), "cpu", LOW, native.missing_cpu),
        Backend(
            "triton",
            triton.launcher("align_cells_grad"),
            "cuda",
            LOW,
            triton.missing,
            tiles=triton.tiles("align_cells_grad"),
        ),
    ],
)
