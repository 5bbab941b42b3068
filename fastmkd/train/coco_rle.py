"""Masks as COCO writes them in JSON: run lengths down the columns, uncompressed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

__all__ = ["decode_mask", "encode_mask"]

Array = np.ndarray[Any, Any]


def encode_mask(mask: Array) -> dict[str, list[int]]:
    """Returns the run lengths of a mask, background first, column after column.

    Args:
        mask: ``(H, W)`` bool.

    Returns:
        ``size`` (H, W) and ``counts``.

    Example:
        >>> encode_mask(np.array([[True, False], [True, True]]))
        {'size': [2, 2], 'counts': [0, 2, 1, 1]}
    """
    flat = mask.T.ravel()
    changes = (flat[1:] != flat[:-1]).nonzero()[0] + 1
    edges = [0, *([0] if flat[0] else []), *changes.tolist(), len(flat)]
    return {"size": list(mask.shape), "counts": [b - a for a, b in itertools.pairwise(edges)]}


def decode_mask(rle: dict[str, list[int]]) -> Array:
    """Returns the mask of run lengths.

    Args:
        rle: from `encode_mask`.

    Raises:
        ValueError: the runs do not fill the mask.

    Example:
        >>> decode_mask({"size": [2, 2], "counts": [0, 2, 1, 1]}).tolist()
        [[True, False], [True, True]]
    """
    height, width = rle["size"]
    counts = np.array(rle["counts"])
    if counts.min(initial=0) < 0 or counts.sum() != height * width:
        raise ValueError(f"counts add up to {counts.sum()}; expected {height} x {width} pixels and no negative run.")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
