"""A backend asked for holds in the backward pass, in whatever thread that runs: a GPU's runs in one of PyTorch's."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

import fastmkd
from fastmkd.ops import OPS
from fastmkd.ops.registry import Backend


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(op, backend) of what has run; the reference stands for a backend that is not built here."""
    seen: list[tuple[str, str]] = []

    def watched(name: str, backend: Backend) -> Backend:
        def run(*args: Any) -> Any:
            seen.append((name, backend.name))
            return OPS[name].reference(*args)

        reason = None if backend.device in ("any", "cpu") else backend.reason
        return dataclasses.replace(backend, run=run, reason=reason or (lambda: None))

    for name in ("masked_conv2d", "masked_conv2d_weight"):
        backends = {key: watched(name, backend) for key, backend in OPS[name].backends.items()}
        monkeypatch.setattr(OPS[name], "backends", backends)
    return seen


def _in_a_thread(backward: Any) -> None:
    thread = threading.Thread(target=backward)  # it starts without the context variables of this one
    thread.start()
    thread.join()


@pytest.mark.parametrize("forced", ["eager", "cpp"])
def test_the_backward_runs_on_the_forwards_backend_in_another_thread(ran: list[tuple[str, str]], forced: str) -> None:
    conv = fastmkd.MaskedConv2d(3, 4, 3, padding=1)
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    with fastmkd.backend(forced):
        loss = conv(images, fastmkd.random_mask(2, (2, 2), 0.5)).square().sum()
        _in_a_thread(loss.backward)
    assert images.grad is not None
    assert ran == [("masked_conv2d", forced)] * 2 + [("masked_conv2d_weight", forced)]


def test_second_derivatives_too(ran: list[tuple[str, str]]) -> None:
    conv = fastmkd.MaskedConv2d(3, 4, 3, padding=1)
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    with fastmkd.backend("eager"):
        loss = conv(images, fastmkd.random_mask(2, (2, 2), 0.5)).square().sum()

    def twice() -> None:
        (slope,) = torch.autograd.grad(loss, images, create_graph=True)
        slope.square().sum().backward()

    _in_a_thread(twice)
    assert len(ran) > 3
    assert {backend for _, backend in ran} == {"eager"}


def test_a_block_around_the_backward_alone_holds_for_an_unforced_forward(ran: list[tuple[str, str]]) -> None:
    conv = fastmkd.MaskedConv2d(3, 4, 3, padding=1)
    loss = conv(torch.randn(2, 3, 4, 4), fastmkd.random_mask(2, (2, 2), 0.5)).sum()
    ran.clear()
    with fastmkd.backend("eager"):
        loss.backward()
    assert ran == [("masked_conv2d_weight", "eager")]
