"""The compiled packed attention, called directly, on every instruction set of this machine."""

from itertools import pairwise

import numpy as np
import pytest
import torch

# Half a unit in the last place, relative.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def attention_by_numpy(qkv, starts, scale):
    out = []
    for first, last in pairwise(starts):
        q, k, v = qkv[first:last].double().numpy().transpose(1, 2, 0, 3)  # (H, L, d) each
        e = scale * q @ k.swapaxes(1, 2)
        e = np.exp(e - e.max(-1, keepdims=True))
        out.append((e / e.sum(-1, keepdims=True) @ v).swapaxes(0, 1))
    return np.concatenate(out)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("lengths", "heads", "dim"),
    [([99] * 3, 6, 64), ([1], 1, 1), ([5, 1, 48, 33, 16], 3, 32), ([577], 2, 64), ([31, 12], 2, 72), ([2100], 1, 32)],
)
def test_packed_attention(ops, lengths, heads, dim, dtype):
    qkv, starts = rand(sum(lengths), 3, heads, dim, dtype=dtype), torch.tensor([0, *lengths]).cumsum(0)
    out = ops.packed_attention(qkv, starts.int(), dim**-0.5)
    want = torch.from_numpy(attention_by_numpy(qkv, starts.tolist(), dim**-0.5))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=ROUNDING[dtype] + 1e-5, atol=2e-6)


def test_packed_attention_extremes(ops):
    starts = torch.tensor([0, 30, 30, 50], dtype=torch.int32)
    qkv = rand(50, 3, 2, 16)
    sharp = qkv.clone()
    sharp[:, 0] *= 1e4  # all weight on one key, the others underflow
    scores = torch.einsum("ihd,jhd->hij", sharp[:30, 0].double(), sharp[:30, 1].double())
    picked = sharp[:30, 2].transpose(0, 1).gather(1, scores.argmax(-1)[..., None].expand(-1, -1, 16))  # (H, 30, d)
    torch.testing.assert_close(ops.packed_attention(sharp, starts, 1.0)[:30].transpose(0, 1), picked)
    alone = ops.packed_attention(qkv, torch.arange(51, dtype=torch.int32), 0.25)
    assert torch.equal(alone, qkv[:, 2])  # one token attends to itself, exactly
    clean = ops.packed_attention(qkv, starts, 0.25)
    odd_nan = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)  # its low bits are not those of others
    for bad in (float("nan"), odd_nan, float("inf")):
        spoilt = qkv.clone()
        spoilt[4, 1, 1] = bad
        out = ops.packed_attention(spoilt, starts, 0.25)
        assert out[:30, 1].isnan().any(-1).any()
        assert not out[:30, 0].isnan().any()  # another head
        assert torch.equal(out[30:], clean[30:])  # another image


def test_packed_attention_gives_an_infinitely_bad_key_no_weight_at_any_scale(ops):
    starts, qkv = torch.tensor([0, 30], dtype=torch.int32), rand(30, 3, 1, 16)
    qkv[:, 0] = 0.1  # times the smallest float: 0
    qkv[3, 1, 0, 5] = -torch.inf
    want = qkv[torch.arange(30) != 3, 2].mean(0)
    torch.testing.assert_close(ops.packed_attention(qkv, starts, 1e-45), want.expand(30, 1, 16))


def test_packed_attention_does_not_depend_on_the_thread_count_or_the_batch(ops):
    lengths = [197, 25, 1, 99, 400, 50]
    qkv, starts = rand(sum(lengths), 3, 6, 64), torch.tensor([0, *lengths]).cumsum(0).int()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(ops.packed_attention(qkv, starts, 0.125))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    first, last = starts[4:6].tolist()
    alone = ops.packed_attention(qkv[first:last], torch.tensor([0, 400], dtype=torch.int32), 0.125)
    assert torch.equal(alone, results[0][first:last])


def test_packed_attention_without_tokens(ops):
    assert ops.packed_attention(rand(0, 3, 2, 8), torch.zeros(1, dtype=torch.int32), 1.0).shape == (0, 2, 8)
    assert ops.packed_attention(rand(0, 3, 2, 8), torch.zeros(4, dtype=torch.int32), 1.0).shape == (0, 2, 8)


QKV, STARTS = torch.rand(6, 3, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)

BAD = [
    ((QKV[0], STARTS, 1.0), "qkv has shape"),
    ((QKV[:, :2].contiguous(), STARTS, 1.0), "qkv has shape"),
    ((QKV.double(), STARTS, 1.0), "qkv has dtype Double"),
    ((QKV.mT.contiguous().mT, STARTS, 1.0), "qkv is not contiguous"),
    ((QKV, STARTS.long(), 1.0), "starts has dtype"),
    ((QKV, STARTS[None], 1.0), "starts has shape"),
    ((QKV, STARTS[:0], 1.0), "starts has shape"),
    ((QKV, STARTS[:2], 1.0), "starts goes from 0 to 2; expected offsets from 0 to 6"),
    ((QKV, STARTS + 1, 1.0), "starts goes from 1 to 7"),
    ((QKV, torch.tensor([0, 4, 2, 6], dtype=torch.int32), 1.0), "never descend"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_arguments_are_named(ops, args, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.packed_attention(*args)
