"""The averages of MaskedDINO and MoCoV3: whose steps they notice, where they are, and how wide."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_vits import pictures, tiny
from torch import nn

from fastmkd.methods import MaskedDINO, MoCoV3
from fastmkd.methods.averages import Averages, fingerprint


def dino(student=None, **options):
    torch.manual_seed(0)
    student = tiny(0, num_classes=0, dynamic_img_size=True).float() if student is None else student
    sizes = {"out_features": 12, "hidden": 16, "bottleneck": 8, "local_crops": 2}
    return MaskedDINO(student, 0.5, **{**sizes, **options}).train()


def moco(student=None, **options):
    torch.manual_seed(0)
    student = tiny(0, num_classes=0).float() if student is None else student
    return MoCoV3(student, **{"hidden": 16, "out_features": 8, **options}).train()


METHODS = pytest.mark.parametrize("make", [dino, moco])


class Writer(torch.optim.Optimizer):
    """Writes past autograd, as optimizers in C++ and those of other libraries do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.sign(), alpha=-0.01)


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "fused adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "fused sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, fused=True),
    "p.data": Writer,
}


def trained(method):
    return [p for p in method.parameters() if p.requires_grad]


def pairs(method):
    """Each averaged weight with the student's."""
    return list(zip(method.ema.parameters(), method._followed_parameters(), strict=True))


@METHODS
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_moves_them_once_a_step(make, optimizer):
    method = make(momentum=0.75, total_updates=8)
    optimizer = OPTIMIZERS[optimizer](trained(method))
    expected = [student.detach().clone() for _, student in pairs(method)]
    for step in range(1, 4):
        for _ in range(2):  # two batches accumulate
            (method(pictures().float()).loss / 2).backward()
            assert int(method.updates) == step
            for (average, _), value in zip(pairs(method), expected, strict=True):
                torch.testing.assert_close(average.detach(), value)
        momentum = method.current_momentum()
        optimizer.step()
        optimizer.zero_grad()
        expected = [
            momentum * value + (1 - momentum) * student.detach()
            for value, (_, student) in zip(expected, pairs(method), strict=True)
        ]
    assert any(not torch.equal(average, student) for average, student in pairs(method))


def test_the_move_is_one_compiled_graph_for_all_steps():
    method, graphs = dino(momentum=0.5), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    begin = torch.compile(method.begin_step, backend=backend, fullgraph=True)
    optimizer = torch.optim.AdamW(trained(method), lr=1e-2, fused=True)
    for p in trained(method):
        p.grad = torch.ones_like(p)
    expected = [average.detach().clone() for average, _ in pairs(method)]
    for step in range(1, 12):
        optimizer.step()
        begin()
        begin()  # nothing has changed, so the graph moves by nothing, as one on a GPU
        expected = [(value + student.detach()) / 2 for value, (_, student) in zip(expected, pairs(method), strict=True)]
        assert int(method.updates) == step
    assert len(graphs) == 1
    for (average, _), value in zip(pairs(method), expected, strict=True):
        torch.testing.assert_close(average.detach(), value)


