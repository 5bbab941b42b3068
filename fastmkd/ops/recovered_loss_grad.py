r"""Gradient of the recovered loss in the rows and in the queries of the attention pooling, in one pass over both maps.

With the names of `fastmkd.ops.recovered_loss`, :math:`n = B H W C`, gradients :math:`g` of its results and weights
:math:`a^s_{bp} = \exp(q^s \cdot s_{bp} - l^s_b)` from its ``log_sums`` l:

.. math::
    \delta^s_{bp} &= a^s_{bp} \, (s_{bp} \cdot g^{c,s}_b - k^s_b) \\
    \partial s_{bp} &= \tfrac{g^E}{n} (s_{bp} - t_{bp}) + g^D_b + a^s_{bp} \, g^{c,s}_b + \delta^s_{bp} \, q^s \\
    \partial q^s &= \sum_{bp} \delta^s_{bp} \, s_{bp}

and likewise the teacher's query; ``shifts`` k is the product of a context with its gradient. From there the gradient
passes the layer norm of each position. Statistics are made again rather than kept: the maps have to be read anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .recovered_maps import MapInputs, check_like, check_maps, map_samples, normalised_positions, rows_of
from .registry import Backend, BadInput, Cost, Sample, declare

__all__ = ["recovered_loss_grad"]

SCHEMA = (
    "recovered_loss_grad(Tensor rows, Tensor teacher, Tensor queries, Tensor log_sums, Tensor grad_error, "
    "Tensor grad_difference, Tensor grad_contexts, Tensor shifts, int patch) -> (Tensor, Tensor)"
)
LOW = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5  # on the variance


def recovered_loss_grad(
    rows: Tensor,
    teacher: Tensor,
    queries: Tensor,
    log_sums: Tensor,
    grad_error: Tensor,
    grad_difference: Tensor,
    grad_contexts: Tensor,
    shifts: Tensor,
    patch: int,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `fastmkd.ops.recovered_loss` in its rows and its queries.

    Args:
        rows: ``(B, gh * gw, p * p * C)`` contiguous.
        teacher: ``(B, C, H, W)`` contiguous or channels-last; the dtype of `rows` or float32.
        queries: ``(2, C)`` float32, student's and teacher's.
        log_sums: ``(2, B)`` float32, logarithms of the softmaxes' denominators.
        grad_error: ``()`` float32.
        grad_difference: ``(B, C)`` float32.
        grad_contexts: ``(2, B, C)`` float32.
        shifts: ``(2, B)`` float32, what is taken off a feature's product with the context's gradient.
        patch: p.

    Returns:
        ``(B, gh * gw, p * p * C)`` in the dtype of `rows`, and ``(2, C)`` float32.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that do not fit.

    Example:
        >>> rows, teacher, zeros = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[[3.0]], [[1.0]]]]), torch.zeros
        >>> grads = torch.tensor(1.0), zeros(1, 2), zeros(2, 1, 2), zeros(2, 1)
        >>> d_rows, d_queries = recovered_loss_grad(rows, teacher, zeros(2, 2), zeros(2, 1), *grads, patch=1)
        >>> d_rows.shape, d_queries
        (torch.Size([1, 1, 2]), tensor([[0., 0.],
                [0., 0.]]))
    """
    return _entry(rows, teacher, queries, log_sums, grad_error, grad_difference, grad_contexts, shifts, patch)


def reference(
    rows: Tensor,
    teacher: Tensor,
    queries: Tensor,
    log_sums: Tensor,
    grad_error: Tensor,
    grad_difference: Tensor,
    grad_contexts: Tensor,
    shifts: Tensor,
    patch: int,
) -> tuple[Tensor, Tensor]:
    sides = normalised_positions(rows, teacher, patch)  # (B, HW, C) each
    student, taught = sides
    d_student = grad_error / rows.numel() * (student - taught) + grad_difference[:, None]
    d_queries = []
    for i, side in enumerate(sides):
        weights = (side @ queries[i] - log_sums[i][:, None]).exp()  # (B, HW)
        along = (side @ grad_contexts[i][:, :, None])[:, :, 0]
        d_logits = weights * (along - shifts[i][:, None])
        d_queries.append((d_logits[:, :, None] * side).sum((0, 1)))
        if i == 0:
            d_student = d_student + weights[:, :, None] * grad_contexts[0][:, None] + d_logits[:, :, None] * queries[0]
    # Through the layer norm.
    cells = rows_of(d_student, teacher.shape[3], patch).unflatten(2, (patch * patch, -1))  # (B, gh * gw, p * p, C)
    x = rows.to(d_student.dtype).unflatten(2, (patch * patch, -1))
    rstd = (x.var(3, unbiased=False, keepdim=True) + EPS).rsqrt()
    normal = (x - x.mean(3, keepdim=True)) * rstd
    d_rows = rstd * (cells - cells.mean(3, keepdim=True) - normal * (cells * normal).mean(3, keepdim=True))
    return d_rows.flatten(2).to(rows.dtype), torch.stack(d_queries)


