r"""Stitching: each token from the student or the teacher, with its position added (DPK, Section 2.2 and Fig. 2).

.. math:: h_{bn} = p_n + \begin{cases} t_{bn} & \text{if } m_{bn} \\ s_{bn} & \text{else} \end{cases}

``student`` s and ``teacher`` t are ``(B, N, d)``, ``from_teacher`` m is ``(B, N)`` bool, ``position`` p is ``(N, d)``,
the result is ``(B, N, d)``. Only the chosen one of two tokens is read, and only the mask is kept for the gradient. That
goes to the network that a token came from and, summed over images, to the token's position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native, triton
from .registry import Backend, BadInput, Cost, Sample, declare

__all__ = ["stitch_tokens"]

SCHEMA = "stitch_tokens(Tensor student, Tensor teacher, Tensor from_teacher, Tensor position) -> Tensor"
LOW = (torch.float32, torch.bfloat16, torch.float16)


def stitch_tokens(student: Tensor, teacher: Tensor, from_teacher: Tensor, position: Tensor | None = None) -> Tensor:
    """Takes each token from the student or the teacher and adds its position. Differentiable.

    Args:
        student: ``(B, N, d)`` floating point.
        teacher: ``(B, N, d)``; cast to the student's dtype.
        from_teacher: ``(B, N)`` bool, True where the token is the teacher's.
        position: ``(N, d)``, cast to the student's dtype; None adds nothing.

    Returns:
        ``(B, N, d)`` in the student's dtype.

    Raises:
        ValueError: shapes that do not fit, or tensors on several devices.
        TypeError: a mask that is not boolean.

    Example:
        >>> student, teacher, mask = torch.ones(1, 2, 1), torch.zeros(1, 2, 1), torch.tensor([[True, False]])
        >>> stitch_tokens(student, teacher, mask, torch.tensor([[0.5], [0.25]])).flatten()
        tensor([0.5000, 1.2500])
    """
    teacher = teacher.to(student.dtype)
    if position is None:
        return torch.where(from_teacher[:, :, None], teacher, student)
    tensors = (student, teacher, from_teacher, position.to(student.dtype))
    return _entry(*(tensor.contiguous() for tensor in tensors))


def reference(student: Tensor, teacher: Tensor, from_teacher: Tensor, position: Tensor) -> Tensor:
    return torch.where(from_teacher[:, :, None], teacher, student) + position


def check(student: Tensor, teacher: Tensor, from_teacher: Tensor, position: Tensor) -> None:
    if student.dim() != 3 or min(student.shape[1:]) < 1:
        raise ValueError(f"student has shape {tuple(student.shape)}; expected (B, N, d), tokens of each image.")
    if not student.is_floating_point():
        raise TypeError(f"student has dtype {student.dtype}; expected a floating-point dtype.")
    if from_teacher.dtype != torch.bool:
        raise TypeError(f"from_teacher has dtype {from_teacher.dtype}; expected bool, True = the teacher's token.")
    shapes = {
        "student": (student, student.shape),
        "teacher": (teacher, student.shape),
        "from_teacher": (from_teacher, student.shape[:2]),
        "position": (position, student.shape[1:]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)} for a student of "
                f"{tuple(student.shape)}."
            )
        if tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device} but student is on {student.device}; move one of them.")
        if tensor.dtype != student.dtype and name != "from_teacher":
            raise TypeError(f"{name} has dtype {tensor.dtype} but student has {student.dtype}; cast one of them.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor, call .contiguous().")


def fake(student: Tensor, teacher: Tensor, from_teacher: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(student)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Each token's gradient goes where the token came from."""
    (mask,) = ctx.saved_tensors
    chosen = mask[:, :, None]
    student, teacher, _, position = ctx.needs_input_grad
    return (
        grad.masked_fill(chosen, 0) if student else None,
        grad.masked_fill(~chosen, 0) if teacher else None,
        None,
        grad.sum(0) if position else None,
    )


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(batch: int, tokens: int, width: int, share: float = 0.5) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(batch * 31 + tokens * 7 + width)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)  # noqa: E731
        mask = (torch.rand(batch, tokens, generator=g) < share).to(device)
        return draw(batch, tokens, width), draw(batch, tokens, width), mask, draw(tokens, width)

    def huge() -> tuple[Any, ...]:
        student = torch.randn(1 << 13, 512, 520, device=device, dtype=dtype)  # 2.2e9 elements: offsets need 64 bits
        mask = torch.rand(student.shape[:2], device=device) < 0.5
        return student, -student, mask, torch.randn(512, 520, device=device, dtype=dtype)

    all_grads = (0, 1, 3)
    return [
        Sample("small", lambda: make(3, 5, 8), grad=all_grads),
        Sample("odd_width", lambda: make(2, 4, 7), grad=all_grads),
        Sample("one_of_everything", lambda: make(1, 1, 1), grad=all_grads),
        Sample("all_of_the_student", lambda: make(2, 9, 33, share=0.0), grad=all_grads),
        Sample("all_of_the_teacher", lambda: make(2, 9, 33, share=1.0), grad=all_grads),
        Sample("last_stage", lambda: make(32, 49, 512, share=0.3)),
        Sample("many_tokens", lambda: make(4, 256, 100)),
        Sample("huge", huge, huge=True),
    ]


def bad_inputs() -> list[BadInput]:
    s, m, p = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, 4)
    return [
        BadInput("two_dims", (s[0], s[0], m, p), ValueError, "student has shape"),
        BadInput("no_width", (s[:, :, :0], s[:, :, :0], m, p[:, :0]), ValueError, "student has shape"),
        BadInput("integers", (s.long(), s.long(), m, p.long()), TypeError, "student has dtype"),
        BadInput("teacher_shape", (s, s[:1], m, p), ValueError, "teacher has shape"),
        BadInput("teacher_dtype", (s, s.half(), m, p), TypeError, "teacher has dtype"),
        BadInput("byte_mask", (s, s, m.byte(), p), TypeError, "from_teacher has dtype"),
        BadInput("mask_shape", (s, s, m[:, :2], p), ValueError, "from_teacher has shape"),
        BadInput("position_shape", (s, s, m, p[:2]), ValueError, "position has shape"),
        BadInput("position_dtype", (s, s, m, p.double()), TypeError, "position has dtype"),
        BadInput("strided", (s, torch.zeros(2, 4, 3).mT, m, p), ValueError, "teacher has strides"),
        BadInput("meta_device", (s, s.to("meta"), m, p), ValueError, "teacher is on meta"),
    ]


def cost(student: Tensor, teacher: Tensor, from_teacher: Tensor, position: Tensor) -> Cost:
    moved = (2 * student.numel() + position.numel()) * student.element_size() + from_teacher.numel()
    return Cost(flops=float(student.numel()), bytes=float(moved))


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
        Backend("cpp", native.entry("stitch_tokens"), "cpu", LOW, native.missing_cpu),
        Backend("triton", triton.launcher("stitch_tokens"), "cuda", LOW, triton.missing),
    ],
)
