"""No step of a method asks the device for a number. Tensors without values have none, so whoever asks one fails."""

from __future__ import annotations

import pytest
import torch
from dpk_networks import cnn
from dpk_networks import pictures as cnn_pictures
from tiny_vits import TARGETS, pictures, tiny
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from fastmkd import DPK, MaskedKD
from fastmkd.methods import FeatureKD
from fastmkd.methods.crd import CRD

OPTIONS = [
    {"keep_ratio": 0.5},
    {"keep_ratio": 1.0},
    {"base": "manifold", "strategy": "random"},
    {"base": "attention", "strategy": "patch"},
    {"mask": "student", "strategy": "bottom"},
]


DPK_OPTIONS = [
    {},
    {"ratio": "cosine"},
    {"ratio": "linear", "mask": "grid"},
    {"mask": "block", "target": "non-masked"},
    {"prior": "learnable", "transform": "conv"},
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


def test_a_read_would_be_noticed():
    with pytest.raises(DynamicOutputShapeException, match="nonzero"):
        on_fake_gpu({"keep_mass": 0.5}, TARGETS)  # its number of patches is one


@pytest.mark.parametrize("options", [{}, {"keep_ratio": 1.0}, {"mask": "student"}, {"micro_batches": 2}])
def test_the_backward_pass_reads_no_number(options, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # raises for a meta device
    method = MaskedKD(tiny(0), tiny(1, img_size=48), **options).to("meta").train()
    step(method, pictures().to("meta"), TARGETS.to("meta"))
    assert all(p.grad is not None for p in method.parameters())


def dpk(options):
    return DPK(cnn(0), cnn(1), {"last": "last"}, encoder_depth=1, decoder_depth=1, width=16, image_size=24, **options)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("options", DPK_OPTIONS)
def test_dpk_reads_no_number(options, batch, monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, targets = cnn_pictures(count=batch).float().to("cuda"), torch.arange(batch).to("cuda")
        out = dpk(options).float().to("cuda").train()(images, targets)
    assert out.loss.is_cuda
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    method = dpk(options).to("meta").train()
    step(method, cnn_pictures(count=4).to("meta"), torch.arange(4, device="meta"))
    assert all(p.grad is not None for p in method.parameters())


def test_crd_reads_no_number():
    labels = torch.arange(20) % 4
    method = FeatureKD(cnn(0), cnn(1), CRD(9, width=8), {"last": "last"}, image_size=24, train_labels=labels)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, numbers = cnn_pictures(count=4).float().to("cuda"), torch.arange(4).to("cuda")
        out = method.float().to("cuda").train()(images, torch.arange(4).to("cuda"), numbers)
    assert out.loss.is_cuda


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
