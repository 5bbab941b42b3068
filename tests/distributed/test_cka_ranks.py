"""Ranks that were given different layers: CKA over ranks is refused on each of them, and none waits for another."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import fresh
import pytest

PATIENCE = timedelta(seconds=30)  # of a rank for the others; a test that hangs ends here

# Rank 0 has `LAYERS[0]` xs and ys, rank 1 `LAYERS[1]`; a third has no minibatch.
WORKER = f"""
import json, os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
import fastmkd

rank, layers = int(os.environ["RANK"]), json.loads(sys.argv[1])
dist.init_process_group("gloo", timeout=timedelta(seconds={PATIENCE.total_seconds()}))
x = torch.randn(8, 5, generator=torch.Generator().manual_seed(rank))
cka = fastmkd.MinibatchCKA()
if rank < 2:
    m, n = layers[rank]
    cka.update([x] * m, [x] * n)
net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
names = [[str(i) for i in range(count)] for count in (layers[rank] if rank < 2 else (1, 1))]
for call in (cka.compute, lambda: fastmkd.compare(net, net, [x] * (rank < 2), tuple(names))):
    try:
        call()
    except ValueError as error:
        print(error)
cka.reset()  # the ranks are still in step
cka.update([x], [x])
print(cka.compute().round(decimals=6).item())
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("layers", "over"),
    [
        ([[2, 1], [1, 1]], "from 1 to 2 layers in xs and from 1 to 1 in ys"),
        ([[1, 2], [1, 3]], "from 1 to 1 layers in xs and from 2 to 3 in ys"),
        ([[1, 3], [2, 1]], "from 1 to 2 layers in xs and from 1 to 3 in ys"),
    ],
)
def test_different_layers_are_refused_on_every_rank(tmp_path: Path, layers: list[list[int]], over: str) -> None:
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    done = fresh.run_ranks(program, str(layers), folder=tmp_path, count=3, timeout=4 * PATIENCE.total_seconds())
    assert [one.returncode for one in done] == [0, 0, 0], "\n".join(one.stderr[-2000:] for one in done)
    here = [*(f"{m} x {n} layers" for m, n in layers), "no minibatch"]
    for one, own in zip(done, here, strict=True):
        said = f"compute() found {own} on this rank, but over all ranks {over}; give the same layers on every rank."
        assert one.stdout.splitlines() == [said, said, "1.0"]
