"""First use of a GPU backend on an unknown GPU model: its samples run once against the reference.

A kernel that no record proves right on this model is tried before it is believed. One that fails is set aside for good
(with a warning that names it) and the op runs on the next backend. What it does with products as TF32 is a verdict of
its own: one that fails there still serves full float32 and the half precisions.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from . import cache, precision
from .arguments import lead

if TYPE_CHECKING:
    from .registry import Backend, Op

__all__ = ["keep", "known_right", "trusted", "verify"]


def trusted(op: Op, candidate: Backend, args: tuple[Any, ...]) -> bool:
    """True when `candidate` may run: no GPU kernel, or a record vouches for it, or its samples came out right here."""
    device = lead(args).device
    for tf32 in _parts(candidate, args):
        known = _known(op, candidate, device, tf32)
        if known is None:
            known = verify(op, candidate, device, tf32)
            if known is not None:
                cache.remember(cache.device_name(device), _pair(op.name, candidate.name, tf32), known)
        if not known:
            return False
    return True


def known_right(op: Op, candidate: Backend, args: tuple[Any, ...]) -> bool:
    """As `trusted`, but an untried backend is not tried: False."""
    return all(_known(op, candidate, lead(args).device, tf32) for tf32 in _parts(candidate, args))


def _parts(candidate: Backend, args: tuple[Any, ...]) -> tuple[bool, ...]:
    """The verdicts that a call needs: that without TF32 and, where its products are TF32, that of those tiles too."""
    products = candidate.tiles is not None and lead(args).dtype == torch.float32
    return (False, True) if products and precision.tf32_is_on() else (False,)


def _known(op: Op, candidate: Backend, device: torch.device, tf32: bool) -> bool | None:
    if device.type == "cpu" or candidate.name == "eager":
        return True
    name, pair = cache.device_name(device), _pair(op.name, candidate.name, tf32)
    return True if pair in cache.verified(name) else cache.verdict(name, pair)


def _pair(op: str, backend: str, tf32: bool) -> str:
    return f"{op}/{backend}/tf32" if tf32 else f"{op}/{backend}"


def verify(op: Op, candidate: Backend, device: torch.device, tf32: bool = False) -> bool | None:
    """Runs every sample of `op` on `candidate` against the reference and warns about the first that is wrong.

    Args:
        op: the op.
        candidate: one of its backends.
        device: where to run.
        tf32: runs the tiles of TF32 instead, and nothing else.

    Returns:
        True when all are right, False when one is wrong, None when there was not enough memory to know.
    """
    from .check import cases, check_sample

    for case in cases(op, candidate, str(device)):
        if case.tf32 != tf32:
            continue
        row = check_sample(op, *case)
        if row.lacked_memory:
            return None
        if row.outcome != "right":
            warnings.warn(
                f"fastmkd: backend {candidate.name!r} of {op.name} is wrong on this {cache.device_name(device)} "
                f"({row.dtype}, sample {row.sample}: error {row.error:.3g}, allowed {row.allowed:.3g} "
                f"{row.detail}); it is set aside{' for TF32' if tf32 else ''} and the op runs on another backend. "
                "Please report this with the output of fastmkd env.",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True


def keep(op: str, backend: str, device: torch.device, right: bool, tf32: bool = False) -> None:
    """Remembers what a whole check of a GPU backend found, as `trusted` would have found it at the first use.

    Args:
        op: name of the op.
        backend: name of the backend; nothing is remembered of the reference.
        device: where it ran; nothing is remembered of a CPU.
        right: whether every sample came out right.
        tf32: whether the samples were those of TF32.
    """
    if device.type != "cpu" and backend != "eager":
        cache.remember(cache.device_name(device), _pair(op, backend, tf32), right)
