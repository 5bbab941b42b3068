"""Runs cases as the ranks of one group, and as one process that belongs to none and has the global batch.

PyTorch takes seconds to import, so one process imports everything and is then forked. Nothing may run a backward pass
before the fork: autograd's threads do not survive it.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import dense_cases
import statistics_cases
import torch
import torch.distributed as dist
import vit_cases
from agreement import Found, split_as

__all__ = ["CASES", "MOVED", "NOT_SPLIT", "QUICK", "SPLIT", "run_cases"]

CASES: dict[str, Callable[[int, int], Found]] = {
    name.removeprefix("case_"): case
    for module in (vit_cases, dense_cases, statistics_cases)
    for name, case in vars(module).items()
    if name.startswith("case_")
}
# FSDP2 has nothing to do with these, which count over ranks and train nothing,
NOT_SPLIT = {"sync_norm_of_visible", "sync_norm_of_all", "minibatch_cka", "cka_gap"}
# and fastmkd refuses these: their teacher is an average of the student that they move by themselves.
MOVED = {"dino", "moco"}
SPLIT = [name for name in CASES if name not in NOT_SPLIT | MOVED]
# One of each method, and what talks between ranks in its forward pass; the long tests take all, in both ways.
QUICK = [
    "supervised", "maskedkd", "dmae_token", "mae", "dpk_cka", "feature_review", "crd", "mkd_retinanet",
    "mkd_segmenter_sync_batch_norm", "dense_fitnet", "packed_network",
]  # fmt: skip
PATIENCE = 900  # seconds, on a machine that others use too


def run_cases(count: int, folder: Path, plan: dict[str, list[str]]) -> list[dict[tuple[str, str], Found]]:
    """What one process alone found, then what each rank found; of a process that failed, what it found before.

    Args:
        count: of ranks.
        folder: for their reports.
        plan: cases by the way in which networks are trained, "ddp" or one of `agreement.FSDP`.
    """
    source = (
        f"import sys; sys.path[:0] = {sys.path!r}; import processes; processes.main({count}, {str(folder)!r}, {plan})"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=2 * PATIENCE)
    (folder / "said.txt").write_text(done.stdout + done.stderr)
    files = [folder / f"{who}.pt" for who in ("alone", *range(count))]
    return [torch.load(file, weights_only=False) if file.exists() else {} for file in files]


def main(count: int, folder: str, plan: dict[str, list[str]]) -> None:
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_work, args=(rank, count, folder, plan)) for rank in (None, *range(count))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        worker.kill()


def _work(rank: int | None, count: int, folder: str, plan: dict[str, list[str]]) -> None:
    torch.set_num_threads(1)
    if rank is not None:
        meet, limit = f"file://{folder}/meet", timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=count, timeout=limit)
    else:
        plan = {"alone": list(dict.fromkeys(name for names in plan.values() for name in names))}
    found: dict[tuple[str, str], Found] = {}
    path = Path(folder) / f"{'alone' if rank is None else rank}.pt"
    try:
        for way, names in plan.items():
            for name in names:
                torch.manual_seed(0)
                with split_as(way):
                    found[way, name] = CASES[name](*((0, 1) if rank is None else (rank, count)))
    finally:
        torch.save(found, path)
    if rank is not None:
        dist.barrier()
        dist.destroy_process_group()
