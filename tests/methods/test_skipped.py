"""A teacher that answers with NaN, or images that hold it: the batch is skipped, counted and named, nothing breaks."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tiny_vits import TARGETS, pictures, tiny

from fastmkd import MaskedKD
from fastmkd.methods import MaskedDINO, MoCoV3
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


def masked_kd(**options):
    return lambda: MaskedKD(tiny(0), tiny(1), **options)


def dino(**options):
    sizes = {"out_features": 12, "hidden": 16, "bottleneck": 8, "local_crops": 1}
    return lambda: MaskedDINO(tiny(0, num_classes=0, dynamic_img_size=True), **sizes, **options)


TAKE_ANY_IMAGE = {
    "all patches": masked_kd(keep_ratio=1.0),
    "random": masked_kd(strategy="random"),
    "masked student": masked_kd(strategy="random", mask="student"),
    "merging": masked_kd(teacher_tokens="merge", keep_ratio=0.9),
    "features": masked_kd(base="manifold", keep_ratio=1.0),
    "parts": masked_kd(keep_ratio=1.0, micro_batches=2),
    "dino": dino(keep_ratio=1.0),
    "dino, random": dino(strategy="random"),
    "moco": lambda: MoCoV3(tiny(0, num_classes=0), hidden=16, out_features=8),
    "moco, aligned": lambda: MoCoV3(tiny(0, num_classes=0), hidden=16, out_features=8, teacher=tiny(3)),
}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("way", TAKE_ANY_IMAGE)
def test_images_that_are_not_finite_cost_their_batch(way, value):
    method, images = TAKE_ANY_IMAGE[way]().double().train(), pictures()
    images[1, 0, 5, 5] = value
    with pytest.warns(UserWarning, match=r"^batch 0 .* has images with NaN or infinity; the batch is skipped"):
        out = method(images, TARGETS)
    assert out.loss.item() == 0
    assert {float(term) for term in out.terms.values()} == {0.0}
    out.loss.backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in method.parameters() if p.requires_grad)
    # Running statistics outlive the batch.
    assert all(buffer.isfinite().all() for buffer in method.buffers())
    assert out.student_output.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert method(pictures(), TARGETS).loss > 0
    assert (method.skipped.count, method.skipped.numbers) == (1, [0])


@pytest.mark.parametrize("way", ["dino", "dino, random", "moco"])
def test_crops_of_the_callers_making_too(way):
    method = TAKE_ANY_IMAGE[way]().double().train()
    images = [pictures(), pictures()]
    images[1][0, 0, 0, 0] = math.nan
    with pytest.warns(UserWarning, match="images with NaN"):
        assert method(images).loss == 0


def test_a_broken_local_crop_is_skipped_and_a_broken_global_one_is_refused_if_it_is_to_be_ranked():
    method, broken = dino(keep_ratio=0.5)().double().train(), pictures(16)
    broken[0, 0, 0, 0] = math.inf
    with pytest.warns(UserWarning, match="images with NaN"):
        out = method([pictures(), pictures(), broken])
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad.eq(0).all() for p in method.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="saliency holds NaN"):
        method([pictures() * math.nan, pictures()])


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
