"""The error that a person can mend: one sentence, no traceback on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["UserError", "cannot_write", "shorten"]


class UserError(ValueError):
    """Something the user gave or has is wrong; the message names it, says what was expected and what to do.

    The command line prints the message alone and exits with code 2.

    Example:
        >>> raise UserError("data.root is empty.")
        Traceback (most recent call last):
        fastmkd.train.errors.UserError: data.root is empty.
    """


def shorten(names: Iterable[str], limit: int = 6) -> str:
    """Joins names with commas and says how many were left out beyond `limit`.

    Args:
        names: what to list.
        limit: how many to name.

    Example:
        >>> shorten(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    names = list(names)
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """Returns the error that says what a full disk or a folder without permission has stopped.

    Args:
        path: what was to be written.
        error: what the system said.

    Example:
        >>> import errno, os
        >>> cannot_write("runs/a", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))).args[0].partition(";")[0]
        'cannot write runs/a: No space left on device. What was there before is whole'
    """
    return UserError(
        f"cannot write {path}: {error.strerror or error}. What was there before is whole; make room or choose another "
        "folder, then give the same command again."
    )
