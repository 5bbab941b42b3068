"""The compiled aligned cells and their gradient, called directly, on every instruction set of this machine."""

import pytest
import torch

from fastmkd.bench.memory import peak_bytes
from fastmkd.ops import get_op

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(batch, channels, gh, gw, patch, width, dtype=torch.float32):
    """Level, weight, bias, visible, mask token, positions, gradient."""
    depth = patch * patch * channels
    return (
        rand(batch, channels, gh * patch, gw * patch, dtype=dtype),
        (rand(width, depth, seed=1) * depth**-0.5).to(dtype),
        rand(width, dtype=dtype, seed=2),
        rand(batch, gh * gw, seed=3) > -0.5,
        rand(width, dtype=dtype, seed=4),
        rand(gh * gw, width, dtype=dtype, seed=5),
        rand(batch, gh * gw, width, dtype=dtype, seed=6),
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "shape", [(2, 33, 2, 3, 3, 20), (1, 1, 2, 1, 2, 1), (3, 64, 1, 20, 1, 17), (2, 20, 3, 9, 2, 64)]
)
def test_tokens_and_gradient(ops, shape, dtype, channels_last):
    level, weight, bias, visible, mask_token, positions, grad = inputs(*shape, dtype)
    patch, rounding = shape[4], ROUNDING[dtype]
    if channels_last:
        level = level.contiguous(memory_format=torch.channels_last)
    for mask, token, shift in ((visible, mask_token, bias), (None, None, None)):
        out = ops.align_cells(level, weight, shift, mask, token, positions, patch)
        wide = [None if x is None else x.double() for x in (level, weight, shift, token, positions)]
        want = get_op("align_cells").reference(*wide[:3], mask, *wide[3:], patch)
        # A token is rounded before its position is added.
        torch.testing.assert_close(out.double(), want, rtol=2 * rounding + 1e-5, atol=3 * rounding + 1e-5)
        d_level, d_weight = ops.align_cells_grad(level, weight, mask, grad, patch)
        want = get_op("align_cells_grad").reference(level.double(), weight.double(), mask, grad.double(), patch)
        assert d_level.stride() == level.stride()
        for got, expected in zip((d_level, d_weight), want, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), expected, rtol=rounding + 1e-5, atol=1e-4)


@pytest.mark.parametrize("way", ["native", "float32"])
def test_bf16_product_both_ways(native, child, way):
    code = """
import torch
from fastmkd._native_loader import load
from fastmkd.ops import get_op
load()
g = torch.Generator().manual_seed(0)
shapes = (2, 8, 8, 6), (24, 32), (24,), (24,), (12, 24), (2, 12, 24)
level, weight, bias, token, positions, grad = ((torch.randn(s, generator=g) / 3).bfloat16() for s in shapes)
visible, native = torch.rand(2, 12, generator=g) > 0.3, torch.ops.fastmkd_native
tokens = native.align_cells(level, weight, bias, visible, token, positions, 2)
out = tokens, *native.align_cells_grad(level, weight, visible, grad, 2)
x, w, *wide, pull = [x.double() for x in (level, weight, bias, token, positions, grad)]
tokens = get_op("align_cells").reference(x, w, wide[0], visible, *wide[1:], 2)
want = tokens, *get_op("align_cells_grad").reference(x, w, visible, pull, 2)
print(all((a.double() - b).norm() < 0.01 * b.norm() for a, b in zip(out, want)))
"""
    assert child(code, FASTMKD_BF16_MATMUL=way) == "True"


def test_nothing_hidden_and_everything_hidden(ops):
    level, weight, bias, visible, mask_token, positions, grad = inputs(2, 5, 2, 3, 2, 7)
    whole = ops.align_cells(level, weight, bias, torch.ones_like(visible), mask_token, positions, 2)
    assert torch.equal(whole, ops.align_cells(level, weight, bias, None, None, positions, 2))
    none = torch.zeros_like(visible)
    out = ops.align_cells(level, weight, bias, none, mask_token, positions, 2)
    assert torch.equal(out, (mask_token + positions).expand_as(out))
    assert not any(x.any() for x in ops.align_cells_grad(level, weight, none, grad, 2))


def test_hidden_cells_take_no_part(ops):
    level, weight, bias, visible, mask_token, positions, grad = inputs(2, 20, 4, 4, 4, 8)
    seen = visible.unflatten(1, (4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    spoilt = torch.where(seen, level, float("nan"))
    for one, other in zip(
        (ops.align_cells(spoilt, weight, bias, visible, mask_token, positions, 4),
         *ops.align_cells_grad(spoilt, weight, visible, grad, 4)),
        (ops.align_cells(level, weight, bias, visible, mask_token, positions, 4),
         *ops.align_cells_grad(level, weight, visible, grad, 4)),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one, other)


def test_of_hidden_cells_nothing_is_written(ops):
    """Beside the result, rows of the visible cells: with one cell in a hundred visible next to nothing."""
    level, weight, bias, _, mask_token, positions, _ = inputs(2, 64, 10, 10, 4, 16)
    few = torch.arange(100).remainder(50).eq(0).expand(2, -1).contiguous()
    peak = peak_bytes(lambda: ops.align_cells(level, weight, bias, few, mask_token, positions, 4), level.device)
    assert peak < level.nbytes / 10


X, W, S, V, M, P, G = inputs(2, 3, 2, 3, 2, 5)

BAD = [
    ("align_cells", (X[0], W, S, V, M, P, 2), "level has shape"),
    ("align_cells", (X.double(), W, S, V, M, P, 2), "level has dtype Double"),
    ("align_cells", (rand(2, 3, 6, 4).mT, W, S, V, M, P, 2), "level is neither contiguous nor channels-last"),
    ("align_cells", (X, W, S, V, M, P, 0), "patch is 0"),
    ("align_cells", (X, W, S, V, M, P, 4), "patch is 4"),
    ("align_cells", (X, W[:, 1:].contiguous(), S, V, M, P, 2), "weight has shape"),
    ("align_cells", (X, W.half(), S, V, M, P, 2), "weight has dtype Half"),
    ("align_cells", (X, rand(12, 5).mT, S, V, M, P, 2), "weight is not contiguous"),
    ("align_cells", (X, W, S[:4], V, M, P, 2), "bias has shape"),
    ("align_cells", (X, W, S, V[:1], M, P, 2), "visible has shape"),
    ("align_cells", (X, W, S, V.byte(), M, P, 2), "visible has dtype Byte"),
    ("align_cells", (X, W, S, V, None, P, 2), "visible and mask_token go together"),
    ("align_cells", (X, W, S, V, M.half(), P, 2), "mask_token has dtype Half"),
    ("align_cells", (X, W, S, V, M, P[:5], 2), "positions has shape"),
    ("align_cells_grad", (X, W, V, G[:, :5], 2), "grad has shape"),
    ("align_cells_grad", (X, W, V, G.half(), 2), "grad has dtype Half"),
    ("align_cells_grad", (X, W, V, rand(2, 5, 6).mT, 2), "grad is not contiguous"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_arguments_are_named(ops, name, args, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        getattr(ops, name)(*args)
