"""Where a frozen teacher works: in line with the caller, or on CUDA streams of its own beside it.

A lane takes tasks in order and gives for each a function that waits for its answer. That is all that pipelining needs
(MaskedKD, Appendix E): hand in the teacher's work on one part of a batch, run the student on the next, wait at the end.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

__all__ = ["Answer", "Lane", "SideStream", "in_line", "lane_between"]


class Answer(Protocol):
    """What a task returns: something that holds tensors."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same with a function applied to every tensor.

        Args:
            fn: for example a move to another device.
        """
        ...


A = TypeVar("A", bound=Answer)


class Lane(Protocol):
    """Takes a task, may start it, and returns what waits for its answer."""

    def __call__(self, task: Callable[[], A], /) -> Callable[[], A]:
        """Takes a task.

        Args:
            task: reads nothing that the caller writes to afterwards.
        """
        ...


def in_line(task: Callable[[], A]) -> Callable[[], A]:
    """The lane that does a task at once, where the caller stands.

    Args:
        task: what to do.

    Example:
        >>> in_line(lambda: "done")()  # type: ignore[type-var]
        'done'
    """
    answer = task()
    return lambda: answer


class SideStream:
    """The lane that queues tasks on a CUDA stream beside the caller's; the host waits for neither.

    Where the teacher has a GPU of its own, both GPUs get such a stream: a copy between two GPUs is queued on the
    current streams of both, and on the caller's it would hold up the student until the teacher is done.

    Args:
        home: GPU of the caller, where a task's tensors come from and its answer goes.
        device: GPU that a task computes on.
    """

    def __init__(self, home: torch.device, device: torch.device) -> None:
        self.home = home
        self._streams = [torch.cuda.Stream(each) for each in dict.fromkeys((home, device))]  # the first one at home

    def __call__(self, task: Callable[[], A]) -> Callable[[], A]:
        """Queues a task behind everything that the caller has queued so far.

        Args:
            task: reads nothing that the caller writes to afterwards.
        """
        ready = torch.cuda.current_stream(self.home).record_event()
        with contextlib.ExitStack() as stack:
            for stream in self._streams:
                stream.wait_event(ready)
                stack.enter_context(torch.cuda.stream(stream))
            answer = task()
            done = self._streams[0].record_event()
        return functools.partial(self._wait, task, answer, done)

    def _wait(self, _task: Callable[[], A], answer: A, done: torch.cuda.Event) -> A:
        # The task is held until the caller's stream waits for its end: the allocator must not give the memory of its
        # tensors, which belongs to that stream, away before. The answer's memory belongs to the side stream.
        here = torch.cuda.current_stream(self.home)
        here.wait_event(done)

        def keep_until_read(x: Tensor) -> Tensor:
            x.record_stream(here)
            return x

        return answer.map(keep_until_read)


def lane_between(home: torch.device, device: torch.device) -> Lane:
    """Returns the lane for a caller on one device and a teacher on another, or on the same.

    Args:
        home: the caller's device.
        device: the teacher's.

    Example:
        >>> lane_between(torch.device("cpu"), torch.device("cpu")) is in_line
        True
    """
    return _side_stream(home, device) if home.type == device.type == "cuda" else in_line


@functools.cache
def _side_stream(home: torch.device, device: torch.device) -> SideStream:
    """One for each pair of devices, for the allocator keeps memory apart by stream."""
    return SideStream(home, device)
