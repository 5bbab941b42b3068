"""The compiled CPU operators, called directly, on every instruction set of this machine."""

import numpy as np
import pytest
import torch

# Half a unit in the last place, relative.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def saliency_by_numpy(q, k, prefix, scale, include_prefix):
    q, k = q.double().numpy(), k.double().numpy()
    first = 0 if include_prefix else prefix
    logits = scale * np.einsum("bhd,bhnd->bhn", q, k[:, :, first:])
    e = np.exp(logits - logits.max(-1, keepdims=True))
    p = (e / e.sum(-1, keepdims=True))[:, :, prefix - first :]
    return p.mean(1) if include_prefix else p.sum(1)


@pytest.mark.parametrize("include_prefix", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("batch", "heads", "prefix", "patches", "dim"),
    [(2, 3, 1, 196, 64), (1, 1, 1, 1, 1), (3, 2, 5, 17, 33), (1, 12, 2, 600, 64), (2, 2, 1, 49, 80)],
)
def test_cls_saliency(ops, batch, heads, prefix, patches, dim, dtype, include_prefix):
    qkv = rand(batch, prefix + patches, 3, heads, dim, dtype=dtype)  # as in a ViT: q and k are views
    q, k = qkv[:, 0, 0], qkv[:, :, 1].transpose(1, 2)
    out = ops.cls_saliency(q, k, prefix, dim**-0.5, include_prefix)
    want = saliency_by_numpy(q, k, prefix, dim**-0.5, include_prefix)
    assert out.dtype == torch.float32
    assert out.shape == (batch, patches)
    np.testing.assert_allclose(out.double().numpy(), want, rtol=4e-6)


def test_cls_saliency_extremes(ops):
    q, k = rand(1, 2, 16), rand(1, 2, 8, 16)
    large = ops.cls_saliency(q * 1e4, k, 1, 1.0, False)  # all weight on one patch, the others underflow to 0
    np.testing.assert_allclose(large.sum().item(), 2.0, rtol=1e-5)
    assert (large >= 0).all()
    k[0, 1, 5, 3] = float("nan")
    assert ops.cls_saliency(q, k, 1, 1.0, False).isnan().all()
    for bits in (-1, 0x7FC00001, 0x7F800001):  # NaN whose low bits an exponent could be added to
        k.view(torch.int32)[0, 1, 5, 3] = bits
        assert ops.cls_saliency(q, k, 1, 1.0, False).isnan().all()
    k[0, 1, 5, 3] = float("inf")
    assert ops.cls_saliency(q.abs(), k, 1, 1.0, False).isnan().all()  # as softmax: inf - inf


def select_by_numpy(saliency, k):
    order = np.argsort(-saliency.numpy(), axis=1, kind="stable")  # -0.0 == 0.0, ties keep their order
    return np.sort(order[:, :k], axis=1)


