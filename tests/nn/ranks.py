"""Runs a program as several processes of one group, as torchrun would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

START = """
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
"""
END = """
dist.destroy_process_group()
print("rank", rank, "done")
"""


def run_ranks(program: str, folder: Path, count: int = 2) -> None:
    """Every rank runs `program`, which finds torch, dist and its rank, to the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = folder / "worker.py"
    script.write_text(START + program + END)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    for rank, worker in enumerate(workers):
        output, _ = worker.communicate(timeout=120)
        assert f"rank {rank} done" in output, output
