"""The error that a person can mend: one sentence, no traceback on the command line."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["UserError", "shorten"]


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
