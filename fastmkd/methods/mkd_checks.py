"""Arguments of MKD that cannot be, each said in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .dense_method import LevelShape

__all__ = ["check_numbers", "check_patches"]

_SHARES = ("mask_ratio", "last_mask_ratio")
_WEIGHTS = ("weight", "global_weight", "logits_weight")
_POSITIVE = ("logits_temperature", "mlp_ratio")
_COUNTS = {"mask_patch": 1, "decoder_depth": 0, "decoder_width": 1, "decoder_heads": 1, "last_epochs": 1}


def check_numbers(**given: Any) -> None:
    """Checks what needs no network.

    Args:
        **given: arguments of `fastmkd.MKD` by name.

    Raises:
        ValueError: one out of range.
    """
    for name in _SHARES:
        if not _is_number(given[name]) or not 0 <= given[name] < 1:
            raise ValueError(f"{name} is {given[name]!r}; expected a share of the cells, at least 0 and below 1.")
    for name in _WEIGHTS:
        if not _is_number(given[name]) or not 0 <= given[name] < math.inf:
            raise ValueError(f"{name} is {given[name]!r}; expected a finite number of at least 0.")
    for name in _POSITIVE:
        if not _is_number(given[name]) or not 0 < given[name] < math.inf:
            raise ValueError(f"{name} is {given[name]!r}; expected a finite positive number.")
    for name, least in _COUNTS.items():
        if not _is_count(given[name]) or given[name] < least:
            raise ValueError(f"{name} is {given[name]!r}; expected a whole number of at least {least}.")
    width, heads = given["decoder_width"], given["decoder_heads"]
    if width % heads:
        raise ValueError(f"decoder_width is {width}, which {heads} attention heads do not divide; change one of them.")
    if given["mask"] not in ("random", "grid", "block"):
        raise ValueError(f"mask is {given['mask']!r}; expected 'random', 'grid' or 'block'.")
    if given["stats"] not in ("visible", "all"):
        raise ValueError(f"stats is {given['stats']!r}; expected 'visible' or 'all'.")
    sam, epochs = given["sam"], given["epochs"]
    if not isinstance(sam, bool) and (not _is_count(sam) or sam < 1):
        raise ValueError(f"sam is {sam!r}; expected the pixels of a token, such as 32, or False for no alignment.")
    if epochs is not None and (not _is_count(epochs) or epochs < given["last_epochs"]):
        raise ValueError(
            f"epochs is {epochs!r}; expected None, or all epochs of the training, at least the {given['last_epochs']} "
            "last ones without teacher."
        )


def check_patches(levels: Sequence[LevelShape], mask_patch: int, sam: int | bool) -> None:
    """Checks that tokens, cells of the mask and positions of the levels fit into each other.

    Args:
        levels: of the student.
        mask_patch: pixels of a cell.
        sam: pixels of a token, or False.

    Raises:
        ValueError: two sizes of which neither divides the other.
    """
    for level in levels:
        token = sam or level.stride
        for name, size, other in (("sam", token, mask_patch), ("sam", token, level.stride)):
            if size % other and other % size:
                what = "cells of the mask" if other == mask_patch else f"positions of {level.name!r}"
                raise ValueError(
                    f"{name} is {sam!r}, tokens of {size} pixels, and {what} are {other} pixels apart; one must be a "
                    "multiple of the other. Powers of two fit, such as 16, 32 and 64."
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
