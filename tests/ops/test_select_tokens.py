"""What `select_tokens` says of arguments that its op never sees."""

from __future__ import annotations

import re

import pytest
import torch

import fastmkd

SALIENCY = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        ({"grid": 4}, "grid is 4; expected (gh, gw), two ints."),
        ({"grid": (4, 4, 1)}, "grid is (4, 4, 1); expected (gh, gw), two ints."),
        ({"grid": (4.0, 4)}, "grid is (4.0, 4); expected (gh, gw), two ints."),
        ({"grid": (4, 4), "target_grid": 8}, "target_grid is 8; expected (gh, gw), two ints."),
    ],
)
def test_refuses_what_is_no_grid(grids, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        fastmkd.select_tokens(SALIENCY, 3, **grids)


def test_a_list_is_a_grid():
    assert torch.equal(fastmkd.select_tokens(SALIENCY, 3, grid=[4, 4]), fastmkd.select_tokens(SALIENCY, 3))
