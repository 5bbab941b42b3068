"""A teacher that runs compiled, against the same teacher uncompiled."""

from __future__ import annotations

import copy
import pickle
import shutil

import dpk_networks
import pytest
import torch
from tiny_vits import ON_GPU, TARGETS, assert_same, full_float32, pictures, tiny
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastmkd
from fastmkd import MaskedKD
from fastmkd.methods import FeatureKD
from fastmkd.methods.features import Features, observe_maps
from fastmkd.methods.teacher_call import TeacherCall
from fastmkd.ops.accuracy import judge


@pytest.fixture
def graphs(monkeypatch):
    """Traces as ``torch.compile`` does, generates no code, and counts the graphs."""
    torch._dynamo.reset()
    counter, real = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, *, dynamic, mode: real(fn, backend=counter, dynamic=dynamic))
    yield counter
    torch._dynamo.reset()


def gradients(method, images, targets):
    out = method.train()(images, targets)
    parameters = [p for p in method.parameters() if p.requires_grad]
    return out.loss.detach(), *torch.autograd.grad(out.loss, parameters, allow_unused=True)


def test_same_loss_and_gradients_from_one_graph_for_each_shape(graphs):
    student, teacher = tiny(0, depth=1).float(), tiny(1, depth=1).float()
    plain, compiled = (MaskedKD(copy.deepcopy(student), teacher, teacher_compile=way) for way in (False, True))
    exact = MaskedKD(copy.deepcopy(student).double(), copy.deepcopy(teacher).double())
    for count, expected in ((3, 1), (2, 2), (3, 2)):  # the last batch of an epoch may be smaller
        batch = pictures(count=count), TARGETS[:count]
        found, right = (gradients(m, batch[0].float(), batch[1]) for m in (compiled, plain))
        for x, wide, same in zip(found, gradients(exact, *batch), right, strict=True):
            assert judge(x, wide, same).ok
        assert graphs.frame_count == expected


@pytest.mark.parametrize(
    "options",
    [
        {"base": "manifold"},
        {"base": "attention"},
        {"mask": "student", "teacher_dtype": torch.bfloat16},
    ],
)
def test_every_base_and_mask(graphs, options):
    losses = []
    for way in (False, True):
        method = MaskedKD(tiny(0).float(), tiny(1).float(), teacher_compile=way, **options)
        for _ in range(3):  # the first batch is traced
            made = graphs.frame_count
            torch.manual_seed(0)
            found = gradients(method, pictures().float(), TARGETS)
        losses.append(found)
    torch.testing.assert_close(losses[1], losses[0])
    assert graphs.frame_count == made > 0


@pytest.mark.parametrize("first", [True, False])
def test_what_is_recorded_may_change_from_call_to_call(graphs, first):
    compiled, plain = (MaskedKD(tiny(0), tiny(1), base="attention", teacher_compile=way) for way in (True, False))
    images, keep = pictures(), torch.arange(8).expand(3, 8).contiguous()
    for with_records in (first, not first) * 2:
        found = []
        for method in (compiled, plain):
            torch.manual_seed(0)
            found.append(method(images, TARGETS).loss if with_records else method.ask_teacher(images, keep).logits)
        torch.testing.assert_close(*found)
    assert graphs.frame_count > 1


def test_the_feature_methods_too(graphs):
    images, targets = dpk_networks.pictures(), dpk_networks.TARGETS

    def feature_kd(way):
        torch.manual_seed(2)
        networks = dpk_networks.cnn(0), dpk_networks.cnn(1)
        return FeatureKD(*networks, "fitnet", {"last": "last"}, image_size=24, teacher_compile=way).double()

    for make in (lambda way: dpk_networks.make(teacher_compile=way), feature_kd):
        before = graphs.frame_count
        found = []
        for way in (False, True):
            torch.manual_seed(0)
            found.append(gradients(make(way), images, targets))
        torch.testing.assert_close(found[1], found[0])
        assert graphs.frame_count > before


