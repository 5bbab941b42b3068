"""What the launchers of the masked convolutions compute, against the ops' references.

With a GPU these tests run on it; without one test_interpreter.py runs them as described in test_numerics.py.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from numerics import DEVICE, INTERPRETED, check, check_tf32, crossed, draw, long_unless, product_dtypes, small_or_all
from torch import Tensor

from fastmkd.nn.masks import random_mask
from fastmkd.nn.plan import MaskPlan, Window
from fastmkd.ops import get_op
from fastmkd.ops import triton as triton_backend
from fastmkd.ops.accuracy import judge, upcast
from fastmkd.ops.masked_conv2d import transposed
from fastmkd.ops.masked_conv2d_weight import masked_conv2d_weight  # noqa: F401  (declares the op)
from fastmkd.ops.registry import Sample

pytest.importorskip("triton")
pytestmark = [pytest.mark.usefixtures("poisoned"), *([] if INTERPRETED else [pytest.mark.gpu])]


def random_table(rows_in: int, rows_out: int, num_taps: int, patterns: int = 5) -> tuple[Tensor, Tensor]:
    """Any table is a valid one: random rows, a few patterns of present taps (the first has none), rows sorted by it."""
    g = torch.Generator().manual_seed(rows_in + rows_out + num_taps)
    present = torch.rand(patterns, num_taps, generator=g) < torch.linspace(0, 1, patterns)[:, None]
    which = torch.randint(patterns, (rows_out,), generator=g)
    taps = torch.where(present[which], torch.randint(rows_in, (rows_out, num_taps), generator=g), -1)
    return taps.int(), which.argsort(stable=True).int()


def conv_args(
    dtype: torch.dtype,
    rows: tuple[int, int],
    channels: tuple[int, int],
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
    bias: bool = True,
) -> tuple[Any, ...]:
    """Arguments of masked_conv2d with a random table; rows and channels are (in, out)."""
    (rows_in, rows_out), (cin, cout), (kh, kw) = rows, channels, kernel
    taps, order = random_table(rows_in, rows_out, kh * kw)
    weight = draw(cout, cin // groups, kh, kw) * (cin // groups * kh * kw) ** -0.5
    move = lambda tensor: tensor.to(DEVICE, dtype)  # noqa: E731
    unused = torch.empty(0, dtype=torch.int32, device=DEVICE)
    return (
        move(draw(rows_in, cin)),
        move(weight),
        move(draw(cout)) if bias else None,
        taps.to(DEVICE),
        unused,
        order.to(DEVICE),
        unused,
        groups,
    )


def plan_args(
    dtype: torch.dtype,
    batch: int,
    grid: tuple[int, int],
    cell: tuple[int, int],
    channels: tuple[int, int],
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    hidden: float = 0.75,
) -> tuple[Any, ...]:
    """Arguments of masked_conv2d for a layer of a real network, its tables from the plan."""
    visible = random_mask(batch, grid, hidden, generator=torch.Generator().manual_seed(batch)).to(DEVICE)
    plan, pad = MaskPlan(visible), kernel // 2
    taps = plan.taps(cell, Window((kernel, kernel), (stride, stride), (pad, pad), (1, 1)))
    (cin, cout), rows = channels, plan.num_rows(cell)
    weight = draw(cout, cin // groups, kernel, kernel) * (cin // groups * kernel * kernel) ** -0.5
    tables = (taps.forward, taps.backward, taps.forward_order, taps.backward_order)
    return draw(rows, cin).to(DEVICE, dtype), weight.to(DEVICE, dtype), None, *tables, groups


def weight_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of masked_conv2d_weight for the same layer, with a random gradient."""
    values, weight, _, taps, _, order, _, groups = args
    grad = draw(len(taps), len(weight)).to(values)
    return values, grad, taps, order, *weight.shape[2:], groups


