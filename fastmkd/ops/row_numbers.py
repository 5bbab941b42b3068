"""Row numbers in index tables, looked at once: a batch's tables serve every layer, and a check reads all of a table."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["check_row_numbers"]

_CHECKED = "_fastmkd_row_numbers"  # on the table: (lowest, end, version) that were found right


def check_row_numbers(
    name: str, table: Tensor, low: int, end: int, what: str = "a row number"
) -> Iterator[tuple[Tensor, str]]:
    """Yields what an op's ``check_values`` yields, unless this table was found right before and has not changed since.

    Args:
        name: of the argument.
        table: of integers.
        low: the least that is allowed.
        end: the first that is too large.
        what: they are.

    Example:
        >>> import torch
        >>> table = torch.tensor([0, 2])
        >>> [(bool(right), sentence) for right, sentence in check_row_numbers("order", table, 0, 2)]
        [(False, 'order holds a row number outside 0 to 1.')]
        >>> _ = [right for right, _ in check_row_numbers("order", table, 0, 3)]
        >>> list(check_row_numbers("order", table, 0, 3))  # nothing to look at again
        []
    """
    if table.numel() == 0:
        return
    version = None if table.is_inference() else table._version
    if version is not None and getattr(table, _CHECKED, None) == (low, end, version):
        return
    yield ((table >= low) & (table < end)).all(), f"{name} holds {what} outside {low} to {end - 1}."
    # Only after the caller has not raised. On a GPU the assertion is under way: once is enough there too.
    if version is not None:
        setattr(table, _CHECKED, (low, end, version))
