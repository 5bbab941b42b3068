"""The baselines against their formulas in plain loops, and what the class around them refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dpk_networks import cnn
from dpk_networks import pictures as four_pictures
from tiny_vits import kl, tiny
from torch import Tensor, nn

from fastmkd import MaskedViT
from fastmkd.methods import FeatureKD
from fastmkd.methods.baselines import Answers, AttentionTransfer, DecoupledKD, Step
from fastmkd.methods.feature_alignment import FeatureAlignment

TARGETS = torch.tensor([0, 4, 2])


def pictures() -> Tensor:
    return four_pictures(count=3)


def make(student=None, teacher=None, **options) -> FeatureKD:
    options = {"image_size": 24, **options}
    return FeatureKD(student or cnn(0), teacher or cnn(1, channels=6), **options).double().train()


def test_vanilla_kd():
    method, images = make(ce_weight=0.1), pictures()
    out = method(images, TARGETS)
    s, t = method.student(images), method.teacher(images)
    torch.testing.assert_close(out.terms["base"], 16 * kl(s / 4, t / 4))
    torch.testing.assert_close(out.loss, 0.1 * F.cross_entropy(s, TARGETS) + 0.9 * 16 * kl(s / 4, t / 4))
    torch.testing.assert_close(out.student_output, s)
    assert list(method.heads) == []


def test_fitnet():
    method, images = make(base="fitnet", layers={"stem": "stem", "last": "last"}, logit_weight=0.5), pictures()
    out = method(images, TARGETS)
    expected = 0
    x, y = images, images
    for i, name in enumerate(("stem", "last")):
        x, y = getattr(method.student, name)(x), getattr(method.teacher, name)(y)
        expected = expected + (method.heads[f"adapt{i}"](x) - y).square().mean()
    torch.testing.assert_close(out.terms["base"], expected)
    torch.testing.assert_close(out.loss, out.terms["ce"] + 100 * expected + 0.5 * out.terms["kd"])
    out.loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(("head", "depth"), [("linear", 1), ("mlp2", 2), ("mlp3", 3)])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_feature_alignment(head, depth, loss):
    base = {"class_path": "fastmkd.methods.feature_alignment.FeatureAlignment",
            "init_args": {"head": head, "loss": loss}}  # fmt: skip
    method = make(tiny(0, img_size=24), tiny(1, img_size=24, embed_dim=32), base=base, layers={"blocks.0": "blocks.1"})
    images = pictures()
    out = method(images, TARGETS)
    (project,) = method.heads.values()
    s, t = (MaskedViT(network).forward_intermediates(images, [block])[0][:, 1:] for network, block in
            ((method.student, 0), (method.teacher, 1)))  # fmt: skip
    assert [part.out_features for part in project if isinstance(part, nn.Linear)] == [32] * depth
    gap = project(s) - t
    expected = gap.abs().mean() if loss == "l1" else gap.square().mean()
    torch.testing.assert_close(out.terms["base"], expected.detach())
    torch.testing.assert_close(out.loss, out.terms["ce"] + expected)
    out.loss.backward()
    assert all(p.grad is not None for p in method.heads.parameters())
    with pytest.raises(ValueError, match=f"{'head' if loss == 'l1' else 'loss'} is 'best'"):
        FeatureAlignment(**{"head" if loss == "l1" else "loss": "best"})


def test_attention_transfer():
    student = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    teacher = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    found = AttentionTransfer().loss(
        nn.ModuleDict(), Answers(student, [student]), Answers(teacher, [teacher]), Step(TARGETS)
    )
    total = 0.0
    for b in range(2):
        small = teacher[b].view(5, 4, 2, 4, 2).mean((2, 4))
        maps = []
        for feature in (student[b], small):
            attention = torch.tensor([[sum(feature[:, i, j] ** 2) for j in range(4)] for i in range(4)]) / len(feature)
            maps.append(attention / attention.square().sum().sqrt())
        total += (maps[0] - maps[1]).square().sum().item()
    torch.testing.assert_close(found.item(), total / 32)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_decoupled_kd(tau):
    s = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    t = 3 * torch.randn(3, 5, dtype=torch.float64)
    base = DecoupledKD(target_weight=2.0, other_weight=3.0, warmup_epochs=4)
    expected = 0
    for b, true in enumerate(TARGETS.tolist()):
        p, q = (t[b] / tau).softmax(0), (s[b] / tau).softmax(0)
        others = [c for c in range(5) if c != true]
        binary = p[true] * (p[true] / q[true]).log() + (1 - p[true]) * ((1 - p[true]) / (1 - q[true])).log()
        p_hat, q_hat = p[others] / p[others].sum(), q[others] / q[others].sum()
        expected = expected + (2 * binary + 3 * (p_hat * (p_hat / q_hat).log()).sum()) * tau**2 / 3
    for epoch, share in ((0, 0.25), (3, 1.0), (9, 1.0)):
        found = base.loss(nn.ModuleDict(), Answers(s), Answers(t), Step(TARGETS, tau, epoch))
        torch.testing.assert_close(found, share * expected)
    (grad,) = torch.autograd.grad(found, s)
    (by_hand,) = torch.autograd.grad(expected, s)
    torch.testing.assert_close(grad, by_hand)
    with pytest.raises(ValueError, match="soft labels"):
        base.loss(nn.ModuleDict(), Answers(s), Answers(t), Step(t.softmax(1), tau))


def test_dkd_grows_with_the_epochs():
    method = make(base="dkd")
    first = method(pictures(), TARGETS).terms["base"]
    method.set_epoch(19)
    torch.testing.assert_close(method(pictures(), TARGETS).terms["base"], 20 * first)


def test_dkd_of_two_classes_in_float32():
    s, t = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    loss = DecoupledKD(warmup_epochs=0).loss(nn.ModuleDict(), Answers(s), Answers(t), Step(torch.tensor([0, 1, 1])))
    loss.backward()
    assert s.grad.isfinite().all()


def test_review_kd():
    layers = {"stem": "stem", "last": "last"}
    method, images = (
        make(
            base={"class_path": "fastmkd.methods.baselines.ReviewKD", "init_args": {"warmup_epochs": 2}}, layers=layers
        ),
        pictures(),
    )
    out = method(images, TARGETS)
    s, t = [], []
    for net, maps in ((method.student, s), (method.teacher, t)):
        maps.append(net.stem(images))
        maps.append(net.last(maps[0]))
    low, high = method.heads["fuse0"], method.heads["fuse1"]
    assert high.attend is None
    gathered = high.reduce(s[1])
    expected = context_by_hand(high.expand(gathered), t[1])
    own = low.reduce(s[0])
    above = gathered.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weights = low.attend(torch.cat((own, above), 1))
    fused = weights[:, :1] * own + weights[:, 1:] * above
    expected = expected + context_by_hand(low.expand(fused), t[0])
    torch.testing.assert_close(out.terms["base"], expected / 2)
    method.set_epoch(5)
    torch.testing.assert_close(method(images, TARGETS).terms["base"], expected)
    out.loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def context_by_hand(x: Tensor, y: Tensor) -> Tensor:
    """Maps of 12 x 12 or 6 x 6; an average over a part that overlaps its neighbour is PyTorch's."""
    total = (x - y).square().mean()
    for parts, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        total = total + weight * F.adaptive_avg_pool2d(x - y, parts).square().mean()
    return total / 1.875


