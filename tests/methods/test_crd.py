"""CRD, with its bank and in-batch, against its formula in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from dpk_networks import cnn, pictures
from torch import Tensor, nn

from fastmkd.methods import FeatureKD
from fastmkd.methods.baselines import Answers, Step
from fastmkd.methods.crd import CRD, BatchCRD, Memory

TARGETS = torch.tensor([0, 4, 0, 1])


def answers(channels: int, seed: int) -> Answers:
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(4, channels, 3, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    return Answers(torch.zeros(4, 5), maps)


def batch_by_hand(
    heads: nn.ModuleDict, student: Answers, teacher: Answers, same: list[list[bool]], tau: float
) -> float:
    total = 0.0
    for stage in range(2):
        embedded = []
        for role, maps in (("student", student.maps), ("teacher", teacher.maps)):
            rows = [heads[f"{role}{stage}"](image.flatten(1).mean(1)) for image in maps[stage]]
            embedded.append([row / row.square().sum().sqrt() for row in rows])
        for anchors, others in (embedded, embedded[::-1]):
            for i in range(4):
                score = [math.exp((anchors[i] @ others[j]).item() / tau) for j in range(4)]
                total -= math.log(score[i] / sum(score[j] for j in range(4) if j == i or not same[i][j])) / 4
    return total


@pytest.mark.parametrize("soft", [False, True])
def test_formula_and_gradient(soft):
    base, student, teacher = BatchCRD(width=6, temperature=0.5), answers(3, 0), answers(5, 1)
    torch.manual_seed(0)
    heads = nn.ModuleDict(base.heads(student, teacher)).double()
    targets = torch.full((4, 5), 0.2) if soft else TARGETS
    same = [[not soft and a == b for b in TARGETS.tolist()] for a in TARGETS.tolist()]
    found = base.loss(heads, student, teacher, Step(targets))
    assert found.item() == pytest.approx(batch_by_hand(heads, student, teacher, same, 0.5), rel=1e-12)
    inputs = [*student.maps, *heads.parameters()]
    assert torch.autograd.gradcheck(
        lambda *_: base.loss(heads, student, teacher, Step(targets)), inputs, fast_mode=True
    )


def test_images_of_one_class_have_nothing_to_tell_apart():
    base, student, teacher = BatchCRD(), answers(3, 0), answers(5, 1)
    heads = nn.ModuleDict(base.heads(student, teacher)).double()
    loss = base.loss(heads, student, teacher, Step(torch.zeros(4, dtype=torch.int64)))
    loss.backward()
    assert loss == 0
    assert all(not x.grad.any() for x in student.maps)  # zeros, not NaN


def test_learns_and_leaves_a_clean_student():
    student, teacher = cnn(0), cnn(1, channels=6)
    keys, images = list(student.state_dict()), pictures()
    method = FeatureKD(student, teacher, "crd-batch", {"last": "last"}, image_size=24).double().train()
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.02)
    values = []
    for _ in range(12):
        out = method(images, TARGETS)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        values.append(out.terms["base"])
    assert values[-1] < 0.7 * values[0]
    assert sorted(method.heads) == ["student0", "teacher0"]
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())
    assert list(method.release().state_dict()) == keys


LABELS = torch.tensor([0, 2, 0, 1, 4, 2, 0, 4, 0, 0])


class BankByHand:
    """CRD as the paper writes it, an image and a number at a time."""

    def __init__(self, memory: Memory) -> None:
        self.rows = [[row.clone() for row in rows] for rows in memory.rows]
        self.z: list[float | None] = [None, None]

    def step(self, embedded: tuple[Tensor, Tensor], numbers: list[int], drawn: Tensor, tau: float, m: float) -> float:
        total, count = 0.0, len(LABELS)
        for bank, anchors in ((0, embedded[1]), (1, embedded[0])):
            places = [[number, *others] for number, others in zip(numbers, drawn.tolist(), strict=True)]
            raised = [
                [math.exp((anchor @ self.rows[bank][j]).item() / tau) for j in places[i]]
                for i, anchor in enumerate(anchors)
            ]
            if self.z[bank] is None:
                self.z[bank] = count * sum(map(sum, raised)) / sum(map(len, raised))
            for row in raised:
                p = [value / self.z[bank] for value in row]
                noise = (len(row) - 1) / count
                total -= math.log(p[0] / (p[0] + noise)) + sum(math.log(noise / (q + noise)) for q in p[1:])
        for bank in (0, 1):
            for i, number in enumerate(numbers):
                row = m * self.rows[bank][number] + (1 - m) * embedded[bank][i]
                self.rows[bank][number] = row / row.square().sum().sqrt()
        return total / len(numbers)


def test_bank_by_hand(monkeypatch):
    base = CRD(negatives=7, momentum=0.3, width=6, temperature=0.5)
    torch.manual_seed(0)
    student, teacher = answers(3, 0), answers(5, 1)
    heads = nn.ModuleDict({**base.heads(student, teacher), **base.memories(2, LABELS)}).double().train()
    by_hand = [BankByHand(heads[f"memory{i}"]) for i in range(2)]
    drawn, original = [], Memory.draw
    monkeypatch.setattr(Memory, "draw", lambda self, numbers: drawn.append(original(self, numbers)) or drawn[-1])
    for step, numbers in enumerate(([3, 0, 9, 4], [5, 3, 1, 0], [0, 3, 2, 4])):
        student, teacher = answers(3, 2 * step), answers(5, 2 * step + 1)
        embedded = base.embedded(heads, student, teacher)
        found = base.loss(heads, student, teacher, Step(TARGETS, numbers=torch.tensor(numbers)))
        expected = sum(by_hand[i].step(embedded[i], numbers, drawn[-2:][i], 0.5, 0.3) for i in range(2))
        assert found.item() == pytest.approx(expected, rel=1e-12)
        for i, bank in enumerate(by_hand):
            rows = torch.stack([torch.stack(rows) for rows in bank.rows])
            torch.testing.assert_close(heads[f"memory{i}"].rows, rows)
            torch.testing.assert_close(heads[f"memory{i}"].log_z.exp().tolist(), bank.z)
        found.backward()  # the banks have moved on, the gradient has not
    assert all(x.grad.abs().sum() > 0 for x in (*student.maps, *teacher.maps, *heads.parameters()))


def test_gradient_of_the_bank(monkeypatch):
    base, student, teacher = CRD(negatives=5, width=4, temperature=0.5), answers(3, 0), answers(5, 1)
    heads = nn.ModuleDict({**base.heads(student, teacher), **base.memories(2, LABELS)}).double().eval()
    for i in range(2):
        heads[f"memory{i}"].log_z.fill_(2.0)
    others = Memory.draw(heads["memory0"], torch.arange(4))
    monkeypatch.setattr(Memory, "draw", lambda self, numbers: others)
    step = Step(TARGETS, numbers=torch.arange(4))
    inputs = [*student.maps, *teacher.maps, *heads.parameters()]
    assert torch.autograd.gradcheck(lambda *_: base.loss(heads, student, teacher, step), inputs, fast_mode=True)


def test_negatives_are_the_others_alike():
    draws, numbers = 4000, torch.tensor([3, 0, 7, 1])
    drawn = Memory(LABELS, 2, draws, 0.5, 0.07).draw(numbers)
    for number, row in zip(numbers.tolist(), drawn, strict=True):
        others = LABELS[number] != LABELS
        counts = row.bincount(minlength=len(LABELS))
        assert counts[~others].sum() == 0
        expected = draws / others.sum()
        assert ((counts[others] - expected).abs() < 5 * expected.sqrt()).all()
    unlabelled = CRD(negatives=500, other_classes=False).memories(1, LABELS)["memory0"].draw(numbers)
    for number, row in zip(numbers.tolist(), unlabelled, strict=True):
        assert set(row.tolist()) == set(range(len(LABELS))) - {number}


def test_bank_takes_in_unit_rows_in_training_only():
    memory, numbers = Memory(LABELS, 4, 3, 0.0, 0.07), torch.tensor([2, 2, 5])
    start = memory.rows.clone()
    assert torch.equal(memory.rows, Memory(LABELS, 4, 3, 0.0, 0.07).rows)  # on every rank, whatever its seed
    s, t = (torch.nn.functional.normalize(torch.randn(3, 4), dim=1) for _ in range(2))
    memory.eval()(s, t, numbers)
    assert torch.equal(memory.rows, start)
    assert memory.log_z.isnan().all()
    memory.train()(s, t, numbers)
    torch.testing.assert_close(memory.rows[:, [2, 5]], torch.stack((s, t))[:, [0, 2]])  # of a number's two, the first
    untouched = [i for i in range(len(LABELS)) if i not in (2, 5)]
    assert torch.equal(memory.rows[:, untouched], start[:, untouched])
    torch.testing.assert_close(memory.rows.norm(dim=2), torch.ones(2, len(LABELS)))


def make(base="crd", **options) -> FeatureKD:
    options = {"train_labels": LABELS, "image_size": 24, **options}
    return FeatureKD(cnn(0), cnn(1, channels=6), base, {"last": "last"}, **options).double().train()


def test_learns_goes_on_and_leaves_a_clean_student():
    method, numbers, images = make(CRD(negatives=9)), torch.tensor([0, 4, 2, 3]), pictures()
    keys = list(cnn(0).state_dict())
    assert method.needs_image_numbers
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.02)
    values = []
    for _ in range(12):
        out = method(images, TARGETS, numbers)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        values.append(out.terms["base"])
    assert values[-1] < 0.7 * values[0]
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    twin = make(CRD(negatives=9))
    twin.load_state_dict(method.state_dict())
    found = []
    for one in (method, twin):
        torch.manual_seed(0)
        found.append(one(images, TARGETS, numbers=numbers).loss)
    assert torch.equal(*found)
    assert list(method.release().state_dict()) == keys


def test_under_autocast_scores_keep_their_precision():
    method, numbers = make().float(), torch.tensor([0, 4, 2, 3])
    memory, kept = method.heads["memory0"], []
    memory.register_forward_pre_hook(lambda _m, args: kept.append(args))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = method(pictures().float(), TARGETS, numbers)
    memory.load_state_dict(make().float().heads["memory0"].state_dict())
    torch.manual_seed(0)
    torch.testing.assert_close(out.terms["base"], memory(*kept[0]))


@pytest.mark.parametrize("kind", [CRD, BatchCRD])
@pytest.mark.parametrize(("options", "match"), [({"width": 0}, "width is 0"), ({"temperature": 0.0}, "temperature is")])
def test_refuses(kind, options, match):
    with pytest.raises(ValueError, match=match):
        kind(**options)


def test_bank_refuses():
    for options, match in (({"negatives": 0}, "negatives is 0"), ({"momentum": 1.0}, r"momentum is 1\.0")):
        with pytest.raises(ValueError, match=match):
            CRD(**options)
    with pytest.raises(ValueError, match="'crd' remembers every training image; give it their classes as train_labels"):
        make(train_labels=None)
    with pytest.raises(ValueError, match=r"train_labels has shape \(2, 3\)"):
        make(train_labels=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="images of one class only"):
        make(train_labels=[1, 1, 1])
    method, images = make(), pictures()
    with pytest.raises(ValueError, match="numbers is None, but this method remembers"):
        method(images, TARGETS)
    with pytest.raises(ValueError, match=r"numbers has shape \(3,\); expected \(4,\)"):
        method(images, TARGETS, torch.arange(3))
    with pytest.raises(TypeError, match=r"numbers has dtype torch\.float32"):
        method(images, TARGETS, torch.zeros(4))
    with pytest.raises(ValueError, match="numbers holds an image outside 0 to 9"):
        method(images, TARGETS, torch.tensor([0, 1, 2, 10]))
