"""A teacher that answers with NaN: the batch is skipped, counted and named, and nothing breaks."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tiny_vits import TARGETS, pictures, tiny

from fastmkd import MaskedKD
from fastmkd.methods.skipped import REMEMBERED, SkippedBatches


@pytest.mark.parametrize("base", ["logit", "manifold", "attention"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_step_has_zero_loss_and_zero_gradients(base, value):
    student, teacher = tiny(0), tiny(1)
    method = MaskedKD(student, teacher, base=base).train()
    method(pictures(), TARGETS)
    broken = teacher.norm.bias.detach().clone()
    with torch.no_grad():
        teacher.norm.bias[0] = value
    with pytest.warns(UserWarning, match=r"batch 1 .* is not finite; the batch is skipped"):
        out = method(pictures(), TARGETS)
    assert out.loss.item() == 0
    assert {float(term) for term in out.terms.values()} == {0.0}
    out.loss.backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in student.parameters())
    assert out.student_output.isfinite().all()

    with torch.no_grad():
        teacher.norm.bias.copy_(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert method(pictures(), TARGETS).loss > 0
    assert (method.skipped.count, method.skipped.numbers) == (1, [1])
    assert "skipped" not in "".join(method.state_dict())


def test_features_count_too():
    teacher = tiny(1, depth=2)
    method = MaskedKD(tiny(0), teacher, base="manifold", keep_ratio=1.0)
    # NaN in the last block's patch rows only: the head, which reads the CLS row, never sees it.
    teacher.blocks[1].register_forward_hook(lambda _m, _a, x: x.index_fill(1, torch.tensor([5]), math.nan))
    with pytest.warns(UserWarning, match="batch 0"):
        assert method(pictures(), TARGETS).loss.item() == 0


def test_only_the_first_are_remembered():
    skipped, expected = SkippedBatches(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(60):
            good = i % 3 != 2
            skipped.note(torch.tensor(good))
            expected += [] if good else [i]
    assert skipped.count == len(expected) == 20
    assert skipped.numbers == expected[:REMEMBERED]


def test_compiled_methods_skip_without_a_break():
    teacher = tiny(1, depth=1)
    method = MaskedKD(tiny(0, depth=1), teacher).train()
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    assert compiled(pictures(), TARGETS).loss > 0
    with torch.no_grad():
        teacher.norm.bias[0] = math.nan
    assert compiled(pictures(), TARGETS).loss == 0
    assert compiled(pictures(), TARGETS).loss == 0
    assert (method.skipped.count, method.skipped.numbers) == (2, [1, 2])
