"""The compiled operators of a masked autoencoder, called directly, on every instruction set of this machine."""

import numpy as np
import pytest
import torch

LOW = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def choose(batch, patches, count):
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(9)).argsort(1)[:, :count].contiguous()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("batch", "prefix", "patches", "kept", "width"), [(2, 1, 9, 4, 33), (3, 0, 5, 5, 64), (1, 4, 7, 1, 3)]
)
def test_unshuffle_tokens_place_by_place(ops, batch, prefix, patches, kept, width, dtype, wide):
    out_dtype = torch.float32 if wide else dtype
    tokens, keep = rand(batch, prefix + kept, width, dtype=dtype), choose(batch, patches, kept)
    mask_token, positions = rand(width, dtype=out_dtype, seed=1), rand(prefix + patches, width, dtype=out_dtype, seed=2)
    out = ops.unshuffle_tokens(tokens, keep, mask_token, positions)
    assert out.dtype == out_dtype
    for b in range(batch):
        for place in range(prefix + patches):
            named = (keep[b] == place - prefix).nonzero().flatten().tolist()
            row = tokens[b, prefix + named[0]] if named else tokens[b, place] if place < prefix else mask_token
            expected = (row.float() + positions[place].float()).to(out_dtype)
            assert torch.equal(out[b, place], expected), (b, place)


def loss_by_numpy(prediction, images, hidden, patch_h, patch_w, normalize):
    """Loss and its gradient, patch by patch in float64."""
    grid_w, images = images.shape[3] // patch_w, images.double().numpy()
    prediction = prediction.double().numpy()
    differences = np.empty_like(prediction)
    for b, row in enumerate(hidden.tolist()):
        for j, patch in enumerate(row):
            y, x = patch // grid_w * patch_h, patch % grid_w * patch_w
            target = images[b, :, y : y + patch_h, x : x + patch_w].transpose(1, 2, 0).flatten()
            if normalize:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            differences[b, j] = prediction[b, j] - target
    return (differences**2).mean(), 2 * differences / differences.size


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("shape", "patch", "hidden"),
    [((2, 3, 32, 48), (16, 16), 4), ((2, 1, 15, 8), (5, 2), 7), ((1, 5, 14, 28), (7, 14), 1)],
)
def test_masked_patch_loss_and_its_gradient(ops, shape, patch, hidden, dtype, normalize):
    patches = shape[2] // patch[0] * (shape[3] // patch[1])
    numbers = choose(shape[0], patches, hidden)
    prediction = rand(shape[0], hidden, patch[0] * patch[1] * shape[1], dtype=dtype)
    for image_dtype in {dtype, torch.float32}:
        images = rand(*shape, dtype=image_dtype, seed=1)
        want, want_grad = loss_by_numpy(prediction, images, numbers, *patch, normalize)
        loss, stats = ops.masked_patch_loss(prediction, images, numbers, *patch, normalize)
        assert loss.dtype == stats.dtype == torch.float32
        assert loss.item() == pytest.approx(want, rel=2e-6)
        grad = ops.masked_patch_loss_grad(prediction, images, numbers, stats, torch.tensor(3.0), *patch)
        assert grad.dtype == dtype
        np.testing.assert_allclose(
            grad.double().numpy(), 3 * want_grad, rtol=ROUNDING[dtype], atol=4e-6 * np.abs(want_grad).max() + 2**-24
        )


def test_visible_patches_are_not_read(ops):
    images = rand(1, 3, 16, 16)
    images[:, :, :8] = float("nan")
    hidden, prediction = torch.tensor([[3, 2]]), rand(1, 2, 192)
    loss, stats = ops.masked_patch_loss(prediction, images, hidden, 8, 8, True)
    assert loss.isfinite()
    assert ops.masked_patch_loss_grad(prediction, images, hidden, stats, loss, 8, 8).isfinite().all()


def test_a_flat_patch_has_no_variance(ops):
    images = torch.full((1, 3, 8, 8), 0.3)
    loss, stats = ops.masked_patch_loss(torch.zeros(1, 1, 48), images, torch.tensor([[2]]), 4, 4, True)
    assert loss == 0
    torch.testing.assert_close(stats.flatten().tolist(), [0.3, 1e3])


