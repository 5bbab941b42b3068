"""A converted network under plain DistributedDataParallel: gradients are averaged, packed maps pass through."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

WORKER = """
import copy
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastmkd.nn import cifar, convert_cnn, pack

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
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
dist.destroy_process_group()
print("rank", rank, "done")
"""


def test_gradients_are_averaged_over_ranks(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, worker in enumerate(workers):
        output, _ = worker.communicate(timeout=120)
        assert f"rank {rank} done" in output, output
