"""A converted network under plain DistributedDataParallel: gradients are averaged, packed maps pass through."""

from __future__ import annotations

from ranks import run_ranks

WORKER = """
import copy
from torch.nn.parallel import DistributedDataParallel
from fastmkd.nn import cifar, convert_cnn, pack

torch.manual_seed(0)
cnn = convert_cnn(cifar.ResNet(8, num_classes=5).double()).eval()  # eval: batch statistics differ by rank
alone = copy.deepcopy(cnn)
images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
visible = torch.rand(4, 2, 2) < 0.5
visible[:, 0, 0] = True
ddp = DistributedDataParallel(cnn)
mine = slice(2 * rank, 2 * rank + 2)
ddp(pack(images[mine], visible[mine])).square().mean().backward()
alone(pack(images, visible)).square().mean().backward()
for (name, p), q in zip(cnn.named_parameters(), alone.parameters()):
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda m: name + m)
"""


def test_gradients_are_averaged_over_ranks(tmp_path):
    run_ranks(WORKER, tmp_path)
