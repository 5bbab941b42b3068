"""MaskPlan's tables against tables built by looking every tap up, in any geometry that keeps cells whole."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_masks import draw_mask, masks, pixels
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import fastmkd
from fastmkd.nn.masked_conv import MaskedConv2d
from fastmkd.nn.packed import PackedFeatures, pack
from fastmkd.nn.plan import MaskPlan, Window
from fastmkd.ops.tap_locate import locate
from fastmkd.ops.tap_table import group_rows, tap_table
from fastmkd.ops.tap_tables import slow_tables


@st.composite
def geometries(draw):
    """A cell, and a window that maps whole cells to whole cells, axis by axis."""
    axes = []
    for _ in range(2):
        stride = draw(st.sampled_from((1, 2, 4)))
        cell = stride * draw(st.integers(1, 3))
        kernel = draw(st.sampled_from((1, 2, 3, 4, 5, 7)))
        dilation = draw(st.sampled_from((1, 2, 3)))
        total = max(dilation * (kernel - 1) + 1 - stride, 0)  # of both paddings together
        before = draw(st.integers(0, total))
        axes.append((cell, kernel, stride, before, dilation, total - before))
    cell, kernel, stride, before, dilation, after = zip(*axes, strict=True)
    return cell, Window(kernel, stride, before, dilation, after)


def reading_order(plan: MaskPlan, cell: tuple[int, int]) -> torch.Tensor:
    """For each row of a packed map, its number among the visible pixels in reading order."""
    size = (plan.grid[0] * cell[0], plan.grid[1] * cell[1])
    seen = pixels(plan.visible, size)
    number = torch.where(seen > 0, seen.flatten().cumsum(0).view_as(seen) - 1, -1.0)
    return pack(number, plan).values[:, 0].long()


def renumbered(table: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """A table in packed order as one in reading order, in its rows and in what they hold."""
    out = torch.empty_like(table)
    out[rows] = torch.where(table >= 0, entries[table.long()].int(), -1)
    return out


@settings(max_examples=80, deadline=None)
@given(visible=masks, geometry=geometries())
def test_tables_equal_the_slow_ones(visible, geometry):
    cell, window = geometry
    plan = MaskPlan(visible)
    taps = plan.taps(cell, window)
    size = (plan.grid[0] * cell[0], plan.grid[1] * cell[1])
    out = window.output_size(size)
    seen_in, seen_out = pixels(visible, size)[:, 0].bool(), pixels(visible, out)[:, 0].bool()
    forward, backward = slow_tables(seen_in, seen_out, window.kernel, window.stride, window.padding, window.dilation)
    rows_in = reading_order(plan, cell)
    rows_out = reading_order(plan, plan.cell(out))
    assert torch.equal(renumbered(taps.forward, rows_out, rows_in), forward)
    assert torch.equal(renumbered(taps.backward, rows_in, rows_out), backward)
    for table, order in ((taps.forward, taps.forward_order), (taps.backward, taps.backward_order)):
        assert table.dtype == order.dtype == torch.int32
        assert table.is_contiguous()
        assert torch.equal(order.sort().values, torch.arange(len(table)))


@settings(max_examples=40, deadline=None)
@given(visible=masks, geometry=geometries())
def test_inside_is_what_an_unmasked_image_would_find(visible, geometry):
    cell, window = geometry
    size = (visible.shape[1] * cell[0], visible.shape[2] * cell[1])
    everything = MaskPlan(torch.ones_like(visible))
    present = everything.taps(cell, window).forward >= 0  # no tap of an unmasked image is hidden
    dense = PackedFeatures(present.double(), everything, window.output_size(size)).to_dense()
    plan = MaskPlan(visible)
    assert torch.equal(plan.inside(cell, window), pack(dense, plan).values.bool())


def test_grouped_rows_with_the_same_taps_are_together():
    plan = MaskPlan(draw_mask("mixed", 3, (5, 5), 1))
    table, pattern = tap_table(plan.cells, plan.rank, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1))
    patterns = (table[group_rows(pattern).long()] >= 0).int().tolist()
    changes = sum(a != b for a, b in itertools.pairwise(patterns))
    assert changes + 1 == len({tuple(p) for p in patterns}) > 1


def test_tables_are_built_once():
    plan, window = MaskPlan(draw_mask("mixed", 2, (2, 2), 0)), Window((3, 3), (1, 1), (1, 1), (1, 1))
    assert plan.taps((2, 2), window) is plan.taps((2, 2), Window((3, 3), (1, 1), (1, 1), (1, 1)))
    assert plan.forward_taps((2, 2), window) is plan.taps((2, 2), window).forward
    assert plan.inside((2, 2), window) is plan.inside((2, 2), window)
    assert plan.taps((2, 2), window) is not plan.taps((4, 4), window)


def test_tables_of_an_inference_pass_serve_training():
    visible = draw_mask("mixed", 2, (2, 2), 0)
    with torch.inference_mode():
        plan = MaskPlan(visible)
        taps = plan.taps((2, 2), Window((3, 3), (1, 1), (1, 1), (1, 1)))
        teacher = pack(torch.randn(2, 3, 4, 4), plan)
        teacher.to_dense()
    assert not any(t.is_inference() for t in (plan.cells, plan.rank, taps.forward, taps.backward_order))
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    (pack(images, teacher.plan) * torch.rand(2, 3, 1, 1)).to_dense().sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_stem_without_an_inputs_gradient_trains_after_an_inference_pass():
    plan, conv = MaskPlan(draw_mask("mixed", 2, (2, 2), 0)), MaskedConv2d(3, 4, 3, padding=1)
    with torch.inference_mode():
        conv(pack(torch.randn(2, 3, 4, 4), plan))
    conv(pack(torch.randn(2, 3, 4, 4), plan)).values.sum().backward()
    assert conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("transposed", [False, True])
def test_tables_are_on_the_masks_device_whatever_the_default_is(transposed):
    plan, window = MaskPlan(draw_mask("mixed", 2, (2, 2), 0)), Window((3, 3), (1, 1), (1, 1), (1, 1))
    locate.cache_clear()
    want = plan.taps((2, 4), window)
    locate.cache_clear()
    torch.set_default_device("meta")
    try:
        with fastmkd.backend("eager" if transposed else "auto"):
            got = MaskPlan(plan.visible).taps((2, 4), window)
    finally:
        torch.set_default_device(None)
    for name in ("forward", "backward", "forward_order", "backward_order"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_count_given_equals_count_read():
    visible = draw_mask("mixed", 3, (4, 5), 2)
    given_count, read = MaskPlan(visible, count=int(visible.sum())), MaskPlan(visible)
    assert torch.equal(given_count.cells, read.cells)
    assert given_count.num_rows((2, 3)) == read.num_rows((2, 3)) == 6 * int(visible.sum())


def test_count_that_is_wrong():
    with pytest.raises(ValueError, match="count is 5, which is not the number of visible cells"):
        MaskPlan(torch.ones(1, 2, 2, dtype=torch.bool), count=5)
    for count in (4.0, True, "4"):
        with pytest.raises(TypeError, match=f"count is {count!r}; expected the number of visible cells, an int"):
            MaskPlan(torch.ones(1, 2, 2, dtype=torch.bool), count=count)
    with pytest.raises(ValueError, match="visible is on meta, which holds no values to count; give count"):
        MaskPlan(torch.ones(1, 2, 2, dtype=torch.bool, device="meta"))
    assert MaskPlan(torch.ones(1, 2, 2, dtype=torch.bool, device="meta"), count=3).num_rows((2, 2)) == 12


@pytest.mark.parametrize(
    ("visible", "error", "match"),
    [
        ([[True]], TypeError, "visible is list; expected a bool tensor"),
        (torch.ones(1, 2, 2), TypeError, "visible is torch.float32; expected a bool tensor"),
        (torch.ones(2, 2).bool(), ValueError, r"visible has shape \(2, 2\); expected \(B, gh, gw\)"),
        (torch.ones(0, 2, 2).bool(), ValueError, "visible has shape"),
        (torch.tensor([[[True]], [[False]]]), ValueError, "hides an image entirely"),
    ],
)
def test_bad_masks(visible, error, match):
    with pytest.raises(error, match=match):
        MaskPlan(visible)


def test_grid_that_does_not_divide_the_map():
    with pytest.raises(ValueError, match="grid 3 x 3 of visible does not divide a 8 x 9 map; choose a grid"):
        MaskPlan(torch.ones(1, 3, 3).bool()).cell((8, 9))


@pytest.mark.parametrize(
    ("cell", "window"),
    [
        ((4, 4), Window((3, 3), (1, 1), (0, 0), (1, 1))),  # shrinks
        ((4, 4), Window((3, 3), (1, 1), (1, 2), (1, 1))),  # grows in one direction
        ((1, 1), Window((3, 3), (2, 2), (1, 1), (1, 1))),  # the cell cannot be halved
        ((2, 3), Window((1, 1), (2, 2), (0, 0), (1, 1))),  # nor can this one, horizontally
    ],
)
def test_windows_that_break_cells(cell, window):
    with pytest.raises(ValueError, match=r"the masked cells do not stay whole; .*coarser grid, or call \.to_dense"):
        MaskPlan(torch.ones(1, 2, 2).bool()).taps(cell, window)


@pytest.mark.gpu
def test_built_on_the_gpu_without_reading_back():
    visible = draw_mask("mixed", 4, (7, 7), 3)
    window = Window((3, 3), (2, 2), (1, 1), (1, 1))
    expected = MaskPlan(visible).taps((4, 4), window)
    on_gpu, count = visible.cuda(), int(visible.sum())
    MaskPlan(on_gpu, count=count).taps((4, 4), window)  # the first use of an op may measure
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        taps = MaskPlan(on_gpu, count=count).taps((4, 4), window)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("forward", "backward"):
        table, order = getattr(taps, name).cpu(), getattr(taps, f"{name}_order").cpu()
        assert torch.equal(table, getattr(expected, name))
        present = (table >= 0).long() << torch.arange(table.shape[1])
        assert torch.equal(order, group_rows(present.sum(1)))


@pytest.mark.parametrize("count", [98, None])
def test_a_plan_reads_the_count_at_most(count):
    """On a GPU that is made up, whose tensors have no values: whoever asks one for a number fails."""
    wanted = nullcontext() if count else pytest.raises(DynamicOutputShapeException, match="nonzero")
    with FakeTensorMode(), wanted:
        plan = MaskPlan(torch.ones(4, 7, 7, dtype=torch.bool, device="cuda"), count=count)
        taps = plan.taps((4, 4), Window((3, 3), (2, 2), (1, 1), (1, 1)))
        assert taps.forward.shape == (count * 4, 9)
        assert taps.backward_order.shape == (count * 16,)
        assert plan.runs(4).of_rows.is_cuda


def test_a_mask_that_changes_after_pack_changes_nothing():
    visible = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]])
    images, twin = torch.randn(2, 3, 4, 4), visible.clone()
    packed, expected = pack(images, visible), pack(images, twin)
    visible.logical_not_()
    assert torch.equal(packed.visible, twin)
    torch.testing.assert_close(packed.mean((2, 3)), expected.mean((2, 3)), rtol=0, atol=0)
    torch.testing.assert_close(packed.to_dense(), expected.to_dense(), rtol=0, atol=0)
    runs, wanted = packed.plan.runs(2), expected.plan.runs(2)
    assert all(torch.equal(value, getattr(wanted, name)) for name, value in vars(runs).items())