def check(
    rows: Tensor,
    teacher: Tensor,
    queries: Tensor,
    log_sums: Tensor,
    grad_error: Tensor,
    grad_difference: Tensor,
    grad_contexts: Tensor,
    shifts: Tensor,
    patch: int,
) -> None:
    check_maps(rows, teacher, queries, patch)
    batch, channels = teacher.shape[:2]
    check_like(
        rows,
        [
            ("log_sums", log_sums, (2, batch)),
            ("grad_error", grad_error, ()),
            ("grad_difference", grad_difference, (batch, channels)),
            ("grad_contexts", grad_contexts, (2, batch, channels)),
            ("shifts", shifts, (2, batch)),
        ],
    )


def fake(rows: Tensor, teacher: Tensor, queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(queries)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.patch = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives only, so PyTorch finds them in the reference."""
    rows, teacher, *small = (tensor.detach() for tensor in ctx.saved_tensors)
    leaves = [tensor.requires_grad_() for tensor in (rows, *small)]
    with torch.enable_grad():
        given: Any = (rows, teacher, *small, ctx.patch)
        results = reference(*given)
    d_rows, *d_small = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    return d_rows, None, *d_small, None


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def build(make: MapInputs, patch: int) -> tuple[Any, ...]:
        rows, teacher, queries = make()
        batch, channels = teacher.shape[:2]
        g = torch.Generator().manual_seed(rows.numel() % 1009)
        draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(queries)  # noqa: E731
        # The true denominators: weights beyond 1 are nobody's.
        sides = (rows[:2], teacher[:2]) if rows.numel() > 1 << 30 else (rows, teacher)
        logits = [x @ q for x, q in zip(normalised_positions(*sides, patch), queries, strict=True)]
        log_sums = torch.stack([x.logsumexp(1) for x in logits])
        log_sums = log_sums.repeat(1, batch // log_sums.shape[1]).contiguous()
        positions = teacher.shape[2] * teacher.shape[3]
        grads = draw() * rows.numel(), draw(batch, channels), draw(2, batch, channels) * positions, draw(2, batch)
        return rows, teacher, queries, log_sums, *grads, patch

    return [
        Sample(name, partial(build, make, patch), grad=(0, *range(2, 8)) if small else (), huge=name == "huge")
        for name, make, patch, small in map_samples(device, dtype)
    ]


def bad_inputs() -> list[BadInput]:
    rows, t, q = torch.zeros(2, 6, 20), torch.zeros(2, 5, 4, 6), torch.zeros(2, 5)
    log_sums, g, gd, gc, k = (
        torch.zeros(2, 2),
        torch.zeros(()),
        torch.zeros(2, 5),
        torch.zeros(2, 2, 5),
        torch.ones(2, 2),
    )
    return [
        BadInput("rows_shape", (rows[:, 1:].clone(), t, q, log_sums, g, gd, gc, k, 2), ValueError, "rows has shape"),
        BadInput("teacher_dtype", (rows, t.double(), q, log_sums, g, gd, gc, k, 2), TypeError, "teacher has dtype"),
        BadInput("log_sums_shape", (rows, t, q, log_sums[0], g, gd, gc, k, 2), ValueError, "log_sums has shape"),
        BadInput("grad_shape", (rows, t, q, log_sums, g[None], gd, gc, k, 2), ValueError, "grad_error has shape"),
        BadInput("grad_dtype", (rows, t, q, log_sums, g, gd.half(), gc, k, 2), TypeError, "grad_difference has dtype"),
        BadInput("contexts_shape", (rows, t, q, log_sums, g, gd, gc[0], k, 2), ValueError, "grad_contexts has shape"),
        BadInput("strided_shifts", (rows, t, q, log_sums, g, gd, gc, k.mT, 2), ValueError, "shifts has strides"),
        BadInput("meta_device", (rows, t, q, log_sums, g.to("meta"), gd, gc, k, 2), ValueError, "grad_error is on"),
    ]


def cost(rows: Tensor, teacher: Tensor, *rest: Any) -> Cost:
    moved = 2 * rows.numel() * rows.element_size() + teacher.numel() * teacher.element_size()
    return Cost(flops=30.0 * rows.numel(), bytes=float(moved))


_entry = declare(
    SCHEMA,
    reference=reference,
    check=check,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
    samples=samples,
    bad_inputs=bad_inputs,
    cost=cost,
    backends=[
        Backend("cpp", native.entry("recovered_loss_grad"), "cpu", LOW, native.missing_cpu),
        Backend("triton", triton.launcher("recovered_loss_grad"), "cuda", LOW, triton.missing),
    ],
)
