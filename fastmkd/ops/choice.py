"""Which backend runs an op: forced by `backend`, or the fastest on record for this device and shape (``auto``).

``auto`` looks in three places, in this order:

1. the table shipped for this device (``tables/<device>.json``, measured with ``fastmkd bench``);
2. the choices measured here earlier (the disk cache, see `fastmkd.ops.cache`);
3. a short measurement, made once per op, dtype and size, and written to the cache.

``FASTMKD_AUTOTUNE=0`` leaves only the first; what is not in a table then follows `PREFERENCE`. Nothing is measured on a
CPU, while a CUDA graph is captured, or in a run of several processes (`prepare` shares what one of them knows).

While a CUDA graph is captured nothing is tried either: only a backend that is known to be right may run, else the
reference does. So what is captured should have run once before, as PyTorch asks anyway.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from . import cache
from .arguments import lead, tensors
from .precision import dtype_name, tf32_is_on

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

    An op that does not have the backend at all (``cuda`` exists for few ops) is chosen as in ``"auto"``. What ran
    inside takes the same backend in its backward pass, wherever that runs; compiled code does so on a CPU only.

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
    kind = dtype_name(dtype, tf32=device != "cpu" and tf32_is_on())
    key = (cache.device_name(first.device), op.name, kind, size_class(args))
    if key not in _chosen:
        if _capturing(device):  # not kept: the next call outside may try more
            return op.backends[_decide(op, args, key, device, dtype, try_out=False)]
        _chosen[key] = _decide(op, args, key, device, dtype, try_out=True)
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
    """Makes the ranks of a run choose alike: all with one GPU model begin with what the first of them knows.

    A run of several processes calls this once before its first step, after ``torch.cuda.set_device`` where its group is
    NCCL's; ``fastmkd train`` does. It tries nothing out, so no rank waits for another. What nobody knows yet each rank
    finds out by itself at the first use, from the same samples and hence with the same answer, and in a run of several
    processes nothing is measured. Ranks that chose differently would differ in the last bit. A single process need not
    call it.

    Args:
        device: the device that the ops will run on.

    Example:
        >>> prepare(torch.device("cpu"))
    """
    if not _many_processes():
        return
    mine = (cache.device_name(device), cache.snapshot(device))
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    cache.replace(device, next(state for name, state in everyone if name == mine[0]))
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


def _decide(op: Op, args: tuple[Any, ...], key: tuple[str, ...], device: str, dtype: torch.dtype, try_out: bool) -> str:
    """Name of the backend for a call; `try_out` allows to verify and to measure."""
    from . import verdicts

    may_run = verdicts.trusted if try_out else verdicts.known_right
    fit = [b for b in candidates(op, device, dtype) if may_run(op, b, args)]
    names = [b.name for b in fit]
    records = (cache.table(key[0]), cache.choices(key[0]) if autotune() else {})
    for record in records:
        on_record = record.get("/".join(key[1:])) or record.get(op.name)
        if on_record in names:
            return str(on_record)
    if len(fit) == 1 or device == "cpu" or not try_out or not autotune() or _many_processes():
        # Not measured on a CPU: a choice that changed from run to run would change a result's last bit.
        return names[0]
    times = [_seconds(candidate, args) for candidate in fit]
    best = names[times.index(min(times))]
    if max(times) < math.inf:  # else there may be more memory another time
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
    """Median time of a call; infinity when there is not enough memory for it."""
    device = lead(args).device
    times = []
    for _ in range(MEASURE_ROUNDS + 1):  # the first round warms up and is dropped
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        try:
            candidate.run(*args)
        except torch.OutOfMemoryError:
            break
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    else:
        return sorted(times[1:])[MEASURE_ROUNDS // 2]
    torch.cuda.empty_cache()  # not in the handler, where the frames that ran out still hold what they had
    return math.inf
