r"""Visible cells of a level as tokens, the mask token at hidden ones, positions added (MKD, Section 3.1.3).

.. math::
    y_{bn} = p_n + \begin{cases} W x_{bn} + \beta & n \text{ visible in image } b \\ m & \text{else} \end{cases}

``level`` is a map ``(B, C, gh * q, gw * q)`` and :math:`x_{bn}` its cell n: q x q positions row by row, the C channels
of a position side by side; q is called ``patch``. W is MKD's spatial alignment module, a convolution of q x q with
stride q as a matrix ``(D, q * q * C)``, :math:`\beta` its bias, m the mask token, p the positions ``(gh * gw, D)``, and
the result ``(B, gh * gw, D)`` the input of the decoder's first block. Hidden cells are neither unfolded nor multiplied,
and the result is written once, where a convolution, a choice and an addition write it three times.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, triton
from .align_cells_grad import align_cells_grad
from .autocast import autocast_dtype
from .cells import CellInputs, cells, check_cells, check_like, level_samples, tile_level
from .registry import Backend, BadInput, Cost, Sample, declare

__all__ = ["align_cells"]

SCHEMA = (
    "align_cells(Tensor level, Tensor weight, Tensor? bias, Tensor? visible, Tensor? mask_token, Tensor positions, "
    "int patch) -> Tensor"
)
LOW = (torch.float32, torch.bfloat16, torch.float16)


def align_cells(
    level: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    patch: int,
    visible: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Tensor:
    """Makes a token of every visible cell of a level, puts the mask token at the others and adds the positions.

    Differentiable in all floating-point arguments. Under autocast all of them are cast, so that the tokens have the
    dtype that the convolution alone would give; elsewhere they take the level's dtype, the weight must have it.

    Args:
        level: ``(B, C, gh * p, gw * p)``; contiguous or channels-last is read without a copy.
        weight: ``(D, p * p * C)``, for each position of a cell, row by row, its channels.
        bias: ``(D,)`` or None.
        positions: ``(gh * gw, D)``.
        patch: p.
        visible: ``(B, gh * gw)`` or ``(B, gh, gw)`` bool; None where no cell is hidden.
        mask_token: ``(D,)``; given if and only if `visible` is.

    Returns:
        ``(B, gh * gw, D)``.

    Raises:
        ValueError: shapes that do not fit, or `visible` without `mask_token`.
        TypeError: dtypes that do not fit.

    Example:
        >>> level, weight = torch.arange(8.0).view(1, 1, 2, 4), torch.ones(1, 4)
        >>> visible, mask_token = torch.tensor([[True, False]]), torch.tensor([-1.0])
        >>> align_cells(level, weight, None, torch.tensor([[0.1], [0.2]]), 2, visible, mask_token).flatten()
        tensor([10.1000, -0.8000])
    """
    dtype, lower = level.dtype, autocast_dtype(level.device)
    if dtype != torch.float64 and lower is not None:
        dtype = lower
        level, weight = level.to(dtype), weight.to(dtype)
    if not level.is_contiguous(memory_format=torch.channels_last):
        level = level.contiguous()
    bias, mask_token = (None if x is None else x.to(dtype).contiguous() for x in (bias, mask_token))
    if visible is not None:
        visible = visible.flatten(1).contiguous()
    return _entry(level, weight.contiguous(), bias, visible, mask_token, positions.to(dtype).contiguous(), patch)


def reference(
    level: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor | None, mask_token: Tensor | None,
    positions: Tensor, patch: int,
) -> Tensor:  # fmt: skip
    tokens = F.linear(cells(level, patch), weight, bias)  # (B, gh * gw, D)
    if visible is not None and mask_token is not None:
        tokens = torch.where(visible[..., None], tokens, mask_token)
    return tokens + positions


def check(
    level: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor | None, mask_token: Tensor | None,
    positions: Tensor, patch: int,
) -> None:  # fmt: skip
    check_cells(level, weight, visible, patch)
    if (visible is None) != (mask_token is None):
        given, missing = ("visible", "mask_token") if mask_token is None else ("mask_token", "visible")
        raise ValueError(f"{given} is given but {missing} is None; pass both, or neither where no cell is hidden.")
    dim, count = weight.shape[0], level.shape[2] * level.shape[3] // patch**2
    for name, tensor, shape in (
        ("bias", bias, (dim,)),
        ("mask_token", mask_token, (dim,)),
        ("positions", positions, (count, dim)),
    ):
        if tensor is not None:
            check_like(name, tensor, level, shape)


def fake(
    level: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor | None, mask_token: Tensor | None,
    positions: Tensor, patch: int,
) -> Tensor:  # fmt: skip
    return positions.new_empty((level.shape[0], *positions.shape))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    level, weight, _, visible, _, _, ctx.patch = inputs
    ctx.save_for_backward(level, weight, visible)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    level, weight, visible = ctx.saved_tensors
    need_level, need_weight, need_bias, _, need_mask_token, need_positions, _ = ctx.needs_input_grad
    d_level = d_weight = d_bias = d_mask_token = None
    if need_level or need_weight:
        d_level, d_weight = align_cells_grad(level, weight, visible, grad.contiguous(), ctx.patch)
    wide = torch.promote_types(grad.dtype, torch.float32)
    if visible is None:
        d_bias = grad.sum((0, 1), dtype=wide).to(grad.dtype) if need_bias else None
    elif need_bias or need_mask_token:
        # As a product with ones and zeros both sums are one pass, wide even for half precision.
        stood = torch.stack([visible.flatten(), ~visible.flatten()]).to(wide)  # (2, B * gh * gw)
        d_bias, d_mask_token = (stood @ grad.flatten(0, 1).to(wide)).to(grad.dtype)
    return (
        d_level if need_level else None,
        d_weight if need_weight else None,
        d_bias if need_bias else None,
        None,
        d_mask_token if need_mask_token else None,
        grad.sum(0) if need_positions else None,
        None,
    )


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    return [
        Sample(
            name,
            partial(_build, make, patch, bias=name != "channels_last"),
            grad=(0, 1, 2, 4, 5) if small else (),
            huge=name == "huge",
        )
        for name, make, patch, small in level_samples(device, dtype)
    ]


def tile_sample(device: str, dtype: torch.dtype) -> Sample:
    return Sample("tiles", partial(_build, *tile_level(device, dtype)))


def _build(make: CellInputs, patch: int, bias: bool = True) -> tuple[Any, ...]:
    level, weight, visible = make()
    g, dim = torch.Generator().manual_seed(7), weight.shape[0]
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(level)  # noqa: E731
    positions = draw(level.shape[2] * level.shape[3] // patch**2, dim)
    offset = draw(dim) if bias else None
    mask_token = draw(dim) if visible is not None else None
    return level, weight, offset, visible, mask_token, positions, patch


def bad_inputs() -> list[BadInput]:
    x, w, b, p = torch.zeros(2, 3, 4, 6), torch.zeros(5, 12), torch.zeros(5), torch.zeros(6, 5)
    seen, m = torch.ones(2, 6, dtype=torch.bool), torch.zeros(5)
    return [
        BadInput("three_dims", (x[0], w, b, seen, m, p, 2), ValueError, "level has shape"),
        BadInput("byte_level", (x.byte(), w, b, seen, m, p, 2), TypeError, "level has dtype"),
        BadInput("patch_zero", (x, w, b, seen, m, p, 0), ValueError, "patch is 0"),
        BadInput("patch_does_not_divide", (x, w, b, seen, m, p, 4), ValueError, "patch is 4"),
        BadInput("weight_values", (x, w[:, 1:].contiguous(), b, seen, m, p, 2), ValueError, "weight has shape"),
        BadInput("half_weight", (x, w.half(), b, seen, m, p, 2), TypeError, "weight has dtype"),
        BadInput("strided_level", (torch.zeros(2, 3, 6, 4).mT, w, b, seen, m, p, 2), ValueError, "level has strides"),
        BadInput("bias_length", (x, w, b[:4], seen, m, p, 2), ValueError, "bias has shape"),
        BadInput("few_cells", (x, w, b, seen[:, :5].contiguous(), m, p, 2), ValueError, "visible has shape"),
        BadInput("float_mask", (x, w, b, seen.float(), m, p, 2), TypeError, "visible has dtype"),
        BadInput("no_mask_token", (x, w, b, seen, None, p, 2), ValueError, "visible is given but mask_token is None"),
        BadInput("no_mask", (x, w, b, None, m, p, 2), ValueError, "mask_token is given but visible is None"),
        BadInput("mask_tokens", (x, w, b, seen, torch.zeros(2, 5), p, 2), ValueError, "mask_token has shape"),
        BadInput("few_positions", (x, w, b, seen, m, p[:5], 2), ValueError, "positions has shape"),
        BadInput("double_positions", (x, w, b, seen, m, p.double(), 2), TypeError, "positions has dtype"),
        BadInput("meta_device", (x, w, b, seen.to("meta"), m, p, 2), ValueError, "visible is on meta"),
    ]


def cost(
    level: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor | None, mask_token: Tensor | None,
    positions: Tensor, patch: int,
) -> Cost:  # fmt: skip
    share = 1.0 if visible is None else visible.float().mean().item()
    batch, count = level.shape[0], positions.shape[0]
    moved = share * level.numel() + weight.numel() + (batch + 1) * positions.numel()
    return Cost(flops=2.0 * share * batch * count * weight.numel(), bytes=moved * level.element_size())


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
        Backend("cpp", native.entry("align_cells"), "cpu", LOW, native.missing_cpu),
        Backend(
            "triton", triton.launcher("align_cells"), "cuda", LOW, triton.missing, tiles=triton.tiles("align_cells")
        ),
    ],
)
