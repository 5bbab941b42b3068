r"""Gradient of the masked convolution in its weight: a sum over the visible positions, tap by tap.

.. math:: \partial W_t = \sum_o \partial Y_o \, X_{n(o, t)}^T

``X (N_in, Cin)``, ``dY (N_out, Cout)`` and the table ``n`` are those of `fastmkd.ops.masked_conv2d`; a tap that is
absent adds nothing. Accumulates in float32 and in an order that does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .registry import Backend, BadInput, Cost, Sample, declare
from .row_numbers import check_row_numbers
from .tap_tables import TapSample, gather_taps, on_device, tap_samples, tile_tap_sample

__all__ = ["masked_conv2d_weight"]

SCHEMA = (
    "masked_conv2d_weight(Tensor values, Tensor grad, Tensor taps, Tensor order, int kh, int kw, int groups) -> Tensor"
)
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def masked_conv2d_weight(
    values: Tensor, grad: Tensor, taps: Tensor, order: Tensor, kernel: tuple[int, int], groups: int = 1
) -> Tensor:
    """Returns the gradient of a masked convolution in its weight.

    Args:
        values: ``(N_in, Cin)`` contiguous input rows.
        grad: ``(N_out, Cout)`` contiguous gradient of the output rows.
        taps: ``(N_out, kh * kw)`` int32, input row under each tap, -1 for none.
        order: ``(N_out,)`` int32, a permutation of the output rows; fast when rows with the same taps are neighbours.
        kernel: ``(kh, kw)``.
        groups: as in `torch.nn.Conv2d`.

    Returns:
        ``(Cout, Cin / groups, kh, kw)`` in the dtype of `values`.

    Raises:
        ValueError: shapes that do not fit, or a row number out of range (on a GPU an asynchronous assert).
        TypeError: dtypes that do not fit.

    Example:
        >>> x, dy = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [10.0]])
        >>> taps = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
        >>> masked_conv2d_weight(x, dy, taps, torch.arange(2, dtype=torch.int32), (1, 2)).flatten()
        tensor([21.,  2.])
    """
    return _entry(values, grad, taps, order, kernel[0], kernel[1], groups)


def reference(values: Tensor, grad: Tensor, taps: Tensor, order: Tensor, kh: int, kw: int, groups: int) -> Tensor:
    rows = gather_taps(values, taps).unflatten(2, (groups, -1))  # (N_out, T, g, Cin/g)
    out = torch.einsum("ntgi,ngo->goit", rows, grad.unflatten(1, (groups, -1)))
    return out.flatten(0, 1).unflatten(2, (kh, kw)).contiguous()  # (g, Cout/g, Cin/g, T) -> (Cout, Cin/g, kh, kw)


def check(values: Tensor, grad: Tensor, taps: Tensor, order: Tensor, kh: int, kw: int, groups: int) -> None:
    for name, tensor in (("values", values), ("grad", grad), ("taps", taps)):
        if tensor.dim() != 2 or tensor.shape[1] < 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a row per pixel, none of them empty.")
    if min(kh, kw) < 1:
        raise ValueError(f"the kernel is ({kh}, {kw}); expected two positive numbers.")
    for name, tensor in (("values", values), ("grad", grad)):
        if groups < 1 or tensor.shape[1] % groups:
            raise ValueError(f"groups is {groups}, which does not divide the {tensor.shape[1]} channels of {name}.")
    if not values.is_floating_point():
        raise TypeError(f"values has dtype {values.dtype}; expected a floating-point dtype.")
    for name, tensor, shape, dtype in (
        ("grad", grad, (len(taps), grad.shape[1]), values.dtype),
        ("taps", taps, (len(taps), kh * kw), torch.int32),
        ("order", order, (len(taps),), torch.int32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {dtype}.")
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}, values on {values.device}; move them to one device.")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
    for name, tensor in (("values", values), ("grad", grad), ("taps", taps), ("order", order)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")


def check_values(
    values: Tensor, grad: Tensor, taps: Tensor, order: Tensor, kh: int, kw: int, groups: int
) -> Iterator[tuple[Tensor, str]]:
    n_in, n_out = len(values), len(taps)
    yield from check_row_numbers("taps", taps, -1, n_in)
    yield from check_row_numbers("order", order, 0, n_out)


def fake(values: Tensor, grad: Tensor, taps: Tensor, order: Tensor, kh: int, kw: int, groups: int) -> Tensor:
    return values.new_empty((grad.shape[1], values.shape[1] // groups, kh, kw))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, grad, taps, _, _, _, ctx.groups = inputs
    ctx.save_for_backward(values, grad, taps)


def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
    # Second derivatives only, so plain PyTorch is fast enough.
    values, grad, taps = ctx.saved_tensors
    kernel = grad_weight.flatten(2).unflatten(0, (ctx.groups, -1))  # (g, Cout/g, Cin/g, T)
    rows = gather_taps(values, taps).unflatten(2, (ctx.groups, -1))
    d_grad = torch.einsum("ntgi,goit->ngo", rows, kernel).flatten(1)
    d_rows = torch.einsum("ngo,goit->ntgi", grad.unflatten(1, (ctx.groups, -1)), kernel).flatten(2)  # (N_out, T, Cin)
    d_values = values.new_zeros(len(values) + 1, values.shape[1])
    d_values.index_add_(0, taps.long().flatten() % (len(values) + 1), d_rows.flatten(0, 1))  # -1 lands on the extra row
    return d_values[:-1], d_grad, None, None, None, None, None


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    return [
        Sample(name, partial(_draw, sample, device, dtype), grad=(0, 1) if max(sample.channels) <= 8 else ())
        for name, sample in tap_samples().items()
    ]


def tile_sample(device: str, dtype: torch.dtype) -> Sample:
    return Sample("tiles", lambda: _draw(tile_tap_sample(), device, dtype))


def _draw(sample: TapSample, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    (taps, taps_back, *_), (cin, cout), kernel, groups = sample
    g = torch.Generator().manual_seed(cin * 7 + cout)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(device=device, dtype=dtype)  # noqa: E731
    moved, _, order, _ = on_device(sample, device)
    return draw(len(taps_back), cin), draw(len(taps), cout), moved, order, *kernel, groups


def bad_inputs() -> list[BadInput]:
    (taps, taps_back, order, _), (cin, cout), (kh, kw), _ = tap_samples()["small"]
    x, g = torch.zeros(len(taps_back), cin), torch.zeros(len(taps), cout)
    return [
        BadInput("dense_values", (x[None], g, taps, order, kh, kw, 1), ValueError, "values has shape"),
        BadInput("groups", (x, g, taps, order, kh, kw, 2), ValueError, "groups is 2"),
        BadInput("half_grad", (x, g.half(), taps, order, kh, kw, 1), TypeError, "grad has dtype"),
        BadInput("grad_rows", (x, g[1:], taps, order, kh, kw, 1), ValueError, "grad has shape"),
        BadInput("kernel", (x, g, taps, order, kh, 2, 1), ValueError, "taps has shape"),
        BadInput("int64_order", (x, g, taps, order.long(), kh, kw, 1), TypeError, "order has dtype"),
        BadInput("strided", (x.T.contiguous().T, g, taps, order, kh, kw, 1), ValueError, "values has strides"),
        BadInput("row_too_large", (x[:-1].clone(), g, taps, order, kh, kw, 1), ValueError, "taps holds"),
    ]


def cost(values: Tensor, grad: Tensor, taps: Tensor, order: Tensor, kh: int, kw: int, groups: int) -> Cost:
    cin_group, cout = values.shape[1] // groups, grad.shape[1]
    size = values.element_size()
    moved = (values.numel() + grad.numel() + kh * kw * cin_group * cout) * size + (taps.numel() + order.numel()) * 4
    return Cost(flops=2.0 * int((taps >= 0).sum()) * cin_group * cout, bytes=float(moved))


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    check_values=check_values,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    tile_sample=tile_sample,
    bad_inputs=bad_inputs,
    cost=cost,
    backends=[
        Backend("cpp", native.entry("masked_conv2d_weight"), "cpu", FAST_DTYPES, native.missing_cpu),
        Backend(
            "triton",
            triton.launcher("masked_conv2d_weight"),
            "cuda",
            FAST_DTYPES,
            triton.missing,
            tiles=triton.tiles("masked_conv2d_weight"),
        ),
    ],
)