SMALL = {
    "one_of_everything": {"rows": (1, 1), "channels": (1, 1), "kernel": (1, 1)},
    "no_bias": {"rows": (7, 9), "channels": (16, 16), "bias": False},
    "several_tiles_and_splits": {"rows": (100, 600), "channels": (8, 8)},
    "several_channel_blocks": {"rows": (20, 30), "channels": (80, 16)},
    "odd_channels": {"rows": (20, 33), "channels": (17, 67)},
    "stem": {"rows": (50, 40), "channels": (3, 24), "kernel": (7, 7)},
    "more_taps_than_bits": {"rows": (30, 20), "channels": (8, 8), "kernel": (9, 9)},
    "wide_step": {"rows": (30, 20), "channels": (40, 8), "kernel": (11, 11)},
    "many_taps_a_step": {"rows": (20, 20), "channels": (20, 16), "kernel": (17, 17)},
    "one_row_window": {"rows": (30, 20), "channels": (8, 8), "kernel": (1, 5)},
    "narrow_groups": {"rows": (30, 40), "channels": (32, 32), "groups": 8},
    "uneven_groups": {"rows": (30, 40), "channels": (18, 12), "groups": 6},
    "wide_groups": {"rows": (20, 20), "channels": (48, 48), "groups": 2},
    "multiplied_depthwise": {"rows": (30, 40), "channels": (6, 18), "groups": 6},
    "depthwise": {"rows": (30, 70), "channels": (24, 24), "groups": 24},
    "depthwise_several_splits": {"rows": (30, 1100), "channels": (5, 5), "groups": 5, "kernel": (1, 3)},
    "depthwise_wide_window": {"rows": (9, 20), "channels": (24, 24), "groups": 24, "kernel": (7, 7), "bias": False},
    "depthwise_many_taps": {"rows": (9, 9), "channels": (16, 16), "groups": 16, "kernel": (65, 1)},
}
LARGE: dict[str, dict[str, Any]] = {
    "resnet_stage_1": {"batch": 32, "grid": (7, 7), "cell": (8, 8), "channels": (64, 64)},
    "resnet_stage_2": {"batch": 32, "grid": (7, 7), "cell": (4, 4), "channels": (128, 128)},
    "resnet_stage_2_first": {"batch": 32, "grid": (7, 7), "cell": (8, 8), "channels": (128, 128), "stride": 2},
    "resnet_stage_3": {"batch": 32, "grid": (7, 7), "cell": (2, 2), "channels": (256, 256)},
    "resnet_stage_4": {"batch": 32, "grid": (7, 7), "cell": (1, 1), "channels": (512, 512)},
    "resnet_stem": {"batch": 8, "grid": (7, 7), "cell": (32, 32), "channels": (3, 64), "kernel": 7, "stride": 2},
    "resnext_stage_1": {"batch": 16, "grid": (7, 7), "cell": (8, 8), "channels": (128, 128), "groups": 32},
    "resnext_stage_4": {"batch": 16, "grid": (7, 7), "cell": (1, 1), "channels": (1024, 1024), "groups": 32},
    "regnet": {"batch": 16, "grid": (7, 7), "cell": (2, 2), "channels": (240, 240), "groups": 10},
    "convnext_stage_1": {
        "batch": 8, "grid": (7, 7), "cell": (8, 8), "channels": (96, 96), "kernel": 7, "groups": 96,
    },
    "mobilenet_first": {
        "batch": 32, "grid": (7, 7), "cell": (4, 4), "channels": (144, 144), "stride": 2, "groups": 144,
    },
    "nothing_hidden": {"batch": 8, "grid": (7, 7), "cell": (4, 4), "channels": (128, 128), "hidden": 0.0},
}  # fmt: skip


