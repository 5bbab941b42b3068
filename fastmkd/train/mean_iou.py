"""How well a network tells the class of each pixel: mean intersection over union, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .loading import Loader, eval_plan
from .mask_pictures import IGNORE
from .tasks.base import Finish

__all__ = ["confusion_matrix", "evaluate_masks", "mask_scores", "predicted"]


def predicted(logits: Tensor) -> Tensor:
    """The class that each pixel is said to be of; 255 where no class is, as the largest logit is NaN or infinite.

    Args:
        logits: ``(..., K, H, W)``.

    Returns:
        ``(..., H, W)`` int64.

    Example:
        >>> predicted(torch.tensor([[[2.0, float("nan")]], [[1.0, 1.0]]]))
        tensor([[  0, 255]])
    """
    best = logits.max(-3)
    return best.indices.masked_fill(~best.values.isfinite(), IGNORE)


def confusion_matrix(logits: Tensor, targets: Tensor) -> Tensor:
    """Counts pixels by true and predicted class; those whose true class is 255 are left out.

    Args:
        logits: ``(B, K, H, W)``.
        targets: ``(B, H, W)`` int64.

    Returns:
        ``(K, K + 1)`` int64, true classes down and predicted ones across; last those of which no class is predicted.

    Example:
        >>> logits = torch.tensor([[[[2.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]]])
        >>> confusion_matrix(logits, torch.tensor([[[0, 0, 255]]]))
        tensor([[1, 1, 0],
                [0, 0, 0]])
    """
    K = logits.shape[1]
    counted = targets != IGNORE
    pairs = targets[counted] * (K + 1) + predicted(logits)[counted].clamp(max=K)
    return torch.bincount(pairs, minlength=K * (K + 1)).view(K, K + 1)


def mask_scores(confusion: Tensor) -> dict[str, float]:
    """Returns mean IoU and pixel accuracy in percent.

    The mean is over the classes that occur, as truth or as a prediction; without any pixel both scores are NaN.

    Args:
        confusion: ``(K, K + 1)``, see `confusion_matrix`. A pixel of which no class is predicted is a wrong one.

    Example:
        >>> mask_scores(torch.tensor([[3, 1, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]]))
        {'miou': 77.5, 'pixel_accuracy': 87.5}
    """
    counts = confusion.double()
    hits = counts.diagonal()
    union = counts.sum(0)[: len(hits)] + counts.sum(1) - hits
    seen = union > 0
    return {
        "miou": 100 * (hits[seen] / union[seen]).mean().item(),
        "pixel_accuracy": 100 * (hits.sum() / counts.sum()).item(),
    }


@torch.no_grad()
def evaluate_masks(
    model: nn.Module, loader: Loader, finish: Finish, num_pictures: int, batch_size: int, accelerator: Any
) -> dict[str, float]:
    """Tests a segmentation network; its mode is restored.

    Args:
        model: images to ``(B, K, H, W)`` logits of their size; its `num_classes` is K.
        loader: of the test pictures, whose sizes may differ.
        finish: normalises.
        num_pictures: size of the test set.
        batch_size: of one process.
        accelerator: of Hugging Face Accelerate; gives autocast and sums over processes.

    Returns:
        ``miou`` and ``pixel_accuracy`` in percent, and ``images``, how many could be read.

    Raises:
        UserError: no pixel of the test pictures has a class.
    """
    was_training, K, device = model.training, int(model.num_classes), accelerator.device  # type: ignore[arg-type]
    model.eval()
    confusion = torch.zeros(K, K + 1, dtype=torch.int64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    plan = eval_plan(num_pictures, batch_size, accelerator.process_index, accelerator.num_processes)
    for batch in loader.batches(plan):
        for images, targets in of_one_size(*finish(batch.images, batch.targets)):
            with accelerator.autocast():
                logits = model(images)
            confusion += confusion_matrix(logits, targets)
            count += len(images)
    model.train(was_training)
    confusion, count = accelerator.reduce([confusion, count], reduction="sum")
    if count and not confusion.any():
        raise UserError("no pixel of the test masks has a class, so there is nothing to test predictions against.")
    return {**mask_scores(confusion), "images": float(count)}


def of_one_size(images: Any, targets: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts a batch into batches whose pictures have one size, so that no picture's score depends on its neighbours.

    Args:
        images: ``(B, C, H, W)``, or a list of ``(C, H, W)``.
        targets: ``(B, H, W)``, or a list of ``(H, W)``.

    Example:
        >>> pictures = [torch.zeros(3, 4, 4), torch.zeros(3, 2, 4), torch.ones(3, 4, 4)]
        >>> [tuple(part.shape) for part, _ in of_one_size(pictures, [picture[0] for picture in pictures])]
        [(2, 3, 4, 4), (1, 3, 2, 4)]
    """
    groups: dict[torch.Size, list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image.shape, []).append(number)
    for members in groups.values():
        yield torch.stack([images[i] for i in members]), torch.stack([targets[i] for i in members])