def test_the_method_stays_an_ordinary_module(graphs):
    student, teacher = tiny(0, depth=1), tiny(1, depth=1)
    method = MaskedKD(student, teacher, teacher_compile=True)
    expected = method(pictures(), TARGETS).loss
    assert graphs.frame_count == 1
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert torch.equal(twin(pictures(), TARGETS).loss, expected)
    assert list(method.state_dict()) == ["student." + key for key in student.state_dict()]
    assert {id(p) for p in method.parameters()} == {id(p) for p in student.parameters()}
    assert method.float()(pictures().float(), TARGETS).loss.dtype == torch.float32
    teacher.train()  # somebody else's doing
    assert method.train()(pictures().float(), TARGETS).loss.isfinite()
    assert not teacher.training
    assert method.release() is student
    assert all(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(pictures().float()), copy.deepcopy(teacher)(pictures().float()))


@pytest.mark.parametrize(
    ("way", "device", "mode"),
    [
        (True, "cpu", "default"),
        (True, "cuda", "reduce-overhead"),
        ("max-autotune", "cpu", "max-autotune"),
        ("default", "cuda", "default"),
    ],
)
def test_mode(monkeypatch, way, device, mode):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda fn, **options: asked.append(options) or fn)
    call = TeacherCall(observe_maps, compile=way)
    assert call._observer(torch.device(device)) is call._observer(torch.device(device)) is observe_maps
    assert asked == [{"dynamic": False, "mode": mode}]


def test_an_answer_outlives_the_next_one(monkeypatch):
    buffer = torch.zeros(2, 3)  # as CUDA graphs, which write every answer to the same place

    def replay(network, images):
        return Features(buffer.copy_(network(images)), {})

    monkeypatch.setattr(torch, "compile", lambda fn, **_: replay)
    call, net = TeacherCall(observe_maps, compile=True), nn.Linear(4, 3)
    first, images = torch.randn(2, 4), torch.randn(2, 4)
    answer = call(net, first)
    call(net, images)
    torch.testing.assert_close(answer.output, net(first))


def test_answers_can_be_saved_for_a_backward_pass():
    call, net = TeacherCall(observe_maps), nn.Sequential(nn.Conv2d(1, 3, 1))
    answer = call(net, torch.randn(2, 1, 4, 4), ["0"])
    weight = torch.ones(4, requires_grad=True)
    for x in (answer.output, answer.maps["0"]):
        assert not x.is_inference()
        assert not x.requires_grad
        (x * weight).sum().backward()


@pytest.mark.parametrize("make", [lambda **o: MaskedKD(tiny(0), tiny(1), **o), dpk_networks.make])
def test_refuses_modes_that_there_are_not(make):
    with pytest.raises(ValueError, match="teacher_compile is 'fast'; expected True, False or a mode: 'default'"):
        make(teacher_compile="fast")


def test_refuses_to_compile_every_batch_anew():
    with pytest.raises(ValueError, match="would be compiled anew"):
        MaskedKD(tiny(0), tiny(1), keep_mass=0.5, teacher_compile=True)


@pytest.mark.long
def test_the_real_compiler():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    torch._dynamo.reset()
    student, teacher = tiny(0, depth=1), tiny(1, depth=1)
    found = [
        gradients(MaskedKD(copy.deepcopy(student), teacher, teacher_compile=way), pictures(), TARGETS)
        for way in (False, True)
    ]
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("base", "dtype"),
    [
        ("logit", torch.float64),
        ("manifold", torch.float64),
        ("attention", torch.float64),
        ("logit", torch.float32),
        ("attention", torch.float32),
    ],
)
def test_cuda_graphs(base, dtype):
    torch._dynamo.reset()
    student, teacher = tiny(0).to("cuda", dtype), tiny(1, depth=3).to("cuda", dtype)
    methods = [MaskedKD(copy.deepcopy(student), teacher, base=base, teacher_compile=way) for way in (False, True)]
    with full_float32(), fastmkd.backend(ON_GPU[dtype]):
        for seed in range(5):  # warm-up, recording and replay
            torch.manual_seed(seed)
            images = torch.randn(3, 3, 32, 32, dtype=torch.float64, device="cuda").to(dtype)
            plain, compiled = (gradients(method, images, TARGETS.cuda()) for method in methods)
            if base != "manifold":  # draws patches
                assert_same(compiled, plain)
            assert all(x.isfinite().all() for x in compiled)
