"""Ctrl-C and SIGTERM end a run at the next update, after a checkpoint; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interrupts", "RunInterrupted"]


class RunInterrupted(Exception):  # noqa: N818 (it is no error: the user asked for it)
    """The run stopped because it was asked to; a checkpoint has been written."""


class Interrupts:
    """Remembers that an interrupt came while the ``with`` block runs.

    Args:
        enabled: False leaves signals alone. With several processes the signal reaches them at different updates, where
            they cannot agree on a checkpoint; there the last periodic one counts.

    Example:
        >>> with Interrupts() as interrupts:
        ...     interrupts.requested
        False
    """

    def __init__(self, enabled: bool = True) -> None:
        # Only the main thread may set handlers.
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self.enabled:
            self._old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
