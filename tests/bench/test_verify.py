"""A wrong variant is refused, however it is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastmkd.bench.registry import Answer, Variant
from fastmkd.bench.verify import Oracle, tensors

X = torch.linspace(-2, 2, 101)
EXACT = Answer(lambda: X.double().exp())
PLAIN = Variant("torch", X.exp, EXACT, plain=True)


def verdict(result: Any, answer: Answer = EXACT) -> Any:
    other = Variant("other", lambda: result, answer)
    return Oracle([PLAIN, Variant("plain", X.exp, answer, plain=True), other]).judge(other)


def one_wrong() -> torch.Tensor:
    out = X.exp()
    out[17] += 1e-3
    return out


def with_nan() -> torch.Tensor:
    out = X.exp()
    out[3] = math.nan
    return out


@pytest.mark.parametrize(
    "result",
    [one_wrong(), with_nan(), X.exp()[:-1], X.exp().double(), X.exp().bfloat16().float(), (X.exp(), X.exp()), None],
    ids=["one entry", "nan", "shape", "dtype", "rounded", "two tensors", "nothing"],
)
def test_wrong_results_are_refused(result: Any) -> None:
    assert not verdict(result).ok


def test_right_results_pass() -> None:
    assert verdict(X.double().exp().float()).ok
    assert Oracle([PLAIN]).judge(PLAIN).ok


def test_indices_must_be_equal() -> None:
    answer = Answer(lambda: torch.arange(5))
    plain = Variant("torch", lambda: torch.arange(5), answer, plain=True)
    wrong = Variant("wrong", lambda: torch.tensor([0, 1, 2, 4, 3]), answer)
    oracle = Oracle([plain, wrong])
    assert oracle.judge(plain).ok
    assert not oracle.judge(wrong).ok


def test_a_floor_allows_what_a_discrete_choice_moves_and_no_more() -> None:
    answer = Answer(lambda: X.double().exp(), floor=1e-3)
    assert verdict(X.exp() * (1 + 5e-4), answer).ok
    assert not verdict(X.exp() * (1 + 5e-3), answer).ok


def test_an_answer_without_exact_form_must_be_finite() -> None:
    assert verdict(torch.ones(3), Answer()).ok
    assert not verdict(torch.tensor([1.0, math.nan]), Answer()).ok


def test_a_variant_without_a_plain_one_beside_it_is_an_error() -> None:
    lonely = Variant("lonely", X.exp, Answer(lambda: X.double().exp()))
    with pytest.raises(ValueError, match="'lonely'"):
        Oracle([PLAIN, lonely]).judge(lonely)


def test_unwritten_output_is_seen() -> None:
    def unwritten() -> torch.Tensor:
        out = torch.empty(1 << 16)
        out[1:] = 0.5
        return out

    answer = Answer(lambda: torch.full((1 << 16,), 0.5, dtype=torch.float64))
    plain = Variant("torch", lambda: torch.full((1 << 16,), 0.5), answer, plain=True)
    lazy = Variant("lazy", unwritten, answer)
    assert not Oracle([plain, lazy]).judge(lazy).ok


def test_only_tensors_are_results() -> None:
    assert tensors(None) == []
    assert len(tensors([torch.ones(1), (torch.ones(2), None)])) == 2
    with pytest.raises(TypeError, match="returned float"):
        tensors(3.0)
