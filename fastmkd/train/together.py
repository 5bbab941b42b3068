"""What the processes of a run decide as one: if it fails on one of them, it fails on all, with the same sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .errors import UserError

__all__ = ["by_all", "from_main"]

T = TypeVar("T")


def from_main(accelerator: Any, call: Callable[[], T]) -> T:
    """Calls a function on the main process alone and returns its value on every one; all must call this.

    Args:
        accelerator: of Hugging Face Accelerate.
        call: returns what can be pickled.

    Raises:
        UserError: it raised one, or on the other processes, it raised anything.

    Example:
        >>> from types import SimpleNamespace
        >>> from_main(SimpleNamespace(num_processes=1), lambda: 5)
        5
    """
    if accelerator.num_processes == 1:
        return call()
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]  # value, what was wrong
    failed: Exception | None = None
    if accelerator.is_main_process:
        try:
            told[0] = call()
        except Exception as error:  # the others would wait for it for ever
            failed = error
            told[1] = str(error) if isinstance(error, UserError) else f"process 0 failed: {error!r}."
    broadcast_object_list(told)
    if failed is not None:
        raise failed
    if told[1] is not None:
        raise UserError(told[1])
    value: T = told[0]
    return value


def by_all(accelerator: Any, call: Callable[[], T]) -> T:
    """Calls a function on every process and returns its own value if it raises on none; all must call this.

    Args:
        accelerator: of Hugging Face Accelerate.
        call: any; may raise a UserError.

    Raises:
        UserError: it raised one on some process; the first such process is named.

    Example:
        >>> from types import SimpleNamespace
        >>> by_all(SimpleNamespace(num_processes=1), lambda: 5)
        5
    """
    if accelerator.num_processes == 1:
        return call()
    from accelerate.utils import gather_object

    value: Any = None
    wrong: list[str | None] = [None]
    try:
        value = call()
    except UserError as error:
        wrong = [f"process {accelerator.process_index} of {accelerator.num_processes}: {error}"]
    said = [text for text in gather_object(wrong) if text is not None]
    if said:
        raise UserError(said[0])
    result: T = value
    return result
