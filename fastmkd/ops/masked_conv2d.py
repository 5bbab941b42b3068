r"""Masked convolution on packed rows: it computes the visible positions of the output and nothing else.

.. math:: Y_o = \mathrm{bias} + \sum_t W_t \, X_{n(o, t)}

``X (N_in, Cin)`` are the visible pixels of a batch, ``Y (N_out, Cout)`` those of the output, ``W_t (Cout, Cin/groups)``
the weight of tap t, and ``n(o, t)`` the input row under tap t of output row o; a tap with ``n(o, t) = -1`` is hidden or
outside the image and adds nothing. The tables come from `fastmkd.nn.plan.MaskPlan`.

The gradient in X is the same operation with the transposed weight and the table of the other direction; the gradient in
W is the op in `fastmkd.ops.masked_conv2d_weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .masked_conv2d_weight import masked_conv2d_weight
from .registry import Backend, BadInput, Cost, Sample, declare
from .row_numbers import check_row_numbers
from .tap_tables import TapSample, gather_taps, on_device, tap_samples, tile_tap_sample

__all__ = ["masked_conv2d"]

SCHEMA = (
    "masked_conv2d(Tensor values, Tensor weight, Tensor? bias, Tensor taps, Tensor taps_back, "
    "Tensor order, Tensor order_back, int groups) -> Tensor"
)
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def masked_conv2d(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    taps_back: Tensor,
    order: Tensor,
    order_back: Tensor,
    groups: int = 1,
) -> Tensor:
    """Convolves packed rows; only the taps that are present are computed.

    Args:
        values: ``(N_in, Cin)`` contiguous rows of the visible input pixels.
        weight: ``(Cout, Cin / groups, kh, kw)``, as in `torch.nn.Conv2d`.
        bias: ``(Cout,)`` or None.
        taps: ``(N_out, kh * kw)`` int32, input row under each tap of each output row, -1 for none.
        taps_back: ``(N_in, kh * kw)`` int32, output row that reads this input row through each tap, -1 for none; empty,
            ``(0, kh * kw)``, if `values` needs no gradient.
        order: ``(N_out,)`` int32, the output rows in the order in which to compute them.
        order_back: ``(N_in,)`` int32, the input rows in the order in which to compute their gradients; empty with
            `taps_back`.
        groups: as in `torch.nn.Conv2d`.

    Returns:
        ``(N_out, Cout)`` in the dtype of `values`.

    Raises:
        ValueError: shapes that do not fit, or a row number out of range (on a GPU an asynchronous assert).
        TypeError: dtypes that do not fit.

    Example:
        >>> x, w = torch.tensor([[1.0], [2.0]]), torch.tensor([[[[1.0, 10.0]]]])  # two pixels, a 1 x 2 kernel
        >>> taps = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
        >>> back = torch.tensor([[0, -1], [1, 0]], dtype=torch.int32)
        >>> order = torch.arange(2, dtype=torch.int32)
        >>> masked_conv2d(x, w, None, taps, back, order, order)
        tensor([[21.],
                [ 2.]])
    """
    bias = None if bias is None else bias.contiguous()
    return _entry(values, weight, bias, taps, taps_back, order, order_back, groups)


def reference(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    taps_back: Tensor,
    order: Tensor,
    order_back: Tensor,
    groups: int,
) -> Tensor:
    rows = gather_taps(values, taps).unflatten(2, (groups, -1))  # (N_out, T, g, Cin/g)
    kernel = weight.flatten(2).unflatten(0, (groups, -1))  # (g, Cout/g, Cin/g, T)
    out = torch.einsum("ntgi,goit->ngo", rows, kernel).flatten(1)  # (N_out, Cout)
    return (out if bias is None else out + bias).contiguous()  # einsum's own strides differ with the shape


def check(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    taps_back: Tensor,
    order: Tensor,
    order_back: Tensor,
    groups: int,
) -> None:
    if values.dim() != 2 or values.shape[1] < 1:
        raise ValueError(f"values has shape {tuple(values.shape)}; expected (N, Cin), a row per visible pixel.")
    if not values.is_floating_point():
        raise TypeError(f"values has dtype {values.dtype}; expected a floating-point dtype.")
    if weight.dim() != 4 or min(weight.shape) < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (Cout, Cin / groups, kh, kw), none 0.")
    n_in, cin = values.shape
    # Empty tables are those of a gradient that nobody wants. A size that a traced graph does not know is not 0.
    rows_back = n_in
    if taps_back.dim() == 2 and isinstance(taps_back.shape[0], int) and taps_back.shape[0] == 0:
        rows_back = 0
    cout, _, kh, kw = weight.shape
    if groups < 1 or cin % groups or cout % groups or weight.shape[1] != cin // groups:
        raise ValueError(
            f"groups is {groups}, values has {cin} channels and weight has shape {tuple(weight.shape)}; expected "
            "(Cout, Cin / groups, kh, kw) for weight, with groups dividing both channel counts."
        )
    for name, tensor, shape, dtype in (
        ("weight", weight, weight.shape, values.dtype),
        ("bias", bias, (cout,), values.dtype),
        ("taps", taps, (*taps.shape[:1], kh * kw), torch.int32),
        ("taps_back", taps_back, (rows_back, kh * kw), torch.int32),
        ("order", order, taps.shape[:1], torch.int32),
        ("order_back", order_back, (rows_back,), torch.int32),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {dtype}.")
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}, values on {values.device}; move them to one device.")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}.")
    tables = (
        ("values", values),
        ("bias", values if bias is None else bias),
        ("taps", taps),
        ("taps_back", taps_back),
        ("order", order),
        ("order_back", order_back),
    )
    for name, tensor in tables:
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")


def check_values(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    taps_back: Tensor,
    order: Tensor,
    order_back: Tensor,
    groups: int,
) -> Iterator[tuple[Tensor, str]]:
    for name, table, low, end in (
        ("taps", taps, -1, len(values)),
        ("taps_back", taps_back, -1, len(taps)),
        ("order", order, 0, len(taps)),
        ("order_back", order_back, 0, len(values)),
    ):
        yield from check_row_numbers(name, table, low, end)


def fake(values: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, *_: Any) -> Tensor:
    return values.new_empty((taps.shape[0], weight.shape[0]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, weight, bias, *tables, ctx.groups = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(values, weight, *tables)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, weight, taps, taps_back, order, order_back = ctx.saved_tensors
    grad = grad.contiguous()
    d_values = d_weight = d_bias = None
    if ctx.needs_input_grad[0]:
        if len(taps_back) != len(values):
            raise ValueError("taps_back is empty, but values needs a gradient; pass the table of the other direction.")
        d_values = _entry(grad, transposed(weight, ctx.groups), None, taps_back, taps, order_back, order, ctx.groups)
    if ctx.needs_input_grad[1]:
        d_weight = masked_conv2d_weight(values, grad, taps, order, (weight.shape[2], weight.shape[3]), ctx.groups)
    if ctx.needs_input_grad[2]:
        d_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
    return d_values, d_weight, d_bias, *(None,) * 5


def transposed(weight: Tensor, groups: int) -> Tensor:
    """Swaps the channel roles within each group: ``(Cout, Cin/g, kh, kw)`` -> ``(Cin, Cout/g, kh, kw)``.

    A view for a single group: the backends take a weight of any strides.

    Args:
        weight: ``(Cout, Cin / groups, kh, kw)``.
        groups: number of groups.

    Example:
        >>> transposed(torch.zeros(6, 2, 3, 3), 2).shape
        torch.Size([4, 3, 3, 3])
    """
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    return [
        Sample(
            name,
            partial(_draw, sample, device, dtype, bias=name != "one_cell"),
            grad=(0, 1, 2) if max(sample.channels) <= 8 else (),
        )
        for name, sample in tap_samples().items()
    ]


def tile_sample(device: str, dtype: torch.dtype) -> Sample:
    return Sample("tiles", lambda: _draw(tile_tap_sample(), device, dtype))


def _draw(sample: TapSample, device: str, dtype: torch.dtype, bias: bool = True) -> tuple[Any, ...]:
    (_, taps_back, *_), (cin, cout), kernel, groups = sample
    g = torch.Generator().manual_seed(cin * 131 + cout)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(device=device, dtype=dtype)  # noqa: E731
    weight = draw(cout, cin // groups, *kernel) * (cin // groups * kernel[0] * kernel[1]) ** -0.5
    offset = draw(cout) if bias else None
    return draw(len(taps_back), cin), weight, offset, *on_device(sample, device), groups


def bad_inputs() -> list[BadInput]:
    tables, (cin, cout), kernel, _ = tap_samples()["small"]
    taps, back, order, order_back = tables
    x, w, b = torch.zeros(len(back), cin), torch.zeros(cout, cin, *kernel), torch.zeros(cout)
    high, low = taps.clone(), taps.clone()
    high[0, 0], low[0, 0] = len(x), -2
    return [
        BadInput("dense_values", (x[None], w, b, *tables, 1), ValueError, "values has shape"),
        BadInput("integer_values", (x.long(), w, b, *tables, 1), TypeError, "values has dtype"),
        BadInput("half_weight", (x, w.half(), b, *tables, 1), TypeError, "weight has dtype"),
        BadInput("groups", (x, w, b, *tables, 2), ValueError, "groups is 2"),
        BadInput("bias_length", (x, w, b[1:], *tables, 1), ValueError, "bias has shape"),
        BadInput("int64_taps", (x, w, b, taps.long(), back, order, order_back, 1), TypeError, "taps has dtype"),
        BadInput("kernel_taps", (x, w[..., :2], b, *tables, 1), ValueError, "taps has shape"),
        BadInput("order_length", (x, w, b, taps, back, order[1:], order_back, 1), ValueError, "order has shape"),
        BadInput("strided_values", (x.T.contiguous().T, w, b, *tables, 1), ValueError, "values has strides"),
        BadInput("row_too_large", (x, w, b, high, back, order, order_back, 1), ValueError, "taps holds"),
        BadInput("row_too_small", (x, w, b, low, back, order, order_back, 1), ValueError, "taps holds"),
    ]


def cost(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    taps_back: Tensor,
    order: Tensor,
    order_back: Tensor,
    groups: int,
) -> Cost:
    cout, cin_group, *_ = weight.shape
    present = int((taps >= 0).sum())
    size = values.element_size()
    moved = (values.numel() + weight.numel() + taps.shape[0] * cout) * size + (taps.numel() + order.numel()) * 4
    return Cost(flops=2.0 * present * cin_group * cout, bytes=float(moved))


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
        Backend("cpp", native.entry("masked_conv2d"), "cpu", FAST_DTYPES, native.missing_cpu),
        Backend(
            "triton",
            triton.launcher("masked_conv2d"),
            "cuda",
            FAST_DTYPES,
            triton.missing,
            tiles=triton.tiles("masked_conv2d"),
        ),
    ],
)
