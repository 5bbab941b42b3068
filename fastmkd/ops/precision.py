"""How a GPU computes products of float32 matrices: in full, or as TF32, whose factors have 10 bits after the point.

The switch is PyTorch's own (``torch.set_float32_matmul_precision``, ``torch.backends.cuda.matmul.fp32_precision``). It
changes what the reference computes and which kernel a launcher takes, so each setting has its own choices and verdicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["dtype_name", "products", "tf32_is_on"]


def tf32_is_on() -> bool:
    """True when the user asked for TF32 in products of float32 matrices on a GPU.

    Example:
        >>> tf32_is_on()
        False
    """
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


@contextlib.contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Inside the ``with`` block, products of float32 matrices on a GPU are TF32 or full float32.

    Args:
        tf32: which of them.

    Example:
        >>> with products(tf32=True):
        ...     tf32_is_on()
        True
    """
    if tf32 == tf32_is_on():
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def dtype_name(dtype: torch.dtype, tf32: bool = False) -> str:
    """Name of a dtype in tables and records: ``"bfloat16"``; ``"tf32"`` for float32 whose products are TF32.

    Args:
        dtype: the dtype.
        tf32: whether products of float32 matrices are TF32.

    Example:
        >>> dtype_name(torch.bfloat16, tf32=True), dtype_name(torch.float32), dtype_name(torch.float32, tf32=True)
        ('bfloat16', 'float32', 'tf32')
    """
    return "tf32" if tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")
