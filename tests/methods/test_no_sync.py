"""No step of a method asks the device for a number. Tensors without values have none, so whoever asks one fails."""

from __future__ import annotations

import contextlib

import pytest
import torch
from dense_nets import SMALL, Segmenter
from dpk_networks import cnn
from dpk_networks import pictures as cnn_pictures
from tiny_vits import TARGETS, pictures, tiny
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from fastmkd import DMAE, DPK, MKD, MaskedKD
from fastmkd.methods import FeatureKD, MaskedDINO, MoCoV3
from fastmkd.methods.crd import CRD
from fastmkd.methods.fgd import FGDImitation

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


@contextlib.contextmanager
def no_waiting():
    """Whoever waits for the GPU, or reads a number from it, fails."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def self_distillation(kind, **options):
    sizes = {"hidden": 16, "out_features": 8, "teacher": tiny(3)}
    sizes |= {"bottleneck": 8, "local_crops": 1} if kind is MaskedDINO else {}
    return kind(tiny(0, num_classes=0, dynamic_img_size=True), **sizes, **options)


SELF_OPTIONS = [(MaskedDINO, {}), (MaskedDINO, {"keep_ratio": 1.0, "total_updates": 9}), (MoCoV3, {})]


@pytest.mark.parametrize(("kind", "options"), SELF_OPTIONS)
def test_self_distillation_reads_no_number(kind, options):
    method = self_distillation(kind, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = method.to("cuda").train()(pictures().to("cuda"))
    assert out.loss.is_cuda
    assert out.loss.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "options"), SELF_OPTIONS)
def test_a_step_of_self_distillation_does_not_wait_for_the_gpu(kind, options):
    method, images = self_distillation(kind, **options).float().cuda().train(), pictures().float().cuda()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], fused=True)
    for _ in range(4):
        step(lambda x, _: method(x), images, None)
        optimizer.step()
    with no_waiting():
        loss = step(lambda x, _: method(x), images, None)
    assert loss.isfinite()
    assert int(method.updates) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*DMAE_OPTIONS, {"teacher_compile": True}])
def test_a_step_of_dmae_does_not_wait_for_the_gpu(options):
    method, images = dmae(**options).float().cuda().train(), pictures().float().cuda()
    for _ in range(4):
        step(lambda x, _: method(x), images, None)
    with no_waiting():
        loss = step(lambda x, _: method(x), images, None)
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


def dpk(options):
    sizes = {"encoder_depth": 1, "decoder_depth": 1, "width": 16, "image_size": 24}
    return DPK(cnn(0), cnn(1), {"last": "last"}, **sizes, **options).float()


@pytest.mark.parametrize(("options", "batch"), [({}, 1), *((options, 4) for options in DPK_OPTIONS)])
def test_dpk_reads_no_number(options, batch, monkeypatch):
    method = dpk(options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, targets = cnn_pictures(count=batch).float().to("cuda"), torch.arange(batch).to("cuda")
        out = method.to("cuda").train()(images, targets)
    assert out.loss.is_cuda
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    method = dpk(options).to("meta").train()
    step(method, cnn_pictures(count=4).float().to("meta"), torch.arange(4, device="meta"))
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("hybrid", [False, True])
def test_fgd_reads_no_number(hybrid):
    sizes, options = [(6, 8), (3, 4)], {"encoder_depth": 1, "decoder_depth": 1, "width": 16} if hybrid else {}
    term = FGDImitation(4, 6 if hybrid else 4, sizes, hybrid=hybrid, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        maps = [[torch.randn(4, c, *size).to("cuda") for size in sizes] for c in (4, 6 if hybrid else 4)]
        boxes = [torch.rand(count, 4).to("cuda") for count in (2, 0, 1, 3)]
        assert term.to("cuda").train()(*maps, boxes, (48, 64)).is_cuda


def test_crd_reads_no_number():
    labels = torch.arange(20) % 4
    method = FeatureKD(cnn(0), cnn(1), CRD(9, width=8), {"last": "last"}, image_size=24, train_labels=labels).float()
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, numbers = cnn_pictures(count=4).float().to("cuda"), torch.arange(4).to("cuda")
        out = method.to("cuda").train()(images, torch.arange(4).to("cuda"), numbers)
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
    with no_waiting():
        loss = step(method, images, targets)
    assert loss.isfinite()


def test_mkd_reads_no_number(monkeypatch):
    """A masked segmenter's forward pass; a detector's asks torchvision, which asks the device."""
    # Which layers go dense is asked of a table for the device, by its name.
    monkeypatch.setattr("fastmkd.nn.masked_conv.goes_dense", lambda *_: False)
    method = MKD(Segmenter(), Segmenter((4, 8, 8, 12), seed=1), mask_ratio=0.25, logits_weight=1.0, **SMALL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method = method.to("cuda").train()
        targets = torch.zeros(2, 64, 64, dtype=torch.int64, device="cuda")
        out = method(torch.rand(2, 3, 64, 64, device="cuda"), targets)
    assert sorted(out.terms) == ["ce", "feat", "global", "logits"]
    assert out.loss.is_cuda
