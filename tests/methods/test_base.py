"""A method trains the passed student, freezes the passed teacher, and gives both back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastmkd import DistillOutput, Supervised
from fastmkd.methods import DistillMethod


def make(**options) -> DistillMethod:
    torch.manual_seed(0)
    return DistillMethod(nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.Dropout(), nn.BatchNorm1d(2)), **options)


def test_owns_only_the_student_and_its_heads():
    method = make()
    method.heads["projection"] = nn.Linear(2, 2)
    names = ["student.weight", "student.bias", "heads.projection.weight", "heads.projection.bias"]
    assert [name for name, _ in method.named_parameters()] == names
    assert list(method.state_dict()) == names
    assert not any(module is method.teacher for module in method.modules())


def test_keeps_the_passed_objects():
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    method = DistillMethod(student, teacher)
    assert method.student is student
    assert method.teacher is teacher


def test_teacher_stays_in_eval_mode_and_frozen():
    method = make()
    for mode in (True, False):
        method.train(mode)
        assert method.student.training is mode
        assert not any(module.training for module in method.teacher.modules())
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())


def test_teacher_follows_casts_and_moves():
    method = make().double()
    assert method.teacher[0].weight.dtype == torch.float64
    assert method.half().teacher[2].running_mean.dtype == torch.float16
    assert method.to("meta").teacher[0].weight.device.type == "meta"


def test_pinned_teacher_stays():
    method = make(teacher_device="meta")
    assert method.teacher[0].weight.device.type == "meta"
    method.to("cpu").double()
    assert method.teacher[0].weight.device.type == "meta"
    assert method.student.weight.dtype == torch.float64


class HalfReached(DistillMethod):
    def unreachable_parameters(self, student):
        return [name for name, _ in student.named_parameters() if name.startswith("1.")]


def test_release_gives_everything_back():
    student, teacher = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(3, 2))
    student[1].bias.requires_grad_(False)
    student[2].weight.requires_grad_(False)
    teacher[0].bias.requires_grad_(False)
    before = [[p.requires_grad for p in module.parameters()] for module in (student, teacher)]
    method = HalfReached(student, teacher)
    assert [p.requires_grad for p in student.parameters()] == [True, True, False, False, False, True]
    assert method.release() is student
    assert [[p.requires_grad for p in module.parameters()] for module in (student, teacher)] == before
    assert teacher.training
    method.release()
    assert [[p.requires_grad for p in module.parameters()] for module in (student, teacher)] == before


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_copies(clone):
    method = make().double()
    twin = clone(method)
    assert twin.teacher is not method.teacher
    assert torch.equal(twin.teacher[0].weight, method.teacher[0].weight)
    assert not any(parameter.requires_grad for parameter in twin.teacher.parameters())
    assert twin.float().teacher[0].weight.dtype == torch.float32
    assert method.teacher[0].weight.dtype == torch.float64
    twin.release()
    assert all(parameter.requires_grad for parameter in twin.teacher.parameters())


def test_refuses():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="share 2 parameters"):
        DistillMethod(layer, layer)
    with pytest.raises(TypeError, match="student is a str"):
        DistillMethod("vit")
    with pytest.raises(TypeError, match="teacher is a builtin"):
        DistillMethod(layer, torch.relu)
    with pytest.raises(ValueError, match="there is no teacher"):
        DistillMethod(layer, teacher_device="cpu")


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.head_dist = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x.flatten(1)), self.head_dist(x.flatten(1))


def test_supervised():
    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    method, images, targets = Supervised(student), torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    out = method(images, targets)
    assert isinstance(out, DistillOutput)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(student(images), targets))
    torch.testing.assert_close(out.student_output, student(images))
    assert torch.equal(out.terms["ce"], out.loss)
    assert not out.terms["ce"].requires_grad
    out.loss.backward()
    assert student[1].weight.grad.abs().sum() > 0
    (panel,) = method.pictures(images)
    assert (panel.title, panel.kind) == ("input", "image")
    assert torch.equal(panel.image, images)


def test_supervised_with_two_heads():
    student, images, targets = TwoHeads(), torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    out = Supervised(student)(images, targets)
    a, b = student(images)
    expected = (nn.functional.cross_entropy(a, targets) + nn.functional.cross_entropy(b, targets)) / 2
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.student_output, (a + b) / 2)
    with pytest.raises(TypeError, match="returned a mapping of logits"):
        Supervised(type("Odd", (TwoHeads,), {"forward": lambda self, x: {"logits": x}})())(images, targets)
