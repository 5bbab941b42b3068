"""What the processes of a distributed run tell each other within a step."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["average", "gather"]


def gather(x: Tensor) -> Tensor:
    """Returns the rows of all ranks, in the order of the ranks; `x` itself in a run of one process. No gradient flows.

    Args:
        x: ``(n, ...)``, of the same shape on every rank.

    Returns:
        ``(ranks * n, ...)``, the same on every rank.

    Example:
        >>> import torch
        >>> gather(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if not _several():
        return x
    whole = x.new_empty((dist.get_world_size() * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole


def average(x: Tensor) -> Tensor:
    """Returns the mean over ranks; `x` itself in a run of one process. No gradient flows.

    Args:
        x: of the same shape on every rank.

    Example:
        >>> import torch
        >>> average(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    if not _several():
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
