"""What is counted over ranks: batch norm by visible positions, CKA, the share that DPK measures."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from agreement import Found, own, step
from torch import Tensor, nn

import fastmkd
from fastmkd.methods import DistillOutput
from fastmkd.methods.dpk_ratio import CkaGap, CosineGap
from fastmkd.methods.ranks import gather
from fastmkd.nn import cifar, convert_cnn, pack
from fastmkd.nn.masked_norm import MaskedSyncBatchNorm


def uneven(count: int, seed: int = 0) -> Tensor:
    """``(count, 2, 2)`` masks of which the later images see more than the first, so that ranks differ."""
    visible = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) < 0.5
    visible[:, 0, 0] = True
    visible[count // 2 :] = True
    return visible


def pictures(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class PackedSquare(nn.Module):
    """A converted network whose loss is the mean square of what it says."""

    def __init__(self, seed: int, sync: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        network: Any = cifar.ResNet(8, num_classes=5)
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network) if sync else network
        self.student = convert_cnn(network.double())  # a name that FSDP2 splits

    def forward(self, images: Tensor, visible: Tensor) -> DistillOutput:
        said = self.student(pack(images, visible))
        return DistillOutput(said.square().mean(), {}, said)


def packed(rank: int, world: int, sync: bool) -> Found:
    images, visible = own(pictures(4, 3, 16, 16), rank, world), own(uneven(4), rank, world)
    make = lambda seed: PackedSquare(seed, sync).train(sync)  # noqa: E731  # else batch statistics differ by rank
    return step(make, lambda run: run(images, visible), rank, world, ddp=not sync)


def case_packed_network(rank: int, world: int) -> Found:
    return packed(rank, world, sync=False)


def case_packed_network_sync_batch_norm(rank: int, world: int) -> Found:
    return packed(rank, world, sync=True)


def sync_norm(rank: int, world: int, stats: str) -> Found:
    """Ranks weigh by how many positions they see: outputs, gradients, running statistics, in eval mode too."""
    images, visible, weight = pictures(4, 3, 4, 4) + 1, uneven(4), pictures(4, 3, 4, 4)
    norm = MaskedSyncBatchNorm(3).double()
    norm.stats = stats
    for _ in range(2):
        x = own(images, rank, world).clone().requires_grad_()
        seen = pack(x, own(visible, rank, world))
        out = norm(seen).to_dense()
        (out * own(weight, rank, world)).sum().backward()
    found = {"out": gather(out.detach()), "images": gather(x.grad), "running mean": norm.running_mean}
    found |= {"running var": norm.running_var}
    for name, p in norm.named_parameters():
        if world > 1:
            dist.all_reduce(p.grad)
        found[name] = p.grad
    found["eval"] = gather(norm.eval()(seen).to_dense().detach())
    return Found({}, found)


def case_sync_norm_of_visible(rank: int, world: int) -> Found:
    return sync_norm(rank, world, "visible")


def case_sync_norm_of_all(rank: int, world: int) -> Found:
    return sync_norm(rank, world, "all")


def case_minibatch_cka(rank: int, world: int) -> Found:
    """Ranks have different numbers of minibatches, the last one none (Eq. 7 over ranks)."""
    g = torch.Generator().manual_seed(0)
    data = []
    for n in (8, 8, 5):
        x = torch.randn(n, 6, generator=g)
        data.append(([x, x.square()], [x @ torch.randn(6, 4, generator=g)]))
    share = [data, [], [], []] if world == 1 else [data[:2], data[2:], [], []] if world == 2 else [*zip(data), []]
    many, none_on_last = fastmkd.MinibatchCKA(), fastmkd.MinibatchCKA()
    for xs, ys in share[rank]:
        many.update(xs, ys)
    for xs, ys in data if rank == 0 else []:
        none_on_last.update(xs, ys)
    first = many.compute()
    found = {"first": first, "again": many.compute(), "one rank": none_on_last.compute()}  # computing changes nothing
    if rank == 0:  # no other rank takes part, so this must not wait for one
        alone = fastmkd.MinibatchCKA(across_ranks=False)
        alone.update(*data[0])
        alone.compute()
    return Found({}, found)


def case_cka_gap(rank: int, world: int) -> Found:
    """The share of the global batch; a ragged one keeps it; ranks too small alone are enough together."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 4, 4, generator=g, dtype=torch.float64)
    y = x[:, :2] + torch.randn(16, 2, 4, 4, generator=g, dtype=torch.float64)
    mine, other = own(x, rank, world), own(y, rank, world)
    whole, small = CkaGap().train(), CkaGap().train()
    found = {"whole": whole(mine, other, 0), "ragged": whole(mine[:2], other[:2], 0)}
    few = own(x[:4], rank, world), own(y[:4], rank, world)
    found["small"] = small(*few, 0)
    own_share = CkaGap(across_ranks=False).train()(mine, other, 0)
    expected = (1 - fastmkd.cka_matrix([mine], [other])[0, 0]).clamp(0, 1).float()
    torch.testing.assert_close(own_share, expected)
    sums = fastmkd.MinibatchCKA(across_ranks=False)  # Eq. 7 with a minibatch a rank
    for r in range(world):
        sums.update([own(x, r, world)], [own(y, r, world)])
    summed = CkaGap(across_ranks="sums").train()(mine, other, 0)
    torch.testing.assert_close(summed, (1 - sums.compute()[0, 0]).clamp(0, 1).float())
    cosine = CosineGap(across_ranks="sums").train()(mine[:, :2], other, 0)
    return Found({}, {**found, "cosine": cosine})