def build(case: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return conv_args(dtype, **SMALL[case]) if case in SMALL else plan_args(dtype, **LARGE[case])


@pytest.mark.parametrize(("case", "dtype"), crossed(small_or_all(SMALL, LARGE), product_dtypes()))
def test_masked_conv2d(case: str, dtype: torch.dtype) -> None:
    check("masked_conv2d", build(case, dtype))


@pytest.mark.parametrize(("case", "dtype"), crossed(small_or_all(SMALL, LARGE), product_dtypes()))
def test_masked_conv2d_weight(case: str, dtype: torch.dtype) -> None:
    check("masked_conv2d_weight", weight_args(build(case, dtype)))


SLOW = "depthwise_wide"  # many programs of few products


def registry_samples() -> list[Any]:
    return [
        pytest.param(
            name,
            sample,
            id=f"{name}-{str(dtype)[6:]}-{sample.name}",
            marks=long_unless(turn % 2 == number and sample.name != SLOW),
        )
        for name in ("masked_conv2d", "masked_conv2d_weight")
        for number, dtype in enumerate(product_dtypes())
        for turn, sample in enumerate(get_op(name).samples(DEVICE, dtype))
        if not sample.huge
        if not INTERPRETED or get_op(name).cost(*sample.args).flops < 4e6
    ]


@pytest.mark.parametrize(("name", "sample"), registry_samples())
def test_registry_samples(name: str, sample: Sample) -> None:
    check(name, sample.args)


@pytest.mark.parametrize("dtype", product_dtypes(), ids=str)
def test_input_gradient(dtype: torch.dtype) -> None:
    """The op's backward calls the launcher with the transposed weight and the other table."""
    values, weight, _, taps, taps_back, order, order_back, groups = plan_args(
        dtype, 2, (2, 3), (4, 4), (16, 24), stride=2, groups=2, hidden=0.5
    )
    grad = draw(len(taps), len(weight)).to(values)
    check("masked_conv2d", (grad, transposed(weight, groups), None, taps_back, taps, order_back, order, groups))


@pytest.mark.parametrize("dtype", product_dtypes(), ids=str)
def test_every_tile_of_the_tables(dtype: torch.dtype) -> None:
    from fastmkd.kernels import masked_conv2d as conv
    from fastmkd.kernels import masked_conv2d_weight as weight_kernel
    from fastmkd.kernels import masked_depthwise as depthwise

    kind = "ieee" if dtype == torch.float32 else "half"
    args = conv_args(dtype, (20, 130), (16, 24))
    reference = get_op("masked_conv2d").reference
    exact, plain = reference(*upcast(args)), reference(*args)
    for config in conv.CONFIGS[kind].values():
        verdict = judge(conv.masked_conv2d(*args, config=config), exact, plain)
        assert verdict.ok, (config, verdict)
    of_weight = weight_args(args)
    reference = get_op("masked_conv2d_weight").reference
    exact, plain = reference(*upcast(of_weight)), reference(*of_weight)
    for config in weight_kernel.CONFIGS[kind]:
        verdict = judge(weight_kernel.masked_conv2d_weight(*of_weight, config=config), exact, plain)
        assert verdict.ok, (config, verdict)

    args = conv_args(dtype, (20, 70), (136, 136), groups=136, bias=False)
    values, weight, _, taps, _, order, *_ = args
    outs = [depthwise.masked_depthwise(values, weight, None, taps, order, config) for config in depthwise.CONFIGS]
    exact = get_op("masked_conv2d").reference(*upcast(args))
    assert all(judge(out, exact, get_op("masked_conv2d").reference(*args)).ok for out in outs)
    grad, *rest = weight_args(args)[1:6]
    exact = get_op("masked_conv2d_weight").reference(*upcast((values, grad, *rest, 136))).flatten(1).t()
    for config in depthwise.WEIGHT_CONFIGS:
        partial = depthwise.depthwise_weight_partials(values, grad, *rest, config=config)
        torch.testing.assert_close(partial.sum(0).double(), exact, rtol=1e-4, atol=1e-4)


def test_a_step_is_no_wider_than_its_tile_says() -> None:
    """Its shared memory is planned for BLOCK_K products, up to a window of 31 x 31."""
    from fastmkd.kernels import masked_conv2d as conv

    for kind, configs in conv.CONFIGS.items():
        for config, cin, side in product(configs.values(), (1, 3, 8, 12, 16, 24, 64, 80, 256), range(1, 32)):
            constants = conv._constants(kind, config, cin, 64, 1, side * side)
            width = constants["STEP_TAPS"] * constants["BLOCK_C"]
            assert 16 <= width <= max(config.block_k, 32 if side > 22 else 0), (kind, config.name, cin, side)


@pytest.mark.parametrize("groups", [1, 24], ids=["dense", "depthwise"])
def test_rows_without_a_tap_are_not_read(groups: int) -> None:
    values, *rest = conv_args(torch.float32, (40, 30), (24, 24), groups=groups)
    expected = triton_backend.launcher("masked_conv2d")(values, *rest)
    extended = torch.cat((values, torch.full_like(values, float("nan"))))
    assert torch.equal(triton_backend.launcher("masked_conv2d")(extended, *rest), expected)
    _, *of_weight = weight_args((values, *rest))
    run = triton_backend.launcher("masked_conv2d_weight")
    assert torch.equal(run(extended, *of_weight), run(values, *of_weight))


@pytest.mark.parametrize("groups", [1, 24], ids=["dense", "depthwise"])
def test_the_order_decides_the_time_and_not_the_result(groups: int) -> None:
    values, weight, bias, taps, back, order, order_back, _ = conv_args(
        torch.float32, (60, 200), (24, 24), groups=groups
    )
    run = triton_backend.launcher("masked_conv2d")
    expected = run(values, weight, bias, taps, back, order, order_back, groups)
    shuffled = order[torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(DEVICE)]
    assert torch.equal(run(values, weight, bias, taps, back, shuffled, order_back, groups), expected)


def test_a_weight_of_any_strides_is_taken() -> None:
    values, weight, *rest = conv_args(torch.float32, (20, 20), (16, 24))
    run = triton_backend.launcher("masked_conv2d")
    channels_last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(run(values, channels_last, *rest), run(values, weight, *rest))


def test_tf32_follows_the_switch_of_pytorch() -> None:
    args = build("several_channel_blocks" if INTERPRETED else "resnet_stage_2", torch.float32)
    check_tf32("masked_conv2d", args)
    check_tf32("masked_conv2d_weight", weight_args(args))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 32, 128], ids=["dense", "grouped", "depthwise"])
def test_launches_leave_the_host_alone(groups: int) -> None:
    """No launch waits for the GPU, so a student's step is never held up."""
    args = plan_args(torch.bfloat16, 2, (4, 4), (4, 4), (128, 128), groups=groups)
    calls = [("masked_conv2d", args), ("masked_conv2d_weight", weight_args(args))]
    for name, arguments in calls:
        triton_backend.launcher(name)(*arguments)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, arguments in calls:
            triton_backend.launcher(name)(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode(before)
