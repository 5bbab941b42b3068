"""Two ranks with a part of the minibatches each get what one process gets from all of them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastmkd


def minibatches() -> list[tuple[list[Tensor], list[Tensor]]]:
    g = torch.Generator().manual_seed(0)
    found = []
    for n in (8, 8, 5):
        x = torch.randn(n, 6, generator=g)
        found.append(([x, x.square()], [x @ torch.randn(6, 4, generator=g)]))
    return found


def worker(rank: int, folder: str, first_rank_has: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = minibatches()
    own = data[:first_rank_has] if rank == 0 else data[first_rank_has:]
    acc = fastmkd.MinibatchCKA()
    for xs, ys in own:
        acc.update(xs, ys)
    torch.save((acc.compute(), acc.compute()), f"{folder}/{rank}.pt")  # computing changes nothing
    alone = fastmkd.MinibatchCKA(across_ranks=False)
    if rank == 0:  # no other rank takes part, so this must not wait for one
        alone.update(*data[0])
        alone.compute()
    dist.destroy_process_group()


def check(folder: Path, first_rank_has: int) -> None:
    mp.start_processes(worker, args=(str(folder), first_rank_has), nprocs=2, start_method="forkserver")
    acc = fastmkd.MinibatchCKA()
    for xs, ys in minibatches():
        acc.update(xs, ys)
    for rank in (0, 1):
        for found in torch.load(folder / f"{rank}.pt"):
            torch.testing.assert_close(found, acc.compute(), rtol=1e-12, atol=1e-12)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    check(tmp_path, first_rank_has=2)


def test_a_rank_without_a_minibatch_adds_nothing(tmp_path: Path) -> None:
    check(tmp_path, first_rank_has=3)
