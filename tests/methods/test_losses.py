"""Losses against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastmkd.methods.losses import cross_entropy, logit_kd, squared_error


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])  # probabilities 1/4, 3/4 and 4/5, 1/5
    expected = -(math.log(3 / 4) + math.log(4 / 5)) / 2
    assert cross_entropy(logits, torch.tensor([1, 0])).item() == pytest.approx(expected)
    soft = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    expected = -(0.3 * math.log(1 / 4) + 0.7 * math.log(3 / 4) + math.log(4 / 5)) / 2
    assert cross_entropy(logits, soft).item() == pytest.approx(expected)
    assert cross_entropy(logits, soft.double()).dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_logit_kd_by_hand(temperature):
    student = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0, -1.0], [1.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    expected = 0.0
    for s_row, t_row in zip(student.tolist(), teacher.tolist(), strict=True):
        s_exp, t_exp = ([math.exp(z / temperature) for z in row] for row in (s_row, t_row))
        p_s, p_t = ([e / sum(exps) for e in exps] for exps in (s_exp, t_exp))
        expected += sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))
    expected *= temperature**2 / 2
    loss = logit_kd(student, teacher, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert teacher.grad is None
    gradient = (
        ((student.detach() / temperature).softmax(1) - (teacher.detach() / temperature).softmax(1)) * temperature / 2
    )
    torch.testing.assert_close(student.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_widened_first(dtype):
    logits, teacher = (torch.randn(4, 100, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        kd, ce = logit_kd(logits, teacher), cross_entropy(logits, torch.arange(4))
    assert kd.dtype == ce.dtype == torch.float32
    torch.testing.assert_close(kd, logit_kd(logits.float(), teacher.float()), rtol=1e-6, atol=0)
    torch.testing.assert_close(ce, cross_entropy(logits.float(), torch.arange(4)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        (torch.tensor([0, 3]), ValueError, "classes 0 to 3; the logits have 0 to 2"),
        (torch.tensor([-1, 0]), ValueError, "classes -1 to 0"),
        (torch.tensor([0, 1, 2]), ValueError, r"targets has shape \(3,\)"),
        (torch.zeros(2, 4), ValueError, r"targets has shape \(2, 4\)"),
        (torch.zeros(2), ValueError, "soft labels"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, "targets has dtype torch.int32"),
        ([0, 1], TypeError, "targets is a list"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "targets is on meta"),
    ],
)
def test_cross_entropy_refuses(targets, error, match):
    with pytest.raises(error, match=match):
        cross_entropy(torch.zeros(2, 3), targets)


def test_no_images():
    with pytest.raises(ValueError, match=r"logits has shape \(0, 3\); a batch needs at least one image"):
        cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"student_logits has shape \(0, 3\)"):
        logit_kd(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_squared_error_of_two_precisions(dtypes):
    """With gradients, which PyTorch 2.11 does not have for two dtypes."""
    student = torch.randn(3, 4).to(dtypes[0]).requires_grad_()
    teacher = torch.randn(3, 4).to(dtypes[1])
    error = squared_error(student, teacher)
    error.backward()
    assert error.dtype == dtypes[0]
    torch.testing.assert_close(student.grad, (student.detach() - teacher.to(dtypes[0])) * (2 / 12))


def test_shapes_that_are_no_logits():
    with pytest.raises(ValueError, match="global_pool=''"):
        cross_entropy(torch.zeros(2, 17, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="same classes"):
        logit_kd(torch.zeros(2, 3), torch.zeros(2, 4))
