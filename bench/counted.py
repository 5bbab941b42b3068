"""Counts the floating-point operations that a call really runs, those of fastmkd's ops included.

Instruction counters are missing on most virtual machines that run tests; operations are counted anywhere, and the
count is the same on a loaded machine as on a quiet one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmkd.ops import OPS

__all__ = ["operations"]


def operations(run: Callable[[], Any]) -> int:
    """Returns the floating-point operations of one call: matrix products, convolutions, attention, fastmkd's ops.

    Gradients are on while it runs, so that no fused path hides its products from the counter.

    Args:
        run: what to count.

    Example:
        >>> x = torch.ones(2, 3)
        >>> operations(lambda: x @ x.T)  # 2 x 2 sums of 3 products
        24
    """
    formulas = {op.entry.overloadpacket: _formula(op) for op in OPS.values()}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.enable_grad(), counter:
        run()
    return int(counter.get_total_flops())


def _formula(op: Any) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **rest: Any) -> int:
        return int(op.cost(*args).flops)

    count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes: the cost of a mask is in its data
    return count
