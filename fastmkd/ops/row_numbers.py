"""Row and patch numbers, looked at once: a batch's tables serve many layers, and a check reads all of a table."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["check_patch_numbers", "check_row_numbers"]

_CHECKED = "_fastmkd_numbers"  # on the table: what it was found right for, and its version then


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
    if _is_known(table, ("rows", low, end)):
        return
    yield ((table >= low) & (table < end)).all(), f"{name} holds {what} outside {low} to {end - 1}."
    _remember(table, ("rows", low, end))


def check_patch_numbers(name: str, numbers: Tensor, end: int) -> Iterator[tuple[Tensor, str]]:
    """The same for the patches that each image of a batch names: in range, and none of them twice.

    Args:
        name: of the argument.
        numbers: ``(B, k)`` of integers, in any order.
        end: patches of an image.

    Example:
        >>> import torch
        >>> [(bool(right), sentence) for right, sentence in check_patch_numbers("keep", torch.tensor([[1, 1]]), 4)][1]
        (False, 'keep names a patch twice for one image; each may occur once.')
    """
    if _is_known(numbers, ("patches", end)):
        return
    ordered = numbers.sort(1).values
    inside = (ordered[:, 0] >= 0) & (ordered[:, -1] < end)
    yield inside.all(), f"{name} holds a patch outside 0 to {end - 1}, the {end} patches of an image."
    yield (ordered[:, 1:] != ordered[:, :-1]).all(), f"{name} names a patch twice for one image; each may occur once."
    _remember(numbers, ("patches", end))


def _is_known(table: Tensor, right_for: tuple[str | int, ...]) -> bool:
    if table.numel() == 0:
        return True
    return not table.is_inference() and getattr(table, _CHECKED, None) == (right_for, table._version)


def _remember(table: Tensor, right_for: tuple[str | int, ...]) -> None:
    """Called once the caller has not raised. On a GPU the assertion is under way: once is enough there too."""
    if not table.is_inference():
        setattr(table, _CHECKED, (right_for, table._version))
