"""Top-1 and top-5 accuracy over a test set, on any number of processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import Finisher
from .loading import Loader, eval_plan

__all__ = ["count_hits", "evaluate"]


def count_hits(logits: Tensor, targets: Tensor, top: tuple[int, ...] = (1, 5)) -> Tensor:
    """Counts the images whose class is among the largest logits.

    Args:
        logits: ``(B, K)``.
        targets: ``(B,)`` int64.
        top: how many of the largest count; more than K means all.

    Returns:
        ``(len(top),)`` int64.

    Example:
        >>> count_hits(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]), top=(1, 2))
        tensor([0, 1])
    """
    best = logits.topk(min(max(top), logits.shape[1]), dim=1).indices  # (B, max(top))
    hits = best == targets[:, None]
    return torch.stack([hits[:, :k].any(1).sum() for k in top])


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, finish: Finisher, num_pictures: int, batch_size: int, accelerator: Any
) -> dict[str, float]:
    """Tests a classifier; its mode is restored.

    Args:
        model: images to logits.
        loader: of the test pictures.
        finish: normalises.
        num_pictures: size of the test set.
        batch_size: of one process.
        accelerator: of Hugging Face Accelerate; gives autocast and sums over processes.

    Returns:
        ``top1`` and ``top5`` in percent, ``loss`` (mean cross-entropy) and ``images``, how many could be read.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # top-1 hits, top-5 hits, loss, images
    plan = eval_plan(num_pictures, batch_size, accelerator.process_index, accelerator.num_processes)
    for batch in loader.batches(plan):
        images, targets = finish(batch.images, batch.targets)
        with accelerator.autocast():
            logits = model(images)
        logits = logits.float()
        sums[:2] += count_hits(logits, targets)
        sums[2] += F.cross_entropy(logits, targets, reduction="sum")
        sums[3] += len(targets)
    model.train(was_training)
    sums = accelerator.reduce(sums, reduction="sum")
    top1, top5, loss, images = sums.tolist()
    count = max(images, 1.0)
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "images": images}
