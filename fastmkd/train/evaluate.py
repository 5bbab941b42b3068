"""What a classifier or a pre-training is judged by, on any number of processes, and how all scores are put in words."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loading import Loader, eval_plan
from .seeds import seed_all
from .tasks.base import Finish

__all__ = ["count_hits", "evaluate", "evaluate_loss", "summary", "worded"]

# Scores in percent, those a run is summed up by first.
PERCENT = {
    "top1": "top-1",
    "top5": "top-5",
    "map": "mAP",
    "map50": "mAP at IoU 0.50",
    "map75": "mAP at IoU 0.75",
    "map_small": "mAP of small boxes",
    "map_medium": "mAP of medium boxes",
    "map_large": "mAP of large boxes",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
}


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
    model: nn.Module, loader: Loader, finish: Finish, num_pictures: int, batch_size: int, accelerator: Any
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


@torch.no_grad()
def evaluate_loss(
    method: nn.Module,
    loader: Loader,
    finish: Finish,
    num_pictures: int,
    batch_size: int,
    accelerator: Any,
    seed: int,
) -> dict[str, float]:
    """Tests a method that pre-trains by its own loss; what it draws at random is the same each time.

    Args:
        method: a `fastmkd.methods.DistillMethod`, or what Accelerate made of one; its mode is restored.
        loader: of the test pictures.
        finish: normalises.
        num_pictures: size of the test set.
        batch_size: of one process.
        accelerator: of Hugging Face Accelerate; gives autocast and sums over processes.
        seed: of the run.

    Returns:
        ``loss`` and the terms of the method, means over pictures, and ``images``, how many could be read.
    """
    was_training, rank, world = method.training, accelerator.process_index, accelerator.num_processes
    method.eval()
    plan = eval_plan(num_pictures, batch_size, rank, world)
    # A method whose weights are split needs all processes in each of its forward passes: one that has no picture for a
    # pass, or cannot read any, runs a blank one, which does not count.
    passes = math.ceil(math.ceil(num_pictures / world) / batch_size)
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for number, batch in enumerate(itertools.chain(loader.planned(plan), [None] * (passes - len(plan)))):
        seed_all(seed, "test", number, rank)
        shown = loader.blank() if batch is None else batch
        images, targets = finish(shown.images, shown.targets)
        with accelerator.autocast():
            out = method(images, targets)
        for name, value in {"loss": out.loss, **out.terms}.items():
            total = sums.setdefault(name, torch.zeros_like(count))
            if batch is not None:
                total += value.double() * len(images)
        if batch is not None:
            count += len(images)
    method.train(was_training)
    totals = accelerator.reduce(torch.stack([*sums.values(), count]), reduction="sum").tolist()
    images = totals.pop()
    return {**{name: total / max(images, 1) for name, total in zip(sums, totals, strict=True)}, "images": images}


def worded(scores: dict[str, Any]) -> dict[str, str]:
    """Puts scores in words, the one that sums a run up first; other things are left out.

    Args:
        scores: from `fastmkd.train.tasks.Task.evaluate` or `evaluate_loss`, perhaps among other things.

    Example:
        >>> worded({"loss": 1.0, "top1": 71.5, "images": 10.0})
        {'top-1': '71.50 %', 'loss': '1.0000'}
    """
    said = {title: f"{scores[name]:.2f} %" for name, title in PERCENT.items() if name in scores}
    return {**said, "loss": f"{scores['loss']:.4f}"} if "loss" in scores else said


def summary(scores: dict[str, Any]) -> str:
    """Says in a few words what a run came to.

    Args:
        scores: as for `worded`.

    Example:
        >>> summary({"top1": 71.5, "loss": 1.0}), summary({"map": 38.2}), summary({"loss": 0.25})
        ('top-1 71.50 %', 'mAP 38.20 %', 'loss 0.2500')
    """
    return " ".join(next(iter(worded(scores).items())))
