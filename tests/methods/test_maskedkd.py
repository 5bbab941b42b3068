"""MaskedKD against the paper's equations written out with the oracle, in float64."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from tiny_vits import TARGETS, assert_same, full_float32, kl, pictures, tiny
from torch import nn

from fastmkd import MaskedKD, MaskedViT
from fastmkd.ops.select_tokens import resize
from fastmkd.reference import masked_vit_forward, masked_vit_saliency


def by_hand(student, teacher, images, targets, k, weight=1.0, temperature=1.0, ce_weight=1.0, **options):
    """Eq. 1 with the oracle; student and teacher share a grid."""
    logits = masked_vit_forward(student, images)
    keep = masked_vit_saliency(student, images, **options).topk(k, dim=1).indices
    teacher_logits = masked_vit_forward(teacher.eval(), images, keep).detach()
    p = (teacher_logits / temperature).softmax(1)
    kl = (p * (p.log() - (logits / temperature).log_softmax(1))).sum(1).mean()
    return ce_weight * F.cross_entropy(logits, targets) + weight * temperature**2 * kl


@pytest.mark.parametrize("wrap", [lambda model: model, MaskedViT])
@pytest.mark.parametrize(
    ("options", "keep_ratio", "k"),
    [
        ({}, 0.5, 8),
        ({"temperature": 3.0, "weight": 0.7}, 0.25, 4),
        ({"ce_weight": 0.5, "weight": 0.5}, 0.01, 1),
        ({"include_prefix": True}, 0.3, 5),
        ({"weight": 0.0}, 0.5, 8),
    ],
)
def test_loss_and_gradient_by_hand(wrap, options, keep_ratio, k):
    student, teacher, images = tiny(0), tiny(1, depth=3), pictures()
    method = MaskedKD(wrap(student), wrap(teacher), keep_ratio, **options).train()
    out = method(images, TARGETS)
    expected = by_hand(student, teacher, images, TARGETS, k, **options)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        method.ce_weight * out.terms["ce"] + method.weight * out.terms["kd"], out.loss, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(out.student_output, student(images))
    mine = torch.autograd.grad(out.loss, list(student.parameters()))
    theirs = torch.autograd.grad(expected, list(student.parameters()))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(term.requires_grad for term in out.terms.values())


def test_keep_ratio_one_is_plain_logit_distillation():
    student, teacher, images = tiny(0, class_token=False, global_pool="avg"), tiny(1), pictures()
    method = MaskedKD(student, teacher, keep_ratio=1.0, temperature=2.0)
    calls = []
    teacher.patch_embed.proj.register_forward_hook(lambda *_: calls.append(1))
    out = method(images, TARGETS)
    log_s, log_t = (student(images) / 2).log_softmax(1), (teacher(images) / 2).log_softmax(1)
    expected = F.cross_entropy(student(images), TARGETS) + 4 * F.kl_div(
        log_s, log_t, reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(out.loss, expected)
    assert calls  # the convolution itself ran: no gather


def test_soft_labels():
    student, teacher, images = tiny(0), tiny(1), pictures()
    soft = torch.rand(3, 5, dtype=torch.float64).softmax(1)
    out = MaskedKD(student, teacher)(images, soft)
    torch.testing.assert_close(out.terms["ce"], -(soft * student(images).log_softmax(1)).sum(1).mean())


def test_teacher_with_another_patch_grid():
    student, teacher, images = tiny(0), tiny(1, patch_size=4), pictures()
    out = MaskedKD(student, teacher, keep_ratio=0.5)(images, TARGETS)
    scores = resize(masked_vit_saliency(student, images).float().view(3, 4, 4), (8, 8)).flatten(1)
    keep = scores.sort(dim=1, descending=True, stable=True).indices[:, :32]
    torch.testing.assert_close(out.terms["kd"], kl(student(images), masked_vit_forward(teacher, images, keep)))


def test_teacher_of_higher_resolution():
    student, teacher, images = tiny(0), tiny(1, img_size=48), pictures()
    out = MaskedKD(student, teacher, keep_ratio=0.25)(images, TARGETS)
    scores = resize(masked_vit_saliency(student, images).float().view(3, 4, 4), (6, 6)).flatten(1)
    keep = scores.sort(dim=1, descending=True, stable=True).indices[:, :9]
    larger = F.interpolate(images, (48, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(out.terms["kd"], kl(student(images), masked_vit_forward(teacher, larger, keep)))


def test_images_of_changing_size():
    options = {"dynamic_img_size": True}
    method = MaskedKD(tiny(0, **options), tiny(1, **options), keep_ratio=0.5)
    for size in (32, 40):
        assert method(pictures(size), TARGETS).loss.isfinite()
    fixed = MaskedKD(tiny(0, **options), tiny(1), keep_ratio=0.5)
    assert fixed(pictures(40), TARGETS).loss.isfinite()


def test_teacher_with_another_normalisation():
    student, teacher, images = tiny(0), tiny(1), pictures()
    norms = {"student_norm": ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), "teacher_norm": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
    method = MaskedKD(student, teacher, keep_ratio=1.0, **norms).double()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in norms["student_norm"])
    expected = kl(student(images), teacher((images * std + mean - 0.5) / 0.5))
    torch.testing.assert_close(method(images, TARGETS).terms["kd"], expected, rtol=1e-5, atol=1e-7)
    assert list(method.state_dict()) == ["student." + key for key in student.state_dict()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": VisionTransformerDistilled},
        {"reg_tokens": 2, "no_embed_class": True},
        {"global_pool": "avg"},
        {"pre_norm": True, "qk_norm": True, "init_values": 0.1},
    ],
)
@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_every_student_parameter_gets_a_gradient(options, ce_weight):
    student = tiny(0, **options)
    if isinstance(student, VisionTransformerDistilled):
        student.set_distilled_training()
    method = MaskedKD(student, tiny(1), ce_weight=ce_weight).train()
    method(pictures(), TARGETS if ce_weight else None).loss.backward()
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_distilled_student_learns_labels_and_teacher_with_separate_heads():
    student, teacher, images = tiny(0, VisionTransformerDistilled), tiny(1), pictures()
    student.set_distilled_training()
    method = MaskedKD(student, teacher, keep_ratio=1.0).train()
    out = method(images, TARGETS)
    class_logits, distillation_logits = student(images)
    torch.testing.assert_close(out.terms["ce"], F.cross_entropy(class_logits, TARGETS))
    torch.testing.assert_close(out.terms["kd"], kl(distillation_logits, teacher(images)))
    torch.testing.assert_close(out.student_output, (class_logits + distillation_logits) / 2)
    torch.testing.assert_close(method.eval()(images, TARGETS).student_output, student(images))


def test_distillation_alone_needs_no_targets():
    method = MaskedKD(tiny(0), tiny(1), ce_weight=0.0)
    assert set(method(pictures()).terms) == {"kd"}
    assert set(method(pictures(), TARGETS).terms) == {"ce", "kd"}
    with pytest.raises(ValueError, match="targets is None"):
        MaskedKD(tiny(0), tiny(1))(pictures())


def test_teacher_runs_without_gradient_and_dropout():
    teacher = tiny(1, proj_drop_rate=0.5, attn_drop_rate=0.5)
    method = MaskedKD(tiny(0), teacher).train()
    first = method(pictures(), TARGETS).terms["kd"]
    teacher.train()  # somebody else's doing
    assert torch.equal(method(pictures(), TARGETS).terms["kd"], first)
    grad_modes = []
    teacher.blocks[0].register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    method(pictures(), TARGETS)
    assert grad_modes == [False]


def test_teacher_dtype():
    student, teacher, images = tiny(0).float(), tiny(1).float(), pictures().float()
    seen = []
    teacher.blocks[0].mlp.fc1.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    for dtype, ambient, expected in [
        (None, None, torch.float32),
        (None, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
    ]:
        method = MaskedKD(student, teacher, teacher_dtype=dtype)
        with torch.autocast("cpu", ambient, enabled=ambient is not None):
            out = method(images, TARGETS)
        assert seen.pop() == expected
        assert out.loss.dtype == torch.float32
        method.release()


def test_half_precision_method():
    method = MaskedKD(tiny(0).float(), tiny(1).float()).bfloat16()
    assert method(pictures().bfloat16(), TARGETS).loss.dtype == torch.float32


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_copies_are_whole_and_separate(clone):
    method = MaskedKD(tiny(0), tiny(1))
    twin = clone(method)
    expected = method(pictures(), TARGETS).loss
    assert torch.equal(twin(pictures(), TARGETS).loss, expected)
    assert twin._student_vit.model is twin.student
    assert twin._teacher_vit.model is twin.teacher
    with torch.no_grad():
        twin.student.head.bias.add_(torch.arange(5.0))
    assert torch.equal(method(pictures(), TARGETS).loss, expected)
    assert not torch.equal(twin(pictures(), TARGETS).loss, expected)


def test_keys_and_parameters_are_the_student_s():
    student = tiny(0)
    for passed in (student, MaskedViT(student)):
        method = MaskedKD(passed, tiny(1))
        assert method.student is passed
        assert list(method.state_dict()) == ["student." + key for key in student.state_dict()]
        assert {id(p) for p in method.parameters()} == {id(p) for p in student.parameters()}
        assert method.release() is passed


def test_learns_from_the_teacher():
    method = MaskedKD(tiny(0).float(), tiny(1).float(), temperature=2.0, ce_weight=0.0).train()
    images, optimizer = pictures().float(), torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        out = method(images)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_compiles_without_a_break():
    method = MaskedKD(tiny(0, depth=1), tiny(1, depth=1)).train()
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    out = compiled(pictures(), TARGETS)
    torch.testing.assert_close(out.loss, method(pictures(), TARGETS).loss)
    out.loss.backward()
    assert method.student.head.weight.grad.abs().max() > 0


def test_pictures():
    student, teacher = tiny(0), tiny(1, patch_size=4, img_size=48)
    method, images = MaskedKD(student, teacher, keep_ratio=0.25), pictures()
    panels = method.pictures(images)
    assert [(p.title, p.kind) for p in panels] == [("input", "image"), ("saliency", "heat"), ("kept patches", "mask")]
    assert torch.equal(panels[0].image, images)
    heat, kept = panels[1].image, panels[2].image
    assert heat.shape == kept.shape == (3, 32, 32)
    assert heat.flatten(1).amin(1).tolist() == [0, 0, 0]
    assert heat.flatten(1).amax(1).tolist() == [1, 1, 1]
    expected = masked_vit_saliency(student, images).argmax(1)
    assert torch.equal(heat[:, ::8, ::8].flatten(1).argmax(1), expected)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    full_size = MaskedKD(tiny(0), tiny(1), keep_ratio=0.25).pictures(images)[2].image
    assert full_size[:, ::8, ::8].sum((1, 2)).tolist() == [4, 4, 4]
    assert not heat.requires_grad


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "match"),
    [
        ({}, {"num_classes": 6}, {}, ValueError, "student has 5 classes and teacher 6"),
        ({"num_classes": 0}, {"num_classes": 0}, {}, ValueError, "student has 0 classes"),
        ({"class_token": False, "global_pool": "avg"}, {}, {}, ValueError, "student has no CLS token"),
        ({}, {}, {"keep_ratio": 0.0}, ValueError, "keep_ratio is 0.0"),
        ({}, {}, {"keep_ratio": 1.5}, ValueError, "keep_ratio is 1.5"),
        ({}, {}, {"keep_ratio": math.nan}, ValueError, "keep_ratio is nan"),
        (
            {},
            {},
            {"keep_ratio": "0.5"},
            TypeError,
            r"^keep_ratio is '0.5', a str; expected a number above 0 and at most 1",
        ),
        (
            {},
            {},
            {"keep_mass": "0.9"},
            TypeError,
            "^keep_mass is '0.9', a str; expected a number above 0 and at most 1",
        ),
        ({}, {}, {"weight": "1"}, TypeError, "^weight is '1', a str; expected a finite number of at least 0"),
        (
            {},
            {},
            {"ce_weight": None},
            TypeError,
            "^ce_weight is None, a NoneType; expected a finite number of at least",
        ),
        ({}, {}, {"temperature": [4]}, TypeError, r"^temperature is \[4\], a list; expected a finite positive number"),
        ({}, {}, {"base": "logits"}, ValueError, "base is 'logits'; available are 'logit', 'manifold'"),
        ({}, {}, {"base": 3}, TypeError, "base is a int; expected a BaseDistillation"),
        ({}, {}, {"base": {"class_path": "fastmkd.Nothing"}}, ValueError, "cannot be imported"),
        ({}, {}, {"strategy": "best"}, ValueError, "strategy is 'best'; available are 'saliency', 'random'"),
        ({}, {}, {"mask": "both"}, ValueError, "mask is 'both'"),
        ({}, {}, {"base": "manifold", "linear_probe": True}, ValueError, "freezes everything that base Manifold"),
        ({}, {}, {"weight": -1.0}, ValueError, "weight is -1.0"),
        ({}, {}, {"ce_weight": math.inf}, ValueError, "ce_weight is inf"),
        ({}, {}, {"weight": 0, "ce_weight": 0}, ValueError, "both 0"),
        ({}, {}, {"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({}, {}, {"teacher_dtype": torch.int8}, ValueError, "teacher_dtype is torch.int8"),
        ({}, {}, {"student_norm": ([0.0], [1.0])}, ValueError, "belong together"),
        ({}, {}, {"student_norm": ([0.0], [1.0]), "teacher_norm": ([0.0], [1.0])}, ValueError, "student_norm is"),
        ({}, {}, {"student_norm": ([0.0] * 3,), "teacher_norm": ([0.0] * 3,)}, ValueError, "student_norm is"),
        (
            {},
            {},
            {"student_norm": ([0.0] * 3, [0.0] * 3), "teacher_norm": ([0.0] * 3, [1.0] * 3)},
            ValueError,
            "positive standard",
        ),
    ],
)
def test_refuses_arguments(student, teacher, options, error, match):
    models = tiny(0, **student), tiny(1, **teacher)
    with pytest.raises(error, match=match):
        MaskedKD(*models, **options)
    assert all(p.requires_grad for model in models for p in model.parameters())  # nothing was frozen on the way


def test_refuses_other_networks():
    with pytest.raises(TypeError, match=r"teacher is not a ViT whose patches can be left out: .*ResNet"):
        MaskedKD(tiny(0), timm.create_model("resnet18", num_classes=5))
    with pytest.raises(TypeError, match="student is not a ViT"):
        MaskedKD(nn.Linear(2, 5), tiny(1))


def test_refuses_a_batch_without_images():
    with pytest.raises(ValueError, match=r"^images holds no image; its shape is \(0, 3, 32, 32\)\."):
        MaskedKD(tiny(0), tiny(1))(pictures()[:0], TARGETS[:0])


def test_refuses_nan():
    images = pictures()
    images[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="saliency holds NaN"):
        MaskedKD(tiny(0), tiny(1))(images, TARGETS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pinned_teacher_on_the_cpu(dtype, monkeypatch):
    monkeypatch.setenv("FASTMKD_AUTOTUNE", "0")  # the project's kernels on either device, however fast on tiny networks
    monkeypatch.setattr("fastmkd.ops.choice._chosen", {})
    student, teacher, images = tiny(0).to(dtype), tiny(1).to(dtype), pictures().to(dtype)
    expected = MaskedKD(copy.deepcopy(student), teacher)(images, TARGETS).loss
    method = MaskedKD(student, teacher, teacher_device="cpu").cuda()
    with full_float32():
        out = method(images.cuda(), TARGETS.cuda())
    assert out.loss.is_cuda
    assert not method.teacher.pos_embed.is_cuda
    assert_same(out.loss.cpu(), expected)
