"""What the launcher of the packed attention computes, against the op's reference.

With a GPU these tests run on it; without one test_interpreter.py runs them as described in test_numerics.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    check,
    check_tf32,
    crossed,
    draw,
    product_dtypes,
    small_or_all,
    tf32_products,
)

from fastmkd.ops import get_op
from fastmkd.ops import triton as triton_backend
from fastmkd.ops.accuracy import judge, upcast

pytest.importorskip("triton")
pytestmark = [pytest.mark.usefixtures("poisoned"), *([] if INTERPRETED else [pytest.mark.gpu])]


def attention_args(
    dtype: torch.dtype, lengths: list[int], heads: int, dim: int, spread: float = 1.0
) -> tuple[Any, ...]:
    """Arguments of packed_attention for images of these lengths."""
    qkv = (draw(sum(lengths), 3, heads, dim) * spread).to(DEVICE, dtype)
    return qkv, torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32), dim**-0.5


SMALL: dict[str, dict[str, Any]] = {
    "one_of_everything": {"lengths": [1], "heads": 1, "dim": 16},
    "no_image": {"lengths": [], "heads": 2, "dim": 16},
    "no_token": {"lengths": [0, 0], "heads": 2, "dim": 16},
    "empty_images": {"lengths": [0, 5, 0, 0, 40, 0], "heads": 2, "dim": 16},
    "lengths_around_a_tile": {"lengths": [31, 32, 33, 63, 64, 65, 127, 128, 129], "heads": 1, "dim": 32},
    "ones": {"lengths": [1] * 9, "heads": 3, "dim": 16},
    "narrow_head": {"lengths": [7, 20], "heads": 3, "dim": 8},
    "odd_head": {"lengths": [20, 13], "heads": 2, "dim": 23},
    "head_of_72": {"lengths": [35, 50], "heads": 2, "dim": 72},
    "head_of_128": {"lengths": [35], "heads": 1, "dim": 128},
    "head_of_200": {"lengths": [19, 35], "heads": 1, "dim": 200},
    "more_images_than_a_search_block": {"lengths": [1, 2] * 150, "heads": 1, "dim": 16},
    "sharp": {"lengths": [50, 70], "heads": 1, "dim": 64, "spread": 6},
    "deit": {"lengths": [99, 50], "heads": 3, "dim": 64},
}
LARGE: dict[str, dict[str, Any]] = {
    "deit_small": {"lengths": [197] * 256, "heads": 6, "dim": 64},
    "deit_small_half": {"lengths": [99] * 256, "heads": 6, "dim": 64},
    "ragged": {"lengths": [25 + (i * 67) % 173 for i in range(256)], "heads": 12, "dim": 64},
    "long": {"lengths": [4099, 17, 2048], "heads": 16, "dim": 80},
}


@pytest.mark.parametrize(("case", "dtype"), crossed(small_or_all(SMALL, LARGE), product_dtypes()))
def test_packed_attention(case: str, dtype: torch.dtype) -> None:
    check("packed_attention", attention_args(dtype, **{**SMALL, **LARGE}[case]))


@pytest.mark.parametrize("dtype", product_dtypes(), ids=str)
def test_every_tile_of_the_table(dtype: torch.dtype) -> None:
    from fastmkd.kernels import packed_attention as kernel

    args = attention_args(dtype, [100, 1, 0, 37], heads=2, dim=32)
    reference = get_op("packed_attention").reference
    exact, plain = reference(*upcast(args)), reference(*args)
    for config in kernel.CONFIGS["ieee" if dtype == torch.float32 else "half"].values():
        verdict = judge(kernel.packed_attention(*args, config=config), exact, plain)
        assert verdict.ok, (config, verdict)


def test_wide_heads_get_a_tile_of_their_own_and_wider_ones_run_as_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastmkd.kernels.packed_attention import choose_config

    names = lambda dim: {choose_config(dtype, 9999, 9, 12, dim).name for dtype in DTYPES}  # noqa: E731
    assert (names(128), names(129), names(256)) == ({"large", "small"}, {"deep"}, {"deep"})
    with tf32_products():
        assert (names(128), names(256)) == ({"large"}, {"deep"})

    op, launched = get_op("packed_attention"), []
    monkeypatch.setattr(triton_backend, "launcher", lambda name: lambda *args: launched.append(args))
    for head_dim in (256, 257):
        args = attention_args(torch.float32, [9, 5], heads=1, dim=head_dim)
        out = op.backends["triton"].run(*args)
    assert torch.equal(out, op.reference(*args))
    assert [args[0].shape[-1] for args in launched] == [256]


@pytest.mark.parametrize("dtype", product_dtypes(), ids=str)
def test_images_do_not_see_each_other(dtype: torch.dtype) -> None:
    qkv, starts, scale = attention_args(dtype, [30, 41, 12], heads=2, dim=16)
    run = triton_backend.launcher("packed_attention")
    expected = run(qkv, starts, scale)
    qkv[30:71] = float("nan")
    out = run(qkv, starts, scale)
    assert out[30:71].isnan().all()
    out[30:71] = expected[30:71]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("case", small_or_all({"deit": SMALL["deit"]}, {"deit_small": LARGE["deit_small"]}))
def test_tf32_follows_the_switch_of_pytorch(case: str) -> None:
    check_tf32("packed_attention", attention_args(torch.float32, **{**SMALL, **LARGE}[case]), factors=(0,))


def test_every_image_has_its_programs() -> None:
    """The rule that gives programs to images: enough for each, and never two images on one."""
    g = torch.Generator().manual_seed(5)
    for block in (16, 64, 128):
        lengths = torch.randint(0, 3 * block, (500,), generator=g)
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        first = starts // block + torch.arange(501)
        assert (first.diff() >= -(-lengths // block)).all()
        assert first[-1] == starts[-1] // block + 500


@pytest.mark.gpu
def test_launch_leaves_the_host_alone() -> None:
    args = attention_args(torch.bfloat16, [50, 99], heads=3, dim=64)
    triton_backend.launcher("packed_attention")(*args)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_backend.launcher("packed_attention")(*args)
    finally:
        torch.cuda.set_sync_debug_mode(before)
