"""Methods under plain DistributedDataParallel: no find_unused_parameters, gradients averaged, teacher left alone."""

from __future__ import annotations

from two_processes import run_in_two_processes

WORKER = """
import torch, torch.distributed as dist
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch.nn.parallel import DistributedDataParallel

from fastmkd.methods import DMAE, DPK, FeatureKD, MaskedDINO, MaskedKD
from fastmkd.methods.crd import CRD, Memory
from fastmkd.methods.moco import contrastive_loss
from fastmkd.methods.dpk_ratio import CkaGap

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()


def make(seed, kind):
    torch.manual_seed(seed)
    return kind(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)


torch.manual_seed(0)
images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
cases = (
    (VisionTransformer, {}),
    (VisionTransformer, {"base": "attention", "strategy": "middle"}),
    (VisionTransformer, {"linear_probe": True}),
    (VisionTransformerDistilled, {"base": "g2sd"}),
)
for kind, options in cases:
    student = make(rank, kind)  # DDP must take rank 0's weights
    method = MaskedKD(student, make(7, VisionTransformer), **options).train()
    ddp = DistributedDataParallel(method)
    mine = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):  # a second step fails if a parameter of the first was left out
        ddp.zero_grad()
        ddp(images[mine], targets[mine]).loss.backward()

    alone = make(0, kind)
    whole = MaskedKD(alone, make(7, VisionTransformer), **options).train()
    whole(images, targets).loss.backward()
    for (name, a), b in zip(student.named_parameters(), alone.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None and options == {"linear_probe": True}, name
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)

# DPK: heads and student get the gradients of the whole batch, and all ranks find one ratio.
def dpk(seed, ratio):
    student, teacher = make(seed, VisionTransformer), make(7, VisionTransformer)
    torch.manual_seed(seed)
    options = {"ratio": ratio, "encoder_depth": 1, "decoder_depth": 1, "width": 8}
    return DPK(student, teacher, {"blocks.1": "blocks.1"}, **options).train()


method, whole = dpk(rank, 0.0), dpk(0, 0.0)
ddp = DistributedDataParallel(method)
for _ in range(2):
    ddp.zero_grad()
    ddp(images[mine], targets[mine]).loss.backward()
whole(images, targets).loss.backward()
for (name, a), b in zip(method.named_parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
method, whole = dpk(rank, "cka"), dpk(0, CkaGap(across_ranks=False))
images, targets = torch.randn(32, 3, 16, 16), torch.arange(32) % 3
mine = slice(16 * rank, 16 * rank + 16)
found = DistributedDataParallel(method)(images[mine], targets[mine]).terms["ratio"]
torch.testing.assert_close(found, whole(images, targets).terms["ratio"])
assert 0 < found < 1

images, targets, mine = images[:4], targets[:4], slice(2 * rank, 2 * rank + 2)

# DMAE: classifier and pool are frozen, everything else gets the gradient of the whole batch.
def dmae(seed, pool, rows):
    torch.manual_seed(seed)
    student = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, global_pool=pool
    )
    method = DMAE(student, make(7, VisionTransformer), decoder_depth=1, decoder_width=8, decoder_heads=2).train()
    every = torch.rand(4, 16, generator=torch.Generator().manual_seed(3)).argsort(1)
    method.draw = lambda _: (every[rows, :4].contiguous(), every[rows, 4:].contiguous(), (4, 4))
    return method


for pool in ("token", "avg", "map"):
    method, whole = dmae(rank, pool, mine), dmae(0, pool, slice(0, 4))
    ddp = DistributedDataParallel(method)
    for _ in range(2):
        ddp.zero_grad()
        ddp(images[mine]).loss.backward()
    whole(images).loss.backward()
    for (name, a), b in zip(method.named_parameters(), whole.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None and not b.requires_grad, name
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)

# CRD: every rank's bank takes in the images of all, and the gradient is that of the whole batch.
Memory.draw = lambda self, numbers: (numbers[:, None] + 1 + torch.arange(3)) % 5


def crd(seed):
    torch.manual_seed(seed)
    base, layers = CRD(negatives=3, width=4), {"blocks.1": "blocks.1"}
    student, teacher = make(seed, VisionTransformer), make(7, VisionTransformer)
    return FeatureKD(student, teacher, base, layers, train_labels=torch.arange(5)).train()


method, whole, numbers = crd(rank), crd(0), torch.tensor([4, 0, 3, 2])
ddp = DistributedDataParallel(method)
for _ in range(2):
    ddp.zero_grad()
    whole.zero_grad()
    ddp(images[mine], targets[mine], numbers=numbers[mine]).loss.backward()
    whole(images, targets, numbers=numbers).loss.backward()  # both ranks give it the same images
    for (name, a), b in zip(method.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
for name in ("rows", "log_z"):
    own, expected = (getattr(m.heads["memory0"], name) for m in (method, whole))
    torch.testing.assert_close(own, expected)
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    assert torch.equal(*both), name
assert not ddp.modules_buffers  # banks are not sent around

# DINO: the centre is that of all ranks, and the teachers stay the same.
method = MaskedDINO(make(rank, VisionTransformer), out_features=6, hidden=8, bottleneck=4, local_crops=0).train()
ddp = DistributedDataParallel(method)
optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
for step in range(2):
    crops = [images[mine] * (step + 1), images[mine].flip(3)]
    optimizer.zero_grad()
    ddp(crops).loss.backward()
    optimizer.step()
assert method.center.abs().max() > 0
for name, value in method.state_dict().items():
    both = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(both, value)
    torch.testing.assert_close(both[0], both[1], msg=name)

# MoCo v3: the views of all ranks' images are the candidates.
queries, keys = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
part = contrastive_loss(queries[mine], keys[mine], 0.2)
dist.all_reduce(part)
logits = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(keys, dim=1).T / 0.2
torch.testing.assert_close(part / 2, 0.4 * torch.nn.functional.cross_entropy(logits, torch.arange(4)))
dist.barrier()
dist.destroy_process_group()
print("agreed")
"""


def test_two_processes(tmp_path):
    run_in_two_processes(WORKER, tmp_path)
