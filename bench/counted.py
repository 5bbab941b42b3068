"""Counts floating-point operations by what PyTorch is asked to do: what is called, and on how much.

The count is the same on a loaded machine as on a quiet one. For PyTorch's functions it is what they really do; for an
op of fastmkd it is the op's declared cost, so a kernel that wastes work counts as one that does not. What a kernel
really does, only its instructions (`fastmkd.bench.instructions`) and its time show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastmkd import _native_loader
from fastmkd.ops import OPS

__all__ = ["operations"]


def operations(run: Callable[[], Any]) -> int:
    """Returns the floating-point operations of one call: matrix products, convolutions, attention, fastmkd's ops.

    Args:
        run: what to count.

    Example:
        >>> x = torch.ones(2, 3)
        >>> operations(lambda: x @ x.T)  # 2 x 2 sums of 3 products
        24
    """
    formulas: dict[Any, Callable[..., int]] = {}
    _native_loader.load()  # else its operators have no names yet
    for op in OPS.values():
        formulas[op.entry.overloadpacket] = _formula(op)
        # Without gradients a masked ViT calls the compiled attention itself, without the op around it.
        compiled = getattr(torch.ops.fastmkd_native, op.name, None)
        if compiled is not None:
            formulas[compiled] = _formula(op)
    formulas[torch.ops.aten.addmm_] = _raw(lambda _x, a, b, **_: 2 * a.numel() * b.shape[1])
    fused = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    if fused is not None:
        formulas[fused] = _raw(lambda x, weight, *_, **__: 2 * x.numel() * weight.shape[0])
    # PyTorch 2.11 does not count it; the sizes are (B, H, L, d).
    formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _raw(
        lambda q, k, v, *_, **__: 2 * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3])
    )
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter:
        run()
    return int(counter.get_total_flops())


def _formula(op: Any) -> Callable[..., int]:
    return _raw(lambda *args, **_: op.cost(*args).flops)


def _raw(flops: Callable[..., float]) -> Callable[..., int]:
    def count(*args: Any, out_val: Tensor | None = None, **rest: Any) -> int:
        return int(flops(*args, **rest))

    count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes: the cost of a mask is in its data
    return count
