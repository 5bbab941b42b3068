"""What the accuracy rule lets pass where a GPU computes products as TF32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmkd.ops import OPS, accuracy
from fastmkd.ops.accuracy import judge
from fastmkd.ops.centred_gram import u_centre
from fastmkd.ops.check import check_sample
from fastmkd.ops.registry import Backend

Cut = Callable[[Tensor], Tensor]


def cut(bits: int, nearest: bool) -> Cut:
    """Keeps the upper bits of a float32 alone, as the factors of a narrower format; computes on in float64."""

    def of(x: Tensor) -> Tensor:
        half = 1 << 31 - bits if nearest else 0
        return ((x.view(torch.int32) + half) & -(1 << 32 - bits)).view(torch.float32).double()

    return of


TF32, TF32_ROUNDED, BF16 = cut(19, nearest=False), cut(19, nearest=True), cut(16, nearest=False)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def product(k: int) -> Callable[[Cut], Tensor]:
    a, b = draw(300, k), draw(k, 200) * k**-0.5
    return lambda factor: factor(a) @ factor(b)


def attention(length: int) -> Callable[[Cut], Tensor]:
    q, k, v = draw(3, length, 64)
    return lambda factor: factor((factor(q) @ factor(k).mT / 8).softmax(-1).float()) @ factor(v)


def gram(n: int, d: int) -> Callable[[Cut], Tensor]:
    x = draw(n, d) + 1
    return lambda factor: u_centre(factor(x - x[:1]) @ factor(x - x[:1]).mT)


CASES = [product(64), product(1152), attention(197), attention(577), gram(130, 300)]


@pytest.mark.parametrize("compute", CASES)
def test_tf32_may_cut_its_factors_off(compute: Callable[[Cut], Tensor]) -> None:
    """A tensor core does so with float32 registers; PyTorch's library may round, which is three times closer."""
    out, exact, plain = compute(TF32).float(), compute(Tensor.double), compute(TF32_ROUNDED).float()
    assert judge(out, exact, plain, tf32=True).ok


@pytest.mark.parametrize("compute", CASES)
def test_where_nobody_asked_for_tf32_it_is_wrong(compute: Callable[[Cut], Tensor]) -> None:
    out, exact, plain = compute(TF32).float(), compute(Tensor.double), compute(Tensor.float)
    assert not judge(out, exact, plain).ok


@pytest.mark.parametrize("compute", CASES)
def test_factors_of_bf16_are_no_tf32(compute: Callable[[Cut], Tensor]) -> None:
    out, exact, plain = compute(BF16).float(), compute(Tensor.double), compute(TF32_ROUNDED).float()
    assert not judge(out, exact, plain, tf32=True).ok


def test_tensors_are_compared_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge result is compared without several copies of it in float64."""
    out, largest = draw(40, 5), []
    monkeypatch.setattr(accuracy, "PART", 64)
    double = Tensor.double
    monkeypatch.setattr(Tensor, "double", lambda x: (largest.append(x.numel()), double(x))[1])
    for place in (0, 63, 64, 199):
        wrong, lost = out.clone(), out.clone()
        wrong.view(-1)[place] += 0.5
        lost.view(-1)[place] = float("nan")
        assert judge(out, out, out).ok
        assert abs(judge(wrong, out, out).error - 0.5) < 1e-6
        assert not judge(lost, out, out).ok
    assert max(largest) <= 64


def test_a_check_of_tf32_is_judged_as_such() -> None:
    op = OPS["patch_embed"]
    sample = op.samples("cpu", torch.float32)[0]

    def cut_off(images: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return op.reference(TF32(images).float(), TF32(weight).float(), *rest)

    backend = Backend("triton", cut_off, "cpu", (torch.float32,))
    assert check_sample(op, backend, sample, torch.float32, tf32=True).outcome == "right"
    assert check_sample(op, backend, sample, torch.float32).outcome == "wrong"
