"""Pipelining: a batch cut into parts gives the loss of the whole, and the teacher's work runs beside the student's."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from tiny_vits import ON_GPU, TARGETS, assert_same, full_float32, pictures, tiny

import fastmkd
from fastmkd import MaskedKD
from fastmkd.methods import lanes
from fastmkd.methods.lanes import SideStream, lane_between

IMAGES, LABELS = pictures(count=7), torch.tensor([0, 4, 2, 1, 1, 0, 3])


def outcome(method, images=IMAGES, targets=LABELS):
    torch.manual_seed(3)
    out = method.train()(images, targets)
    gradients = torch.autograd.grad(out.loss, [p for p in method.parameters() if p.requires_grad])
    return out.loss.detach(), out.student_output.detach(), out.terms, gradients


@pytest.mark.parametrize("targets", [LABELS, torch.rand(7, 5, dtype=torch.float64).softmax(1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base": "manifold"},  # compares images with each other
        {"base": "attention"},
        {"mask": "student"},
        {"keep_mass": 0.6},
        {"keep_ratio": 1.0},
    ],
)
def test_parts_give_the_loss_and_gradients_of_the_whole(options, targets):
    student, teacher = tiny(0), tiny(1, depth=3)
    whole = outcome(MaskedKD(copy.deepcopy(student), teacher, **options), targets=targets)
    for parts in (2, 3, 100):  # 7 images do not divide; nor are there 100
        method = MaskedKD(copy.deepcopy(student), teacher, micro_batches=parts, **options)
        torch.testing.assert_close(outcome(method, targets=targets), whole, rtol=1e-9, atol=1e-12)


def test_a_bad_answer_skips_all_parts():
    teacher = tiny(1)
    teacher.patch_embed.proj.register_forward_hook(lambda *_: None)
    method = MaskedKD(tiny(0), teacher, micro_batches=3)
    with torch.no_grad():
        teacher.head.bias.fill_(torch.inf)
    with pytest.warns(UserWarning, match="batch 0"):
        loss, _, _, gradients = outcome(method)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)
    assert method.skipped.count == 1


class LateLane:
    """Does nothing before its answer is wanted, and notes what happened when."""

    def __init__(self):
        self.events = []

    def __call__(self, task):
        number = sum(event.startswith("ask") for event in self.events)
        self.events.append(f"ask {number}")

        def result():
            self.events.append(f"wait {number}")
            return task()

        return result


@pytest.mark.parametrize("mask", ["teacher", "student"])
def test_the_student_goes_on_before_the_teacher_has_answered(monkeypatch, mask):
    student, lane, devices = tiny(0), LateLane(), []
    monkeypatch.setattr("fastmkd.methods.maskedkd.lane_between", lambda *pair: devices.append(pair) or lane)
    method = MaskedKD(student, tiny(1), micro_batches=3, mask=mask, strategy="random")
    expected = outcome(MaskedKD(student, tiny(1), micro_batches=3, mask=mask, strategy="random"))
    lane.events.clear()
    student.norm.register_forward_hook(lambda *_: lane.events.append("student"))
    found = outcome(method)
    order = ["student", "ask"] if mask == "teacher" else ["ask", "student"]  # a masked student's teacher needs nothing
    passes = [name if name == "student" else f"{name} {i}" for i in range(3) for name in order]
    assert lane.events == [*passes, "wait 0", "wait 1", "wait 2"]
    if mask == "student":  # a masked teacher sees other random patches when it is asked later
        torch.testing.assert_close(found, expected)
    assert set(devices) == {(torch.device("cpu"), torch.device("cpu"))}


def test_without_parts_there_is_no_lane(monkeypatch):
    monkeypatch.setattr("fastmkd.methods.maskedkd.lane_between", None)
    assert MaskedKD(tiny(0), tiny(1))(pictures(), TARGETS).loss.isfinite()


def test_copies():
    method = MaskedKD(tiny(0), tiny(1), micro_batches=2)
    expected = outcome(method)
    torch.testing.assert_close(outcome(copy.deepcopy(method)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_refuses_other_numbers_of_parts(value):
    with pytest.raises(ValueError, match=f"micro_batches is {value!r}; expected a whole number"):
        MaskedKD(tiny(0), tiny(1), micro_batches=value)


class FakeStream:
    def __init__(self, device):
        self.device, self.queue = device, []

    def wait_event(self, event):
        self.queue.append(("wait", event))

    def record_event(self):
        event = object()
        self.queue.append(("record", event))
        return event


class FakeTensor:
    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)

    def map(self, fn):
        return fn(self)


@pytest.mark.parametrize("teacher_at", [0, 1])
def test_order_on_the_streams(monkeypatch, teacher_at):
    home, away = torch.device("cuda", 0), torch.device("cuda", teacher_at)
    current = {home: FakeStream(home), away: FakeStream(away)}
    if home == away:
        current = {home: current[away]}
    main = dict(current)

    @contextlib.contextmanager
    def use(stream):
        before, current[stream.device] = current[stream.device], stream
        yield
        current[stream.device] = before

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[device])
    lanes._side_stream.cache_clear()
    lane = lane_between(home, away)
    assert lane is lane_between(home, away)
    assert isinstance(lane, SideStream)
    used, answer = {}, FakeTensor()

    def task():
        used.update(current)
        for stream in current.values():
            stream.queue.append(("work", None))
        return answer

    result = lane(task)
    assert current == main  # the caller's streams are current again
    assert len({id(s) for s in (*main.values(), *used.values())}) == 2 * len(main)
    (ready,) = (event for _, event in main[home].queue)
    assert [kind for kind, _ in main[home].queue] == ["record"]
    for stream in used.values():  # nothing begins before the caller's work is done, on either device
        assert stream.queue[:2] == [("wait", ready), ("work", None)]
    kind, done = used[home].queue[-1]
    assert (kind, answer.streams) == ("record", [])
    assert result() is answer
    assert main[home].queue[1:] == [("wait", done)]
    assert answer.streams == [main[home]]
    lanes._side_stream.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_streams(compiled, dtype):
    """The last device: the student's own where there is one GPU, another where there are more."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    student, teacher = tiny(0).to("cuda:0", dtype), tiny(1, depth=12, embed_dim=192, num_heads=3).to(dtype)
    options = {"teacher_device": device, "teacher_compile": compiled}
    whole = MaskedKD(copy.deepcopy(student), copy.deepcopy(teacher), teacher_device=device)
    parts = MaskedKD(copy.deepcopy(student), copy.deepcopy(teacher), micro_batches=4, **options)
    with full_float32(), fastmkd.backend(ON_GPU[dtype]):
        for seed in range(6):
            images = pictures(count=64 + seed).to("cuda:0", dtype)
            targets = torch.arange(64 + seed, device="cuda:0") % 5
            assert_same(outcome(parts, images, targets), outcome(whole, images, targets))