@pytest.mark.parametrize("base", ["fitnet", "at", "reviewkd", "crd-batch"])
def test_vit_and_cnn(base):
    method = make(tiny(0, img_size=24), base=base, layers={"blocks.1": "last"})
    out = method(pictures(), TARGETS)
    out.loss.backward()
    assert out.loss.isfinite()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def test_student_leaves_clean():
    student, teacher = cnn(0), cnn(1)
    keys = list(student.state_dict())
    method = FeatureKD(student, teacher, "fitnet", {"last": "last"}, image_size=24)
    assert method.release() is student
    assert list(student.state_dict()) == keys
    assert all(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"base": "pkt"}, ValueError, "base is 'pkt'; available are 'kd', 'fitnet'"),
        ({"base": "fitnet"}, ValueError, "base 'fitnet' compares feature maps"),
        ({"base": "at", "layers": {"lost": "last"}}, ValueError, "student has no module 'lost'"),
        ({"weight": -1.0}, ValueError, "weight is -1"),
        ({"temperature": 0.0}, ValueError, "temperature is 0"),
        ({"teacher_dtype": torch.int8}, ValueError, "teacher_dtype is torch.int8"),
    ],
)
def test_refuses(options, error, match):
    student, teacher = cnn(0), cnn(1)
    with pytest.raises(error, match=match):
        FeatureKD(student, teacher, image_size=24, **options)
    assert all(p.requires_grad for p in teacher.parameters())


def test_refuses_other_classes():
    with pytest.raises(ValueError, match="student has 5 classes and teacher 6"):
        make(teacher=cnn(1, classes=6))
    with pytest.raises(ValueError, match="other_weight is -1"):
        DecoupledKD(other_weight=-1)
