"""Cosine between the maps of two networks, a minibatch at a time (DPK, Fig. 10)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .comparison import Taps, eval_mode, images_of, layer_names

__all__ = ["compare_cosine"]


@torch.no_grad()
def compare_cosine(model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any], pair: tuple[str, str]) -> Tensor:
    """Returns how alike two layers point: the mean over a minibatch's images of the cosine of their flattened maps.

    Unlike CKA it changes when one network's channels are permuted or rotated, so it says little about networks that
    were trained apart (DPK, Fig. 10, left). Both run in eval mode, which is undone afterwards.

    Args:
        model_a: images to anything; may be on another device than `model_b`.
        model_b: may be the same object, which then runs twice.
        loader: yields batches: images, or a tuple or list that starts with them.
        pair: name of a layer of `model_a`, and of one of `model_b` with as many features an image.

    Returns:
        ``(k,)`` float64 on the CPU, one value a minibatch, from -1 to 1.

    Raises:
        ValueError: a layer that does not exist, does not run once or has another first dimension than the image, or
            layers with other numbers of features.
        TypeError: a layer whose output is not a tensor.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        >>> compare_cosine(net, net, [torch.randn(16, 6)] * 2, ("0", "0")).round(decimals=9)
        tensor([1., 1.], dtype=torch.float64)
    """
    sides = []
    for model, name, role in zip((model_a, model_b), pair, ("model_a", "model_b"), strict=True):
        sides.append((Taps(model, layer_names(model, [name], role), _copied_rows), name))
    values = []
    with eval_mode(model_a, model_b):
        for batch in loader:
            images = images_of(batch)
            rows = []
            for taps, name in sides:
                with taps:
                    rows.append(taps.run(images)[name])  # (B, d)
            x, y = rows[0], rows[1].to(rows[0].device)
            if x.shape != y.shape:
                raise ValueError(
                    f"the layer {pair[0]!r} has {x.shape[1]} features an image and {pair[1]!r} has {y.shape[1]}; an "
                    "angle needs as many. Name other layers, or compare by CKA."
                )
            values.append(F.cosine_similarity(x, y).mean())
    return torch.stack(values).cpu() if values else torch.empty(0, dtype=torch.float64)


def _copied_rows(features: Tensor) -> Tensor:
    """``(B, ...) -> (B, d)``, the same order whatever the memory format; what later layers overwrite stays."""
    return features.flatten(1).to(torch.float64, copy=True)