@pytest.mark.parametrize("patches", [1, 16, 196, 577, 1024, 4096])
def test_select_tokens(ops, patches):
    levels = torch.randint(-3, 4, (3, patches), generator=torch.Generator().manual_seed(patches)).float()
    for saliency in (rand(3, patches), levels * 0.1, torch.zeros(3, patches), -levels.abs() * 0.0):
        for k in {1, (patches + 1) // 2, patches}:
            got = ops.select_tokens(saliency, k, 1, patches, 1, patches)
            assert got.dtype == torch.int64
            np.testing.assert_array_equal(got.numpy(), select_by_numpy(saliency, k))


def resize_by_numpy(maps, size):
    """float32, one rounding per operation, in the order of the definition."""
    f = np.float32

    def axis(n_in, n_out):
        src = np.maximum((np.arange(n_out, dtype=f) + f(0.5)) * f(n_in / n_out) - f(0.5), f(0))
        low = np.minimum(src.astype(np.int64), n_in - 1)
        high = np.minimum(low + 1, n_in - 1)
        w = np.where(low == high, f(0), src - low.astype(f))
        return low, high, f(1) - w, w

    i0, i1, h0, h1 = axis(maps.shape[1], size[0])
    j0, j1, w0, w1 = axis(maps.shape[2], size[1])
    rows = w0 * maps[:, :, j0] + w1 * maps[:, :, j1]
    return h0[:, None] * rows[:, i0] + h1[:, None] * rows[:, i1]


@pytest.mark.parametrize(
    ("grid", "target"),
    [
        ((14, 14), (16, 16)),
        ((14, 14), (24, 24)),
        ((24, 24), (14, 14)),
        ((7, 9), (13, 5)),
        ((1, 12), (5, 12)),
        ((1, 1), (3, 3)),
    ],
)
def test_select_tokens_resized_to_the_bit(ops, grid, target):
    n = target[0] * target[1]
    smooth = rand(4, grid[0] * grid[1])
    ties = torch.randint(-3, 4, smooth.shape, generator=torch.Generator().manual_seed(1)).float()
    for saliency in (smooth, ties):
        maps = torch.from_numpy(resize_by_numpy(saliency.view(-1, *grid).numpy(), target)).reshape(4, -1)
        assert maps.dtype == torch.float32
        for k in {1, n // 2, n - 1}:
            got = ops.select_tokens(saliency, k, *grid, *target)
            np.testing.assert_array_equal(got.numpy(), select_by_numpy(maps, k))


def embed_by_convolution(images, weight, bias, pos, keep, stride):
    """Embed every patch, then gather: the obvious way, in float64."""
    maps = torch.nn.functional.conv2d(images.double(), weight.double(), stride=stride)
    tokens = maps.flatten(2).transpose(1, 2)  # (B, D, gh, gw) -> (B, N, D)
    if bias is not None:
        tokens = tokens + bias.double()
    if pos is not None:
        tokens = tokens + pos.double()
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("with_bias", "pos_kind"), [(True, "same"), (True, "float32"), (False, None), (False, "same")])
@pytest.mark.parametrize(
    ("shape", "patch", "stride", "width"),
    [((2, 3, 32, 48), (16, 16), (16, 16), 24), ((2, 1, 20, 33), (7, 5), (3, 4), 17), ((3, 2, 5, 5), (1, 1), (1, 1), 5)],
)
def test_patch_embed(ops, shape, patch, stride, width, with_bias, pos_kind, dtype):
    n = ((shape[2] - patch[0]) // stride[0] + 1) * ((shape[3] - patch[1]) // stride[1] + 1)
    images, weight = rand(*shape, dtype=dtype), rand(width, shape[1], *patch, dtype=dtype, seed=1) / 8
    bias = rand(width, dtype=dtype, seed=2) if with_bias else None
    pos = None if pos_kind is None else rand(n, width, dtype=dtype if pos_kind == "same" else torch.float32, seed=3)
    generator = torch.Generator().manual_seed(4)
    keep = torch.stack([torch.randperm(n, generator=generator)[: max(1, n // 2)] for _ in range(shape[0])])
    out = ops.patch_embed(images, weight, bias, pos, keep, *stride)
    want = embed_by_convolution(images, weight, bias, pos, keep, stride)
    assert out.dtype == (dtype if pos is None else torch.promote_types(dtype, pos.dtype))
    # Summed in float32 and rounded once.
    allowed = (ROUNDING.get(out.dtype, 0.0) + 1e-5) * want.abs() + 1e-5
    from fastmkd import _native

    if _native.active_isa() == "avx512_bf16" and out.dtype == torch.bfloat16 and with_bias and pos is not None:
        # Products of bf16 are added to bias + position, which has been rounded to half a unit in the last place.
        allowed += 2**-8 * (bias.double() + pos.double())[keep].abs()
    assert ((out.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("way", ["native", "float32"])
def test_bf16_product_both_ways(native, child, way):
    code = """
import torch
from fastmkd._native_loader import load
load()
g = torch.Generator().manual_seed(0)
shapes = (2, 3, 32, 32), (24, 3, 8, 8), (24,), (16, 24)
images, weight, bias, pos = ((torch.randn(s, generator=g) / 3).bfloat16() for s in shapes)
keep = torch.tensor([[0, 5, 9], [15, 2, 1]])
out = torch.ops.fastmkd_native.patch_embed(images, weight, bias, pos, keep, 8, 8)
full = torch.nn.functional.conv2d(images.double(), weight.double(), bias.double(), stride=8)
full = full.flatten(2).mT + pos.double()
print((out.double() - full.gather(1, keep[..., None].expand(-1, -1, 24))).abs().max().item() < 0.05)
"""
    assert child(code, FASTMKD_BF16_MATMUL=way) == "True"


def test_patch_embed_reads_only_kept_patches(ops):
    images, weight = rand(1, 3, 32, 32), rand(8, 3, 16, 16)
    images[:, :, 16:, :] = float("nan")
    out = ops.patch_embed(images, weight, None, None, torch.tensor([[1, 0]]), 16, 16)
    assert out.isfinite().all()


def test_patch_embed_carries_no_gradient_and_ignores_autograd(ops):
    images, weight = rand(1, 3, 8, 8).requires_grad_(), rand(8, 3, 4, 4).requires_grad_()
    out = ops.patch_embed(images, weight, None, None, torch.tensor([[1, 2]]), 4, 4)
    torch.testing.assert_close(
        out.double(), embed_by_convolution(images, weight, None, None, torch.tensor([[1, 2]]), 4), rtol=1e-5, atol=1e-5
    )


def test_empty_batch(ops):
    assert ops.select_tokens(torch.empty(0, 12), 3, 3, 4, 3, 4).shape == (0, 3)
    assert ops.cls_saliency(torch.empty(0, 2, 8), torch.empty(0, 2, 5, 8), 1, 1.0, False).shape == (0, 4)
    keep = torch.empty(0, 2, dtype=torch.int64)
    assert ops.patch_embed(torch.empty(0, 3, 8, 8), rand(5, 3, 4, 4), None, None, keep, 4, 4).shape == (0, 2, 5)


def test_results_do_not_depend_on_the_thread_count(ops):
    qkv = rand(3, 197, 3, 6, 64)
    saliency = rand(64, 196)
    images, weight, keep = rand(4, 3, 64, 64), rand(32, 3, 16, 16), torch.arange(8).repeat(4, 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (
                    ops.cls_saliency(qkv[:, 0, 0], qkv[:, :, 1].transpose(1, 2), 1, 0.125, False),
                    ops.select_tokens(saliency, 98, 14, 14, 16, 16),
                    ops.patch_embed(images, weight, None, None, keep, 16, 16),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def convolution_by_numpy(values, weight, bias, taps, groups):
    """Every tap of every row by itself, in float64."""
    x = np.concatenate((values.double().numpy(), np.zeros((1, values.shape[1]))))[taps.numpy()]  # (N, T, Cin)
    w = weight.double().flatten(2).unflatten(0, (groups, -1)).numpy()  # (g, Cout/g, Cin/g, T)
    out = np.einsum("ntgi,goit->ngo", x.reshape(*taps.shape, groups, -1), w).reshape(len(taps), -1)
    return out if bias is None else out + bias.double().numpy()


def tables(rows_in, rows_out, taps):
    g = torch.Generator().manual_seed(rows_out)
    table = torch.randint(-rows_in // 2, rows_in, (rows_out, taps), generator=g).clamp_(min=-1).int()
    back = torch.full((rows_in, taps), -1, dtype=torch.int32)  # not read by the CPU kernel
    return table, back, torch.arange(rows_out, dtype=torch.int32), torch.arange(rows_in, dtype=torch.int32)


# Cin, Cout, groups, kernel: narrow, odd, wide, grouped, depthwise
CONVOLUTIONS = [(3, 64, 1, 7), (37, 24, 1, 3), (144, 96, 1, 3), (64, 64, 32, 3), (96, 96, 96, 7), (5, 5, 5, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cin", "cout", "groups", "kernel"), CONVOLUTIONS)
def test_masked_conv2d(ops, cin, cout, groups, kernel, dtype):
    taps = tables(300, 400, kernel**2)
    values, bias = rand(300, cin, dtype=dtype), rand(cout, dtype=dtype, seed=2)
    weight = rand(cout, cin // groups, kernel, kernel, dtype=dtype, seed=1) / kernel
    want = torch.from_numpy(convolution_by_numpy(values, weight, bias, taps[0], groups))
    for layout in (weight, weight.contiguous(memory_format=torch.channels_last), weight.mT.contiguous().mT):
        out = ops.masked_conv2d(values, layout, bias, *taps, groups)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, rtol=ROUNDING[dtype] + 1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("cin", "cout", "groups", "kernel"),
    [(128, 128, 32, 3), (64, 64, 4, 3), (12, 12, 4, 3), (24, 40, 8, 1), (40, 20, 20, 3), (6, 10, 2, 3)],
)
def test_an_infinity_stays_in_its_group(ops, cin, cout, groups, kernel, number, dtype):
    """The weights of small groups lie side by side, with zeros between them: zero times infinity is NaN."""
    taps = tables(300, 400, kernel**2)
    values, bias = rand(300, cin, dtype=dtype), rand(cout, dtype=dtype, seed=2)
    weight = rand(cout, cin // groups, kernel, kernel, dtype=dtype, seed=1) / kernel
    values[3, cin // groups], values[50, cin - 1], values[50, 0] = number, number, -number
    want = torch.from_numpy(convolution_by_numpy(values, weight, bias, taps[0], groups))
    out = ops.masked_conv2d(values, weight, bias, *taps, groups).double()
    assert (out.isfinite() == want.isfinite()).all()
    assert want.isfinite().sum() < want.numel()
    torch.testing.assert_close(out, want, rtol=ROUNDING[dtype] + 1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("cin", "cout", "groups", "kernel"), CONVOLUTIONS)
def test_masked_conv2d_weight(ops, cin, cout, groups, kernel):
    taps, _, order, _ = tables(300, 2500, kernel**2)
    values, grad = rand(300, cin), rand(2500, cout, seed=1)
    out = ops.masked_conv2d_weight(values, grad, taps, order, kernel, kernel, groups)
    x = np.concatenate((values.double().numpy(), np.zeros((1, cin))))[taps.numpy()].reshape(*taps.shape, groups, -1)
    want = np.einsum("ntgi,ngo->goit", x, grad.double().numpy().reshape(2500, groups, -1), optimize=True)
    torch.testing.assert_close(out.double().flatten(), torch.from_numpy(want).flatten(), rtol=1e-5, atol=1e-3)


def test_masked_convolutions_do_not_depend_on_the_thread_count(ops):
    """A known sparse convolution library gives other answers with two threads."""
    before = torch.get_num_threads()
    for cin, cout, groups, kernel in ((64, 64, 1, 3), (3, 64, 1, 7), (160, 200, 1, 3), (96, 96, 96, 7)):
        taps = tables(900, 3000, kernel**2)
        values, grad, weight = rand(900, cin), rand(3000, cout), rand(cout, cin // groups, kernel, kernel)
        results = []
        try:
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                forward = ops.masked_conv2d(values, weight, None, *taps, groups)
                results.append((forward, ops.masked_conv2d_weight(values, grad, *taps[::2], kernel, kernel, groups)))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_masked_convolutions_without_rows(ops):
    none = tables(4, 0, 9)
    assert ops.masked_conv2d(rand(4, 8), rand(6, 8, 3, 3), None, *none, 1).shape == (0, 6)
    assert (ops.masked_conv2d_weight(rand(4, 8), rand(0, 6), none[0], none[2], 3, 3, 1) == 0).all()
    hidden = torch.full((5, 9), -1, dtype=torch.int32)
    order = torch.arange(5, dtype=torch.int32)
    out = ops.masked_conv2d(rand(0, 8), rand(6, 8, 3, 3), torch.ones(6), hidden, hidden[:0], order, order[:0], 1)
    assert (out == 1).all()


S = torch.rand(2, 12)
Z, M, P = torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), torch.rand(3, 4)
Q, K = torch.rand(2, 3, 8), torch.rand(2, 3, 5, 8)
IMG, W, KEEP = torch.rand(2, 3, 8, 8), torch.rand(6, 3, 4, 4), torch.tensor([[0, 1], [2, 3]])

X, CW, T9 = torch.rand(4, 6), torch.rand(5, 6, 3, 3), torch.zeros(4, 9, dtype=torch.int32)
ROWS, DY = torch.arange(4, dtype=torch.int32), torch.rand(4, 5)

BAD = [
    ("masked_conv2d", (X[0], CW, None, T9, T9, ROWS, ROWS, 1), "values has shape"),
    ("masked_conv2d", (X.double(), CW.double(), None, T9, T9, ROWS, ROWS, 1), "values has dtype Double"),
    ("masked_conv2d", (X.T.contiguous().T, CW, None, T9, T9, ROWS, ROWS, 1), "values is not contiguous"),
    ("masked_conv2d", (X, CW.half(), None, T9, T9, ROWS, ROWS, 1), "weight has dtype"),
    ("masked_conv2d", (X, CW, None, T9, T9, ROWS, ROWS, 4), "groups is 4"),
    ("masked_conv2d", (X, CW[:, :3], None, T9, T9, ROWS, ROWS, 1), "weight has shape"),
    ("masked_conv2d", (X, CW, torch.ones(4), T9, T9, ROWS, ROWS, 1), "bias has shape"),
    ("masked_conv2d", (X, CW, None, T9[:, :8], T9, ROWS, ROWS, 1), "taps is not contiguous"),
    ("masked_conv2d", (X, CW, None, T9.long(), T9, ROWS, ROWS, 1), "taps has dtype"),
    ("masked_conv2d", (X, CW, None, T9 + 4, T9, ROWS, ROWS, 1), "taps holds"),
    ("masked_conv2d", (X, CW, None, T9 - 2, T9, ROWS, ROWS, 1), "taps holds"),
    ("masked_conv2d", (X, CW, None, T9, T9[1:], ROWS, ROWS, 1), "taps_back has shape"),
    ("masked_conv2d", (X, CW, None, T9, T9, ROWS[1:], ROWS, 1), "order has shape"),
    ("masked_conv2d", (X, CW, None, T9, T9, ROWS, ROWS.long(), 1), "order_back has dtype"),
    ("masked_conv2d_weight", (X, DY.half(), T9, ROWS, 3, 3, 1), "grad has dtype"),
    ("masked_conv2d_weight", (X, DY, T9, ROWS, 3, 2, 1), "taps has shape"),
    ("masked_conv2d_weight", (X, DY, T9, ROWS, 0, 3, 1), "the kernel is"),
    ("masked_conv2d_weight", (X, DY, T9 + 4, ROWS, 3, 3, 1), "taps holds"),
    ("masked_conv2d_weight", (X, DY, T9, ROWS, 3, 3, 5), "groups is 5"),
    ("select_tokens", (S, 0, 3, 4, 3, 4), "k is 0; expected 1 to 12"),
    ("select_tokens", (S, 13, 3, 4, 3, 4), "k is 13"),
    ("select_tokens", (S, 2, 3, 5, 3, 5), r"saliency has shape \(2, 12\)"),
    ("select_tokens", (S, 2, 3, 4, 0, 4), r"target_grid is \(0, 4\)"),
    ("select_tokens", (S, 2, 3, 4, 1 << 40, 1 << 40), "more than"),
    ("select_tokens", (S[0], 2, 3, 4, 3, 4), r"saliency has shape \(12,\)"),
    ("select_tokens", (S.double(), 2, 3, 4, 3, 4), "saliency has dtype Double"),
    ("select_tokens", (torch.rand(12, 2).T, 2, 3, 4, 3, 4), "saliency is not contiguous"),
    ("select_tokens", (S * float("nan"), 2, 3, 4, 3, 4), "NaN or infinity"),
    ("select_tokens", (torch.tensor([[0.0, 1.0], [0.0, float("-inf")]]), 1, 1, 2, 1, 2), "row 1"),
    ("stitch_tokens", (S, Z, M, P), "student has shape"),
    ("stitch_tokens", (Z.double(), Z.double(), M, P.double()), "student has dtype Double"),
    ("stitch_tokens", (Z, Z[:1], M, P), "teacher has shape"),
    ("stitch_tokens", (Z, Z.half(), M, P), "teacher has dtype Half"),
    ("stitch_tokens", (Z, Z, M.byte(), P), "from_teacher has dtype Byte"),
    ("stitch_tokens", (Z, Z, M[:1], P), "from_teacher has shape"),
    ("stitch_tokens", (Z, Z, M, P[:2]), "position has shape"),
    ("stitch_tokens", (Z, torch.zeros(2, 4, 3).mT, M, P), "teacher is not contiguous"),
    ("cls_saliency", (Q[0], K, 1, 1.0, False), "q has shape"),
    ("cls_saliency", (Q, K[:, :2], 1, 1.0, False), "k has shape"),
    ("cls_saliency", (Q, K.half(), 1, 1.0, False), "k has dtype Half"),
    ("cls_saliency", (Q.double(), K.double(), 1, 1.0, False), "q has dtype Double"),
    ("cls_saliency", (Q, K, 5, 1.0, False), "num_prefix_tokens is 5; expected 1 to 4"),
    ("cls_saliency", (Q, K, 0, 1.0, False), "num_prefix_tokens is 0"),
    ("cls_saliency", (Q, torch.rand(2, 3, 8, 5).mT, 1, 1.0, False), "k's last dimension has stride 5"),
    ("patch_embed", (IMG[0], W, None, None, KEEP, 4, 4), "images has shape"),
    ("patch_embed", (IMG, W[:, :2].contiguous(), None, None, KEEP, 4, 4), "weight has shape"),
    ("patch_embed", (IMG, W.half(), None, None, KEEP, 4, 4), "weight has dtype Half"),
    ("patch_embed", (IMG, W, None, None, KEEP + 1, 4, 4), "keep holds 4; expected 0 to 3"),
    ("patch_embed", (IMG, W, None, None, KEEP - 1, 4, 4), "keep holds -1; expected 0 to 3"),
    ("patch_embed", (IMG, W, None, None, KEEP.int(), 4, 4), "keep has dtype Int"),
    ("patch_embed", (IMG, W, None, None, KEEP[:1], 4, 4), "keep has shape"),
    ("patch_embed", (IMG, W, torch.rand(5), None, KEEP, 4, 4), "bias has shape"),
    ("patch_embed", (IMG, W, None, torch.rand(5, 6), KEEP, 4, 4), "pos has shape"),
    ("patch_embed", (IMG, W, None, torch.rand(4, 6).half(), KEEP, 4, 4), "pos has dtype Half"),
    ("patch_embed", (IMG, W, None, None, KEEP, 0, 4), "stride is"),
    ("patch_embed", (IMG[:, :, :3].contiguous(), W, None, None, KEEP, 4, 4), "at least one patch"),
    ("patch_embed", (IMG.mT, W, None, None, KEEP, 4, 4), "images is not contiguous"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_arguments_are_named(ops, name, args, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        getattr(ops, name)(*args)
