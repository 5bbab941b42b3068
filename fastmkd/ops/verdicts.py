"""First use of a GPU backend on an unknown GPU model: its samples run once against the reference.

A kernel that no record proves right on this model is tried before it is believed. One that fails is set aside for good
(with a warning that names it) and the op runs on the next backend.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cache
from .accuracy import judge, upcast

if TYPE_CHECKING:
    from .registry import Backend, Op

__all__ = ["trusted", "verify", "verify_all"]


def trusted(op: Op, candidate: Backend, args: tuple[Any, ...]) -> bool:
    """True when `candidate` may run: it is no GPU kernel, a record vouches for it, or its samples came out right here."""
    device = next(a for a in args if isinstance(a, Tensor)).device
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
    for dtype in candidate.dtypes:
        for sample in op.samples(str(device), dtype):
            if sample.huge:
                continue
            args = sample.args
            try:
                found = judge(candidate.run(*args), op.reference(*upcast(args)), op.reference(*args))
            except Exception as error:  # a kernel that does not compile on this model must not end the user's run
                found = None
                detail = f"{type(error).__name__}: {error}"
            if found is None or not found.ok:
                detail = detail if found is None else f"error {found.error:.3g}, allowed {found.allowed:.3g} {found.detail}"
                warnings.warn(
                    f"fastmkd: backend {candidate.name!r} of {op.name} is wrong on this {cache.device_name(device)} "
                    f"({dtype}, sample {sample.name}: {detail}); it is set aside and {op.name} runs on another backend. "
                    "Please report this with the output of fastmkd env.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return False
    return True


def verify_all(device: torch.device) -> None:
    """Tries every GPU backend of every op that has no verdict on `device` yet."""
    from .registry import OPS

    if device.type == "cpu":
        return
    for op in OPS.values():
        for candidate in op.backends.values():
            if candidate.takes(device.type, candidate.dtypes[0]) and candidate.reason() is None:
                trusted(op, candidate, (torch.empty(0, device=device),))
