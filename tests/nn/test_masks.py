"""Masks hide exactly the promised number of cells, each in its own way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmkd import block_mask, grid_mask, random_mask

MASKS = (random_mask, grid_mask, block_mask)
grids = st.tuples(st.integers(1, 17), st.integers(1, 17))


@pytest.mark.parametrize("make", MASKS)
@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 5), grid=grids, mask_ratio=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_hides_exactly_the_rounded_share(make, batch, grid, mask_ratio, seed):
    visible = make(batch, grid, mask_ratio, generator=torch.Generator().manual_seed(seed))
    cells = grid[0] * grid[1]
    assert visible.shape == (batch, *grid)
    assert visible.dtype == torch.bool
    hidden = (~visible).flatten(1).sum(1)
    assert (hidden == min(round(mask_ratio * cells), cells - 1)).all()


@pytest.mark.parametrize("make", MASKS)
def test_generator_decides_alone(make):
    first = make(8, (6, 7), 0.4, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    again = make(8, (6, 7), 0.4, generator=torch.Generator().manual_seed(3))
    other = make(8, (6, 7), 0.4, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("make", MASKS)
def test_images_get_masks_of_their_own(make):
    torch.manual_seed(0)
    assert len(make(64, (8, 8), 0.5).flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("make", MASKS)
def test_device(make):
    assert make(1, (2, 2), 0.5, device="meta", generator=torch.Generator()).device.type == "meta"
    assert make(1, (2, 2), 0.5, device="cpu").device.type == "cpu"


def test_random_mask_treats_cells_alike():
    visible = random_mask(4000, (3, 4), 0.25, generator=torch.Generator().manual_seed(0))
    rate = visible.double().mean(0)  # 9 of 12 visible; standard error 0.007
    assert (rate - 0.75).abs().max() < 0.035


def test_grid_mask_keeps_one_of_every_four():
    visible = grid_mask(32, (8, 12), 0.75, generator=torch.Generator().manual_seed(0))
    assert (visible.view(32, 4, 2, 6, 2).sum((2, 4)) == 1).all()


def test_grid_mask_is_a_checkerboard_at_one_half():
    visible = grid_mask(8, (6, 6), 0.5, generator=torch.Generator().manual_seed(0))
    assert (visible[:, 1:] ^ visible[:, :-1]).all()
    assert (visible[:, :, 1:] ^ visible[:, :, :-1]).all()


@pytest.mark.parametrize("mask_ratio", [0.1, 0.3, 0.5, 0.75])
def test_block_mask_hides_a_rectangle_up_to_one_row(mask_ratio):
    for visible in block_mask(50, (9, 11), mask_ratio, generator=torch.Generator().manual_seed(1)):
        rows, columns = (~visible).nonzero().unbind(1)
        height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        holes = height * width - len(rows)
        assert holes < max(height, width)


def test_block_mask_varies_place_and_shape():
    visible = block_mask(200, (16, 16), 0.2, generator=torch.Generator().manual_seed(0))
    boxes = set()
    for one in visible:
        rows, columns = (~one).nonzero().unbind(1)
        boxes.add(((rows.max() - rows.min()).item(), (columns.max() - columns.min()).item()))
    assert len(boxes) > 5
    assert not visible.all(0).any()  # every cell is hidden in some image


@pytest.mark.parametrize("make", MASKS)
@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((0, (2, 2), 0.5), ValueError, "batch is 0"),
        ((1.5, (2, 2), 0.5), TypeError, "batch is 1.5"),
        (
            (torch.zeros(8, 3, 4, 4), (2, 2), 0.5),
            TypeError,
            r"^batch is a Tensor; expected an int, such as len\(images",
        ),
        ((1, (2, 0), 0.5), ValueError, r"grid is \(2, 0\)"),
        ((1, (2, 2, 2), 0.5), ValueError, "grid is"),
        ((1, 4, 0.5), TypeError, "grid is 4"),
        ((1, (2, 2), "0.5"), TypeError, "mask_ratio is '0.5'; expected a number"),
        ((1, (2.0, 2), 0.5), TypeError, "grid is"),
        ((1, (2, 2), -0.1), ValueError, "mask_ratio is -0.1"),
        ((1, (2, 2), 1.1), ValueError, "mask_ratio is 1.1"),
        ((1, (2, 2), float("nan")), ValueError, "mask_ratio is nan"),
    ],
)
def test_refuses_bad_arguments(make, args, error, match):
    with pytest.raises(error, match=match):
        make(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("make", MASKS)
def test_cpu_generator_gives_the_same_masks_on_a_gpu(make):
    on_gpu = make(4, (7, 7), 0.3, device="cuda", generator=torch.Generator().manual_seed(5))
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), make(4, (7, 7), 0.3, generator=torch.Generator().manual_seed(5)))
