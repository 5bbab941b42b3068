"""Runs a program as several processes of one group, as torchrun would."""

from __future__ import annotations

from pathlib import Path

import fresh

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
    script = folder / "worker.py"
    script.write_text(START + program + END)
    for rank, done in enumerate(fresh.run_ranks(script, folder=folder, count=count)):
        assert f"rank {rank} done" in done.stdout, done.stdout + done.stderr