@pytest.mark.long
@METHODS
def test_compiled_methods_follow_and_are_compiled_once(make):
    method = make(tiny(0, depth=1, num_classes=0, dynamic_img_size=True).float(), momentum=0.5)
    twin = copy.deepcopy(method)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(method, backend=backend)
    optimizers = [torch.optim.AdamW(trained(each), lr=1e-3, fused=True) for each in (method, twin)]
    made = []
    for step in range(4):
        for run, optimizer in zip((compiled, twin), optimizers, strict=True):
            torch.manual_seed(step)
            run(pictures().float()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append(len(graphs))
    assert made[1] == made[-1]
    assert int(method.updates) == int(twin.updates) == 4
    for ours, theirs in zip(method.ema.parameters(), twin.ema.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_loaded_state_has_a_move_to_make():
    method = dino(momentum=0.5)
    optimizer = torch.optim.SGD(trained(method), lr=0.1)
    for seed in range(2):
        torch.manual_seed(seed)
        method(pictures().float()).loss.backward()
        optimizer.step()
    state = copy.deepcopy(method.state_dict())
    ends = []
    for _ in range(2):  # the second time it has already seen the student that it loads
        torch.manual_seed(2)
        method(pictures().float())
        ends.append(copy.deepcopy(method.state_dict()))
        method.load_state_dict(state)
    assert int(ends[0]["updates"]) == int(state["updates"]) + 1
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in state)
    assert "_seen" not in state


CHANGES = {
    "one bit of a matrix": lambda net: (
        net[0].weight.data[1, 2].copy_(net[0].weight.data[1, 2].nextafter(torch.ones(())))
    ),
    "two of a vector that cancel": lambda net: net[0].bias.data.copy_(net[0].bias.data.flip(0)),
    "all signs": lambda net: [p.data.neg_() for p in net.parameters()],
    "twice as large": lambda net: net[1].weight.data.mul_(2),
    "far apart": lambda net: net[1].weight.data.copy_(torch.full_like(net[1].weight, 1e30)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", CHANGES)
def test_fingerprints_see_a_change(change, dtype):
    if dtype != torch.float32 and change in ("one bit of a matrix", "far apart"):
        change = "twice as large"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30)).to(dtype)
    before = fingerprint(net.parameters())
    assert torch.equal(before, fingerprint(copy.deepcopy(net).parameters()))
    CHANGES[change](net)
    assert not torch.equal(before, fingerprint(net.parameters()))


def test_half_precision_averages_do_not_stand_still():
    method = dino(momentum=0.996).bfloat16()
    with torch.no_grad():
        for p in method._followed_parameters():
            p.add_(0.01 * torch.sign(p) + 0.01)
    start = [average.clone() for average in method.ema.parameters()]
    for _ in range(100):
        method.update_teacher()
    for (average, student), was in zip(pairs(method), start, strict=True):
        assert (student.dtype, average.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(average, was + (1 - 0.996**100) * (student.float() - was), rtol=1e-4, atol=1e-6)


@METHODS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_students_of_half_precision_learn(make, dtype, when):
    student = tiny(0, num_classes=0, dynamic_img_size=True).float()
    method = make(student.to(dtype)) if when == "before" else make(student).to(dtype)
    assert {p.dtype for p in trained(method)} == {dtype}
    assert {p.dtype for p in method.ema.parameters()} == {torch.float32}
    optimizer = torch.optim.SGD(trained(method), lr=1e-2)
    for _ in range(2):
        out = method(pictures().to(dtype))
        out.loss.backward()
        optimizer.step()
    assert out.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(method))
    # Close to the same average in float32, whose answers bfloat16 rounds.
    wide = copy.deepcopy(method).float()
    head = method.ema["head"] if make is dino else method._keys
    images = pictures(count=6).to(dtype)
    ours = method._observe_average(method._teacher_vit, images, None, head)
    theirs = wide._observe_average(
        wide._teacher_vit, images.float(), None, wide.ema["head"] if make is dino else wide._keys
    )
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), theirs, rtol=0.1, atol=0.1)


def test_casts_there_and_back_cost_no_bit():
    method = dino()
    with torch.no_grad():
        method.center.copy_(torch.randn(12))
    before = copy.deepcopy([*method.ema.parameters(), method.center])
    method.bfloat16().to(torch.float16).float()
    assert all(map(torch.equal, before, [*method.ema.parameters(), method.center]))
    half = dino().bfloat16()
    assert half.center.dtype == torch.float32
    assert half.double().center.dtype == torch.float64
    assert {p.dtype for p in Averages({"net": nn.Linear(2, 2).half()}).parameters()} == {torch.float32}


def test_checkpoints_of_narrower_averages_load():
    method = dino().bfloat16()
    state = {key: x.bfloat16() if x.is_floating_point() else x for key, x in method.state_dict().items()}
    method.load_state_dict(state)
    assert method.ema["backbone"].norm.weight.dtype == torch.float32
    wide = dino()
    wide.load_state_dict(method.state_dict())
    assert torch.equal(wide.ema["backbone"].norm.weight, method.ema["backbone"].norm.weight)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_are_where_the_student_is_and_as_wide(make, dtype):
    frozen = tiny(3, embed_dim=16).to(dtype)
    student = tiny(0, num_classes=0, dynamic_img_size=True).to(dtype)
    method = make(student, teacher=frozen)
    out = method(pictures().to(dtype))
    out.loss.backward()
    assert {p.dtype for p in method.heads.parameters()} == {dtype}

    method = make(student.to("meta"), teacher=frozen.to("meta"))
    assert {x.device.type for x in [*method.parameters(), *method.buffers()]} == {"meta"}
