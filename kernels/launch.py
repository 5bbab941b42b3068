"""What every launcher and every kernel file shares: device guard, precision switch, description of a compile check."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["AotCase", "on_device", "product_kind"]


@dataclass(frozen=True)
class AotCase:
    """One compilation of a kernel that must succeed, without a GPU, for every supported architecture.

    The compile test reads these from the list ``AOT_CASES`` of each kernel file. Whatever the case says, the compiled
    kernel may use neither a stack frame nor local memory, nor more shared memory than the architecture has.

    Args:
        name: label that appears in test names.
        kernel: the ``@triton.jit`` function.
        signature: Triton type of each run-time argument, such as ``"*bf16"``, ``"i32"`` or ``"fp32"``.
        constexprs: compile-time arguments, and None for pointers that are absent.
        aligned: integer arguments that are multiples of 16 in the launch meant; pointers always are.
        options: launch options (``num_warps``, ``num_stages``, ``enable_fp_fusion``).
        mma: True when the machine code must contain the architecture's tensor-core instruction.
        requires: regular expressions that the machine code must match.
        forbids: regular expressions that it must not match.

    Example:
        >>> AotCase("copy", kernel=None, signature={"x_ptr": "*fp32"}).mma
        False
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    mma: bool = False
    requires: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU current, since Triton launches on the current one; does nothing for a CPU tensor.

    CPU tensors come with ``TRITON_INTERPRET=1``, where a kernel runs as NumPy.

    Example:
        >>> with on_device(torch.zeros(1)):
        ...     pass
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def product_kind(dtype: torch.dtype) -> str:
    """How matrix products of a dtype are computed: the key of a kernel's table of tiles.

    Args:
        dtype: float32, bfloat16 or float16.

    Returns:
        "half" for bf16 and fp16; "tf32" or "ieee" for fp32, after PyTorch's own switch for matrix products
        (``torch.backends.cuda.matmul.fp32_precision``): full fp32 unless the user asked for TF32. Of a TF32 factor the
        tensor core reads ten bits after the point and cuts off the others, where PyTorch's own products round to them.

    Example:
        >>> product_kind(torch.bfloat16)
        'half'
    """
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
