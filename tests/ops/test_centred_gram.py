"""U-centred Gram matrices where float16 is short of numbers."""

from __future__ import annotations

import pytest
import torch

import fastmkd


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_float16_features_may_differ_by_more_than_float16_holds(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    half = (torch.randn(8, 50, generator=g).sign() * 40000).half().requires_grad_()  # differences of 80,000
    other = (torch.randn(8, 30, generator=g) / 10).half()  # the gradient fits in float16
    exact = half.detach().double().requires_grad_()
    with fastmkd.backend(backend):
        found = fastmkd.hsic1(half, other)
        found.backward()
    wanted = fastmkd.hsic1(exact, other.double())
    wanted.backward()
    assert half.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=0)
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=2e-3, atol=2e-3 * float(exact.grad.abs().max()))
