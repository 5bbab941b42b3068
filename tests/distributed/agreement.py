"""What a case gives back, and a training step that many processes and one take alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastmkd.nn import masks
from fastmkd.train.accelerator import make_accelerator
from fastmkd.train.sharding import name_units

__all__ = ["FSDP", "Found", "global_draws", "own", "shard", "split_as", "step"]

# How networks are split, and what Accelerate calls it: all weights gathered at once, or a ViT's a block at a time.
FSDP = {"whole": "NO_WRAP", "blocks": "TRANSFORMER_BASED_WRAP"}
_way = "ddp"


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


@contextmanager
def split_as(way: str) -> Iterator[None]:
    """Each `step` of many processes in it runs under DDP ("ddp") or FSDP2 (one of `FSDP`)."""
    global _way
    _way = way
    yield
    _way = "ddp"


def shard(method: nn.Module) -> nn.Module:
    """Splits a method as ``fastmkd.train`` does when it is launched with FSDP2."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": FSDP[_way]}
    settings |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    settings["MASTER_ADDR"] = "127.0.0.1"  # asked for and not used: the group is there
    with mock.patch.dict(os.environ, settings):
        accelerator = make_accelerator(SimpleNamespace(run=SimpleNamespace(precision="no", device="cpu")))
        name_units(method)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad])
        method, _ = accelerator.prepare(method, optimizer)
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in trained)
    mine = sum(p.to_local().numel() for p in trained)
    assert mine < 0.8 * sum(p.numel() for p in trained), "nothing was split"
    return method


def step(make: Callable[[int], Any], call: Callable[[Any], Any], rank: int, world: int, *, ddp: bool = True) -> Found:
    """Two steps of a method under plain DDP or FSDP2; of the first kind the second fails if a parameter was left out.

    Args:
        make: a method from a seed; the ranks have seeds of their own, of which DDP must take rank 0's. FSDP2 splits
            what every rank has, and so they have the same.
        call: gives this rank's part of the batch to the method.
        rank: of this process.
        world: number of processes; 1 runs by itself.
        ddp: False averages gradients by hand, for layers that DDP takes on a GPU only (SyncBatchNorm).
    """
    fsdp = world > 1 and _way in FSDP
    ddp = ddp and world > 1 and not fsdp
    method = make(rank if ddp else 0)
    run = DistributedDataParallel(method) if ddp else shard(method) if fsdp else method
    with global_draws(rank, world):
        for _ in range(2):
            method.zero_grad()
            out = call(run)
            out.loss.backward()
    same = {name: _gradient(p) for name, p in method.named_parameters() if p.requires_grad}
    if world > 1 and not ddp and not fsdp:
        for gradient in same.values():
            dist.all_reduce(gradient)
            gradient /= world
    same |= {name: value.clone() for name, value in method.named_buffers()}
    return Found({"loss": out.loss.detach(), **out.terms}, same)


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
