r"""The recovered map against the teacher's: layer-normed squared error, and what the relation term needs of both maps.

With :math:`s_{bp}` and :math:`t_{bp}` the student's recovered and the teacher's features at position p of image b, each
normalised over its C channels (no affine part, epsilon 1e-5), MKD's Eq. 3 for one level is

.. math:: E = \frac{1}{2 B H W C} \sum_{bp} \| s_{bp} - t_{bp} \|^2

and of Eq. 4, whose blocks are :math:`R(x) = x + \mathrm{add}(c(x))` (FGD, Eq. 7), everything that depends on positions:

.. math:: D_b = \sum_p s_{bp} - t_{bp}, \qquad
    c^s_b = \sum_p \mathrm{softmax}_p(q^s \cdot s_{bp}) \, s_{bp}, \qquad c^t_b \text{ likewise}

An added vector is the same at all positions, so with :math:`d = \mathrm{add}_s(c^s) - \mathrm{add}_t(c^t)`

.. math:: \sum_{bp} \| R_s(s) - R_t(t) \|^2_{bp} = 2 B H W C \, E + \sum_b 2 \, d_b \cdot D_b + H W \| d_b \|^2

One pass reads both maps once. Neither the shuffled map, nor the normalised ones, nor R of them is ever written. The op
also returns ``log_sums (2, B)``, the logarithms of the softmaxes' denominators, which its gradient reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native, triton
from .recovered_loss_grad import recovered_loss_grad
from .recovered_maps import MapInputs, check_maps, map_samples, normalised_positions
from .registry import Backend, BadInput, Cost, Sample, declare

__all__ = ["Recovered", "recovered_loss", "relation_error"]

SCHEMA = "recovered_loss(Tensor rows, Tensor teacher, Tensor queries, int patch) -> (Tensor, Tensor, Tensor, Tensor)"
LOW = (torch.float32, torch.bfloat16, torch.float16)


class Recovered(NamedTuple):
    """What `recovered_loss` returns; all differentiable, in float32 (float64 for float64).

    Example:
        >>> Recovered(torch.zeros(()), torch.zeros(2, 8), torch.zeros(2, 2, 8)).error.item()
        0.0
    """

    error: Tensor  # (), half the mean squared difference
    difference: Tensor  # (B, C), sum over the positions of student - teacher
    contexts: Tensor  # (2, B, C), attention-pooled student and teacher


def recovered_loss(rows: Tensor, teacher: Tensor, patch: int, queries: Tensor | None = None) -> Recovered:
    """Compares what a spatial recovery module predicts with the teacher's map, both layer-normed (MKD, Eq. 3 and 4).

    Differentiable in `rows` and `queries`; the teacher's map is a target and carries no gradient.

    Args:
        rows: ``(B, gh * gw, p * p * C)``, output of the recovery's linear layer: for each cell its p x p positions row
            by row, the C channels of a position side by side.
        teacher: ``(B, C, gh * p, gw * p)``, contiguous or channels-last.
        patch: p.
        queries: ``(2, C)``, of the attention pooling of the student's and of the teacher's map: the weights of the
            1 x 1 convolutions to one channel (their bias changes no softmax). None pools evenly.

    Returns:
        A `Recovered`.

    Raises:
        ValueError: shapes that do not fit, or a teacher's map that requires a gradient.
        TypeError: dtypes that do not fit.

    Example:
        >>> rows, teacher = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[[3.0]], [[1.0]]]])
        >>> recovered_loss(rows, teacher, patch=1).error
        tensor(2.0000)
    """
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher requires a gradient, but its map is a target here; pass teacher.detach().")
    wide = torch.promote_types(torch.promote_types(rows.dtype, teacher.dtype), torch.float32)
    if wide == torch.float64:
        rows = rows.to(wide)
    if teacher.is_floating_point() and teacher.dtype not in (rows.dtype, wide):
        teacher = teacher.to(wide)
    if not teacher.is_contiguous(memory_format=torch.channels_last):
        teacher = teacher.contiguous()
    if queries is None:
        queries = rows.new_zeros(2, teacher.shape[1])
    error, difference, contexts, _ = _entry(rows.contiguous(), teacher, queries.to(wide).contiguous(), patch)
    return Recovered(error, difference, contexts)


def relation_error(recovered: Recovered, added: Tensor, positions: int) -> Tensor:
    """The relation term of one level (MKD, Eq. 4; FGD, Eq. 7), summed over a map's elements, averaged over images.

    Args:
        recovered: of `recovered_loss`.
        added: ``(B, C)``, what the student's block adds to every position less what the teacher's adds.
        positions: H * W.

    Returns:
        A scalar.

    Example:
        >>> rows, teacher = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[[3.0]], [[1.0]]]])
        >>> relation_error(recovered_loss(rows, teacher, patch=1), torch.tensor([[1.0, -1.0]]), positions=1).round()
        tensor(2.)
    """
    squares = 2 * added.numel() * positions * recovered.error
    return (squares + (added * (2 * recovered.difference + positions * added)).sum()) / len(added)


def reference(rows: Tensor, teacher: Tensor, queries: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = normalised_positions(rows, teacher, patch)  # (B, HW, C) each
    difference = sides[0] - sides[1]
    logits = torch.stack([side @ query for side, query in zip(sides, queries, strict=True)])  # (2, B, HW)
    contexts = torch.stack([(w[:, None] @ x)[:, 0] for w, x in zip(logits.softmax(2), sides, strict=True)])
    return difference.square().mean() / 2, difference.sum(1), contexts, logits.logsumexp(2)


def check(rows: Tensor, teacher: Tensor, queries: Tensor, patch: int) -> None:
    check_maps(rows, teacher, queries, patch)


def fake(rows: Tensor, teacher: Tensor, queries: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels = teacher.shape[:2]
    make = queries.new_empty
    return make(()), make((batch, channels)), make((2, batch, channels)), make((2, batch))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, teacher, queries, ctx.patch = inputs
    ctx.save_for_backward(rows, teacher, queries, output[2], output[3])


def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    rows, teacher, queries, contexts, log_sums = ctx.saved_tensors
    g_error, g_difference, g_contexts, g_log_sums = grads
    # A logit moves its softmax's mean by (its own product with the gradient - this), and its denominator.
    shifts = (contexts * g_contexts).sum(2) - g_log_sums  # (2, B)
    d_rows, d_queries = recovered_loss_grad(
        rows, teacher, queries, log_sums, g_error, g_difference.contiguous(), g_contexts.contiguous(), shifts, ctx.patch
    )
    return d_rows, None, d_queries, None


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def build(make: MapInputs, patch: int) -> tuple[Any, ...]:
        return *make(), patch

    return [
        Sample(name, partial(build, make, patch), grad=(0, 2) if small else (), huge=name == "huge")
        for name, make, patch, small in map_samples(device, dtype)
    ]


def bad_inputs() -> list[BadInput]:
    rows, t, q = torch.zeros(2, 6, 20), torch.zeros(2, 5, 4, 6), torch.zeros(2, 5)
    return [
        BadInput("two_dims", (rows[0], t, q, 2), ValueError, "rows has shape"),
        BadInput("integers", (rows.long(), t, q, 2), TypeError, "rows has dtype"),
        BadInput("half_teacher", (rows, t.half(), q, 2), TypeError, "teacher has dtype"),
        BadInput("teacher_dims", (rows, t[0], q, 2), ValueError, "teacher has shape"),
        BadInput("patch_zero", (rows, t, q, 0), ValueError, "patch is 0"),
        BadInput("patch_does_not_divide", (rows, t, q, 4), ValueError, "patch is 4"),
        BadInput("other_patch", (rows, t, q, 1), ValueError, "rows has shape"),
        BadInput("few_rows", (rows[:, :5].contiguous(), t, q, 2), ValueError, "rows has shape"),
        BadInput("one_query", (rows, t, q[0], 2), ValueError, "queries has shape"),
        BadInput("half_queries", (rows.half(), t.half(), q.half(), 2), TypeError, "queries has dtype"),
        BadInput("strided_rows", (torch.zeros(2, 20, 6).mT, t, q, 2), ValueError, "rows has strides"),
        BadInput("strided_teacher", (rows, torch.zeros(2, 5, 6, 4).mT, q, 2), ValueError, "teacher has strides"),
        BadInput("meta_device", (rows, t.to("meta"), q, 2), ValueError, "teacher is on meta"),
    ]


def cost(rows: Tensor, teacher: Tensor, queries: Tensor, patch: int) -> Cost:
    moved = rows.numel() * rows.element_size() + teacher.numel() * teacher.element_size()
    return Cost(flops=20.0 * rows.numel(), bytes=float(moved))


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
        Backend("cpp", native.entry("recovered_loss"), "cpu", LOW, native.missing_cpu),
        Backend("triton", triton.launcher("recovered_loss"), "cuda", LOW, triton.missing),
    ],
)
