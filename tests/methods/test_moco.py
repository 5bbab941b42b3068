"""MoCoV3: loss by hand, who is trained, batch statistics, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from tiny_vits import pictures, tiny

from fastmkd import MaskedViT
from fastmkd.methods import MoCoV3
from fastmkd.methods.moco import contrastive_loss, mlp
from fastmkd.reference import masked_vit_forward


def make(seed=0, classes=0, **options):
    torch.manual_seed(seed)
    defaults = {"hidden": 16, "out_features": 8}
    return MoCoV3(tiny(seed, num_classes=classes), **{**defaults, **options}).double().train()


def views():
    return [pictures(), pictures().flip(0).flip(-1)]


def by_hand(queries, keys, tau):
    total = 0.0
    for b, query in enumerate(queries):
        similar = [math.exp(float(F.cosine_similarity(query, key, dim=0)) / tau) for key in keys]
        total -= 2 * tau * math.log(similar[b] / sum(similar)) / len(queries)
    return total


def test_loss_by_hand():
    queries, keys = torch.randn(2, 5, 4, dtype=torch.float64)
    queries.requires_grad_()
    loss = contrastive_loss(queries, keys, 0.2)
    assert loss.item() == pytest.approx(by_hand(queries.detach(), keys, 0.2), rel=1e-10)
    loss.backward()
    assert queries.grad.abs().min() > 0
    assert contrastive_loss(queries.bfloat16(), keys.bfloat16(), 0.2).dtype == torch.float32


def test_heads_have_no_bias_and_no_affine_at_the_end():
    layers = [type(layer).__name__ for layer in mlp(3, 6, 12, 4)]
    assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [name for name, _ in mlp(2, 6, 12, 4).named_parameters()] == ["0.weight", "1.weight", "1.bias", "3.weight"]


def test_whole_step_by_hand():
    method = make()
    with torch.no_grad():
        for parameter in method.ema.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    method._has_changed()  # no move before this step
    student, average = copy.deepcopy(method.student), copy.deepcopy(method.ema["backbone"])
    project, predict, theirs = (
        copy.deepcopy(module).train()
        for module in (method.heads["project"], method.heads["predict"], method.ema["project"])
    )
    out = method(views())

    queries = [predict(project(masked_vit_forward(student, view))) for view in views()]
    keys = [theirs(masked_vit_forward(average, view)) for view in views()]
    expected = by_hand(queries[0].detach(), keys[1], 0.2) + by_hand(queries[1].detach(), keys[0], 0.2)
    assert out.loss.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(out.student_output, masked_vit_forward(student, views()[0]))
    loss = contrastive_loss(queries[0], keys[1], 0.2) + contrastive_loss(queries[1], keys[0], 0.2)
    copied = [*(p for p in student.parameters() if p.requires_grad), *project.parameters(), *predict.parameters()]
    wanted = torch.autograd.grad(loss, copied)
    mine = torch.autograd.grad(out.loss, [p for p in method.parameters() if p.requires_grad])
    assert len(mine) == len(wanted)
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_what_learns():
    method = make(classes=5)
    method(views()).loss.backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [n for n, p in method.named_parameters() if not p.requires_grad and not n.startswith("ema.")]
    assert missing == []
    assert frozen == [f"student.{n}" for n in ("patch_embed.proj.weight", "patch_embed.proj.bias")] + [
        "student.head.weight", "student.head.bias"
    ]  # fmt: skip
    assert all(p.grad is None for p in method.ema.parameters())
    method.release()
    assert all(p.requires_grad for p in method.student.parameters())
    assert all(p.requires_grad for p in make(freeze_patch_embed=False).student.parameters())


def test_it_learns_and_the_average_follows():
    method = make(momentum=0.9)
    before = copy.deepcopy(method.ema["backbone"].state_dict())
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        out = method(views())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = method.ema["backbone"].state_dict()
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])
    assert torch.equal(before["patch_embed.proj.weight"], after["patch_embed.proj.weight"])


def test_layers_follow_a_frozen_network():
    teacher = tiny(3, embed_dim=24, depth=4).double()
    method = make(teacher=teacher, alpha=0.5, student_layer=[1, 2], align_head="linear")
    assert method.heads["align"].layers == [(1, 2), (2, 4)]
    before = method.state_dict()
    out = method(views())
    alone = make()
    alone.load_state_dict({key: value for key, value in before.items() if not key.startswith("heads.align")})
    expected = 0.0
    for own, other, head in zip((0, 1), (1, 3), method.heads["align"], strict=True):
        for view in views():
            (s,), (t,) = (
                MaskedViT(network).forward_intermediates(view, [block])
                for network, block in ((method.student, own), (teacher, other))
            )
            expected += (head(s[:, 1:]) - t[:, 1:]).abs().mean() / 2
    torch.testing.assert_close(out.terms["align"], expected)
    torch.testing.assert_close(out.loss, alone(views()).loss + 0.5 * expected)
    out.loss.backward()
    assert all(p.grad is not None for p in method.heads["align"].parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in key or "frozen" in key for key in method.state_dict())
    method.release()
    assert all(p.requires_grad for p in teacher.parameters())


def test_broken_frozen_network_is_skipped():
    method = make(teacher=tiny(3).float())
    method.teacher.float().train()  # by somebody, since
    method(views())
    assert not method.teacher.training
    with torch.no_grad():
        method.teacher.blocks[0].mlp.fc1.bias[0] = math.nan
    with pytest.warns(UserWarning, match="the teacher's output for batch 1 "):
        out = method(views())
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad.eq(0).all() for p in method.parameters() if p.requires_grad)


def test_modes():
    method = copy.deepcopy(make())
    assert method.ema["project"].training  # keys are normalised by their batch too
    assert not method.ema["backbone"].training
    method.eval()
    assert not any(module.training for module in method.modules())
    torch.manual_seed(0)
    own = method(pictures())
    assert own.loss.isfinite()


def test_broken_average_is_skipped():
    method = make()
    with torch.no_grad():
        method.ema["backbone"].norm.bias[0] = math.nan
    with pytest.warns(UserWarning, match="batch 0 "):
        out = method(views())
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad.eq(0).all() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"total_updates": 0}, "total_updates is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"teacher": tiny(3), "alpha": -1.0}, "alpha is -1.0"),
        ({"teacher": tiny(3), "align_head": "conv"}, "head is 'conv'"),
        ({"teacher": tiny(3), "student_layer": 9}, "student_layer is 9"),
        ({"teacher": tiny(3, patch_size=4)}, "patches of"),
    ],
)
def test_refuses_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_refuses_students_and_views():
    with pytest.raises(ValueError, match="distilled DeiT"):
        MoCoV3(tiny(0, VisionTransformerDistilled))
    for wrong in ([pictures()], [pictures(), pictures(16)]):
        with pytest.raises(ValueError, match="no two views of one shape"):
            make()(wrong)
