"""What a case gives back, and a training step that many processes and one take alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmkd.nn import masks

__all__ = ["Found", "global_draws", "own", "step"]


@dataclass
class Found:
    """What a case found on one process.

    Attributes:
        mean: tensors whose mean over ranks is that of one process with the global batch, such as losses.
        same: tensors that are on every rank what they are on one process, such as gradients after DDP.
    """

    mean: dict[str, Tensor]
    same: dict[str, Tensor]


def own(x: Any, rank: int, world: int) -> Any:
    """The part of a global batch that a rank gets."""
    count = len(x) // world
    return x[rank * count : (rank + 1) * count]


@contextmanager
def global_draws(rank: int, world: int) -> Iterator[None]:
    """Masks are drawn for the images of all ranks, of which each rank takes its own."""
    calls = 0

    def uniform(shape: tuple[int, ...], device: Any, generator: Any) -> Tensor:
        nonlocal calls
        calls += 1
        every = torch.rand((world * shape[0], *shape[1:]), generator=torch.Generator().manual_seed(calls))
        return own(every, rank, world)

    with mock.patch.object(masks, "_uniform", uniform):
        yield


def step(make: Callable[[int], Any], call: Callable[[Any], Any], rank: int, world: int, *, ddp: bool = True) -> Found:
    """Two steps of a method under plain DDP, the second of which fails if a parameter of the first was left out.

    Args:
        make: a method from a seed; the ranks have seeds of their own, of which DDP must take rank 0's.
        call: gives this rank's part of the batch to the method.
        rank: of this process.
        world: number of processes; 1 runs without DDP.
        ddp: False averages gradients by hand, for layers that DDP takes on a GPU only (SyncBatchNorm).
    """
    ddp = ddp and world > 1
    method = make(rank if ddp else 0)
    run = DistributedDataParallel(method) if ddp else method
    with global_draws(rank, world):
        for _ in range(2):
            method.zero_grad()
            out = call(run)
            out.loss.backward()
    same = {name: _gradient(p) for name, p in method.named_parameters() if p.requires_grad}
    if world > 1 and not ddp:
        for gradient in same.values():
            dist.all_reduce(gradient)
            gradient /= world
    same |= {name: value.clone() for name, value in method.named_buffers()}
    return Found({"loss": out.loss.detach(), **out.terms}, same)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