def test_results_do_not_depend_on_the_thread_count(ops):
    tokens, keep, token, positions = rand(8, 50, 96), choose(8, 196, 49), rand(96), rand(197, 96)
    prediction, images, hidden = rand(8, 30, 768), rand(8, 3, 96, 96), choose(8, 36, 30)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, stats = ops.masked_patch_loss(prediction, images, hidden, 16, 16, True)
            grad = ops.masked_patch_loss_grad(prediction, images, hidden, stats, loss, 16, 16)
            results.append((ops.unshuffle_tokens(tokens, keep, token, positions), loss, stats, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


T, KEEP, M, P = rand(2, 3, 4), torch.tensor([[0, 4], [2, 1]]), rand(4), rand(6, 4)
X, Y, HIDDEN = rand(2, 3, 8, 12), rand(2, 2, 48), torch.tensor([[0, 5], [3, 2]])
STATS, G = torch.ones(2, 2, 2), torch.tensor(1.0)

BAD = [
    ("unshuffle_tokens", (T[0], KEEP, M, P), "tokens has shape"),
    ("unshuffle_tokens", (T.double(), KEEP, M.double(), P.double()), "tokens has dtype Double"),
    ("unshuffle_tokens", (T, KEEP[:1], M, P), "keep has shape"),
    ("unshuffle_tokens", (T, KEEP.int(), M, P), "keep has dtype Int"),
    ("unshuffle_tokens", (T, KEEP + 1, M, P), "keep holds 5; expected 0 to 4"),
    ("unshuffle_tokens", (T, KEEP - 1, M, P), "keep holds -1"),
    ("unshuffle_tokens", (T, KEEP // 2 * 2 % 4, M, P), "keep names the patch 0 twice for image 0"),
    ("unshuffle_tokens", (T, KEEP, M[:3], P), "mask_token has shape"),
    ("unshuffle_tokens", (T, KEEP, M.half(), P), "mask_token has dtype Half"),
    ("unshuffle_tokens", (T, KEEP, M, P[:2]), "positions has shape"),
    ("unshuffle_tokens", (T, KEEP, M.half(), P.half()), "positions has dtype Half"),
    ("unshuffle_tokens", (rand(2, 4, 3).mT, KEEP, M, P), "tokens is not contiguous"),
    ("masked_patch_loss", (Y[0], X, HIDDEN, 4, 4, True), "prediction has shape"),
    ("masked_patch_loss", (Y.double(), X.double(), HIDDEN, 4, 4, True), "prediction has dtype Double"),
    ("masked_patch_loss", (Y, X.half(), HIDDEN, 4, 4, True), "images has dtype Half"),
    ("masked_patch_loss", (Y, X.mT, HIDDEN, 4, 4, True), "images is not contiguous"),
    ("masked_patch_loss", (Y, X, HIDDEN, 4, 5, True), "the patch size is"),
    ("masked_patch_loss", (Y, X, HIDDEN, 0, 4, True), "the patch size is"),
    ("masked_patch_loss", (Y, X, HIDDEN[:1], 4, 4, True), "hidden has shape"),
    ("masked_patch_loss", (Y, X, HIDDEN.int(), 4, 4, True), "hidden has dtype Int"),
    ("masked_patch_loss", (Y, X, HIDDEN + 1, 4, 4, True), "hidden holds 6; expected 0 to 5"),
    ("masked_patch_loss", (Y[:, :, 1:].contiguous(), X, HIDDEN, 4, 4, True), "prediction has shape"),
    ("masked_patch_loss_grad", (Y, X, HIDDEN - 1, STATS, G, 4, 4), "hidden holds -1"),
    ("masked_patch_loss_grad", (Y, X, HIDDEN, STATS[0], G, 4, 4), "stats has shape"),
    ("masked_patch_loss_grad", (Y, X, HIDDEN, STATS.half(), G, 4, 4), "stats has dtype Half"),
    ("masked_patch_loss_grad", (Y, X, HIDDEN, STATS, G.expand(2), 4, 4), "grad has shape"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_arguments_are_named(ops, name, args, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        getattr(ops, name)(*args)
