"""First use of a GPU backend on an unknown GPU model: its samples run once against the reference.

A kernel that no record proves right on this model is tried before it is believed. One that fails is set aside for good
(with a warning that names it) and the op runs on the next backend.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from . import cache
from .arguments import lead

if TYPE_CHECKING:
    from .registry import Backend, Op

__all__ = ["keep", "trusted", "verify", "verify_all"]


def trusted(op: Op, candidate: Backend, args: tuple[Any, ...]) -> bool:
    """True when `candidate` may run: no GPU kernel, or a record vouches for it, or its samples came out right here."""
    device = lead(args).device
    if device.type == "cpu" or candidate.name == "eager":
        return True
    name, pair = cache.device_name(device), f"{op.name}/{candidate.name}"
    if pair in cache.verified(name):
        return True
    known = cache.verdict(name, pair)
    if known is None:
        known = verify(op, candidate, device)
        cache.remember(name, pair, known)
    return known


def verify(op: Op, candidate: Backend, device: torch.device) -> bool:
    """Runs every sample of `op` on `candidate` against the reference and warns about the first that is wrong.

    Args:
        op: the op.
        candidate: one of its backends.
        device: where to run.

    Returns:
        True when all samples are right.
    """
    from .check import check_sample

    for dtype in candidate.dtypes:
        for sample in op.samples(str(device), dtype):
            if sample.huge:
                continue
            row = check_sample(op, candidate, sample, dtype)
            if row.outcome != "right":
                warnings.warn(
                    f"fastmkd: backend {candidate.name!r} of {op.name} is wrong on this {cache.device_name(device)} "
                    f"({row.dtype}, sample {row.sample}: error {row.error:.3g}, allowed {row.allowed:.3g} "
                    f"{row.detail}); it is set aside and the op runs on another backend. Please report this with the "
                    "output of fastmkd env.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return False
    return True


def keep(op: str, backend: str, device: torch.device, right: bool) -> None:
    """Remembers what a whole check of a GPU backend found, as `trusted` would have found it at the first use.

    Args:
        op: name of the op.
        backend: name of the backend; nothing is remembered of the reference.
        device: where it ran; nothing is remembered of a CPU.
        right: whether every sample came out right.
    """
    if device.type != "cpu" and backend != "eager":
        cache.remember(cache.device_name(device), f"{op}/{backend}", right)


def verify_all(device: torch.device) -> None:
    """Tries every GPU backend of every op that has no verdict on `device` yet."""
    from .registry import OPS

    if device.type == "cpu":
        return
    for op in OPS.values():
        for candidate in op.backends.values():
            if candidate.takes(device.type, candidate.dtypes[0]) and candidate.reason() is None:
                trusted(op, candidate, (torch.empty(0, device=device),))
