"""Which backend runs an op: forced by `backend`, or the fastest on record for this device and shape (``auto``).

``auto`` looks in three places, in this order:

1. the table shipped for this device (``tables/<device>.json``, measured with ``fastmkd bench``);
2. the choices measured here earlier (the disk cache, see `fastmkd.ops.cache`);
3. a short measurement, made once per op, dtype and size, and written to the cache.

``FASTMKD_AUTOTUNE=0`` leaves only the first; what is not in a table then follows `PREFERENCE`. Nothing is measured on a
CPU, while a CUDA graph is captured, or in a run of several processes (`prepare` shares what one of them knows).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from . import cache
from .arguments import lead, tensors

if TYPE_CHECKING:
    from .registry import Backend, Op

__all__ = ["NAMES", "PREFERENCE", "BackendUnavailableError", "backend", "candidates", "choose", "forced", "prepare"]

NAMES = ("auto", "eager", "cpp", "triton", "cuda")
PREFERENCE = ("cpp", "triton", "cuda", "eager")  # of those that run on the device, when nothing has been measured
MEASURE_ROUNDS = 5

_forced: ContextVar[str] = ContextVar("fastmkd_backend", default="auto")
_newest = "auto"  # for compiled code: PyTorch 2.11 traces no ContextVar, but notices when a global changes
_chosen: dict[tuple[str, ...], str] = {}


class BackendUnavailableError(RuntimeError):
    """The backend asked for exists for this op but cannot run here; the message says why."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op inside the ``with`` block on one backend.

    An op that does not have the backend at all (``cuda`` exists for few ops) is chosen as in ``"auto"``.

    Args:
        name: ``"auto"`` (the default elsewhere), ``"eager"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: raised by an op in the block that has the backend but cannot run it here.

    Example:
        >>> import torch, fastmkd
        >>> with fastmkd.backend("eager"):
        ...     fastmkd.select_tokens(torch.tensor([[0.1, 0.7, 0.2]]), 2)
        tensor([[1, 2]])
    """
    if name not in NAMES:
        raise ValueError(f"backend got name={name!r}; expected one of {', '.join(map(repr, NAMES))}.")
    global _newest
    token, _newest, before = _forced.set(name), name, _newest
    try:
        yield
    finally:
        _forced.reset(token)
        _newest = before


def forced() -> str:
    """The name that the innermost `backend` block asks for; ``"auto"`` outside of one."""
    return _newest if torch.compiler.is_compiling() else _forced.get()


def choose(op: Op, args: tuple[Any, ...]) -> Backend:
    """Returns the backend that is to run `op` on `args`, which have passed the op's checks."""
    first = lead(args)
    device, dtype = first.device.type, first.dtype
    name = _forced.get()
    if name != "auto" and name in op.backends:
        return _usable(op, name, device, dtype)
    key = (cache.device_name(first.device), op.name, str(dtype).removeprefix("torch."), size_class(args))
    if key not in _chosen:
        if _capturing(device):
            return candidates(op, device, dtype)[0]
        _chosen[key] = _decide(op, args, key, device, dtype)
    return op.backends[_chosen[key]]


def candidates(op: Op, device: str, dtype: torch.dtype) -> list[Backend]:
    """The backends that ``auto`` may take for this device type and dtype, best guess first; none is a TypeError."""
    fit = [b for b in op.backends.values() if b.takes(device, dtype) and b.default and b.reason() is None]
    if not fit:  # the reference takes any device, so it is the dtype
        takes = ", ".join(str(d).removeprefix("torch.") for d in op.backends["eager"].dtypes)
        raise TypeError(f"{op.name} got {str(dtype).removeprefix('torch.')} and takes {takes}; cast the inputs.")
    return sorted(fit, key=lambda b: PREFERENCE.index(b.name))


def size_class(args: tuple[Any, ...]) -> str:
    """Size of the largest tensor as a power of four of its elements: ``"4^7"`` for 16,384 to 65,535."""
    elements = max(t.numel() for t in tensors(args))
    return f"4^{max(elements, 1).bit_length() // 2}"


def prepare(device: torch.device) -> None:
    """Verifies every op on `device` in rank 0 and shares its verdicts and choices with all ranks.

    A run of several processes calls this once before its first step: ranks that chose differently would differ in the
    last bit. A single process need not call it.

    Args:
        device: the device that the ops will run on.

    Example:
        >>> prepare(torch.device("cpu"))
    """
    from . import verdicts

    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        verdicts.verify_all(device)
        cache.load(device)
    if distributed:
        shared: list[Any] = [cache.snapshot(device)]
        torch.distributed.broadcast_object_list(shared, src=0)
        cache.replace(device, shared[0])
        _chosen.clear()


def _usable(op: Op, name: str, device: str, dtype: torch.dtype) -> Backend:
    chosen = op.backends[name]
    if not chosen.takes(device, dtype):
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in chosen.dtypes)
        raise BackendUnavailableError(
            f"backend {name!r} of {op.name} takes {chosen.device} tensors of {dtypes}, but got a {device} tensor of "
            f"{str(dtype).removeprefix('torch.')}; move or cast the inputs, or use backend('auto')."
        )
    reason = chosen.reason()
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} of {op.name} cannot run here: {reason}")
    return chosen


def _decide(op: Op, args: tuple[Any, ...], key: tuple[str, ...], device: str, dtype: torch.dtype) -> str:
    from . import verdicts

    fit = [b for b in candidates(op, device, dtype) if verdicts.trusted(op, b, args)]
    names = [b.name for b in fit]
    for record in (cache.table(key[0]), cache.choices(key[0])):
        on_record = record.get("/".join(key[1:])) or record.get(op.name)
        if on_record in names:
            return str(on_record)
    if len(fit) == 1 or device == "cpu" or not autotune() or _many_processes():
        # Not measured on a CPU: a choice that changed from run to run would change a result's last bit.
        return names[0]
    best = min(fit, key=lambda b: _seconds(b, args)).name
    cache.remember(key[0], "/".join(key[1:]), best)
    return best


def autotune() -> bool:
    """False when ``FASTMKD_AUTOTUNE=0`` fixes all choices to the shipped tables."""
    return os.environ.get("FASTMKD_AUTOTUNE", "1") != "0"


def _many_processes() -> bool:
    d = torch.distributed
    return d.is_available() and d.is_initialized() and d.get_world_size() > 1


def _capturing(device: str) -> bool:
    return device == "cuda" and torch.cuda.is_current_stream_capturing()


def _seconds(candidate: Backend, args: tuple[Any, ...]) -> float:
    times = []
    for _ in range(MEASURE_ROUNDS + 1):  # the first round warms up and is dropped
        torch.cuda.synchronize()
        start = time.perf_counter()
        candidate.run(*args)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[MEASURE_ROUNDS // 2]
