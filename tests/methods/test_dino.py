"""MaskedDINO: loss by hand, who sees what, how the teacher follows, and exact resumption."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from tiny_vits import pictures, tiny

from fastmkd import MaskedViT
from fastmkd.methods import MaskedDINO
from fastmkd.methods.crops import random_crops
from fastmkd.methods.dino_head import DinoHead, dino_loss
from fastmkd.reference import masked_vit_forward, masked_vit_saliency


def make(seed=0, keep_ratio=0.5, classes=0, **options):
    torch.manual_seed(seed)
    student = tiny(seed, num_classes=classes, dynamic_img_size=True)
    defaults = {"out_features": 12, "hidden": 16, "bottleneck": 8, "local_crops": 2}
    return MaskedDINO(student, keep_ratio, **{**defaults, **options}).double().train()


def crops():
    return [pictures(), pictures().flip(0), pictures(16), pictures(16).flip(1)]


def by_hand(student_logits, teacher_logits, center, tau_s, tau_t):
    total, pairs = 0.0, 0
    for g, teacher in enumerate(teacher_logits):
        for v, student in enumerate(student_logits):
            if v == g:
                continue
            for b in range(len(teacher)):
                target = [math.exp((float(t) - float(c)) / tau_t) for t, c in zip(teacher[b], center, strict=True)]
                logits = [math.exp(float(s) / tau_s) for s in student[b]]
                entropy = [-t / sum(target) * math.log(s / sum(logits)) for t, s in zip(target, logits, strict=True)]
                total += sum(entropy) / len(teacher)
            pairs += 1
    return total / pairs


def test_loss_by_hand():
    student = torch.rand(4, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher, center = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.rand(5)
    loss = dino_loss(student, teacher, center, 0.1, 0.04)
    expected = by_hand(student.detach(), teacher.detach(), center, 0.1, 0.04)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    loss.backward()
    assert teacher.grad is None
    assert all(student.grad[v].abs().max() > 0 for v in range(4))
    assert dino_loss(student.bfloat16(), teacher.bfloat16(), center).dtype == torch.float32


def test_head():
    head = DinoHead(6, 9, hidden=7, bottleneck=4)
    x = torch.randn(3, 6)
    hidden = head.mlp(x)
    cosine = torch.nn.functional.cosine_similarity(hidden[:, None], head.prototypes[None], dim=-1)
    torch.testing.assert_close(head(x), cosine)


@pytest.mark.parametrize("keep_ratio", [0.25, 1.0])
def test_whole_step_by_hand(keep_ratio):
    method = make(keep_ratio=keep_ratio)
    with torch.no_grad():
        for parameter in method.ema.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        method.center.copy_(torch.linspace(-0.1, 0.1, 12))
    method._has_changed()  # no move before this step
    student, teacher, center = method.student, method.ema["backbone"], method.center.clone()
    head, teacher_head = method.heads["dino"], method.ema["head"]
    out = method(crops())

    seen = [head(masked_vit_forward(student, crop)) for crop in crops()]
    answers = []
    for crop in crops()[:2]:
        keep = None
        if keep_ratio < 1:
            keep = masked_vit_saliency(student, crop).topk(4, dim=1).indices
        answers.append(teacher_head(masked_vit_forward(teacher, crop, keep)))
    expected = dino_loss(torch.stack(seen), torch.stack(answers), center)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.student_output, masked_vit_forward(student, crops()[0]))
    parameters = [*student.parameters(), *head.parameters()]
    mine = torch.autograd.grad(out.loss, parameters)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, parameters))
    moved = 0.9 * center + 0.1 * torch.cat(answers).mean(0)
    torch.testing.assert_close(method.center, moved.detach())


def test_classifier_is_left_alone_and_everything_else_learns():
    method = make(classes=5)
    method(crops()).loss.backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [n for n, p in method.named_parameters() if not p.requires_grad and not n.startswith("ema.")]
    assert missing == []
    assert frozen == ["student.head.weight", "student.head.bias"]
    assert all(p.grad is None for p in method.ema.parameters())
    method.release()
    assert method.student.head.weight.requires_grad


def test_teacher_follows_once_per_optimizer_step():
    method = make(momentum=0.5)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    weight = lambda: method.student.blocks[0].attn.qkv.weight.detach().clone()  # noqa: E731
    expected = weight()
    for _ in range(3):
        for _ in range(2):  # two batches accumulate
            (method(crops()).loss / 2).backward()
        torch.testing.assert_close(method.ema["backbone"].blocks[0].attn.qkv.weight, expected)
        optimizer.step()
        optimizer.zero_grad()
        expected = 0.5 * expected + 0.5 * weight()
    assert int(method.updates) == 3
    method.eval()
    method(crops())
    assert int(method.updates) == 3


def test_momentum_rises_along_a_cosine():
    method = make(momentum=0.9, total_updates=4)
    values = []
    for _ in range(6):
        values.append(float(method.current_momentum()))
        method.update_teacher()
    expected = [1 - 0.1 * (math.cos(math.pi * min(i, 4) / 4) + 1) / 2 for i in range(6)]
    assert values == pytest.approx(expected, abs=1e-6)


def test_resumes_exactly():
    def steps(method, optimizer, count):
        for _ in range(count):
            torch.manual_seed(int(optimizer.param_groups[0].setdefault("seed", 0)))
            optimizer.param_groups[0]["seed"] += 1
            method(pictures()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def start(seed):
        method = make(seed, total_updates=10, momentum=0.8)
        return method, torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = start(0)
    steps(whole, optimizer, 2)
    file = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict()), file)
    steps(whole, optimizer, 2)
    again, optimizer = start(1)
    file.seek(0)
    method_state, optimizer_state = torch.load(file)
    again.load_state_dict(method_state)
    optimizer.load_state_dict(optimizer_state)
    steps(again, optimizer, 2)
    assert whole.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_learns_what_a_teacher_that_stands_still_says():
    method = make(momentum=1.0, center_momentum=1.0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        out = method(crops())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_layers_follow_a_frozen_network():
    frozen = tiny(3, embed_dim=24, depth=4).double()
    method = make(teacher=frozen, alpha=2.0)
    plain = make()
    plain.load_state_dict({key: value for key, value in method.state_dict().items() if "align" not in key})
    out = method(crops())
    assert method.heads["align"].layers == [(2, 3)]
    torch.testing.assert_close(out.terms["dino"], plain(crops()).loss.detach())
    torch.testing.assert_close(out.loss.detach(), out.terms["dino"] + 2 * out.terms["align"])
    (s,), (t,) = (
        MaskedViT(network).forward_intermediates(torch.cat(crops()[:2]), [block])
        for network, block in ((method.student, 1), (frozen, 2))
    )
    expected = (method.heads["align"][0](s[:, 1:]) - t[:, 1:]).abs().mean()
    torch.testing.assert_close(out.terms["align"], expected.detach())
    out.loss.backward()
    assert all(p.grad is not None for p in method.heads["align"].parameters())


def test_local_crops_of_several_sizes():
    method = make()
    given = [*crops()[:2], pictures(16), pictures(24), pictures(16).flip(1), pictures(24).flip(2)]
    assert method(crops()).loss.isfinite()
    center = method.center.clone()
    out = method(given)
    seen = [method.heads["dino"](masked_vit_forward(method.student, crop)) for crop in given]
    kept = [masked_vit_saliency(method.student, crop).topk(8, dim=1).indices for crop in given[:2]]
    answers = [
        method.ema["head"](masked_vit_forward(method.ema["backbone"], crop, keep))
        for crop, keep in zip(given[:2], kept, strict=True)
    ]
    torch.testing.assert_close(out.loss, dino_loss(torch.stack(seen), torch.stack(answers), center))
    # A crop that the loss took for another one's would get its gradient.
    logits = method.heads["dino"](torch.cat(method._local_features(given[2:])))
    torch.testing.assert_close(logits, torch.cat(seen[2:]))


@pytest.mark.parametrize("make_frozen", [lambda net: net.bfloat16(), lambda net: net.float(), lambda net: net.train()])
def test_frozen_networks_of_any_precision_and_mode(make_frozen):
    dropping = {"proj_drop_rate": 0.5, "attn_drop_rate": 0.5}
    expected = make(teacher=tiny(3, **dropping).double())(crops()).terms["align"]
    method = make(teacher=tiny(3, **dropping).double())
    make_frozen(method.teacher)
    torch.testing.assert_close(method(crops()).terms["align"], expected, rtol=0.02, atol=0)


def test_broken_frozen_network_is_skipped():
    method = make(teacher=tiny(3).double())
    with torch.no_grad():
        method.teacher.blocks[0].mlp.fc1.bias[0] = math.nan
    with pytest.warns(UserWarning, match="the teacher's output for batch 0 "):
        out = method(crops())
    out.loss.backward()
    assert out.loss == 0
    assert out.terms == {"dino": 0, "align": 0}
    assert all(p.grad.eq(0).all() for p in method.parameters() if p.requires_grad)
    assert method.skipped.numbers == [0]


def test_broken_teacher_is_skipped():
    method = make()
    method(crops())
    center = method.center.clone()
    with torch.no_grad():
        method.ema["backbone"].norm.bias[0] = math.nan
    with pytest.warns(UserWarning, match="batch 1 "):
        out = method(crops())
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad.eq(0).all() for p in method.parameters() if p.requires_grad)
    assert torch.equal(method.center, center)
    assert method.skipped.numbers == [1]


@pytest.mark.filterwarnings("ignore:batch 0")
@pytest.mark.parametrize("theirs_too", [True, False])
def test_the_centre_is_that_of_the_processes_whose_batch_counts(monkeypatch, theirs_too):
    method = make(keep_ratio=1.0)
    with torch.no_grad():
        method.center.copy_(torch.linspace(-0.1, 0.1, 12))
    center, theirs = method.center.clone(), torch.randn(12, dtype=torch.float64)

    def all_reduce(found):
        found.add_(torch.cat((theirs, torch.ones(1))) * theirs_too)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    method([pictures() * math.nan, pictures()])
    torch.testing.assert_close(method.center, 0.9 * center + 0.1 * theirs if theirs_too else center)


def test_copies_show_and_stay_in_eval_mode():
    method = copy.deepcopy(make())
    assert not any(module.training for module in method.ema.modules())
    assert method.student.training
    panels = method.pictures(pictures())
    assert [panel.title for panel in panels] == ["input", "saliency", "kept patches"]
    assert panels[2].image[:, ::8, ::8].sum((1, 2)).tolist() == [8, 8, 8]


def test_own_crops():
    torch.manual_seed(0)
    method = make(local_crops=3)
    assert [tuple(crop.shape[-2:]) for crop in method.cut(pictures())] == [(32, 32)] * 2 + [(16, 16)] * 3
    # A picture whose channels are the coordinates shows where a crop was taken.
    axis = torch.linspace(-1, 1, 64) * 63 / 64  # pixel centres
    image = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(200, -1, -1, -1)
    parts = random_crops(image, (32, 32), (0.1, 0.4))
    sides = (parts[:, :, -1, -1] - parts[:, :, 0, 0]) / 2 * 32 / 31  # (B, 2) shares of height and width
    area = (sides[:, 0] * sides[:, 1]).abs()
    assert 0.095 < area.min() < 0.15
    assert 0.35 < area.max() < 0.405
    aspect = (sides[:, 1] / sides[:, 0]).abs()
    assert 0.74 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.35
    assert 70 < (sides[:, 1] < 0).sum() < 130  # flipped
    assert (sides[:, 0] > 0).all()
    whole = random_crops(image, (64, 64), (1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    torch.testing.assert_close(whole, image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_crops_in_half_precision_are_those_of_float32(dtype):
    images = pictures(224).to(dtype)
    found = []
    for given in (images, images.float()):
        torch.manual_seed(1)
        found.append(random_crops(given, (96, 96), (0.05, 0.4)))
    assert found[0].dtype == dtype
    assert torch.equal(found[0], found[1].to(dtype))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"center_momentum": math.nan}, "center_momentum is nan"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
        ({"total_updates": 0}, "total_updates is 0"),
        ({"local_crops": -1}, "local_crops is -1"),
        ({"strategy": "best"}, "strategy is 'best'"),
    ],
)
def test_refuses_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_refuses_students_and_crops():
    with pytest.raises(ValueError, match="create it with dynamic_img_size=True"):
        MaskedDINO(tiny(0), out_features=4)
    with pytest.raises(ValueError, match="student has no CLS token"):
        MaskedDINO(tiny(0, class_token=False, global_pool="avg"), out_features=4, local_crops=0)
    with pytest.raises(ValueError, match="distilled DeiT"):
        MaskedDINO(tiny(0, VisionTransformerDistilled), out_features=4, local_crops=0)
    with pytest.raises(ValueError, match="no two global crops"):
        make()([pictures()])
    for wrong in (pictures(16, count=2), pictures(16)[:, :2], pictures(16)[0]):
        with pytest.raises(ValueError, match=r"images\[3\] has the shape .* each crop is one of every image"):
            make()([*crops()[:3], wrong])
    with pytest.raises(ValueError, match="scale is"):
        random_crops(pictures(), (8, 8), (0.5, 0.1))
    with pytest.raises(ValueError, match="ratio is"):
        random_crops(pictures(), (8, 8), (0.1, 0.5), ratio=(0.0, 1.0))
