"""A table is looked at once, but never trusted after it changed or with other bounds."""

from __future__ import annotations

import pytest
import torch

from fastmkd.ops.masked_conv2d import masked_conv2d
from fastmkd.ops.row_numbers import check_patch_numbers, check_row_numbers


def looks(table, low=0, end=3):
    return [bool(right) for right, _ in check_row_numbers("order", table, low, end)]


def stop_at_the_first_wrong(table):
    for right, sentence in check_row_numbers("order", table, 0, 3):
        if not right:
            raise ValueError(sentence)


def test_a_right_table_is_looked_at_once():
    table = torch.tensor([0, 2, 1])
    assert looks(table) == [True]
    assert looks(table) == []
    assert looks(table, end=2) == [False]
    assert looks(table, low=1) == [False]


def test_a_changed_table_is_looked_at_again():
    table = torch.tensor([0, 2, 1])
    looks(table)
    table[1] = 3
    assert looks(table) == [False]


def test_a_wrong_table_stays_wrong():
    table = torch.tensor([0, 5])
    for _ in range(2):
        with pytest.raises(ValueError, match="order holds a row number outside 0 to 2"):
            stop_at_the_first_wrong(table)


def test_tensors_of_inference_mode_have_no_version_and_are_looked_at_each_time():
    with torch.inference_mode():
        table = torch.tensor([0, 1])
        assert looks(table) == looks(table) == [True]


def test_a_gradient_without_its_table_is_refused():
    x, w = torch.ones(2, 1, requires_grad=True), torch.ones(1, 1, 1, 1)
    taps, order = torch.tensor([[0], [1]], dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    out = masked_conv2d(x, w, None, taps, taps[:0], order, order[:0])
    with pytest.raises(ValueError, match="taps_back is empty, but values needs a gradient"):
        out.sum().backward()


def test_patch_numbers_are_looked_at_once_and_again_for_another_grid_or_after_a_change():
    keep = torch.tensor([[3, 0], [1, 2]])
    for end, expected in ((4, [True, True]), (4, []), (3, [False, True]), (4, [True, True])):
        looks = [bool(right) for right, _ in check_patch_numbers("keep", keep, end)]
        assert looks == expected, end
    keep[1, 0] = 2
    assert [bool(right) for right, _ in check_patch_numbers("keep", keep, 4)] == [True, False]
