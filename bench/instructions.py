"""Counts the instructions that a call retires, by the processor's own counter, where Linux lets a program read it.

This is the work that is really done, whoever's kernel does it, and other processes do not change it. Most virtual
machines and containers have no such counter; then the reason is returned, for a gate to print.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["INSTRUCTIONS", "TASK_CLOCK", "count"]

INSTRUCTIONS = (0, 1)  # PERF_TYPE_HARDWARE, PERF_COUNT_HW_INSTRUCTIONS
TASK_CLOCK = (1, 1)  # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_TASK_CLOCK: nanoseconds, needs no hardware

_SYSCALL = {"x86_64": 298, "aarch64": 241}  # perf_event_open
_SIZE = 128  # of struct perf_event_attr, version 7
_USER_ONLY = 1 << 5 | 1 << 6  # exclude_kernel, exclude_hv: what an ordinary user may count


def count(run: Callable[[], Any], event: tuple[int, int] = INSTRUCTIONS) -> int | str:
    """Returns how many of an event the calling thread has during one call, or a sentence that says why it cannot tell.

    Args:
        run: what to count; PyTorch must be on one thread, since others are not counted.
        event: type and number, as in ``linux/perf_event.h``.

    Example:
        >>> found = count(lambda: sum(range(1000)))
        >>> isinstance(found, str) or found > 1000
        True
    """
    opened = _open(event)
    if isinstance(opened, str):
        return opened
    try:
        before = _read(opened)
        run()
        after = _read(opened)
    finally:
        os.close(opened)
    if after is None or before is None or after <= before:
        return "the processor's counter stood still."
    return after - before


def _open(event: tuple[int, int]) -> int | str:
    number = _SYSCALL.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return f"instructions can be counted on Linux on {' and '.join(_SYSCALL)}, not on {platform.machine()}."
    attr = ctypes.create_string_buffer(_SIZE)
    struct.pack_into("IIQ", attr, 0, event[0], _SIZE, event[1])
    struct.pack_into("Q", attr, 32, 1 | 2)  # read_format: the times in which it was enabled, and really counted
    struct.pack_into("Q", attr, 40, _USER_ONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(number), attr, 0, -1, ctypes.c_long(-1), ctypes.c_ulong(0))
    if fd < 0:
        code = ctypes.get_errno()
        return f"the system has no counter for this program (perf_event_open: {os.strerror(code)})."
    return int(fd)


def _read(fd: int) -> int | None:
    """None where the counter was shared, so that a part was not counted."""
    value, enabled, running = struct.unpack("QQQ", os.read(fd, 24))
    return int(value) if enabled == running else None
