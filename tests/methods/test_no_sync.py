"""A step of MaskedKD or DMAE asks the device for no number: tensors without values have none, so whoever asks fails."""

from __future__ import annotations

import pytest
import torch
from tiny_vits import TARGETS, pictures, tiny
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from fastmkd import DMAE, MaskedKD

OPTIONS = [
    {"keep_ratio": 0.5},
    {"keep_ratio": 1.0},
    {"base": "manifold", "strategy": "random"},
    {"base": "attention", "strategy": "patch"},
    {"mask": "student", "strategy": "bottom"},
]


def step(method, images, targets):
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        out = method(images, targets)
    out.loss.backward()
    return out.loss


def on_fake_gpu(options, targets):
    """A forward pass on a GPU that is made up: every tensor has a shape and no values."""
    method = MaskedKD(tiny(0), tiny(1, img_size=48), **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return method.to("cuda").train()(pictures().to("cuda"), targets.to("cuda"))


@pytest.mark.parametrize("targets", [TARGETS, torch.rand(3, 5, dtype=torch.float64)], ids=["hard", "soft"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_forward_pass_reads_no_number(options, targets):
    out = on_fake_gpu(options, targets)
    assert out.loss.is_cuda
    assert out.loss.requires_grad


DMAE_OPTIONS = [{}, {"normalize_target": True, "normalize": True, "student_layer": [1, 2]}]


def dmae(**options):
    return DMAE(tiny(0), tiny(1), decoder_depth=1, decoder_width=16, decoder_heads=2, **options)


@pytest.mark.parametrize("options", DMAE_OPTIONS)
def test_dmae_reads_no_number(options):
    method = dmae(**options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = method.to("cuda").train()(pictures().to("cuda"))
    assert out.loss.is_cuda
    assert out.loss.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*DMAE_OPTIONS, {"teacher_compile": True}])
def test_a_step_of_dmae_does_not_wait_for_the_gpu(options):
    method, images = dmae(**options).float().cuda().train(), pictures().float().cuda()
    for _ in range(4):
        step(lambda x, _: method(x), images, None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step(lambda x, _: method(x), images, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_a_read_would_be_noticed():
    with pytest.raises(DynamicOutputShapeException, match="nonzero"):
        on_fake_gpu({"keep_mass": 0.5}, TARGETS)  # its number of patches is one


@pytest.mark.parametrize("options", [{}, {"keep_ratio": 1.0}, {"mask": "student"}, {"micro_batches": 2}])
def test_the_backward_pass_reads_no_number(options, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # raises for a meta device
    method = MaskedKD(tiny(0), tiny(1, img_size=48), **options).to("meta").train()
    step(method, pictures().to("meta"), TARGETS.to("meta"))
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [*OPTIONS, {"micro_batches": 2}, {"teacher_compile": True}, {"teacher_compile": True, "micro_batches": 2}],
)
def test_a_step_does_not_wait_for_the_gpu(options):
    student, teacher = tiny(0).float(), tiny(1, img_size=48).float()
    method = MaskedKD(student, teacher, **options).cuda().train()
    assert teacher.pos_embed.is_cuda
    images, targets = pictures().float().cuda(), TARGETS.cuda()
    for _ in range(4):  # the first use of an op may measure, the first ones of CUDA graphs record
        step(method, images, targets)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step(method, images, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
