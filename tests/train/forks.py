"""Children that are forked from this process, which has imported everything already, and killed wherever one likes."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import traceback
from collections.abc import Callable, Iterator

TRACE_ME, NEXT_SYSTEM_CALL = 0, 24  # requests of ptrace(2)


def fork(work: Callable[[], object]) -> int:
    """Starts `work` in a child, which ends with 0, or with 1 if it raises; returns the child's number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL


def killed_at_system_calls(work: Callable[[], object], every: int = 1) -> Iterator[int]:
    """Runs `work` in one child after the other and kills each a little later, where a system call begins or ends.

    Args:
        work: what the children do.
        every: how many of these places to go on from one child to the next.

    Yields:
        How many children were killed, right after each. Ends with the first that was not: it came to no such place.
    """
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long] * 4

    def traced() -> None:
        assert ptrace(TRACE_ME, 0, 0, 0) == 0
        os.kill(os.getpid(), signal.SIGSTOP)
        work()

    for killed in itertools.count(1):
        pid = fork(traced)
        status = os.waitpid(pid, 0)[1]
        for _ in range(killed * every):
            assert os.WIFSTOPPED(status), "the child failed"
            ptrace(NEXT_SYSTEM_CALL, pid, 0, 0)
            status = os.waitpid(pid, 0)[1]
            if os.WIFEXITED(status):
                assert os.waitstatus_to_exitcode(status) == 0
                return
        kill(pid)
        yield killed
