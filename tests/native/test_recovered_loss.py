"""The compiled recovered loss and its gradient, called directly, on every instruction set of this machine."""

import pytest
import torch

from fastmkd.bench.memory import peak_bytes
from fastmkd.ops import get_op

LOW = [torch.float32, torch.bfloat16, torch.float16]


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(batch, channels, gh, gw, patch, dtype=torch.float32, teacher=torch.float32):
    rows = rand(batch, gh * gw, patch * patch * channels, dtype=dtype)
    return rows, rand(batch, channels, gh * patch, gw * patch, dtype=teacher, seed=1), rand(2, channels, seed=2) / 3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(2, 33, 2, 3, 3), (1, 1, 2, 1, 2), (3, 64, 1, 20, 1), (2, 100, 3, 9, 2)])
def test_loss_and_gradient(ops, shape, dtype, channels_last):
    for taught in {dtype, torch.float32}:
        rows, teacher, queries = inputs(*shape, dtype, taught)
        if channels_last:
            teacher = teacher.to(memory_format=torch.channels_last)
        batch, channels = teacher.shape[:2]
        out = ops.recovered_loss(rows, teacher, queries, shape[4])
        want = get_op("recovered_loss").reference(rows.double(), teacher.double(), queries.double(), shape[4])
        for got, expected in zip(out, want, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)
        grads = torch.tensor(300.0), rand(batch, channels, seed=3), rand(2, batch, channels, seed=4), rand(2, batch)
        out = ops.recovered_loss_grad(rows, teacher, queries, out[3], *grads, shape[4])
        wide = [x.double() for x in (rows, teacher, queries, want[3], *grads)]
        expected_rows, expected_queries = get_op("recovered_loss_grad").reference(*wide, shape[4])
        rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        atol = 1e-5 * expected_rows.abs().max().item()
        torch.testing.assert_close(out[0].double(), expected_rows, rtol=rtol, atol=atol)
        torch.testing.assert_close(out[1].double(), expected_queries, rtol=1e-4, atol=1e-4)


def test_a_logit_that_is_not_a_number_is_seen(ops):
    rows, teacher, queries = inputs(1, 4, 2, 2, 2)
    rows[0, 1, 5] = float("nan")
    error, difference, contexts, log_sums = ops.recovered_loss(rows, teacher, queries, 2)
    assert error.isnan()
    assert difference.isnan().all()
    assert contexts[0].isnan().all()
    assert log_sums[0].isnan().all()
    assert contexts[1].isfinite().all()


def test_results_do_not_depend_on_the_thread_count(ops):
    rows, teacher, queries = inputs(3, 96, 5, 8, 4)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            error, difference, contexts, log_sums = ops.recovered_loss(rows, teacher, queries, 4)
            grads = error, difference, contexts, torch.ones_like(log_sums)
            d_rows, d_queries = ops.recovered_loss_grad(rows, teacher, queries, log_sums, *grads, 4)
            results.append((*grads[:3], log_sums, d_rows, d_queries))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


R, T, Q = inputs(2, 5, 2, 3, 2)
L, G, GD, GC, K = torch.zeros(2, 2), torch.tensor(1.0), torch.zeros(2, 5), torch.zeros(2, 2, 5), torch.zeros(2, 2)

BAD = [
    ("recovered_loss", (R[0], T, Q, 2), "rows has shape"),
    ("recovered_loss", (R, T[0], Q, 2), "teacher has shape"),
    ("recovered_loss", (R.double(), T.double(), Q, 2), "rows has dtype Double"),
    ("recovered_loss", (R, T.half(), Q, 2), "teacher has dtype Half"),
    ("recovered_loss", (R, T, Q, 0), "patch is 0"),
    ("recovered_loss", (R, T, Q, 4), "patch is 4"),
    ("recovered_loss", (R[:, 1:].contiguous(), T, Q, 2), "rows has shape"),
    ("recovered_loss", (R[:, :, :0], T[:, :0], Q[:, :0], 2), "none of them 0"),
    ("recovered_loss", (rand(2, 20, 6).mT, T, Q, 2), "rows is not contiguous"),
    ("recovered_loss", (R, rand(2, 5, 6, 4).mT, Q, 2), "teacher is neither contiguous nor channels-last"),
    ("recovered_loss", (R, T, Q[0], 2), "queries has shape"),
    ("recovered_loss", (R, T, Q.half(), 2), "queries has dtype Half"),
    ("recovered_loss_grad", (R, T, Q, L[:1], G, GD, GC, K, 2), "log_sums has shape"),
    ("recovered_loss_grad", (R, T, Q, L, G[None], GD, GC, K, 2), "grad_error has shape"),
    ("recovered_loss_grad", (R, T, Q, L, G, GD.half(), GC, K, 2), "grad_difference has dtype Half"),
    ("recovered_loss_grad", (R, T, Q, L, G, GD, GC[0], K, 2), "grad_contexts has shape"),
    ("recovered_loss_grad", (R, T, Q, L, G, GD, GC, K.mT, 2), "shifts is not contiguous"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_arguments_are_named(ops, name, args, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        getattr(ops, name)(*args)


@pytest.mark.parametrize("channels_last", [False, True])
def test_no_map_is_written(ops, channels_last):
    """The loss allocates sums, its gradient one set of rows; neither a normalised nor a shuffled map beside them."""
    rows, teacher, queries = inputs(2, 256, 4, 8, 4)
    if channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    log_sums = ops.recovered_loss(rows, teacher, queries, 4)[3]
    grads = torch.tensor(1.0), rand(2, 256), rand(2, 2, 256), rand(2, 2)
    loss = peak_bytes(lambda: ops.recovered_loss(rows, teacher, queries, 4), rows.device)
    gradient = peak_bytes(lambda: ops.recovered_loss_grad(rows, teacher, queries, log_sums, *grads, 4), rows.device)
    assert loss < rows.nbytes / 50
    assert rows.nbytes <= gradient < 1.05 * rows.nbytes
