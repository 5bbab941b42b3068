"""MKD under plain DistributedDataParallel: gradients averaged, every parameter reached, in the last epochs too."""

from __future__ import annotations

from two_processes import run_in_two_processes

WORKER = """
import torch, torch.distributed as dist
from dense_nets import SMALL, batch, detector, teacher_of
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d

import fastmkd

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
images, targets = batch()
images[1] = torch.rand(3, 96, 80, generator=torch.Generator().manual_seed(1))  # of one size: padding is the same
mine = slice(rank, rank + 1)


def make(seed, **options):
    student, teacher = detector(seed=seed, norm=FrozenBatchNorm2d), teacher_of(norm=FrozenBatchNorm2d)
    torch.manual_seed(seed)
    return fastmkd.MKD(student, teacher, **SMALL, **options).train()


# The same gradients as one process with both images, where masks do not differ.
method, whole = make(rank, mask_ratio=0.0), make(0, mask_ratio=0.0)
ddp = DistributedDataParallel(method)
ddp(images[mine], targets[mine]).loss.backward()
whole(images, targets).loss.backward()
for (name, a), b in zip(method.named_parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)

# A second step fails if a parameter of the first was left out; the last epochs have no use for the decoders.
method = make(rank, mask_ratio=0.3, epochs=4, last_mask_ratio=0.4)
ddp = DistributedDataParallel(method)
for epoch in (0, 1, 2, 3):
    ddp.zero_grad()
    method.set_epoch(epoch)
    out = ddp(images[mine], targets[mine])
    assert ("feat" in out.terms) == (epoch < 2)
    out.loss.backward()
    for name, p in method.named_parameters():
        both = [torch.empty_like(p.grad) for _ in range(2)]
        dist.all_gather(both, p.grad)
        assert torch.equal(*both), name
dist.barrier()
dist.destroy_process_group()
print("agreed")
"""


def test_two_processes(tmp_path):
    run_in_two_processes(WORKER, tmp_path)
